"""Compare the training speed of dist_sft with `transformers.Trainer` on the same work.

    python benchmarks/train_speed.py --rows alpaca_en.json            # the three contestants
    python benchmarks/train_speed.py --rows alpaca_en.json --ranks    # dist_sft: 2 ranks against 1
    python benchmarks/train_speed.py --rows alpaca_en.json --dtype bfloat16 --batch-size 128 \
        --steps 12 --warmup 4 --set train.tokens_per_micro_batch=16384         # on a GPU

Contestants: `plain`, the usual Trainer recipe (batch 4 x accumulation 8,
or as many rows in 8 parts as --batch-size says); `rebalance`, the same
with `train_sampling_strategy="batch_rebalance"`; `dist_sft` through its launcher. They train the
same rows in the same optimizer batches from the same weights: each one gets its rows placed
so that its own sampler draws them in these batches, its token counts are compared with ours, and
the losses, which the table shows, agree to rounding. Each runs in a process of its own, one after
the other, round after round; the first steps are warm-up; the table shows medians over the rounds.

Columns: real tokens/s, their ratio to the first contestant in the same round, supervised tokens/s,
real tokens / tokens computed (padding included), peak memory of a training process, useful GFLOP/s
(`ModelSize.training_flops`), the machine's matrix-multiply GFLOP/s just before and after
(`matmul_rate.py`), the share of it that was useful, the loss of the last step, and the largest
relative difference between its losses and the first contestant's.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from alpaca import Tokens, tokenize
from model_size import ModelSize
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from dist_sft.plan import Plan

HERE = Path(__file__).resolve().parent
ACCUMULATION = 8  # of the Trainer contestants
LEARNING_RATE = 2e-5

Row = dict[str, str]


class Case(NamedTuple):
    """Rows to train on."""

    max_length: int
    equal_lengths: bool = False


CASES = {
    "alpaca-256": Case(256),
    "alpaca-1024": Case(1024),
    "equal-256": Case(256, equal_lengths=True),
    "equal-1024": Case(1024, equal_lengths=True),
}


class Work(NamedTuple):
    """What all contestants of a case do: rows in training order, and their tokens."""

    rows: list[Row]
    tokens: list[Tokens]
    max_length: int
    batch_size: int

    def step(self, step: int) -> list[Tokens]:
        """Return the tokens of one optimizer batch; steps count from 1."""
        return self.tokens[(step - 1) * self.batch_size : step * self.batch_size]


class Setting(NamedTuple):
    """What is the same in every run."""

    model: Path
    size: ModelSize
    threads: int
    dtype: str
    warmup: int
    """Steps that are not counted."""
    overrides: list[str]


@dataclass(frozen=True)
class Run:
    """What one contestant did in one round, warm-up left out."""

    case: str
    contestant: str
    round: int
    seconds: float
    tokens: int
    supervised_tokens: int
    computed_tokens: int | None
    """Padding included; None where the contestant does not say."""
    gflops: float
    """Useful floating-point operations per second, in 1e9."""
    matmul_gflops: float
    """The machine's matrix-multiply rate, mean of just before and just after."""
    peak_mib: float
    """The most memory a training process held: resident on CPU, allocated by torch on GPU."""
    losses: dict[int, float]
    """Loss of every step, warm-up too."""


def main() -> None:
    """Run every case and print its table."""
    options = command_line().parse_args()
    model: Path = options.model.resolve()
    size = ModelSize.read(model)
    setting = Setting(model, size, options.threads, options.dtype, options.warmup, options.set)
    contestants = RANKS if options.ranks else [CONTESTANTS[name] for name in options.contestants]
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    console = Console(width=None if sys.stdout.isatty() else 140)
    runs: list[Run] = []
    for case in options.cases:
        work = make_work(CASES[case], rows, model, options.batch_size, options.steps)
        for round_number in range(1, options.rounds + 1):
            for contestant in contestants:
                runs.append(measure(case, round_number, contestant, work, setting))
                print(one_line(runs[-1]), flush=True)
        console.print(table(case, [run for run in runs if run.case == case]))
        if options.json:
            options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def command_line() -> argparse.ArgumentParser:
    """Return the benchmark's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=Path, required=True, help="JSON list of Alpaca rows")
    add("--model", type=Path, default=HERE.parent / "models/smollm2-135m", help="Llama-like model")
    add("--cases", nargs="+", choices=CASES, default=["alpaca-256", "alpaca-1024", "equal-256"])
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS),
        help="the first one is the measure of the others")  # fmt: skip
    add("--ranks", action="store_true", help="instead, compare 1 and 2 ranks of dist_sft")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=3, help="optimizer steps of a run, the warm-up among them")
    add("--warmup", type=int, default=1, help="steps at the start that are not counted")
    add("--batch-size", type=int, default=32, help="rows of a step; a multiple of 8")
    add("--threads", type=int, default=1, help="threads of each rank")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--set", action="append", default=[], metavar="key=value",
        help="override a setting of train_speed.yaml, for example deepspeed=zero2")  # fmt: skip
    add("--json", type=Path, help="also write every run to this file")
    return parser


def make_work(case: Case, rows: Sequence[Row], model: Path, batch_size: int, steps: int) -> Work:
    """Choose the rows of `steps` optimizer batches, the same ones every time."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    count = partial(
        tokenize,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        eos_token_id=config["eos_token_id"],
        max_length=case.max_length,
    )
    shuffled = random.Random(0).sample(rows, len(rows))
    if case.equal_lengths:
        shuffled = [lengthen(row, case.max_length, count) for row in shuffled]
    usable = [row for row in shuffled if count(row).supervised > 0]
    chosen = usable[: steps * batch_size]
    if len(chosen) < steps * batch_size:
        sys.exit(f"{steps} steps need {steps * batch_size} rows, {len(usable)} are usable: "
                 "give more --rows or fewer --steps")  # fmt: skip
    return Work(chosen, [count(row) for row in chosen], case.max_length, batch_size)


def lengthen(row: Row, length: int, count: Callable[[Row], Tokens]) -> Row:
    """Repeat the answer until the row is cut, so that it has exactly `length` tokens."""
    while len(count(row).input_ids) < length:
        row = {**row, "output": row["output"] + "\n" + row["output"]}
    return row


def trainer(sampling: str, work: Work, setting: Setting, folder: Path) -> list[str]:
    """Return the command of `transformers.Trainer`."""
    rows = folder / "rows.json"
    rows.write_text(json.dumps(work.rows), encoding="utf-8")
    options = {
        "model": setting.model,
        "max-length": work.max_length,
        "threads": setting.threads,
        "dtype": setting.dtype,
        "lr": LEARNING_RATE,
        "batch": work.batch_size // ACCUMULATION,
        "accumulation": ACCUMULATION,
        "sampling": sampling,
    }
    command = [sys.executable, str(HERE / "trainer_recipe.py"), str(rows), str(folder / "run")]
    return command + [text for key, value in options.items() for text in (f"--{key}", str(value))]


def dist_sft(workers: int, work: Work, setting: Setting, folder: Path) -> list[str]:
    """Return the command of dist_sft, whose plan draws the rows in training order."""
    num_rows = len(work.rows)
    plan = Plan((num_rows,), (1.0,), seed=0, batch_size=work.batch_size)
    drawn = np.concatenate([plan.samples(step + 1) for step in range(plan.steps_per_epoch)])
    placed = [work.rows[i] for i in np.argsort(drawn)]
    rows = folder / "rows.json"
    rows.write_text(json.dumps(placed), encoding="utf-8")
    overrides = {
        "run_dir": folder / "run",
        "model.path": setting.model,
        "model.dtype": setting.dtype,
        "data.train.0.path": rows,
        "data.cache_dir": folder / "cache",
        "data.max_length": work.max_length,
        "threads_per_worker": setting.threads,
        "optimizer.lr": LEARNING_RATE,
        "train.batch_size": work.batch_size,
    }
    return [
        *(sys.executable, str(HERE.parent / "launch/local.py"), "train"),
        str(HERE / "train_speed.yaml"),
        *(f"{key}={value}" for key, value in overrides.items()),
        *setting.overrides,
        *("--workers", str(workers)),
    ]


class Contestant(NamedTuple):
    """Someone who trains."""

    name: str
    command: Callable[[Work, Setting, Path], list[str]]
    """Writes its rows into the folder; running the command leaves `run/metrics.jsonl` there."""
    ranks: int = 1


CONTESTANTS = {
    "plain": Contestant("plain", partial(trainer, "sequential")),
    "rebalance": Contestant("rebalance", partial(trainer, "batch_rebalance")),
    "dist_sft": Contestant("dist_sft", partial(dist_sft, 1)),
}
RANKS = [
    Contestant("1 rank", partial(dist_sft, 1)),
    Contestant("2 ranks", partial(dist_sft, 2), ranks=2),
]


def measure(
    case: str, round_number: int, contestant: Contestant, work: Work, setting: Setting
) -> Run:
    """Let one contestant train and check that it did the work asked for."""
    folder = Path(tempfile.mkdtemp(prefix="train-speed-"))
    command = contestant.command(work, setting, folder)
    before = matmul_gflops(setting, contestant.ranks)
    run(command, folder / "log.txt", setting.threads)
    after = matmul_gflops(setting, contestant.ranks)
    lines = read_steps(folder / "run" / "metrics.jsonl")
    check_equal_work(contestant.name, work, lines)
    shutil.rmtree(folder)  # where something failed it stays: its logs say why

    measured = [line for step, line in sorted(lines.items()) if step > setting.warmup]
    seconds = sum(line["seconds"] for line in measured)
    supervised_tokens = sum(line["supervised_tokens"] for line in measured)
    lengths = [
        len(row.input_ids) for step in lines if step > setting.warmup for row in work.step(step)
    ]
    computed = [line.get("computed_tokens") for line in measured]
    return Run(
        case=case,
        contestant=contestant.name,
        round=round_number,
        seconds=seconds,
        tokens=sum(lengths),
        supervised_tokens=supervised_tokens,
        computed_tokens=None if None in computed else sum(computed),
        gflops=setting.size.training_flops(lengths, supervised_tokens) / seconds / 1e9,
        matmul_gflops=(before + after) / 2,
        peak_mib=max(line["peak_memory_bytes"] for line in measured) / 2**20,
        losses={step: line["loss"] for step, line in sorted(lines.items())},
    )


def matmul_gflops(setting: Setting, ranks: int) -> float:
    """Measure the machine's matrix-multiply rate now, with as many processes as there are ranks."""
    command = [
        *(sys.executable, str(HERE / "matmul_rate.py"), str(setting.model)),
        *("--threads", str(setting.threads), "--dtype", setting.dtype),
    ]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(ranks)]
    return sum(float(child.communicate()[0]) for child in children)


def run(command: Sequence[str], log: Path, threads: int) -> None:
    """Run a command to its end; stop the benchmark with the end of its log if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "wb") as output:
        done = subprocess.run(
            command, check=False, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        print(*log.read_text(errors="replace").splitlines()[-40:], sep="\n", file=sys.stderr)
        sys.exit(f"exit code {done.returncode} from: {shlex.join(command)}")


def read_steps(metrics: Path) -> dict[int, dict[str, Any]]:
    """Return the step lines of a `metrics.jsonl`; where a step appears twice, the last counts."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line for line in lines if "event" not in line}


def check_equal_work(name: str, work: Work, lines: dict[int, dict[str, Any]]) -> None:
    """Stop unless every step trained on the tokens that it was given, no more and no fewer."""
    steps = len(work.rows) // work.batch_size
    if sorted(lines) != list(range(1, steps + 1)):
        sys.exit(f"{name} was to take steps 1 to {steps}, it took {sorted(lines)}")
    for step, line in lines.items():
        rows = work.step(step)
        expected = sum(len(row.input_ids) for row in rows), sum(row.supervised for row in rows)
        trained = line["tokens"], line["supervised_tokens"]
        if trained != expected:
            sys.exit(f"{name}, step {step}: (tokens, supervised) {trained}, expected {expected}")


def one_line(run: Run) -> str:
    """Tell of one run while the others go on."""
    return (
        f"{run.case} round {run.round} {run.contestant}: {run.tokens / run.seconds:.1f} tokens/s, "
        f"{run.gflops:.1f} of {run.matmul_gflops:.1f} GFLOP/s, {run.peak_mib:.0f} MiB"
    )


def table(case: str, runs: Sequence[Run]) -> Table:
    """Lay out the medians of a case; ratios are to the first contestant of the same round."""
    names = list(dict.fromkeys(run.contestant for run in runs))
    first = {run.round: run for run in runs if run.contestant == names[0]}
    # Markdown, so that a table can be pasted into a report.
    result = Table(title=f"{case}, medians over rounds: {len(first)}", box=box.MARKDOWN)
    result.add_column("contestant")
    for column in (
        "tok/s", f"x {names[0]}", "supervised tok/s", "efficiency", "peak MiB",
        "GFLOP/s", "matmul", "share", "last loss", "loss diff",
    ):  # fmt: skip
        result.add_column(column, justify="right", no_wrap=True)
    for name in names:
        mine = [run for run in runs if run.contestant == name]
        efficiency = [r.tokens / r.computed_tokens for r in mine if r.computed_tokens]
        result.add_row(
            name,
            f"{median(r.tokens / r.seconds for r in mine):.1f}",
            f"{median(first[r.round].seconds / r.seconds for r in mine):.2f}",
            f"{median(r.supervised_tokens / r.seconds for r in mine):.1f}",
            f"{median(efficiency):.3f}" if efficiency else "-",
            f"{median(r.peak_mib for r in mine):.0f}",
            f"{median(r.gflops for r in mine):.1f}",
            f"{median(r.matmul_gflops for r in mine):.1f}",
            f"{median(r.gflops / r.matmul_gflops for r in mine):.0%}",
            f"{list(mine[0].losses.values())[-1]:.6f}",
            f"{max(loss_difference(r, first[r.round]) for r in mine):.1e}",
        )
    return result


def loss_difference(run: Run, other: Run) -> float:
    """Return the largest relative difference between the losses of two runs."""
    pairs = zip(run.losses.values(), other.losses.values(), strict=True)
    return max(abs(a - b) / b for a, b in pairs)


if __name__ == "__main__":
    main()
