"""The SHA-256 of files: of one that is there, of one that did not change, of one being written.

Every node asks at every start whether source and encoded data are what they were. Reading them for
that takes a second per GiB where the disk is fast, and minutes where many nodes share one.
"""

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

# A file may change twice within one tick of its time stamps, so a young one is not remembered. Two
# seconds is the coarsest tick around; the rest is for clocks that differ between hosts.
SETTLED_SECONDS = 10.0
# Bits that rot below the file system change no time stamp: after this long all are read again.
REMEMBERED_SECONDS = 7 * 86_400.0


def sha256(file: Path) -> str:
    """Return the SHA-256 of every byte in the file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remembered_sha256(file: Path, folder: Path) -> str:
    """Return the SHA-256 of a file; one that did not change is read once, `folder` remembers it.

    A change that went through the file system is noticed, also one of the same size with its time
    of modification put back: that sets `ctime`. Not noticed for up to `REMEMBERED_SECONDS` is what
    leaves size, times and inode alone: rotten bits, a write past the file system, and a file system
    that keeps no `ctime` of its own where the time of modification is put back as well.
    """
    with file.open("rb") as stream:  # opening first makes a network file system look again
        before = _state(stream)
        memo = folder / _name(file, before)
        known = _read(memo)
        if known is not None:
            return known
        began = time.time()
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        unchanged = _state(stream) == before
    age = began - max(before.mtime_ns, before.ctime_ns) / 1e9
    if unchanged and age > SETTLED_SECONDS:
        # A cache that only others may write to is read every time. Half a line, left by a power
        # failure, is no digest: no temporary name is needed here.
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            memo.write_text(digest, encoding="ascii")
    return digest


class HashingFile:
    """Write one file; hash what was meant to be written, not what the disk made of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file."""
        self._stream.write(data)
        self._digest.update(data)

    def finish(self) -> tuple[int, str]:
        """Flush everything to disk; return the file's size and SHA-256."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._stream.tell(), self._digest.hexdigest()


class _State(NamedTuple):
    """Hold what a file system knows to be different when a file is."""

    size: int
    mtime_ns: int
    ctime_ns: int
    """Set by every change; unlike the time of modification, utime() cannot put it back."""
    inode: int


def _state(stream: BinaryIO) -> _State:
    state = os.fstat(stream.fileno())
    return _State(state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


def _name(file: Path, state: _State) -> str:
    identity = json.dumps([os.path.realpath(file), *state])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _read(memo: Path) -> str | None:
    try:
        if time.time() - memo.stat().st_mtime > REMEMBERED_SECONDS:
            return None
        text = memo.read_bytes().decode("ascii", errors="replace")
    except OSError:
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None
