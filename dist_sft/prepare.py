"""Make what training starts from, once per node and before ranks meet, and wait for all nodes.

Whoever waits, waits on files in the attempt's folder and not in a collective, which would time out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from dist_sft import data, runs
from dist_sft.config import Recipe
from dist_sft.console import Console
from dist_sft.model import make_random_weights
from dist_sft.tokenizer import Words
from dist_sft.world import Place


def prepare_once(
    run_dir: Path, attempt: int, place: Place, recipe: Recipe, words: Words, console: Console
) -> data.Stores:
    """Let the first rank of every node prepare data and random weights; wait for all nodes.

    Raises RuntimeError when a rank gives up meanwhile.
    """
    files = [runs.attempt_dir(run_dir, attempt) / f"data-{n}.json" for n in range(place.nodes)]
    if place.local_rank == 0:
        stores = data.prepare(recipe.data, words, console.say)
        if recipe.model.config is not None:
            make_random_weights(recipe, stores.vocab_size, run_dir / "initial")
        runs.write_atomically(files[place.node_rank], stores.to_json())
    for number, file in enumerate(files):
        pause = 0.05
        while not file.exists():
            failed = runs.first_failure(run_dir, attempt)
            if failed:
                raise RuntimeError(f"rank {failed[0]} gave up: {failed[1].reason}")
            if pause < 1.0 <= pause * 2:
                console.say(f"waiting until node {number} has its data")
            time.sleep(pause)
            pause = min(1.0, pause * 2)
    return data.Stores(**json.loads(files[place.node_rank].read_text(encoding="utf-8")))
