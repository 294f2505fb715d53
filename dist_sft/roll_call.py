"""Before workers start on several nodes: who is there, and do they fit together? Needs no torch.

Every node writes what it is into the attempt's folder, and tries to reach the first one, which
compares all of them and writes the verdict. That a file written there is read here is the proof
that all see one folder in which a rename is at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_sft import __version__, runs
from dist_sft.config import Recipe
from dist_sft.preflight import checkpoint_bytes, machine_mistakes

SECONDS = 180.0  # what nodes get to appear; a container may have to be unpacked first
CONNECT_SECONDS = 60.0  # and the first of them, to listen
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "numpy")
FILE = "roll_call.json"


@dataclass(frozen=True)
class Node:
    """What a node says of itself."""

    rank: int
    host: str
    alike: dict[str, str]
    """Facts that must be the same on all nodes."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with this node alone."""


class NotTogether(RuntimeError):
    """Report nodes that cannot work together; the text names them."""


def take(
    run_dir: Path,
    attempt: int,
    recipe: Recipe,
    node_rank: int,
    nodes: int,
    address: tuple[str, int],
    *,
    workers: int,
    gpus: int,
    threads: int,
) -> None:
    """Return once all nodes are there and agree; raise NotTogether on each of them where not.

    `address` is the host and the port of the first node, at which workers will meet.
    """
    folder = runs.attempt_dir(run_dir, attempt)
    with _listening(address[1]) if node_rank == 0 else contextlib.nullcontext():
        problems = machine_mistakes(recipe, workers, gpus, "--workers-per-node")
        problems += [*_unreachable(address), *_too_full(run_dir, recipe)]
        alike = {
            "recipe": recipe.fingerprint(),
            "GPUs": str(gpus),
            "threads per worker": str(threads),
            "python": sys.version.split()[0],
            "dist_sft": __version__,
            **{name: _version(name) for name in LIBRARIES},
        }
        me = Node(node_rank, socket.gethostname(), alike, problems)
        runs.write_atomically(_file(folder, node_rank), json.dumps(asdict(me)) + "\n")
        verdict = _judge(folder, nodes) if node_rank == 0 else _wait_for_verdict(folder, run_dir)
    if verdict["problems"]:
        raise NotTogether("\n  ".join(["the nodes cannot work together:", *verdict["problems"]]))


def bad_hosts(run_dir: Path, attempt: int) -> list[str]:
    """Return the hosts that the verdict blames, and that another start should do without."""
    path = runs.attempt_dir(run_dir, attempt) / FILE
    return json.loads(path.read_text(encoding="utf-8"))["bad"] if path.exists() else []


def compare(found: list[Node]) -> tuple[list[str], list[str]]:
    """Return what is wrong, a line each, and the hosts to blame, from which most others differ."""
    problems = [f"{node.host}: {said}" for node in found for said in node.problems]
    bad = [node.host for node in found if node.problems]
    for key in found[0].alike:
        usual, count = Counter(node.alike.get(key, "?") for node in found).most_common(1)[0]
        odd = [node for node in found if node.alike.get(key, "?") != usual]
        if odd:
            said = ", ".join(f"{node.host} has {node.alike.get(key, '?')}" for node in odd)
            problems.append(f"{key}: {said}; the other {count} have {usual}")
            if 2 * count > len(found):  # of two that differ, nobody knows which one is right
                bad += [node.host for node in odd]
    return problems, list(dict.fromkeys(bad))


def _judge(folder: Path, nodes: int) -> dict[str, Any]:
    found = dict[int, Node]()
    deadline = time.monotonic() + SECONDS
    while len(found) < nodes and time.monotonic() < deadline:
        for rank in set(range(nodes)).difference(found):
            with contextlib.suppress(FileNotFoundError):
                found[rank] = Node(**json.loads(_file(folder, rank).read_text(encoding="utf-8")))
        time.sleep(0.1)
    problems, bad = compare([node for _, node in sorted(found.items())])
    for rank in sorted(set(range(nodes)).difference(found)):
        host = _host_of(rank)
        problems.append(
            f"node {rank}{f' ({host})' if host else ''} did not appear in {SECONDS:.0f} s: is it "
            f"down, or does it not see {folder}?"
        )
        bad += [host] if host else []
    verdict = {"nodes": [asdict(node) for node in found.values()], "problems": problems, "bad": bad}
    runs.write_atomically(folder / FILE, json.dumps(verdict, indent=1) + "\n")
    return verdict


def _wait_for_verdict(folder: Path, run_dir: Path) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS + CONNECT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            verdict: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return verdict
        time.sleep(0.1)
    raise NotTogether(
        f"node 0 said nothing for {SECONDS:.0f} s: is it down, or is {run_dir} not one folder "
        "that every node sees?"
    )


@contextlib.contextmanager
def _listening(port: int) -> Iterator[None]:
    """Accept connections at the port at which workers will meet; it is free again afterwards."""
    with socket.create_server(("", port), backlog=1024) as server:
        server.settimeout(0.2)
        done = threading.Event()

        def accept() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    server.accept()[0].close()

        thread = threading.Thread(target=accept, name="roll call", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _unreachable(address: tuple[str, int]) -> Iterator[str]:
    """Say why the first node cannot be reached; it may begin to listen a little later."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                yield f"cannot reach {address[0]}:{address[1]}, where workers meet: {error}"
                return
        time.sleep(0.2)


def _too_full(run_dir: Path, recipe: Recipe) -> Iterator[str]:
    needed, free = checkpoint_bytes(recipe), shutil.disk_usage(run_dir).free
    if needed is not None and free < needed:
        yield (
            f"{run_dir} has room for {free / 1e9:.1f} GB, and one checkpoint needs "
            f"{needed / 1e9:.1f} GB"
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _host_of(rank: int) -> str | None:
    """Return a node's name, which the batch shell knows from the allocation."""
    hosts = os.environ.get("DIST_SFT_HOSTS", "").split()
    return hosts[rank] if rank < len(hosts) else None


def _file(folder: Path, node_rank: int) -> Path:
    return folder / f"node-{node_rank}.json"
