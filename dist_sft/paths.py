"""Tell a local path from a name on the hub, a run from a model; help where one is mistyped."""

import difflib
import os
import re
from pathlib import Path

from dist_sft.errors import UserError

FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_local(path: str) -> bool:
    """Tell whether `path` can only be a file or folder: no hub name looks like that."""
    return not HUB_NAME.fullmatch(path) or path.lower().endswith(FILE_TYPES)


def near_matches(missing: str) -> str:
    """Return a hint to end a message about `missing` with: names like it, or where was looked."""
    path = Path(missing).expanduser()
    folder = path.parent
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return f" (the folder {folder} does not exist, seen from {Path.cwd()})"
    except OSError as error:
        return f" (the folder {folder} cannot be read: {error.strerror})"
    near = difflib.get_close_matches(path.name, names, n=3)
    if not near:
        return f" (looked in {folder.resolve()})"
    return f"; did you mean {' or '.join(str(folder / name) for name in near)}?"


def cache_folder(cache_dir: str | None) -> Path:
    """Return where what is made from data is kept: as the recipe says, or by default."""
    if cache_dir is not None:
        return Path(cache_dir)
    default = Path.home() / ".cache" / "dist_sft"
    return Path(os.environ.get("DIST_SFT_CACHE", default))


def explain_missing(place: str, error: Exception) -> str:
    """Say in a line why nothing could be loaded from a folder or hub name."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(place).is_dir():
        files = ", ".join(sorted(path.name for path in Path(place).iterdir())[:8])
        return f"{said} (the folder holds {files or 'nothing'})"
    if is_local(place):
        return "there is no such folder"
    return f"there is no such folder here, and the hub does not give it: {said}"


def model_folder(path: str) -> str:
    """Return where a model's files are: a run folder stands for what it exported."""
    folder = Path(path)
    if not (folder / "checkpoints").is_dir() or not (folder / "launch.json").is_file():
        return path
    if not (folder / "model").is_dir():
        raise UserError(f"model.path: the run {path} has exported no model yet (no {path}/model)")
    return str(folder / "model")
