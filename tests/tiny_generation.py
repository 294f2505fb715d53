"""A generation run that is quick to do: a very small model, and prompts of many lengths."""

import json
from pathlib import Path
from typing import Any

import yaml
from tiny_models import tiny_model
from tiny_tokenizers import byte_level

ROWS = 120
BROKEN = {7: "broken_json", 31: "empty_prompt"}


def make(folder: Path, rows: int = ROWS) -> dict[str, Any]:
    """Write model, tokenizer and prompts; return a recipe without run_dir and output."""
    tokenizer = byte_level()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps(row_of(number), ensure_ascii=False) for number in range(rows)]
    lines[7], lines[31] = '{"prompt": ', '{"prompt": ""}'
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "job": "generate",
        "model": {"path": str(folder / "model")},
        "input": [{"path": str(folder / "prompts.jsonl")}],
        "cache_dir": str(folder / "cache"),
        "generate": {"max_new_tokens": 12, "part_rows": 8, "batch_tokens": 400},
    }


def row_of(number: int) -> dict[str, Any]:
    """Return a row: what it asks, and something that has to come out as it went in."""
    return {"prompt": f"问题 {number}: " + "why " * (number * 7 % 11), "id": f"№{number}"}


def write(recipe: dict[str, Any], run_dir: Path, suffix: str = ".jsonl", **sections: Any) -> Path:
    """Write a recipe beside its run folder and its output, with sections replaced or extended."""
    changed = {
        key: {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in sections.items()
    }
    path = run_dir.with_suffix(".yaml")
    output = {"path": str(output_of(run_dir, suffix))}
    content = {**recipe, "run_dir": str(run_dir), "output": output, **changed}
    path.write_text(yaml.safe_dump(content))
    return path


def output_of(run_dir: Path, suffix: str = ".jsonl") -> Path:
    """Return where the answers of a run are."""
    return run_dir.with_name(f"{run_dir.name}-answers{suffix}")
