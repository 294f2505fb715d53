"""The quickstart: make a small instruction set, train on it, and ask before and after.

python -m dist_sft.quickstart [--workers N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_sft import local, quickstart_data, runs
from dist_sft.config import Recipe, read_training
from dist_sft.console import printable

RECIPE = Path("configs/quickstart.yaml")
DATA = Path("data/quickstart")
MAX_NEW_TOKENS = 16
BATCH_TOKENS = 8192
SHOWN = 1  # prompts shown per skill


def answers_of(recipe: Recipe, model_folder: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Answer rows with a model, greedily."""
    import torch
    from transformers.utils import logging

    from dist_sft.asking import ask
    from dist_sft.chat import Encoder, parse
    from dist_sft.tokenizer import load_words
    from dist_sft.weights import load

    logging.disable_progress_bar()
    words = load_words(recipe.model, recipe.data.template)
    encoder = Encoder(words.template, words.tokenizer)
    prompts = [encoder.prompt(parse(row)) for row in rows]
    model = load(model_folder, torch.float32, torch.device("cpu"))
    decode = words.tokenizer.decode
    answers = ask(model, prompts, encoder.stop_ids, decode, MAX_NEW_TOKENS, BATCH_TOKENS)
    return [answer.text for answer in answers]


def show(rows: Sequence[Mapping[str, str]], before: Sequence[str], after: Sequence[str]) -> None:
    """Print a few answers, and the share of exact ones per skill."""
    console = Console(highlight=False)
    answers = Table("prompt", "before", "after", "right", title="held-out prompts")
    seen: dict[str, int] = {}
    for row, old, new in zip(rows, before, after, strict=True):
        seen[row["skill"]] = seen.get(row["skill"], 0) + 1
        if seen[row["skill"]] <= SHOWN:
            prompt = f"{row['instruction']} {row['input']}"
            answers.add_row(prompt, printable(old), new, row["output"])
    console.print(answers)
    scores = Table("skill", "before", "after", title="exact match on held-out prompts")
    old_scores, new_scores = (quickstart_data.exact_match(rows, a) for a in (before, after))
    for skill, score in new_scores.items():
        scores.add_row(skill, f"{old_scores[skill]:.0%}", f"{score:.0%}")
    console.print(scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quickstart; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.quickstart", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    quickstart_data.write(DATA)
    code = local.main(["train", str(RECIPE), "--workers", str(options.workers)])
    if code != runs.FINISHED:
        return code
    recipe = read_training(RECIPE)
    run_dir = Path(recipe.run_dir)
    rows = quickstart_data.make_rows(seed=0).held_out
    before, after = (answers_of(recipe, run_dir / name, rows) for name in ("initial", "model"))
    show(rows, before, after)
    print(f"run folder: {run_dir}\nloss curve: {run_dir / 'loss.png'}")
    return runs.FINISHED


if __name__ == "__main__":
    sys.exit(main())
