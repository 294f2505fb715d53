"""Turn a checkpoint into a Hugging Face folder, one parameter in memory at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dist_sft.checkpoint import Reader

SHARD_BYTES = 5 * 2**30


def export(checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors shards, config, tokenizer and generation settings to `out`.

    Memory is bounded by one output shard. `out` is built under a temporary name and renamed.
    """
    reader = Reader(checkpoint)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint / "model", temporary)
    _set_dtype(temporary / "config.json", dtype)
    shards = _plan_shards(reader.manifest["shapes"], dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: reader.tensor(name).to(dtype) for name in names}
        save_file(tensors, temporary / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _set_dtype(config_json: Path, dtype: torch.dtype) -> None:
    """Name the dtype of the exported weights: transformers loads in the one it finds here."""
    config = json.loads(config_json.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_json.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plan_shards(
    shapes: dict[str, list[int]], dtype: torch.dtype, shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_needed = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + bytes_needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_needed
    return shards
