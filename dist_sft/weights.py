"""A model to answer with: from a folder as it is, or a checkpoint that is converted once.

On CPU, workers of one node share the memory of weights: they map the same files, and copy what
`prepack` lays out anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dist_sft.chat import Encoder
from dist_sft.errors import UserError
from dist_sft.export import export, fill
from dist_sft.locate import Located, Step, check_vocabulary, locate
from dist_sft.manifest import DamagedCheckpoint
from dist_sft.model import load_pretrained
from dist_sft.once import DamagedError, make_once
from dist_sft.prepack import can_prepack, prepack

__all__ = [
    "Located",
    "Step",
    "check_vocabulary",
    "check_words",
    "convert",
    "load",
    "locate",
    "ready",
]


def convert(checkpoint: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint as a folder that transformers loads, under a temporary name first.

    Ranges of float32 become `dtype` a few MiB at a time: there is no whole copy in memory.
    """
    export(checkpoint, out, dtype)


def ready(located: Located, out: Path, dtype: torch.dtype, say: Callable[[str], None]) -> Path:
    """Return the folder to load: the one that was located, or `out`, to which it is converted.

    Whoever comes first converts, others wait for it. Raises UserError where the run that the
    checkpoint is from removes it meanwhile.
    """
    if not located.checkpoint:
        return located.folder

    def make(unfinished: Path) -> None:
        say(f"converting {located.folder} to {dtype}")
        try:
            fill(unfinished, located.folder, dtype)
        except (OSError, DamagedCheckpoint):
            if located.folder.exists():
                raise
            raise UserError(
                f"{located.folder} was removed while it was read: its run goes on, and keeps the "
                "newest only (checkpoint.keep, checkpoint.keep_every). Take another one"
            ) from None

    def found() -> Path:
        if not out.is_dir():
            raise DamagedError(f"{out} is missing")
        return out

    return make_once(out, make=make, load=found, what="the converted weights", say=say)


def check_words(located: Located, encoder: Encoder, say: Callable[[str], None], key: str) -> None:
    """Compare what makes prompts with what made them in training; `key` names the template's.

    Raises UserError where they differ. Says so where a checkpoint is too old to know.
    """
    if not located.checkpoint:
        known, name = located.template, encoder.template.name
        # What a run exported asks in the words of its training, whatever they are called there.
        if known is not None and name not in (known, "tokenizer"):
            raise UserError(
                f"{key}: got {name}, but {located.folder} was trained with {known}; set {key} to "
                f"{known}"
            )
        return
    trained = located.facts.get("prompt_words")
    if trained is None:
        say(
            f"{located.folder} was written before checkpoints knew their template: that prompts "
            "are worded as in training cannot be checked"
        )
    elif trained != encoder.prompt_fingerprint:
        raise UserError(
            f"{key}: prompts of the template {encoder.template.name} and this tokenizer are not "
            f"those that {located.folder} was trained with. Set {key} to {located.template}, "
            "with the checkpoint's own tokenizer"
        )


def load(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str | None = None,
    trust_remote_code: bool = False,
    prepacked: bool = True,
) -> PreTrainedModel:
    """Load a model to answer with: in `dtype`, on `device`, in evaluation mode.

    On CPU, weights that are stored in `dtype` stay in the files' pages, which processes share,
    unless they are `prepacked`: then a process has its own, and they are the faster ones. The files
    must stay what they are for as long as the model is used. Raises UserError where they cannot be
    loaded; `name` is what the recipe calls them.
    """
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    model = load_pretrained(
        str(folder), dtype, name=name, trust_remote_code=trust_remote_code, **place
    )
    model.eval().requires_grad_(False)
    if prepacked and can_prepack(dtype, device):
        prepack(model)
    return model
