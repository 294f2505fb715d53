"""How long a save holds training up, and what a load reads: DeepSpeed's own against dist_sft's.

torchrun --standalone --nproc-per-node=2 benchmarks/save_speed.py MODEL SCRATCH
torchrun --standalone --nproc-per-node=4 benchmarks/save_speed.py MODEL SCRATCH --load

The first saves in turns with DeepSpeed's `save_checkpoint`, with a save that is waited for, and
with one that is written while training goes on; a save ends when its bytes are on disk. DeepSpeed
does not flush its files: it is timed without, and with an fsync of each. `--load` loads what the
first one left behind, on any number of ranks.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from dist_sft import checkpoint, config, once, pieces, saving
from dist_sft.batches import Feeder
from dist_sft.engine import make_accelerator, make_engine
from dist_sft.metrics import Clock
from dist_sft.model import DTYPES, load_model
from dist_sft.step import agree_on_step, run_micro_batches
from dist_sft.world import Place

ROWS, TOKENS = 4, 256


class Rows:
    lengths = np.full(ROWS, TOKENS)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(index)
        return generator.integers(1000, size=TOKENS), np.ones(TOKENS, np.bool_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args()
    recipe = config.check(
        {
            "run_dir": str(options.scratch),
            "model": {"path": options.model, "dtype": options.dtype},
            "data": {"train": [{"path": "made up"}]},
            "deepspeed": options.deepspeed,
        },
        origin="the benchmark",
    )
    place, dtype = Place.from_environment(), DTYPES[options.dtype]
    accelerator = make_accelerator(recipe, dtype, options.scratch)
    engine = make_engine(accelerator, load_model(recipe.model, options.model, dtype), recipe)
    feeder = Feeder(Rows(), place.rank, place.world, TOKENS, False, place.device)

    def train() -> float:
        began = time.perf_counter()
        batches = feeder.micro_batches(np.arange(ROWS))
        agreed = agree_on_step(batches, place.device)
        run_micro_batches(engine, batches, agreed.supervised, Clock(place.device))
        engine.step()
        return time.perf_counter() - began

    train()
    result = load(options.scratch, engine) if options.load else save(options, engine, train)
    if place.rank == 0:
        print(json.dumps({"ranks": place.world, "deepspeed": options.deepspeed} | result, indent=1))
    dist.destroy_process_group()


def save(options: argparse.Namespace, engine, train: Callable[[], float]) -> dict[str, object]:
    rank_0 = dist.get_rank() == 0
    files, taken = options.scratch / "deepspeed", iter(range(1, 10_000))

    def saver(*, asynchronous: bool) -> saving.Saver:
        return saving.Saver(
            options.scratch, 0, engine, {}, lambda folder, buffers: folder.mkdir(),
            config.Checkpoint(asynchronous=asynchronous, keep=2),
            say=print, beat=lambda phase: None, metrics=None,
        )  # fmt: skip

    waited_for, beside = saver(asynchronous=False), saver(asynchronous=True)

    def timed(work: Callable[[], object]) -> float:
        dist.barrier()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def with_deepspeed(*, flush: bool) -> float:
        if rank_0:
            shutil.rmtree(files, ignore_errors=True)

        def work() -> None:
            engine.deepspeed.save_checkpoint(str(files), tag="step")
            if flush and rank_0:
                for path in files.rglob("*"):
                    once.sync(path)
            dist.barrier()

        return timed(work)

    figures: dict[str, list[float]] = {
        name: [] for name in ("DeepSpeed", "DeepSpeed, flushed", "waited for", "blocked by copy",
                              "blocked by commit", "until committed", "step", "step beside a save")
    }  # fmt: skip
    with_deepspeed(flush=True)
    beside.save(next(taken))  # its buffer is new
    beside.finish()
    for _ in range(options.rounds):
        figures["step"] += [train() for _ in range(3)]
        figures["DeepSpeed"].append(with_deepspeed(flush=False))
        train()
        figures["DeepSpeed, flushed"].append(with_deepspeed(flush=True))
        train()
        figures["waited for"].append(timed(lambda: waited_for.save(next(taken))))
        train()
        began = time.perf_counter()
        figures["blocked by copy"].append(timed(lambda: beside.save(next(taken))))
        while not agree_on_step([], torch.device("cpu"), written=beside.is_written).written:
            figures["step beside a save"].append(train())
        figures["blocked by commit"].append(timed(beside.finish))
        figures["until committed"].append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    newest = max((options.scratch / "checkpoints").iterdir())
    ours = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {
        "GB": {"DeepSpeed": size / 1e9, "dist_sft": ours / 1e9},
        "median seconds": {name: round(median(values), 3) for name, values in figures.items()},
        "all": {name: [round(x, 3) for x in values] for name, values in figures.items()},
    }


def load(scratch: Path, engine) -> dict[str, object]:
    newest = max((scratch / "checkpoints").iterdir())
    elements, read = [0], pieces.Reader.read

    def counted(reader: pieces.Reader, name: str, key: str, start: int, length: int):
        for offset, piece in read(reader, name, key, start, length):
            elements[0] += len(piece)
            yield offset, piece

    began = time.perf_counter()
    checkpoint.newest_good(scratch, "sha256", print)
    verified = time.perf_counter() - began
    with patch.object(pieces.Reader, "read", counted):
        began = time.perf_counter()
        checkpoint.restore(newest, engine)
        seconds = time.perf_counter() - began
    mine = {"verify": round(verified, 2), "load": round(seconds, 2), "GB": elements[0] * 4 / 1e9}
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    total = sum(path.stat().st_size for path in newest.glob("rank-*"))
    return {"GB in the checkpoint": total / 1e9, "by rank": everyone}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
