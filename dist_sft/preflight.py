"""What a launcher can refuse before there is a run folder: without torch, and at once.

Only what is certain. A name that may be on the hub, and what is in a file, are for the ranks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dist_sft import manifest
from dist_sft.config import AnyRecipe, Recipe
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.paths import FILE_TYPES, is_local, near_matches
from dist_sft.sections import RowSource

NO_GPU = ("", "-1", "NoDevFiles")  # the last one is SLURM's


def missing_paths(recipe: AnyRecipe) -> list[str]:
    """Return a line per path of the recipe that can only be a local one and does not exist.

    For launchers whose ranks see the files that this machine sees.
    """
    return [
        f"{key}={path}: no such file or folder; allowed: {allowed}{near_matches(path)}"
        for key, path, allowed in _paths(recipe)
        if is_local(path) and not os.path.exists(path)
    ]


def path_mistakes(recipe: AnyRecipe) -> list[str]:
    """Return a line per path that does not exist, and one where the output cannot be written."""
    mistakes = missing_paths(recipe)
    if not isinstance(recipe, Recipe):
        output = Path(recipe.output.path)
        folder = output.parent
        if not folder.is_dir():
            mistakes.append(f"output.path={output}: there is no folder {folder}; make it first")
        elif not os.access(folder, os.W_OK):
            mistakes.append(f"output.path={output}: the folder {folder} cannot be written to")
        elif output.is_dir():
            mistakes.append(f"output.path={output}: this is a folder; give the name of a file")
        elif output.exists() and not (Path(recipe.run_dir) / "output.json").exists():
            mistakes.append(
                f"output.path={output}: there is a file that this run did not make; remove it, or "
                "give another path"
            )
    return mistakes


def checkpoint_bytes(recipe: Recipe) -> int | None:
    """Predict the size of a checkpoint: weights and two moments in float32, 12 bytes a parameter.

    The number of parameters is in the headers of the model's safetensors files
    (https://huggingface.co/docs/safetensors). Where the run has a checkpoint, its size is known.
    None where neither is there: a model of the hub that is not here yet, or that is only a config.
    """
    known = manifest.folders(Path(recipe.run_dir))
    if known:
        return sum(path.stat().st_size for path in known[max(known)].iterdir())
    folder = Path(recipe.model.path) if recipe.model.path else None
    if folder is not None and (folder / "model").is_dir():  # of a finished run
        folder /= "model"
    files = sorted(folder.glob("*.safetensors")) if folder else []
    elements = 0
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        elements += sum(math.prod(x["shape"]) for k, x in header.items() if k != "__metadata__")
    return 12 * elements or None


def weights_bytes(recipe: GenerateRecipe) -> int | None:
    """Return what a checkpoint that answers takes at least, converted in the run folder.

    None where there is nothing to convert, or where it has been: other models are read as they are.
    """
    folder = Path(recipe.model.path)
    if manifest.step_of(folder) is None:
        found = manifest.folders(folder)
        if not found:
            return None
        folder = found[max(found)]
    if any(Path(recipe.run_dir, "weights").glob("*/config.json")):
        return None
    try:
        shapes = manifest.read(folder)["shapes"].values()
    except manifest.DamagedCheckpoint:  # who answers will say so
        return None
    return (4 if recipe.model.dtype == "float32" else 2) * sum(map(math.prod, shapes))


def machine_mistakes(
    recipe: AnyRecipe, workers: int, gpus: int, option: str = "--workers"
) -> list[str]:
    """Return a line per wish that this machine's GPUs, or their absence, cannot fulfil.

    For launchers whose ranks run on this machine; `option` says how many.
    """
    mistakes = []
    if recipe.model.dtype == "float16" and not gpus:
        mistakes.append(
            f"model.dtype: float16 needs a GPU, and there is none here ({_visible()}); "
            "allowed here: auto, float32, bfloat16"
        )
    if gpus and workers > gpus:
        there_are = "there is 1 GPU" if gpus == 1 else f"there are {gpus} GPUs"
        mistakes.append(
            f"{option}: got {workers}, but {there_are} here ({_visible()}) and every worker needs "
            f"one of its own; allowed: 1 to {gpus}, or with CUDA_VISIBLE_DEVICES= (empty) any "
            "number on CPU"
        )
    return mistakes


def named_gpus(visible: str) -> list[str]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names."""
    return [name for name in map(str.strip, visible.split(",")) if name not in NO_GPU]


def _paths(recipe: AnyRecipe) -> Iterator[tuple[str, str, str]]:
    """Yield dotted key, value and what is allowed."""
    rows = f"a {', '.join(FILE_TYPES)} file, a folder written by Dataset.save_to_disk, a hub name"
    sources: Mapping[str, Sequence[RowSource]]
    if isinstance(recipe, Recipe):
        sources = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
        template, run = ("data.template", recipe.data.template), "a finished run folder"
        if recipe.eval.prompts is not None:
            yield "eval.prompts", recipe.eval.prompts, rows
    else:
        sources, template, run = {"input": recipe.input}, ("template", recipe.template), "a run"
    for key, listed in sources.items():
        for number, source in enumerate(listed):
            yield f"{key}.{number}.path", source.path, rows
    yield *template, "human-assistant, alpaca, chatml, tokenizer, a Jinja file"
    model = f"a folder with config.json and safetensors weights, {run}, a hub name"
    if recipe.model.path is not None:
        yield "model.path", recipe.model.path, model
    if recipe.model.tokenizer is not None:
        tokenizer = "a folder with tokenizer.json, a hub name"
        yield "model.tokenizer", recipe.model.tokenizer, tokenizer


def _visible() -> str:
    name = "CUDA_VISIBLE_DEVICES"
    return f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"
