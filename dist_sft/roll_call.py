"""Before workers start on several nodes: who is there, and do they fit together? Needs no torch.

Every node writes what it is into the attempt's folder, the first one before others, which try to
reach it then; it compares all of them and writes the verdict. That a file written there is read
here is the proof that all see one folder in which a rename is at once.
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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_sft import __version__, runs
from dist_sft.config import AnyRecipe, Recipe
from dist_sft.preflight import checkpoint_bytes, machine_mistakes, weights_bytes

SECONDS = 180.0  # what nodes get to appear; a container may have to be unpacked first
CONNECT_SECONDS = 30.0  # what the way to the first node gets, which listens already
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "numpy")
FILE = "roll_call.json"
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Where the driver lists all GPUs of a machine, also those that this process may not use."""


Verdict = dict[str, Any]
"""Content of `roll_call.json`: nodes, problems and the bad hosts."""


@dataclass(frozen=True)
class Node:
    """What a node says of itself."""

    rank: int
    host: str
    alike: dict[str, str]
    """Facts that must be the same on all nodes."""
    problems: list[str] = field(default_factory=list)
    """What is wrong here."""
    unreachable: str | None = None
    """Why it cannot reach the first node."""


class NotTogether(RuntimeError):
    """Report nodes that cannot work together; the text names them."""


def take(
    run_dir: Path,
    attempt: int,
    recipe: AnyRecipe,
    node_rank: int,
    nodes: int,
    address: tuple[str, int] | None,
    *,
    workers: int,
    gpus: int,
    threads: int,
) -> None:
    """Return once all nodes are there and agree; raise NotTogether on each of them where not.

    `address` is the host and the port of the first node, at which workers will meet; None where it
    is the only one.
    """
    folder = runs.attempt_dir(run_dir, attempt)
    problems = machine_mistakes(recipe, workers, gpus, "--workers-per-node")
    problems += [*_too_few_gpus(workers, gpus), *too_full(run_dir, recipe)]
    me = Node(node_rank, _host(), {"GPUs": str(gpus), **facts(recipe, threads)}, problems)
    verdict: Verdict | None
    if address is None or node_rank == 0:
        verdict = _lead(folder, me, nodes, address)
    else:
        verdict = _follow(folder, me, address)
    if verdict is None:
        raise NotTogether(_silence(run_dir))
    if verdict["problems"]:
        who = "the nodes cannot work together:" if nodes > 1 else "this node cannot do the work:"
        raise NotTogether("\n  ".join([who, *verdict["problems"]]))


def facts(recipe: AnyRecipe, threads: int) -> dict[str, str]:
    """Return what must be the same on all nodes."""
    return {
        "recipe": recipe.fingerprint(),
        "threads per worker": str(threads),
        "python": sys.version.split()[0],
        "dist_sft": __version__,
        **{name: _version(name) for name in LIBRARIES},
    }


def node_file(folder: Path, node_rank: int) -> Path:
    """Return where, in an attempt's folder, a node says what it is."""
    return folder / f"node-{node_rank}.json"


def write(folder: Path, node: Node) -> None:
    """Say what this node is, in an attempt's folder."""
    runs.write_atomically(node_file(folder, node.rank), json.dumps(asdict(node)) + "\n")


def read(path: Path) -> Node:
    """Return what a node has said of itself."""
    return Node(**json.loads(path.read_text(encoding="utf-8")))


def bad_hosts(run_dir: Path, attempt: int) -> list[str]:
    """Return the hosts that the verdict blames, and that another start should do without."""
    path = runs.attempt_dir(run_dir, attempt) / FILE
    return json.loads(path.read_text(encoding="utf-8"))["bad"] if path.exists() else []


def compare(
    found: list[Node], missing: Mapping[int, str | None] | None = None
) -> tuple[list[str], list[str]]:
    """Return what is wrong, a line each, and the hosts to blame; `missing` are hosts by rank.

    What most nodes suffer from is a mistake in the recipe or of the cluster, and no node's fault.
    """
    problems = [f"{node.host}: {said}" for node in found for said in node.problems]
    blamed = [[node.host for node in found if node.problems]]
    for key in found[0].alike:
        usual, count = Counter(node.alike.get(key, "?") for node in found).most_common(1)[0]
        odd = [node for node in found if node.alike.get(key, "?") != usual]
        if odd:
            said = ", ".join(f"{node.host} has {node.alike.get(key, '?')}" for node in odd)
            problems.append(f"{key}: {said}; the other {count} have {usual}")
            blamed.append([node.host for node in odd])
    cut_off = [node for node in found if node.unreachable]
    problems += [f"{node.host}: {node.unreachable}" for node in cut_off]
    missing = missing or {}
    for rank, host in sorted(missing.items()):
        problems.append(
            f"node {rank}{f' ({host})' if host else ''} did not appear in "
            f"{SECONDS + CONNECT_SECONDS:.0f} s: is it down, or does it not see the run folder?"
        )
    nodes = len(found) + len(missing)
    for hosts in ([node.host for node in cut_off], [host for host in missing.values() if host]):
        everybody = len(hosts) == nodes - 1 > 1
        blamed.append([found[0].host] if everybody else hosts)
    bad = [host for hosts in blamed if 2 * len(hosts) < nodes for host in hosts]
    return problems, list(dict.fromkeys(bad))


def _lead(folder: Path, me: Node, nodes: int, address: tuple[str, int] | None) -> Verdict:
    """Be the first node: write first, listen to the others, judge."""
    with contextlib.ExitStack() as stack:
        if address:
            try:
                stack.enter_context(_listening(address[1]))
            except OSError as error:  # another start has another port: it is no node's fault
                why = os.strerror(error.errno or 0)
                problem = f"{me.host}: nobody can listen at port {address[1]}: {why}"
                return _conclude(folder, [], [problem], [])
        write(folder, me)
        return _judge(folder, nodes)


def _follow(folder: Path, me: Node, address: tuple[str, int]) -> Verdict | None:
    """Be another node; return None where nothing is heard of the first one."""
    if _wait_for([node_file(folder, 0), folder / FILE], SECONDS) is None:
        return None
    verdict = _read(folder / FILE)
    if verdict is None:
        write(folder, replace(me, unreachable=_way_to(address)))
        verdict = _wait_for([folder / FILE], SECONDS + 2 * CONNECT_SECONDS)
    return verdict


def _judge(folder: Path, nodes: int) -> Verdict:
    found = dict[int, Node]()
    deadline = time.monotonic() + SECONDS + CONNECT_SECONDS
    while len(found) < nodes and time.monotonic() < deadline:
        for rank in set(range(nodes)).difference(found):
            content = _read(node_file(folder, rank))
            if content is not None:
                found[rank] = Node(**content)
        time.sleep(0.1)
    there = [node for _, node in sorted(found.items())]
    missing = {rank: _host_of(rank) for rank in range(nodes) if rank not in found}
    return _conclude(folder, there, *compare(there, missing))


def _conclude(folder: Path, there: list[Node], problems: list[str], bad: list[str]) -> Verdict:
    verdict = {"nodes": [asdict(node) for node in there], "problems": problems, "bad": bad}
    runs.write_atomically(folder / FILE, json.dumps(verdict, indent=1) + "\n")
    return verdict


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a file that another node writes, or None where it is not there yet."""
    with contextlib.suppress(OSError, ValueError):  # a server may answer late, or with half of it
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return None


def _wait_for(paths: list[Path], seconds: float) -> dict[str, Any] | None:
    """Return the content of the first of these files that appears, or None where none does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in paths:
            content = _read(path)
            if content is not None:
                return content
        time.sleep(0.1)
    return None


def _silence(run_dir: Path) -> str:
    return (
        f"node 0 said nothing for {SECONDS:.0f} s: is it down, or is {run_dir} not one folder "
        "that every node sees?"
    )


@contextlib.contextmanager
def _listening(port: int) -> Iterator[None]:
    """Accept connections at the port at which workers will meet; it is free again afterwards."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=1024, dualstack_ipv6=both
    ) as server:
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


def _way_to(address: tuple[str, int]) -> str | None:
    """Return why the first node, which listens, cannot be reached."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return f"cannot reach {address[0]}:{address[1]}, where workers meet: {error}"
        time.sleep(0.2)


def _too_few_gpus(workers: int, gpus: int) -> Iterator[str]:
    """Say where workers would share GPUs, take those of others, or run on CPUs beside GPUs.

    An empty CUDA_VISIBLE_DEVICES is the wish to work on CPUs.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if given.isdecimal() and workers > min(int(given), gpus):
        yield (
            f"--workers-per-node is {workers}, SLURM gave this job {given} GPUs on this node, and "
            f"{gpus} are visible"
        )
    there = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
    if there and not gpus:
        yield (
            f"this node has {there} GPUs, and the job may use none of them: ask for them "
            f"(--gpus-per-node={there}), or put `export CUDA_VISIBLE_DEVICES=` into the site file "
            "to work on CPUs"
        )


def too_full(run_dir: Path, recipe: AnyRecipe) -> Iterator[str]:
    """Say where there is no room for a checkpoint, or for one that is converted to answer."""
    try:
        if isinstance(recipe, Recipe):
            what, needed = "one checkpoint needs", checkpoint_bytes(recipe)
        else:
            what, needed = f"the weights of {recipe.model.path} need", weights_bytes(recipe)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        yield f"{run_dir}: {error.strerror}"
        return
    if needed is not None and free < needed:
        yield (f"{run_dir} has room for {free / 1e9:.1f} GB, and {what} {needed / 1e9:.1f} GB")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _host() -> str:
    """Return this node's name, which SLURM may spell in another way than the node itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _host_of(rank: int) -> str | None:
    """Return a node's name, which the batch shell knows from the allocation."""
    hosts = os.environ.get("DIST_SFT_HOSTS", "").split()
    return hosts[rank] if rank < len(hosts) else None
