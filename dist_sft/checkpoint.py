"""Save, find, restore and prune checkpoints; beside `manifest` the only file that knows the folder.

    checkpoints/step-00000200/
        manifest.json              step, shapes, pieces; size and SHA-256 of every file below
        manifest.sha256            the manifest's own, as `sha256sum -c` reads it
        rank-00000.safetensors     this rank's pieces, "name|key|start" -> float32 [n]
        model/                     config, tokenizer and generation settings, without weights

A folder is built under a temporary name and renamed when every rank has finished: one that has a
final name is complete. State is stored by parameter name and element range, never by rank, and
read back by range, never unpickled; every byte is checked against the manifest before.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_sft import manifest, once, runs, shards, world
from dist_sft.digests import sha256
from dist_sft.engine import Engine
from dist_sft.errors import UserError
from dist_sft.pieces import Reader
from dist_sft.shards import Fragment
from dist_sft.tensor_file import Entry, write_tensors

MODES = {"private": 0o700, "group": 0o750, "all": 0o755}


class SaveFailed(RuntimeError):
    """Report that no checkpoint was made, as some rank could not write its part."""


class Snapshot:
    """Keep a copy of this rank's share of the state, in memory that is used for every save."""

    def __init__(self, engine: Engine) -> None:
        """Take the memory. Raises UserError where there is not enough."""
        elements = sum(t.numel() for f in shards.owned(engine) for t in f.tensors.values())
        try:
            self._buffer = torch.empty(elements, pin_memory=torch.cuda.is_available())
        except RuntimeError as error:
            raise UserError(
                f"checkpoint.asynchronous: no memory for a copy of the state, {elements * 4:,} "
                f"bytes on this rank ({error}); set it to false, and training waits for saves"
            ) from error

    def take(self, engine: Engine) -> list[Fragment]:
        """Copy the share; what is returned stays as it is until the next call."""
        copied, end = [], 0
        for fragment in shards.owned(engine):
            tensors = {}
            for key, tensor in fragment.tensors.items():
                start, end = end, end + tensor.numel()
                tensors[key] = self._buffer[start:end].copy_(tensor)
            copied.append(fragment._replace(tensors=tensors))
        assert end == len(self._buffer), "the layout has changed"
        return copied


class Saving:
    """A checkpoint on its way: a thread writes this rank's part, `finish` commits or discards it.

    Ranks meet when they make it and in `finish`, which every rank calls together, not in between.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        engine: Engine,
        facts: dict[str, Any],
        write_model: Callable[[Path], None],
        attempt: int = 0,
        mode: str = "private",
        snapshot: Snapshot | None = None,
    ) -> None:
        """Begin to save the state after `step`.

        `facts` are kept in the manifest; `write_model(folder)` writes config and tokenizer; `mode`
        says who may read. Without a `snapshot`, the state must not change before `finish`.
        """
        self._run_dir, self._attempt, self._mode = run_dir, attempt, MODES[mode]
        self.step = step
        self.final = manifest.folder_of(run_dir, step)
        self._temporary = self.final.with_name(f".{self.final.name}.attempt-{attempt}.tmp")
        self._content = facts | {
            "format": manifest.FORMAT,
            "step": step,
            "world_size": dist.get_world_size(),
            "optimizer_steps": shards.optimizer_steps(engine),
            "loss_scale": shards.loss_scale(engine),
            "shapes": shards.parameter_shapes(engine),
            "frozen": shards.frozen(engine),
        }
        self._written: dict[str, Any] = {}
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        # One rank looks: file systems may show ranks different things, and all must do the same.
        self.is_there = world.on_rank_0(self._make_room)
        """The step is saved already; nothing is done."""
        if self.is_there:
            return
        self._fragments = snapshot.take(engine) if snapshot else list(shards.owned(engine))
        self._write_model = write_model
        self._thread.start()

    def _make_room(self) -> bool:
        shutil.rmtree(self._temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # writing will say what is wrong
            if self.final.exists():
                if not manifest.check(self.final, "size")[1]:
                    return True
                _set_aside([self.final])
        return False

    @property
    def is_written(self) -> bool:
        """Tell whether this rank has written its part, or failed to."""
        return not self._thread.is_alive()

    def _write(self) -> None:
        rank = dist.get_rank()
        try:
            self._temporary.parent.mkdir(self._mode, parents=True, exist_ok=True)
            self._temporary.mkdir(MODES["private"], exist_ok=True)
            file = f"rank-{rank:05d}.safetensors"
            path = self._temporary / file
            self._written[file] = _write_state(path, self._fragments, self._mode & 0o666)
            if rank == 0:
                self._write_model(self._temporary / "model")
                self._written |= _describe_files(self._temporary, "model", self._mode)
        except Exception as error:  # a rank that left here would let the others wait for its vote
            self._failure = f"rank {rank}: {error}"

    def finish(self) -> Path:
        """Wait until every rank has written its part, and give the folder its name.

        Raises SaveFailed on every rank where one cannot write, and nothing is left behind; raises
        SupersededError where a newer attempt than this one works on the run.
        """
        everyone: list[Any] | None = None
        if not self.is_there:
            self._thread.join()
            if dist.get_rank() == 0:
                everyone = [None] * dist.get_world_size()
            # What every rank has written is also its vote.
            dist.gather_object((self._failure, self._written), everyone)
        world.on_rank_0(lambda: self._conclude(everyone))
        return self.final

    def _conclude(self, everyone: list[Any] | None) -> None:
        """Commit, or discard; `everyone` holds (failure, files) of each rank."""
        try:
            runs.check_newest(self._run_dir, self._attempt)
            if everyone is not None:
                self._commit(everyone)
        except Exception as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if isinstance(error, runs.SupersededError):
                raise
            raise SaveFailed(
                f"the checkpoint of step {self.step} cannot be saved: {error}"
            ) from error

    def _commit(self, everyone: list[Any]) -> None:
        """Write the manifest and give the folder its name, where every rank has done its part."""
        failures = [said for said, _ in everyone if said]
        if failures:
            raise RuntimeError("; ".join(failures))
        files = {name: entry for _, part in everyone for name, entry in part.items()}
        manifest.write(self._temporary, self._content | {"files": files}, self._mode & 0o666)
        self._temporary.chmod(self._mode)
        once.sync(self._temporary)
        runs.check_newest(self._run_dir, self._attempt)  # again: the rest took its time
        self._temporary.rename(self.final)
        once.sync(self.final.parent)


def _write_state(path: Path, fragments: Iterable[Fragment], mode: int) -> dict[str, Any]:
    """Write this rank's share as safetensors; return its manifest entry."""
    pieces = []
    entries = {}
    for fragment in fragments:
        pieces.append((fragment.name, fragment.start, len(fragment.tensors["fp32"])))
        for key, tensor in fragment.tensors.items():
            name = f"{fragment.name}|{key}|{fragment.start}"
            entries[name] = Entry(torch.float32, [len(tensor)], [tensor])
    size, digest = write_tensors(path, entries, mode)
    return {"size": size, "sha256": digest, "pieces": pieces}


def _describe_files(folder: Path, under: str, mode: int) -> dict[str, Any]:
    """Flush what libraries wrote; return its manifest entries."""
    entries = {}
    for path in sorted((folder / under, *(folder / under).rglob("*"))):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        once.sync(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return entries


def newest_good(
    run_dir: Path,
    level: manifest.Level,
    say: Callable[[str], None],
    *,
    trusting: bool = False,
    ruled_out: Callable[[int], bool] = lambda step: False,
) -> int | None:
    """Return the step of the newest checkpoint that is what was written; every rank calls this.

    Each rank checks its part of the files. Damaged ones are passed over, with a line that says what
    is wrong, and renamed once a good one is found. None where there are no checkpoints at all.
    Raises as `manifest.newest_good` does; and UserError, unless `trusting`, for a checkpoint that
    somebody else may have changed. Steps that are `ruled_out` are not looked at.
    """
    # Ranks may see different things.
    found = world.on_rank_0(lambda: [s for s in manifest.folders(run_dir) if not ruled_out(s)])
    part = slice(dist.get_rank(), None, dist.get_world_size())
    good, damaged = manifest.newest_good(
        [manifest.folder_of(run_dir, step) for step in found],
        lambda folder: world.gather(manifest.check(folder, level, part)[1]),
        say,
        "Put a good copy back, or give another run_dir to start anew",
    )
    if good is None:
        return None
    if not trusting:
        world.on_rank_0(lambda: manifest.refuse_untrusted(good))
    world.on_rank_0(lambda: _set_aside(damaged))
    return manifest.step_of(good)


def _set_aside(damaged: list[Path]) -> None:
    """Rename them: else their steps would not be saved again, and pruning would count them."""
    for folder in damaged:
        folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))


def restore(folder: Path, engine: Engine) -> None:
    """Load a checkpoint into the engine, whatever layout it was saved from.

    A rank reads the element ranges that it holds and no others. Raises UserError where the
    checkpoint is of a model with other parameters, or lacks the moments of one to train.
    """
    reader = Reader(folder)
    if reader.manifest["shapes"] != shards.parameter_shapes(engine):
        raise UserError(f"{folder} holds a model with other parameters; give another run_dir")
    thawed = sorted(reader.frozen.difference(shards.frozen(engine)))
    if thawed:
        # Moments of zero beside a counter of many steps make AdamW's first steps far too long.
        raise UserError(
            f"model.freeze: {thawed[0]} was frozen when {folder} was written, so AdamW knows "
            "nothing of it. Freeze it again, or train on in another run_dir from this run's model"
        )
    for fragment in shards.held(engine):
        for key, tensor in fragment.tensors.items():
            for offset, piece in reader.read(fragment.name, key, fragment.start, len(tensor)):
                tensor[offset : offset + len(piece)].copy_(piece)
    buffers = dict(engine.module.named_buffers(remove_duplicate=False))
    for name, value in reader.buffers().items():
        buffers[name].copy_(value)
    shards.set_optimizer_steps(engine, reader.manifest["optimizer_steps"])
    shards.set_loss_scale(engine, reader.manifest.get("loss_scale"))
    shards.publish(engine)


def prune(run_dir: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete checkpoints but the newest `keep`, the best, and those of every `keep_every`th step.

    Those that the run went back from go. None ever lacks a part under its name.
    """
    remove_leftovers(run_dir, ".step-*.old")
    found = manifest.folders(run_dir)
    problems = {step: manifest.check(folder, "size")[1] for step, folder in found.items()}
    if any(problem.kind != "damaged" for several in problems.values() for problem in several):
        return  # the best may be among those that cannot be read now
    best = manifest.best(run_dir)
    # Damaged ones do not count: a run could be continued from those that stay.
    whole = [step for step in found if not problems[step]]
    oldest = whole[-keep] if len(whole) > keep else 0
    for step, folder in manifest.every_folder(run_dir).items():
        kept = step >= oldest or step == best or (keep_every and step % keep_every == 0)
        if step not in found or not kept:
            folder.rename(folder.with_name(f".{folder.name}.old"))
    remove_leftovers(run_dir, ".step-*.old")


def clean_up(run_dir: Path, attempt: int) -> None:
    """Remove what killed attempts left, once this one works; an older one must not come to that."""
    runs.check_newest(run_dir, attempt)
    remove_leftovers(run_dir)


def remove_leftovers(run_dir: Path, pattern: str = ".step-*") -> None:
    """Remove what killed attempts left half-written or half-deleted; rank 0 calls this."""
    for folder in (run_dir / "checkpoints").glob(pattern):
        shutil.rmtree(folder, ignore_errors=True)
