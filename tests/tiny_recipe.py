"""A recipe for runs that are killed: rows that say who they are, and a very small model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tiny_tokenizers import pad_is_eos
from transformers import AutoTokenizer

ROWS, HELD_OUT, BATCH_SIZE = 41, 5, 8
STEPS_PER_EPOCH = 6  # the last one has a single row: all ranks but one have fillers


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


class Finished(NamedTuple):
    """A run that nobody disturbed."""

    recipe: dict[str, Any]
    run_dir: Path


def make_recipe(folder: Path) -> dict[str, Any]:
    """Write data and tokenizer; return a recipe without run_dir."""
    pad_is_eos().save_pretrained(folder / "tokenizer")
    for name, count in (("row", ROWS), ("held-out", HELD_OUT)):
        rows = [
            {"instruction": f"{name} {n};", "output": f"{n * n % 97} " * (1 + n * 7 % 10)}
            for n in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return {
        "model": {
            "config": LLAMA,
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {
            "train": [{"path": str(folder / "row.json")}],
            "eval": [{"path": str(folder / "held-out.json")}],
            "max_length": 96,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"batch_size": BATCH_SIZE, "steps": 18, "tokens_per_micro_batch": 160},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "deepspeed": "zero2",
        "checkpoint": {"every": 4, "keep": 2},
        "eval": {"every": 5},
    }


def write(recipe: dict[str, Any], run_dir: Path, **sections: Any) -> Path:
    """Write a recipe beside its run folder, with some of its sections replaced or extended."""
    changed = {
        key: {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in sections.items()
    }
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, **changed, "run_dir": str(run_dir)}))
    return path


def numbers_of(recipe: dict[str, Any], rows: list[list[int]]) -> list[int]:
    """Return the numbers that rows of token ids say of themselves, by the text that they are."""
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["tokenizer"])
    numbers = []
    for row in rows:
        text = tokenizer.decode(row)
        _, found, rest = text.partition("row ")
        assert found, f"not a row of the training data: {text!r}"
        numbers.append(int(rest.partition(";")[0]))
    return numbers
