"""Train: the one loop. Every launcher starts this program once per rank.

torchrun ... -m dist_sft.train RUN_DIR --attempt N
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# DeepSpeed asks for its accelerator when it is imported, and guesses wrong without a GPU.
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dist_sft import attention, checkpoint, data, runs, world
from dist_sft.config import Recipe, read_config_json
from dist_sft.console import Console, redirect_output
from dist_sft.data import Batch, Feeder
from dist_sft.engine import Engine, make_accelerator, make_engine, set_learning_rate
from dist_sft.errors import UserError
from dist_sft.export import export
from dist_sft.metrics import Clock, FlopCounter, MetricsFile, peak_memory_bytes, peak_rate
from dist_sft.model import fit_vocabulary, load_model, make_random_weights, resolve_dtype
from dist_sft.optim import learning_rate
from dist_sft.runs import Outcome
from dist_sft.stopping import StopFlag
from dist_sft.store import Dataset
from dist_sft.tokenizer import Words, load_words, model_folder

EVAL_EXAMPLES = 1024  # how many are laid out over the ranks at once


class Diverged(RuntimeError):
    """Report a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    run_dir: Path
    attempt: int
    rank: int
    local_rank: int
    node_rank: int
    world: int
    device: torch.device

    @classmethod
    def from_environment(cls, run_dir: Path, attempt: int) -> Place:
        """Read the variables that torchrun and Ray Train set."""
        env = os.environ
        local_rank = int(env["LOCAL_RANK"])
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        node_rank = int(env.get("GROUP_RANK", env.get("NODE_RANK", "0")))
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        return cls(run_dir, attempt, rank, local_rank, node_rank, world_size, device)


def train(run_dir: Path, attempt: int, console: Console) -> Outcome:
    """Train to the end, or to a stop; return how it went. Raises UserError for wrong input."""
    with ExitStack() as stack:
        # 1. Who am I, and what is asked of me?
        place = Place.from_environment(run_dir, attempt)
        recipe = read_config_json(run_dir)
        stop = StopFlag(run_dir)
        stop.listen()
        dtype = resolve_dtype(recipe.model.dtype, place.device)
        if recipe.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)

        # 2. Encode the data and make random weights, once per node, before ranks meet: whoever
        #    waits, waits on a file and not in a collective that would time out.
        words = load_words(recipe.model, recipe.data)
        stores = prepare_once(place, recipe, words, console)
        train_set, eval_sets = data.open_datasets(stores, recipe.data, recipe.seed)

        # 3. Join the other ranks, and make sure that they are of one mind.
        accelerator = make_accelerator(recipe, dtype, run_dir)
        stack.callback(accelerator.end_training)  # closes trackers and the process group
        world.agree(world.facts_of_this_rank(recipe.fingerprint(), train_set.fingerprint))
        peak, peak_source = peak_rate(place.device, dtype)

        # 4. Model, optimizer, sharding; prove that packing is safe on this model.
        folder = model_folder(recipe.model.path) if recipe.model.path else f"{run_dir}/initial"
        model = load_model(recipe.model, folder, dtype if recipe.deepspeed else torch.float32)
        added = fit_vocabulary(model, stores.vocab_size, recipe.seed)
        if added:
            console.say(f"the template or tokenizer added {added} tokens: embeddings resized")
        flops = FlopCounter(model)
        engine = make_engine(accelerator, model, recipe)
        packed = choose_packing(engine, recipe.train.packing, place.device, console)

        # 5. The plan: which samples make up every step. Continue where the run was.
        plan = data.make_plan(train_set, recipe.data, recipe.seed, recipe.train.batch_size)
        total = data.total_steps(plan, recipe.train.epochs, recipe.train.steps)
        budget = recipe.train.tokens_per_micro_batch

        def feeder_of(dataset: Dataset) -> Feeder:
            return Feeder(dataset, place.rank, place.world, budget, packed, place.device)

        feeder = feeder_of(train_set)
        done = restore_newest(run_dir, engine, console)
        trackers = start_trackers(accelerator, recipe)
        metrics = MetricsFile(run_dir / "metrics.jsonl", attempt) if place.rank == 0 else None
        if metrics:
            stack.callback(metrics.close)
        stack.callback(console.close)

        def save(step: int) -> None:
            facts = {"recipe": recipe.fingerprint(), "data": train_set.fingerprint}
            checkpoint.save(run_dir, step, engine, facts, model_writer(engine, words))
            if place.rank == 0:
                checkpoint.prune(run_dir, recipe.checkpoint.keep)

        def evaluate_all() -> dict[str, float]:
            return {
                name: evaluate(engine, feeder_of(dataset), place.device)
                for name, dataset in eval_sets.items()
            }

        console.say(
            f"training {total - done} steps, {plan.steps_per_epoch} per epoch, on {place.world} "
            f"workers in {dtype}, {'packed' if packed else 'padded'}"
        )
        console.start(total, done)
        clock = Clock(place.device)

        # 6. The loop. Everything about a step follows from its number.
        saved = done
        for step in range(done + 1, total + 1):
            began = time.perf_counter()
            with clock("data"):
                samples = plan.samples(step)
                batches = feeder.micro_batches(samples)
            with clock("communication"):
                supervised, stopping = agree_on_step(batches, stop, place.device)
            if stopping:
                save(step - 1)
                return Outcome(
                    runs.STOPPED, f"stopped by {stop.reason or 'another rank'}", step - 1
                )

            losses = run_micro_batches(
                engine, batches, supervised, clock, seed=(recipe.seed, step, place.rank)
            )
            loss = summed(sum(losses), place.device) / supervised
            if not math.isfinite(loss):
                raise Diverged(explain_divergence("loss", loss, step, batches, losses, train_set))
            rate = learning_rate(step, total, recipe.optimizer)
            set_learning_rate(engine, rate)
            with clock("optimizer"):
                grad_norm = engine.step()
            if not math.isfinite(grad_norm):
                raise Diverged(
                    explain_divergence("gradient", grad_norm, step, batches, losses, train_set)
                )

            # 7. Tell, evaluate, save.
            last = step == total
            due = recipe.eval.every and step % recipe.eval.every == 0
            eval_losses = evaluate_all() if eval_sets and (due or last) else {}
            seconds = time.perf_counter() - began
            lengths = train_set.lengths[samples]
            line = {
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": grad_norm,
                "examples": len(samples),
                "tokens": int(lengths.sum()),
                "supervised_tokens": supervised,
                "seconds": seconds,
                "phases": clock.read(),
                "share_of_peak": flops(lengths, supervised) / seconds / peak / place.world,
                "peak_memory_bytes": peak_memory_bytes(place.device),
            }
            if eval_losses:
                line["eval_loss"] = eval_losses
            if metrics:
                metrics.write(**line)
            trackers(line)
            console.step(step, describe(line), important=bool(eval_losses) or step in (1, total))
            if recipe.checkpoint.every and step % recipe.checkpoint.every == 0 and not last:
                save(step)
                saved = step

        # 8. The end: a last checkpoint, and a model that others can load.
        console.close()
        if saved < total:
            save(total)
        if place.rank == 0:
            export(checkpoint.folder_of(run_dir, total), run_dir / "model", dtype)
        console.say(f"finished: {run_dir} (share of peak is of the {peak_source})")
        return Outcome(runs.FINISHED, "finished", total)


def prepare_once(place: Place, recipe: Recipe, words: Words, console: Console) -> data.Stores:
    """Let the first rank of every node prepare data and random weights; others wait on a file."""
    done = runs.attempt_dir(place.run_dir, place.attempt) / f"data-{place.node_rank}.json"
    initial = place.run_dir / "initial"
    if place.local_rank == 0:
        stores = data.prepare(recipe.data, words, console.say)
        if recipe.model.config is not None and not initial.exists() and place.rank == 0:
            make_random_weights(recipe.model, stores.vocab_size, recipe.seed, initial)
        runs.write_atomically(done, stores.to_json())
    while not done.exists() or (recipe.model.config is not None and not initial.exists()):
        time.sleep(0.05)
    return data.Stores(**json.loads(done.read_text(encoding="utf-8")))


def choose_packing(engine: Engine, setting: str, device: torch.device, console: Console) -> bool:
    """Prove that packed rows are isolated on this model; say so and pad where they are not."""
    if setting == "off":
        return False
    proof = attention.prove(engine.module, engine, device)
    if proof.holds:
        engine.module.set_attn_implementation(attention.NAME)
        console.say(f"packing: {proof.reason}")
        return True
    if setting == "on":
        raise UserError(f"train.packing: on, but {proof.reason}; allowed for this model: auto, off")
    console.say(f"packing: {proof.reason}; rows are sorted by length and padded instead")
    return False


def restore_newest(run_dir: Path, engine: Engine, console: Console) -> int:
    """Load the newest checkpoint, if there is one; return the step to go on from."""
    found = checkpoint.steps(run_dir)
    if not found:
        return 0
    checkpoint.restore(checkpoint.folder_of(run_dir, found[-1]), engine)
    console.say(f"continuing after step {found[-1]}")
    return found[-1]


def agree_on_step(batches: list[Batch], stop: StopFlag, device: torch.device) -> tuple[int, bool]:
    """Add up the targets of the global batch, and learn whether any rank was asked to stop."""
    targets = sum(len(batch.targets) for batch in batches)
    numbers = torch.tensor([targets, stop.reason is not None], dtype=torch.int64, device=device)
    dist.all_reduce(numbers)
    supervised, stopping = numbers.tolist()
    return max(1, supervised), stopping > 0


def run_micro_batches(
    engine: Engine,
    batches: list[Batch],
    supervised: int,
    clock: Clock,
    seed: tuple[int, int, int] = (0, 1, 0),
) -> list[Tensor]:
    """Compute a step's gradient; return every micro-batch's sum of token losses.

    `supervised` is the number of targets of the global batch; `seed` is (run's seed, step, rank):
    dropout follows the place in the run and not its history. Raises UserError when out of memory.
    """
    losses = []
    for number, batch in enumerate(batches):
        torch.manual_seed(hash((*seed, number)))
        try:
            with engine.micro_batch(last=number == len(batches) - 1):
                with clock("forward"):
                    loss_sum = token_loss(engine, batch)
                with clock("backward"):
                    engine.backward(loss_sum, supervised)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise UserError(explain_memory(error, batch, number)) from error
            raise
        losses.append(loss_sum.detach().float())
    return losses


def token_loss(engine: Engine, batch: Batch) -> Tensor:
    """Return the sum of the token losses of a micro-batch; the head runs on its targets only.

    A filler has no targets: its loss is 0 and so is every gradient, but every parameter gets one.
    """
    output = engine(**batch.inputs, logits_to_keep=batch.keep)
    logits: Tensor = output.logits  # [K, V]
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def evaluate(engine: Engine, feeder: Feeder, device: torch.device) -> float:
    """Return the mean loss per supervised token over a whole evaluation set."""
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batches in feeder.all_in_order(EVAL_EXAMPLES):
            for batch in batches:
                total[0] += token_loss(engine, batch).double()
                total[1] += len(batch.targets)
    engine.module.train()
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return loss_sum / tokens


def summed(value: Tensor | float, device: torch.device) -> float:
    """Add a number up over all ranks."""
    total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    dist.all_reduce(total)
    return float(total)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error means that memory ran out, on GPU or CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_memory(error: RuntimeError, batch: Batch, number: int) -> str:
    """Say which micro-batch was too large, and what to try."""
    rows = len(batch.samples)
    if rows > 1:
        advice = f"try train.tokens_per_micro_batch: {batch.tokens // 2}"
    else:
        advice = f"it is a single row: try data.max_length: {batch.tokens // 2}"
    return (
        f"out of memory in micro-batch {number}: {batch.tokens} tokens in {rows} rows; {advice}, or "
        "model.gradient_checkpointing: true, or more sharding (deepspeed: zero3)\n"
        f"{str(error).splitlines()[0]}"
    )


def explain_divergence(
    what: str, value: float, step: int, batches: list[Batch], losses: list[Tensor], dataset: Dataset
) -> str:
    """Say where a number stopped being finite, and what people do about it."""
    bad = [
        f"{name} row {row}"
        for batch, loss in zip(batches, losses, strict=True)
        if not torch.isfinite(loss)
        for name, row in (dataset.locate(int(number)) for number in batch.samples)
    ]
    where = f"; in the micro-batch of {', '.join(bad[:20])}" if bad else ""
    return (
        f"the {what} is {value} in step {step}{where}. The step was not saved. Look at these rows "
        "with dist-sft inspect; lower optimizer.lr, lengthen optimizer.warmup_steps, or set "
        "optimizer.clip"
    )


def model_writer(engine: Engine, words: Words) -> Callable[[Path], None]:
    """Return what writes everything of a Hugging Face folder but the weights."""

    def write(folder: Path) -> None:
        engine.module.config.save_pretrained(folder)
        if engine.module.generation_config is not None:
            engine.module.generation_config.save_pretrained(folder)
        words.tokenizer.save_pretrained(folder)

    return write


def start_trackers(accelerator: Any, recipe: Recipe) -> Callable[[dict[str, Any]], None]:
    """Open the trackers; return what gives them a step's numbers."""
    if recipe.trackers:
        accelerator.init_trackers(Path(recipe.run_dir).name)

    def log(line: dict[str, Any]) -> None:
        if recipe.trackers:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            values |= {f"eval_loss/{k}": v for k, v in line.get("eval_loss", {}).items()}
            values |= {f"seconds/{k}": v for k, v in line["phases"].items()}
            accelerator.log(values, step=line["step"])

    return log


def describe(line: dict[str, Any]) -> str:
    """Return a step's numbers for a person."""
    text = (
        f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
        f"{line['tokens'] / line['seconds']:,.0f} tokens/s"
    )
    for name, loss in line.get("eval_loss", {}).items():
        text += f"  {name} {loss:.4f}"
    return text


def run_rank(run_dir: Path, attempt: int) -> int:
    """Run one rank to its end and write down how it went; return the process's exit code."""
    rank = int(os.environ["RANK"])
    terminal = redirect_output(runs.attempt_dir(run_dir, attempt) / f"rank-{rank}.log")
    console = Console(terminal if rank == 0 else None)
    try:
        outcome = train(run_dir, attempt, console)
    except Exception as error:
        traceback.print_exc()
        code = runs.WRONG_INPUT if isinstance(error, UserError) else runs.FAILED
        reason = str(error) if code == runs.WRONG_INPUT else f"{type(error).__name__}: {error}"
        runs.write_failure(run_dir, attempt, rank, Outcome(code, reason, -1))
        return code
    if rank == 0:
        runs.write_outcome(run_dir, attempt, outcome)
    return 0  # torchrun takes any other code for a crash


def main() -> int:
    """Run one rank."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.train", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args()
    return run_rank(arguments.run_dir, arguments.attempt)


if __name__ == "__main__":
    sys.exit(main())
