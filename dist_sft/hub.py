"""Bring a model from the hub to this node's disk, so that all ranks load the same commit of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from dist_sft.config import Model
from dist_sft.errors import UserError
from dist_sft.paths import explain_missing, is_local, model_folder

WORDS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
WEIGHTS = "*.safetensors"
# The same weights once more, in formats of other programs.
DOUBLES = ["original/*", "consolidated*", "onnx/*", "openvino/*"]


def on_disk(model: Model, say: Callable[[str], None]) -> Model:
    """Return the recipe's model with local folders in place of names on the hub.

    One process per node calls this; what is in the hub's cache is not fetched again. Raises
    UserError for what the hub does not give.
    """
    changes: dict[str, str | None] = {"revision": None}
    if model.path is not None:
        place = model_folder(model.path)
        changes["path"] = fetch("model.path", place, model.revision, [*WORDS, WEIGHTS], say)
    if model.tokenizer is not None:
        changes["tokenizer"] = fetch("model.tokenizer", model.tokenizer, None, [*WORDS], say)
    return model.model_copy(update=changes)


def fetch(
    key: str, place: str, revision: str | None, patterns: list[str], say: Callable[[str], None]
) -> str:
    """Return the folder of a model: the one that is here, or what the hub has of `patterns`.

    `key` is what said so, for messages. Raises UserError for what the hub does not give.
    """
    if Path(place).is_dir() or is_local(place):
        if revision is not None:
            raise UserError(
                f"model.revision: got {revision}, but {place} is a folder here; a revision is for "
                "names on the hub: leave it out"
            )
        return place
    from huggingface_hub import snapshot_download

    say(f"{key}: there is no folder {place} here, so it is looked for on the hub")
    try:
        folder = snapshot_download(
            place, revision=revision, allow_patterns=patterns, ignore_patterns=DOUBLES
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {place}: {explain_missing(place, error)}") from error
    say(f"{key}: {place} is in {folder}")
    return folder


def identity(folder: Path) -> str:
    """Return what tells two models apart without reading weights: config, file names and sizes."""
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    for path in sorted(folder.glob(WEIGHTS)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
