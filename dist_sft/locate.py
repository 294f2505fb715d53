"""What `model.path` means where prompts are answered: a folder, a hub name, a run, a checkpoint.

Training's results are read as they are, sharded or exported. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dist_sft import hub, manifest
from dist_sft.digests import remembered_sha256
from dist_sft.errors import UserError
from dist_sft.manifest import Level
from dist_sft.paths import is_local, near_matches
from dist_sft.templates import TEMPLATES

Step = Literal["newest", "best"] | int

GIVE = (
    "give a folder with config.json and safetensors weights, a hub name, a training run, or one "
    "of its checkpoints (RUN/checkpoints/step-N)"
)


@dataclass(frozen=True)
class Located:
    """A model that is on this disk, and is what was written."""

    folder: Path
    """Where the weights are."""
    checkpoint: bool
    """They are a checkpoint's: sharded and float32, to be converted before they are loaded."""
    words: Path
    """Where config and tokenizer are."""
    run: Path | None
    """The training run that it is from, where that is known."""
    memo: Path
    """Folder that remembers the hashes of files."""
    known: str | None = None
    """Its identity, where that need not be found out."""

    @cached_property
    def identity(self) -> str:
        """Name the content in hex: SHA-256 of a manifest, or over config and safetensors files.

        Reads weights that are not a checkpoint's, once.
        """
        if self.known is not None:
            return self.known
        if self.checkpoint:
            return hashlib.sha256((self.folder / manifest.NAME).read_bytes()).hexdigest()
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(self.folder.glob(hub.WEIGHTS)):
            digest.update(f"{path.name} {remembered_sha256(path, self.memo)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return what the checkpoint says of itself; nothing for other weights."""
        return manifest.read(self.folder) if self.checkpoint else {}

    @property
    def template(self) -> str | None:
        """Return the `data.template` that the model was trained with, where that is known.

        Of a Jinja file that is not there any more, the tokenizer has kept a copy.
        """
        name = self.facts.get("template")
        if name is None and self.run is not None:
            name = _config(self.run).get("data", {}).get("template")
        if name is None or name in TEMPLATES or Path(name).is_file():
            return name
        return "tokenizer"


def locate(
    path: str,
    step: Step = "newest",
    *,
    revision: str | None = None,
    verify: Level = "sha256",
    trusting: bool = False,
    memo: Path,
    say: Callable[[str], None],
    key: str = "model.path",
    step_key: str = "model.step",
) -> Located:
    """Find the model that `path` means, check a checkpoint by `verify`, and say what is taken.

    Of a training run that is the newest checkpoint that is what was written, or that of `step`; the
    exported model where there are no checkpoints. `key` and `step_key` are for messages. Raises
    UserError for anything else; for a checkpoint that is damaged or, unless `trusting`, that
    somebody else may have changed. Raises RuntimeError for one that cannot be read now.
    """
    folder = Path(path)
    if not folder.exists() and is_local(path):
        raise UserError(f"{key}={path}: no such folder; {GIVE}{near_matches(path)}")
    patterns = [*hub.WORDS, hub.WEIGHTS]
    folder = Path(hub.fetch(key, path, revision, patterns, say))
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is a file; {GIVE}")
    checkpoint = manifest.step_of(folder) is not None and (folder / manifest.NAME).exists()
    is_run = _is_run(folder, key)
    if step != "newest" and not is_run:
        raise UserError(f"{step_key}: got {step}, but {folder} is not a training run: leave it out")
    if checkpoint:
        _check_one(folder, verify, trusting)
        return Located(folder, True, folder / "model", _run_above(folder.parent), memo)
    if is_run:
        taken = _of_run(folder, step, verify, trusting, say, key, step_key)
        if taken is not None:
            return Located(taken, True, taken / "model", folder, memo)
        say(f"{key}: {folder} has no checkpoints any more; what it exported is taken")
        folder /= "model"
    _check_folder(folder, key)
    return Located(folder, False, folder, _run_above(folder), memo)


def check_vocabulary(located: Located, tokens: int, new: int, template: str, key: str) -> None:
    """Raise UserError where the tokenizer has more `tokens` than the model has embeddings.

    `new` of them were added for the `template`.
    """
    config = json.loads((located.words / "config.json").read_text(encoding="utf-8"))
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if rows is None or tokens <= rows:
        return
    if tokens - new <= rows:
        raise UserError(
            f"{key}: the template {template} needs {new} tokens that the model has never seen; set "
            "the one that the model was trained with"
        )
    raise UserError(
        f"the tokenizer has {tokens} tokens, and the model in {located.words} embeddings for "
        f"{rows}: it is that of another model. Leave model.tokenizer out, or give the right one"
    )


def _is_run(folder: Path, key: str) -> bool:
    """Tell whether this is a training run; raises UserError where it is another one, or in one."""
    if (folder / "config.json").is_file() and (folder / "launch.json").is_file():
        job = _config(folder).get("job", "train")
        if job != "train":
            raise UserError(f"{key}: {folder} is a run of job: {job}, which makes no model; {GIVE}")
        return True
    if folder.name == "checkpoints" and _run_above(folder):
        raise UserError(f"{key}: {folder} is within a run's folder; give {folder.parent}")
    if folder.name == "model" and (folder.parent / manifest.NAME).exists():
        raise UserError(
            f"{key}: {folder} is a part of a checkpoint, without weights; give {folder.parent}"
        )
    return False


def _run_above(folder: Path) -> Path | None:
    run = folder.resolve().parent
    is_run = (run / "config.json").is_file() and (run / "launch.json").is_file()
    return run if is_run and _config(run).get("job", "train") == "train" else None


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _of_run(
    run: Path,
    step: Step,
    verify: Level,
    trusting: bool,
    say: Callable[[str], None],
    key: str,
    step_key: str,
) -> Path | None:
    """Return the folder of the checkpoint to take; None where there is only an exported model."""
    found = manifest.folders(run)
    if not found and step == "newest" and (run / "model").is_dir():
        return None
    if not found:
        raise UserError(f"{key}: the run {run} has no checkpoint yet")
    if step == "newest":
        folder, _ = manifest.newest_good(
            list(found.values()),
            lambda folder: manifest.check(folder, verify)[1],
            say,
            f"Put a good copy back, or give another {key}",
        )
        assert folder is not None
        if not trusting:
            manifest.refuse_untrusted(folder)
        say(f"{key}: the checkpoint of step {manifest.step_of(folder)} of {run} is taken")
        return folder
    number = manifest.best(run) if step == "best" else step
    if number is None:
        raise UserError(f"{step_key}: best, but no checkpoint of {run} was evaluated; give a step")
    if number not in found:
        raise UserError(
            f"{step_key}: got {step}; allowed: newest, best, or one of the checkpoints of {run}: "
            f"{', '.join(map(str, found))}"
        )
    _check_one(found[number], verify, trusting)
    say(f"{key}: the checkpoint of step {number} of {run} is taken")
    return found[number]


def _check_one(folder: Path, verify: Level, trusting: bool) -> None:
    wrong = manifest.check(folder, verify)[1]
    if any(problem.kind == "out of reach" for problem in wrong):
        raise RuntimeError(f"{folder} cannot be read: {wrong[0]}")
    if wrong:
        raise UserError(
            f"the checkpoint of step {manifest.step_of(folder)} is damaged: {wrong[0]}\nTake "
            f"another one; `dist-sft verify {folder.parents[1]}` checks them all"
        )
    if not trusting:
        manifest.refuse_untrusted(folder)


def _check_folder(folder: Path, key: str) -> None:
    """Raise UserError for a folder that holds no model."""
    files = sorted(path.name for path in folder.iterdir())
    holds = f"the folder holds {', '.join(files[:8]) or 'nothing'}"
    if "config.json" not in files:
        raise UserError(f"{key}: {folder} is no model: it has no config.json ({holds}); {GIVE}")
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{key}: {folder} has no safetensors weights ({holds}); {GIVE}")
