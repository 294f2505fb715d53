"""Tell a local path from a name on the hub, and help where one is mistyped."""

import difflib
import os
import re
from pathlib import Path

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
