"""Make what a job starts from, once per node and before ranks meet, and wait for all nodes.

Whoever waits, waits on files in the attempt's folder and not in a collective, which would time out.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dist_sft import data, hub, runs
from dist_sft.config import Model, Recipe
from dist_sft.console import Console
from dist_sft.errors import UserError
from dist_sft.model import make_random_weights
from dist_sft.tokenizer import Words, load_words
from dist_sft.world import Place

ALIVE_SECONDS = 300.0  # without a change in its file a node counts as dead


class Prepared(NamedTuple):
    """What is on this node's disk before training begins."""

    stores: data.Stores
    words: Words
    model: Model
    """The recipe's model with folders in place of names on the hub."""
    folder: Path
    """Where the weights to begin with are."""


def prepare_once(
    run_dir: Path, attempt: int, place: Place, recipe: Recipe, console: Console
) -> Prepared:
    """Let the first rank of every node fetch, encode and make weights; wait for all nodes.

    Raises UserError for wrong input, and RuntimeError when a rank or node gives up meanwhile.
    """
    words: list[Words] = []

    def make(_first: dict[str, Any] | None) -> dict[str, Any]:
        model = hub.on_disk(recipe.model, console.say)
        words.append(load_words(model, recipe.data.template))
        stores = data.prepare(recipe.data, words[0], console.say)
        if model.config is not None:
            make_random_weights(recipe, stores.vocab_size, run_dir / "initial")
        return {"path": model.path, "tokenizer": model.tokenizer, "stores": asdict(stores)}

    everyone = once_per_node(run_dir, attempt, place, console, make, range(place.nodes))
    found = everyone[place.node_rank]
    stores = data.Stores(**found.pop("stores"))
    model = recipe.model.model_copy(update=found | {"revision": None})
    folder = Path(model.path) if model.path else run_dir / "initial"
    mine = words[0] if words else load_words(model, recipe.data.template)
    return Prepared(stores, mine, model, folder)


def once_per_node(
    run_dir: Path,
    attempt: int,
    place: Place,
    console: Console,
    make: Callable[[dict[str, Any] | None], dict[str, Any]],
    nodes: Iterable[int],
    *,
    after_the_first: bool = False,
) -> dict[int, dict[str, Any]]:
    """Let the first rank of this node `make` something; return what these `nodes` have made.

    What `make` returns is told to others as JSON. `after_the_first`, other nodes begin when the
    first one is done, and are given what it has made. Raises what `make` raises, and RuntimeError
    when a rank or node gives up meanwhile.
    """
    folder = runs.attempt_dir(run_dir, attempt)
    files = {n: folder / f"data-{n}.json" for n in {*nodes, place.node_rank}}
    if place.local_rank == 0:
        mine, first = files[place.node_rank], None
        if after_the_first and place.node_rank:
            _wait_for(files[0], 0, run_dir, attempt, console)
            first = json.loads(files[0].read_text(encoding="utf-8"))
        with _sign_of_life(_alive(mine)):
            runs.write_atomically(mine, json.dumps(make(first)) + "\n")
    for number, file in sorted(files.items()):
        _wait_for(file, number, run_dir, attempt, console)
    return {n: json.loads(file.read_text(encoding="utf-8")) for n, file in files.items()}


def _alive(file: Path) -> Path:
    return file.with_suffix(".alive")


@contextlib.contextmanager
def _sign_of_life(file: Path) -> Iterator[None]:
    """Write a number that grows into a file within a block."""
    done = threading.Event()

    def keep() -> None:
        number = 0
        while not done.wait(ALIVE_SECONDS / 20):
            number += 1
            with contextlib.suppress(OSError):  # a disk that is full says so where it matters
                file.write_text(str(number))

    file.write_text("0")
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        file.unlink(missing_ok=True)


def _wait_for(file: Path, node: int, run_dir: Path, attempt: int, console: Console) -> None:
    pause, seen, seen_at = 0.05, "", time.monotonic()
    while not file.exists():
        failed = runs.first_failure(run_dir, attempt)
        if failed:
            raise RuntimeError(f"rank {failed[0]} gave up: {failed[1].reason}")
        if runs.read_outcome(run_dir, attempt):
            raise RuntimeError("the attempt is over")
        if pause < 1.0 <= pause * 2:
            console.say(f"waiting until node {node} has its data")
        time.sleep(pause)
        pause = min(1.0, pause * 2)
        with contextlib.suppress(OSError):
            now = _alive(file).read_text()
            if now != seen:
                seen, seen_at = now, time.monotonic()
        if time.monotonic() - seen_at > ALIVE_SECONDS:
            raise UserError(
                f"node {node} has given no sign of life for {ALIVE_SECONDS:.0f} s: {_alive(file)} "
                "does not change. Is that node down, or is run_dir not one folder that every "
                "node sees?"
            )
