"""Make a folder once: one process makes it, others wait; a folder with its final name is whole."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

# A temporary folder in which nothing changed for so long has lost its maker, wherever that ran.
ABANDONED_SECONDS = 3600.0
TEMPORARY = re.compile(r"(?P<name>[^.]+)\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")


class DamagedError(RuntimeError):
    """Report that a folder is missing, cut off or changed; making it again repairs it."""


def make_once(
    path: Path,
    *,
    make: Callable[[Path], None],
    load: Callable[[], T],
    what: str,
    say: Callable[[str], None] = print,
) -> T:
    """Return `load()`; where that raises DamagedError, first `make` the folder `path`.

    `make` fills an empty folder with a temporary name; after that it gets its name. One process
    makes it while others wait on the lock file beside it; whatever `make` raises leaves nothing
    behind, and what a killed maker left is removed by the next one. `path` has no dot in its name;
    `what` names the thing in the lines for a person that `say` gets.
    """
    with suppress(DamagedError):
        return load()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_maker(path, what, say):
        _remove_leftovers(path)
        if path.exists():  # made while this process waited, or damaged
            try:
                return load()
            except DamagedError as damage:
                say(f"{what}: damaged ({damage}), made again")
                _discard(path)
        making = _temporary(path)
        making.mkdir()
        try:
            make(making)
            _commit(making, path)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        return load()


@contextmanager
def _only_maker(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process makes this folder.

    The kernel's lock ends with its process, however that ends. On a file system without locks two
    processes make the same content under two names, and the second to rename loses nothing.
    """
    with _lock_file(path).open("ab") as lock:
        try:
            if not _try_lock(lock):
                say(f"{what}: waiting for another process that makes it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            say(f"{what}: {path.parent} has no file locks ({error}); going on without")
        yield


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _temporary(path: Path) -> Path:
    unique = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}.{unique}.tmp")


def _commit(making: Path, path: Path) -> None:
    sync(making)
    try:
        making.rename(path)
    except OSError as error:
        # Something is there already: another maker was faster, with the same content.
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
    sync(path.parent)


def _discard(path: Path) -> None:
    """Remove a folder, in one step for everybody who looks for its name."""
    doomed = _temporary(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed makers left beside `path`, whose lock the caller holds."""
    for folder in path.parent.iterdir():
        match = TEMPORARY.fullmatch(folder.name)
        if not match:
            continue
        made = path.with_name(match["name"])
        # The folder may vanish meanwhile, a lock be refused: then somebody else takes care of it.
        with suppress(OSError), _lock_file(made).open("ab") as lock:
            gone = _maker_is_gone(folder, match["host"], int(match["pid"]))
            if gone and (made == path or _try_lock(lock)):
                shutil.rmtree(folder)


def _maker_is_gone(folder: Path, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    newest = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
    return time.time() - newest > ABANDONED_SECONDS


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
