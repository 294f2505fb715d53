"""Real ranks without the ten seconds that imports take: a warm process forks them.

`Warm` starts this file as a program; that imports everything once and then forks, at a test's word,
ranks that call `rank_program.run` with the variables of torchrun. Beside training, a rank writes
down which rows it really computes, and can be slowed down or held at a place.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from dist_sft import local, node, report, runs
from dist_sft.config import read_config_json
from dist_sft.watchdog import DUMP_SIGNAL

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
PAUSE = 0.001
IMPORTED_LATE = (
    "dist_sft.generate",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "matplotlib.figure",
    "transformers.models.llama.modeling_llama",
)
"""What ranks import only when they run."""


@dataclass(frozen=True)
class Way:
    """How ranks behave in one attempt."""

    seconds_per_step: float = 0.0
    hold_before: tuple[int, ...] = ()
    """Steps: every rank waits there until the test lets it go on, see `Group.let_go`."""
    hold_at_write: str = ""
    """Whoever opens a file for writing whose path has this in it waits there for ever."""
    hold_at: tuple[str, str] = ("", "")
    """Whoever comes to a call with this audit event, and this end of its path, waits before it."""
    hold_once_there: str = ""
    """Nobody is held at `hold_at` before the run folder has this file."""


class Group:
    """The ranks of one attempt."""

    def __init__(
        self, warm: Warm, run_dir: Path, attempt: int, world: int, way: Way, job: str = "train"
    ) -> None:
        self.run_dir, self.attempt, self.world = run_dir, attempt, world
        self.notes = notes_of(run_dir, attempt)
        self.notes.mkdir(parents=True)
        self._warm = warm
        self.pids: list[int] = warm.ask(
            do="start", run_dir=str(run_dir), attempt=attempt, world=world, job=job,
            notes=str(self.notes), way=way.__dict__,
        )["pids"]  # fmt: skip

    def codes(self) -> list[int | None]:
        """Return the exit codes of the ranks, None for those that live."""
        codes: list[int | None] = self._warm.ask(do="look", pids=self.pids)["codes"]
        return codes

    def kill(self) -> bool:
        """Send SIGKILL to the whole group; tell whether every rank was alive and died of it."""
        codes = self._warm.ask(do="kill", pids=self.pids)["codes"]
        return bool(codes == [-signal.SIGKILL] * self.world)

    def kill_one(self, rank: int) -> bool:
        """Send SIGKILL to one rank; tell whether it was alive and died of it."""
        if self.codes()[rank] is not None:
            return False
        os.kill(self.pids[rank], signal.SIGKILL)  # not reaped yet, so the number is its own
        deadline = time.monotonic() + SECONDS
        while (code := self.codes()[rank]) is None and time.monotonic() < deadline:
            time.sleep(PAUSE)
        return code == -signal.SIGKILL

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that happens while all ranks are alive."""
        deadline, look = time.monotonic() + SECONDS, 0.0
        while not happened():
            now = time.monotonic()
            if now >= look:  # less often than what is waited for: it costs the ranks time
                assert self.codes() == [None] * self.world, self.explain()
                assert now < deadline, f"it did not happen\n{self.explain()}"
                look = now + 0.05
            time.sleep(PAUSE)

    def finish(self) -> None:
        """Wait until the ranks have ended; all of them must have succeeded."""
        deadline = time.monotonic() + SECONDS
        while None in (codes := self.codes()) and not any(codes):
            assert time.monotonic() < deadline, f"they do not end\n{self.explain()}"
            time.sleep(0.02)
        if any(codes):
            self.kill()  # as torchrun does with the others
            raise AssertionError(self.explain())

    def end(self) -> list[int | None]:
        """Wait until all ranks have ended, however; return their exit codes."""
        deadline = time.monotonic() + SECONDS
        while None in (codes := self.codes()):
            assert time.monotonic() < deadline, f"they do not end\n{self.explain()}"
            time.sleep(0.02)
        return codes

    def is_held(self, where: int | str) -> bool:
        """Tell whether every rank waits before a step, or some rank at a "write" or a "call"."""
        held = len(list(self.notes.glob(f"held-{where}-*")))
        return held == self.world if isinstance(where, int) else held > 0

    def let_go(self, where: int | str) -> None:
        """Let the ranks that wait before a step, or at a "call", go on."""
        (self.notes / f"go-{where}").touch()

    def limit_files(self, ranks: tuple[int, ...], size: int | None) -> None:
        """Let no file of these ranks, and of what they start, become larger; None: any size."""
        for rank in ranks:
            process = psutil.Process(self.pids[rank])
            for one in (process, *process.children(recursive=True)):
                _, hard = resource.prlimit(one.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(
                    one.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard)
                )

    def explain(self) -> str:
        """Return the codes and what the ranks said last, the stacks of the living included."""
        for pid, code in zip(self.pids, self.codes(), strict=True):
            if code is None:
                os.kill(pid, DUMP_SIGNAL)
        time.sleep(1.0)
        logs = sorted(runs.attempt_dir(self.run_dir, self.attempt).glob("rank-*.log"))
        said = [self.notes / "output", *logs]
        tails = [f"--- {p}\n{p.read_text(errors='replace')[-3000:]}" for p in said if p.exists()]
        return "\n".join([f"attempt {self.attempt}: exit codes {self.codes()}", *tails])


class Warm:
    """A process with everything imported that forks ranks."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=os.environ
                | node.rank_environment(threads=1, gpus=0)
                | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()  # it ends, and every rank that is left with it
        self._process.wait(timeout=30)
        assert self._process.stdout
        self._process.stdout.close()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Have something done; return the answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text()
        content: dict[str, Any] = json.loads(answer)
        return content

    def start(self, recipe: Path, world: int, way: Way = Way(), job: str = "train") -> Group:
        """Prepare the run folder as the launcher does, and start the ranks of its next attempt."""
        prepared = local.main([job, str(recipe), "--workers", str(world), "--prepare"])
        assert prepared == runs.FINISHED
        run_dir = recipe.with_suffix("")
        return Group(self, run_dir, runs.start_attempt(run_dir), world, way, job)

    def run(self, recipe: Path, world: int, way: Way = Way(), job: str = "train") -> Path:
        """Run the next attempt to its end; return the run folder."""
        group = self.start(recipe, world, way, job)
        group.finish()
        assert runs.is_finished(read_config_json(group.run_dir))
        return group.run_dir


def notes_of(run_dir: Path, attempt: int) -> Path:
    """Return where the ranks of an attempt write what only the tests need."""
    return run_dir.with_name(f"{run_dir.name}-notes") / str(attempt)


def computed(run_dir: Path) -> list[dict[str, Any]]:
    """Return what every rank computed: {attempt, step, rank, rows}, rows as lists of token ids."""
    lines = []
    for path in sorted(notes_of(run_dir, 0).parent.glob("*/rows-*.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines


def losses(run_dir: Path) -> list[float]:
    """Return the losses of all steps, which must be there without a gap."""
    steps = report.read_steps(run_dir / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["loss"] for line in steps]


# ---- the program -----------------------------------------------------------------------------


def instrument(train: Any, order: dict[str, Any], rank: int) -> None:
    """Make this rank write down what it computes, and stop where the test wants it to."""
    notes, way = Path(order["notes"]), Way(**order["way"])
    rows_file = os.open(notes / f"rows-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real = train.run_micro_batches

    def run_micro_batches(engine: Any, batches: Any, *rest: Any) -> Any:
        *_, (_, step, _) = rest
        if step in way.hold_before:
            (notes / f"held-{step}-{rank}").touch()
            while not (notes / f"go-{step}").exists():
                time.sleep(PAUSE)
        rows = [row for batch in batches if len(batch.targets) for row in rows_in(batch)]
        line = {"attempt": order["attempt"], "step": step, "rank": rank, "rows": rows}
        os.write(rows_file, json.dumps(line).encode() + b"\n")  # one call: whole or not at all
        time.sleep(way.seconds_per_step)
        return real(engine, batches, *rest)

    train.run_micro_batches = run_micro_batches
    if way.hold_at_write:

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and way.hold_at_write in str(arguments[0]):
                _, mode, flags = arguments
                if (mode and set(mode) & set("wax+")) or (flags & (os.O_WRONLY | os.O_RDWR)):
                    os.mkdir(notes / f"held-write-{rank}")
                    time.sleep(SECONDS)

        sys.addaudithook(hook)
    if way.hold_at[0]:
        called, ending = way.hold_at
        needed = Path(order["run_dir"]) / way.hold_once_there

        def hold(event: str, arguments: tuple[Any, ...]) -> None:
            if event == called and str(arguments[0]).endswith(ending) and needed.exists():
                os.mkdir(notes / f"held-call-{rank}")
                while not (notes / "go-call").exists():
                    time.sleep(PAUSE)

        sys.addaudithook(hold)


def rows_in(batch: Any) -> list[list[int]]:
    """Cut a micro-batch's tensors into rows of token ids again."""
    ids, inputs = batch.inputs["input_ids"], batch.inputs
    if "position_ids" not in inputs:
        return [row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"])]  # noqa: B905
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    return [ids[0, start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def rank_main(train: Any, order: dict[str, Any], rank: int, port: int) -> int:
    """Be one rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "WORLD_SIZE": str(order["world"]), "LOCAL_WORLD_SIZE": str(order["world"]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    output = os.open(Path(order["notes"]) / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):  # the old ones belong to the conversation with the test
        os.dup2(output, descriptor)
    if order["job"] == "generate":
        return answer_slowly(order)
    instrument(train, order, rank)
    code: int = train.rank_program.run(train.train, Path(order["run_dir"]), order["attempt"])
    return code


def answer_slowly(order: dict[str, Any]) -> int:
    """Be a worker of a generation run."""
    from dist_sft import generate, progress, rank_program

    tick = progress.Progress.tick

    def slowly(self: Any, *told: int) -> None:
        time.sleep(order["way"]["seconds_per_step"])
        tick(self, *told)

    progress.Progress.tick = slowly  # type: ignore[method-assign]
    return rank_program.run(generate.generate, Path(order["run_dir"]), order["attempt"])


def main() -> None:
    """Do as the lines of stdin say, until it is closed."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    sys.path.insert(0, str(ROOT / "tests"))
    from processes import free_port

    from dist_sft import train

    codes: dict[int, int | None] = {}

    def reap(pids: list[int], *, block: bool = False) -> list[int | None]:
        for pid in pids:
            if codes[pid] is None:
                ended, status = os.waitpid(pid, 0 if block else os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
        return [codes[pid] for pid in pids]

    def kill(pids: list[int]) -> None:
        if None in reap(pids):  # so the group's number cannot be somebody else's yet
            os.killpg(pids[0], signal.SIGKILL)

    groups: list[list[int]] = []
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["do"] == "start":
            port, pids = free_port(), list[int]()
            for rank in range(order["world"]):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        os.setpgid(0, pids[0] if pids else 0)
                        os.close(answers)
                        code = rank_main(train, order, rank, port)
                    finally:
                        sys.stdout.flush()
                        os._exit(code)
                pids.append(pid)
                codes[pid] = None
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(pid, pids[0])  # parent and child both do so, whoever comes first
            groups.append(pids)
            answer = {"pids": pids}
        elif order["do"] == "look":
            answer = {"codes": reap(order["pids"])}
        elif order["do"] == "kill":
            kill(order["pids"])
            answer = {"codes": reap(order["pids"], block=True)}
        os.write(answers, json.dumps(answer).encode() + b"\n")
    for pids in groups:
        kill(pids)


if __name__ == "__main__":
    main()
