"""One world of ranks, or none: what all of them must agree on before anything is computed."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dist_sft import __version__
from dist_sft.errors import UserError
from dist_sft.preflight import named_gpus

T = TypeVar("T")

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "numpy")
# What is behind a difference, most of the time; of anything else: another installation.
CAUSES = {
    "recipe": "run_dir must be one folder that every host sees",
    "data": "the files of data.train or data.eval differ there, or changed while the run started",
    "model": "its config or weights differ there: give model.revision, or a folder all hosts see",
    "threads": "OMP_NUM_THREADS is set by the launcher; something on that host changes it",
}


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    rank: int
    local_rank: int
    node_rank: int
    nodes: int
    world: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> Place:
        """Read the variables that torchrun sets.

        Raises UserError where this process was given GPUs, but has none that work.
        """
        env = os.environ
        local_rank = int(env["LOCAL_RANK"])
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            visible = env.get("CUDA_VISIBLE_DEVICES", "")
            if named_gpus(visible):
                raise UserError(
                    f"CUDA_VISIBLE_DEVICES={visible} gives this worker GPUs, but torch "
                    f"{torch.__version__} finds none that works: is it a build for CPUs, or is the "
                    "driver missing (in a container: --nv)? An empty value means to train on CPUs"
                )
        node_rank, nodes = int(env["GROUP_RANK"]), int(env["GROUP_WORLD_SIZE"])
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        return cls(rank, local_rank, node_rank, nodes, world_size, device)


def facts_of_this_rank(hashes: dict[str, str], device: torch.device) -> dict[str, Any]:
    """Return what must be equal on all ranks; `hashes` name what they were given."""
    return {
        "world size": (int(os.environ["WORLD_SIZE"]), dist.get_world_size()),
        **hashes,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "dist_sft": __version__,
        **{name: version(name) for name in LIBRARIES},
    }


def agree(facts: dict[str, Any]) -> None:
    """Compare the facts of all ranks; raise UserError on every rank, naming the odd ones out."""
    everyone: list[Any] = [None] * dist.get_world_size()
    who = (int(os.environ["RANK"]), socket.gethostname())
    dist.all_gather_object(everyone, (who, facts))
    problems = disagreements(everyone)
    if problems:
        raise UserError("\n  ".join(["the ranks do not agree:", *problems]))


def all_reduce_rate(device: torch.device, megabytes: int = 16, times: int = 3) -> float:
    """Measure the bytes per second at which gradients are summed; the median of a few times."""
    numbers = torch.ones(megabytes * 2**18, device=device)
    rates = []
    for _ in range(times):
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(numbers.nbytes / (time.perf_counter() - began))
    return median(rates)


def gather(items: list[T]) -> list[T]:
    """Return the items of all ranks, in the order of ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    return [item for part in everyone for item in part]


def on_rank_0(work: Callable[[], T]) -> T:
    """Do something on rank 0; return the result, or raise the error, on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error if _can_be_sent(error) else RuntimeError(repr(error))
    dist.broadcast_object_list(box, src=0)
    result, failure = box
    if failure is not None:
        raise failure
    return cast("T", result)


def _can_be_sent(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def disagreements(everyone: list[tuple[tuple[int, str], dict[str, Any]]]) -> list[str]:
    """List what differs between ranks; `everyone` holds ((rank, host), facts) of each."""
    problems = []
    ranks = sorted(rank for (rank, _), _ in everyone)
    if ranks != list(range(len(everyone))):
        problems.append(f"ranks are {ranks}, expected 0 to {len(everyone) - 1}, each once")
    for (rank, host), facts in everyone:
        asked, got = facts["world size"]
        if asked != got:
            problems.append(
                f"rank {rank} on {host} was started as one of {asked}, but joined {got}"
            )
    for key in [name for name in everyone[0][1] if name != "world size"]:
        values = [str(facts.get(key)) for _, facts in everyone]
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            odd = [
                f"rank {rank} on {host} has {value}"
                for ((rank, host), _), value in zip(everyone, values, strict=True)
                if value != usual
            ]
            cause = CAUSES.get(key, "install the same version on every host")
            problems.append(f"{key}: {'; '.join(odd)}; the others have {usual} ({cause})")
    return problems
