"""The only file that knows what a checkpoint folder looks like: save, latest, restore, prune.

    checkpoints/step-00000200/
        manifest.json              written last but for the rename: step, shapes, pieces, sizes
        rank-00000.safetensors     this rank's pieces, "name|key|start" -> float32 [n]
        model/                     config, tokenizer and generation settings, without weights

A folder is built under a temporary name and renamed when every rank has finished: one that has a
final name is complete. State is stored by parameter name and element range, never by rank, and
read back by range, never unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_sft import once, shards, world
from dist_sft.engine import Engine
from dist_sft.errors import UserError
from dist_sft.runs import write_atomically

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """List the steps of all finished checkpoints, oldest first."""
    found = (_NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def save(
    run_dir: Path,
    step: int,
    engine: Engine,
    facts: dict[str, Any],
    write_model: Callable[[Path], None],
) -> Path:
    """Save the state after `step`, unless it is saved; every rank calls this together.

    `facts` are kept in the manifest; `write_model(folder)` writes config and tokenizer.
    """
    rank = dist.get_rank()
    final = folder_of(run_dir, step)
    # One rank looks: file systems may show ranks different things, and all must do the same.
    if world.from_rank_0(final.exists() if rank == 0 else None):
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    file = f"rank-{rank:05d}.safetensors"
    pieces: list[tuple[str, int, int]] = []
    tensors: dict[str, Tensor] = {}
    for fragment in shards.owned(engine):
        pieces.append((fragment.name, fragment.start, len(fragment.tensors["fp32"])))
        for key, tensor in fragment.tensors.items():
            tensors[f"{fragment.name}|{key}|{fragment.start}"] = tensor.contiguous()
    save_file(tensors, temporary / file)
    once.sync(temporary / file)
    index: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(index, (file, pieces, (temporary / file).stat().st_size))
    if rank == 0:
        write_model(temporary / "model")
        manifest = facts | {
            "format": FORMAT,
            "step": step,
            "world_size": dist.get_world_size(),
            "optimizer_steps": shards.optimizer_steps(engine),
            "shapes": shards.parameter_shapes(engine),
            "files": {name: {"size": size, "pieces": held} for name, held, size in index},
        }
        write_atomically(temporary / "manifest.json", json.dumps(manifest))
        temporary.rename(final)
        once.sync(final.parent)
    dist.barrier()
    return final


def restore(folder: Path, engine: Engine) -> None:
    """Load a checkpoint into the engine, whatever layout it was saved from.

    A rank reads the element ranges that it holds and no others. Raises UserError where the
    checkpoint is of a model with other parameters.
    """
    reader = Reader(folder)
    if reader.manifest["shapes"] != shards.parameter_shapes(engine):
        raise UserError(f"{folder} holds a model with other parameters; give another run_dir")
    for fragment in shards.held(engine):
        for key, tensor in fragment.tensors.items():
            for offset, piece in reader.read(fragment.name, key, fragment.start, len(tensor)):
                tensor[offset : offset + len(piece)].copy_(piece)
    shards.set_optimizer_steps(engine, reader.manifest["optimizer_steps"])
    shards.publish(engine)


class Reader:
    """Read element ranges of a checkpoint's tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self._pieces: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for file, entry in self.manifest["files"].items():
            for name, start, length in entry["pieces"]:
                self._pieces[name].append((start, length, file))
        self._open: dict[str, Any] = {}

    def read(self, name: str, key: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (offset from start, values) until the range of the flattened tensor is complete."""
        covered = 0
        for piece_start, piece_length, file in sorted(self._pieces[name]):
            first = max(start, piece_start)
            last = min(start + length, piece_start + piece_length)
            if first < last:
                source = self._file(file).get_slice(f"{name}|{key}|{piece_start}")
                yield first - start, source[first - piece_start : last - piece_start]
                covered += last - first
        assert covered == length, f"{self.folder} holds {covered} of {length} elements of {name}"

    def tensor(self, name: str, key: str = "fp32") -> Tensor:
        """Return one whole tensor in its own shape."""
        shape = self.manifest["shapes"][name]
        whole = torch.empty(shape)
        flat = whole.view(-1)
        for offset, piece in self.read(name, key, 0, flat.numel()):
            flat[offset : offset + len(piece)] = piece
        return whole

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for step in steps(run_dir)[:-keep]:
        shutil.rmtree(folder_of(run_dir, step))
