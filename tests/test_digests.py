"""A file is hashed again exactly where it may have changed."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from dist_sft import digests
from dist_sft.digests import remembered_sha256


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"some rows")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "digests"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the files that were read, and take every file for one that has settled."""
    read: list[str] = []
    file_digest = hashlib.file_digest

    def note(stream, name):
        read.append(Path(stream.name).name)
        return file_digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", note)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    return read


def test_an_unchanged_file_is_read_once(file: Path, folder: Path, hashed: list[str]) -> None:
    expected = hashlib.sha256(b"some rows").hexdigest()
    assert [remembered_sha256(file, folder) for _ in range(3)] == [expected] * 3
    assert hashed == ["rows.jsonl"]
    (folder.parent / "elsewhere").symlink_to(file)
    assert remembered_sha256(folder.parent / "elsewhere", folder) == expected
    assert len(hashed) == 1, "the same file under another name"


def flip(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"S")


def flip_and_put_the_time_back(file: Path) -> None:
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"Some rows")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [flip, flip_and_put_the_time_back, replace])
def test_a_change_of_the_same_size_is_noticed(
    change, file: Path, folder: Path, hashed: list[str]
) -> None:
    remembered_sha256(file, folder)
    time.sleep(0.1)  # longer than a tick of the file system's clock
    change(file)
    assert remembered_sha256(file, folder) == hashlib.sha256(b"Some rows").hexdigest()
    assert len(hashed) == 2


def test_what_is_read_again_after_a_week(file: Path, folder: Path, hashed: list[str]) -> None:
    remembered_sha256(file, folder)
    [memo] = folder.iterdir()
    week = digests.REMEMBERED_SECONDS
    for age, count in ((week - 60, 1), (week + 60, 2), (0, 2)):
        if age:
            os.utime(memo, (time.time() - age,) * 2)
        remembered_sha256(file, folder)
        assert len(hashed) == count


@pytest.mark.parametrize("content", [b"", b"0123", b"x" * 64, b"\xff" * 64])
def test_half_a_memory_is_none(content: bytes, file: Path, folder: Path, hashed: list[str]) -> None:
    whole = remembered_sha256(file, folder)
    [memo] = folder.iterdir()
    memo.write_bytes(content)
    assert remembered_sha256(file, folder) == whole
    assert memo.read_text() == whole
    assert len(hashed) == 2


def test_a_young_file_is_not_remembered(
    file: Path, folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 10.0)
    for _ in range(2):
        remembered_sha256(file, folder)
    assert len(hashed) == 2
    assert not folder.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    file: Path, folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file_digest = hashlib.file_digest

    def grow(stream, name):
        with file.open("ab") as end:
            end.write(b"!")
        return file_digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", grow)
    remembered_sha256(file, folder)
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    file: Path, folder: Path, hashed: list[str]
) -> None:
    folder.write_text("a file is in the way")
    expected = hashlib.sha256(b"some rows").hexdigest()
    assert [remembered_sha256(file, folder) for _ in range(2)] == [expected] * 2
    assert len(hashed) == 2
