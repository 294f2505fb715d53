"""Start a handful of rank processes on this machine, the way torchrun would."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

TAIL_LINES = 40


class RanksFailed(AssertionError):
    """Report that a rank failed or that time ran out, with the end of every rank's log."""


def run_ranks(
    program: Path,
    *arguments: object,
    world: int,
    log_dir: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run `world` ranks of a Python program to their end; return what each of them printed.

    As soon as one fails, or when `seconds` have passed, the others are killed and RanksFailed is
    raised. A rank is killed with its process group, which is its own, so that what it started ends
    with it.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    logs = [log_dir / f"rank-{rank}.log" for rank in range(world)]
    port = free_port()
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        ranks = []
        for rank, path in enumerate(logs):
            log = stack.enter_context(path.open("w"))
            process = subprocess.Popen(
                [sys.executable, str(program), *map(str, arguments)],
                env={**os.environ, **_variables(rank, world, port), **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(_kill, process)
            ranks.append(process)
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            if time.monotonic() > deadline:
                raise RanksFailed(_explain(f"not finished after {seconds:.0f} s", logs))
            time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
    if any(codes):
        raise RanksFailed(_explain(f"exit codes {codes}, None for one that was killed", logs))
    return [path.read_text(errors="replace") for path in logs]


def _variables(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # once it has been waited for, its number may be somebody else's
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _explain(problem: str, logs: list[Path]) -> str:
    tails = (
        "\n".join([f"--- {path}", *path.read_text(errors="replace").splitlines()[-TAIL_LINES:]])
        for path in logs
    )
    return "\n".join([problem, *tails])
