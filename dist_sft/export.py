"""Turn a checkpoint into a Hugging Face folder, a piece of a tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dist_sft.pieces import BUFFERS, Reader
from dist_sft.tensor_file import Entry, write_tensors

SHARD_BYTES = 5 * 2**30


def write_model_files(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    chat_template: str | None,
    buffers: dict[str, Tensor],
) -> None:
    """Write everything of a Hugging Face folder but the trained parameters.

    Generation will stop at `stop_ids`, the end tokens of the template that was learned; the
    tokenizer will ask in its words, `chat_template`, or as it does already where that is None.
    `buffers` (see `persistent_buffers`) go into a file of their own.
    """
    model.config.save_pretrained(folder)
    generation = deepcopy(model.generation_config) or GenerationConfig()
    generation.eos_token_id = list(stop_ids)
    # Not save_pretrained: that refuses what published models contain, a temperature without
    # sampling for one.
    generation.to_json_file(folder / "generation_config.json")
    if chat_template is not None:
        tokenizer = copy(tokenizer)  # the caller's keeps its own
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    if buffers:
        save_file(buffers, folder / BUFFERS)


def persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of the buffers that belong to the weights; they are equal on all ranks."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    return {name: state[name].cpu().clone() for name in state if name not in parameters}


def export(checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors shards, config, tokenizer and generation settings to `out`.

    Memory is bounded by a piece of a tensor (`tensor_file.PIECE`). `out` is built under a temporary
    name and renamed.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary, checkpoint, dtype, shard_bytes)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def fill(
    folder: Path, checkpoint: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Do the same in an empty folder, where somebody else cares for names."""
    reader = Reader(checkpoint)
    for name in reader.manifest["files"]:  # what else lies there, nobody has checked
        if name.startswith("model/"):
            target = folder / name.removeprefix("model/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, target)  # not its mode: it is for others
    _set_dtype(folder / "config.json", dtype)
    mode = (folder / "config.json").stat().st_mode & 0o666
    entries = {
        name: Entry(dtype, shape, reader.whole(name))
        for name, shape in reader.manifest["shapes"].items()
    }
    for name, buffer in reader.buffers().items():  # in their own dtype, as transformers keeps them
        entries[name] = Entry(buffer.dtype, list(buffer.shape), [buffer])
    (folder / BUFFERS).unlink(missing_ok=True)
    shards = _plan_shards(entries, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: entries[name] for name in names}
        write_tensors(folder / file, shard, mode, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _set_dtype(config_json: Path, dtype: torch.dtype) -> None:
    """Name the dtype of the exported weights: transformers loads in the one it finds here."""
    config = json.loads(config_json.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_json.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plan_shards(entries: Mapping[str, Entry], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        bytes_needed = math.prod(entry.shape) * entry.dtype.itemsize
        if shards[-1] and size + bytes_needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_needed
    return shards
