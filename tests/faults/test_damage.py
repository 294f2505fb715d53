"""Whatever happens to whichever file of a checkpoint: it is noticed, named, and never loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_recipe import Finished

from dist_sft import checkpoint, manifest
from dist_sft.cli import main
from dist_sft.errors import UserError

pytestmark = pytest.mark.timeout(300)


def flip(file: Path) -> None:
    """Change one bit in the middle, in place: size and times of the folder stay."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, cut, empty, Path.unlink)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture
def run_dir(finished: Finished, tmp_path: Path) -> Path:
    """Return a copy of the finished run's checkpoints."""
    shutil.copytree(finished.run_dir / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_file_in_turn(
    damage: Callable[[Path], None], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = manifest.folder_of(run_dir, 10), manifest.folder_of(run_dir, 8)
    whole = run_dir.with_name("whole")
    shutil.copytree(newest, whole)
    names = [file.relative_to(newest).as_posix() for file in files_of(newest)]
    print(len(names), "files:", names)
    assert {"rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"} < set(names)
    assert {"manifest.sha256", "model/config.json", "model/tokenizer.json"} < set(names)
    assert main(["verify", str(run_dir)]) == 0
    capsys.readouterr()
    for name in names:
        damage(newest / name)
        assert main(["verify", str(run_dir)]) == 1
        told = capsys.readouterr().out
        assert str(newest / name) in told or f"(see {name})" in told
        assert str(older) not in told

        said: list[str] = []
        assert checkpoint.newest_good(run_dir, "sha256", said.append) == 8
        (line,) = said
        assert line.startswith("the checkpoint of step 10 is damaged and passed over")
        assert str(newest / name) in line or f"(see {name})" in line
        assert list(manifest.folders(run_dir)) == [8]
        (aside,) = (run_dir / "checkpoints").glob("step-00000010.damaged-*")
        shutil.rmtree(aside)
        shutil.copytree(whole, newest)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "model/config.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_nothing_good_is_left(damage: Callable[[Path], None], name: str, run_dir: Path) -> None:
    for folder in manifest.folders(run_dir).values():
        damage(folder / name)
    said: list[str] = []
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoint.newest_good(run_dir, "sha256", said.append)
    assert [line.partition(" is damaged")[0][-2:].strip() for line in said] == ["10", "8"]
    assert list(manifest.folders(run_dir)) == [8, 10], "a person may put a good copy back"


@pytest.mark.usefixtures("alone")
def test_sizes_alone_miss_a_flipped_bit_only(run_dir: Path) -> None:
    """`checkpoint.verify: size` notices what a crash or a full disk does, and says no more."""
    newest = manifest.folder_of(run_dir, 10)
    flip(newest / "rank-00000.safetensors")
    said: list[str] = []
    assert checkpoint.newest_good(run_dir, "size", said.append) == 10
    assert not said
    cut(newest / "rank-00001.safetensors")
    assert checkpoint.newest_good(run_dir, "size", said.append) == 8
    assert "rank-00001.safetensors" in said[0]


@pytest.mark.usefixtures("alone")
def test_only_what_would_be_loaded_must_be_trusted(run_dir: Path) -> None:
    """Nobody minds an older one that others may write, until it is the one to go on from."""
    newest, older = manifest.folder_of(run_dir, 10), manifest.folder_of(run_dir, 8)
    (older / "rank-00000.safetensors").chmod(0o666)
    said: list[str] = []
    assert checkpoint.newest_good(run_dir, "sha256", said.append) == 10
    assert not said
    cut(newest / "rank-00001.safetensors")
    with pytest.raises(UserError, match=r"/step-00000008/rank-00000.safetensors may be written by"):
        checkpoint.newest_good(run_dir, "sha256", said.append)
    assert list(manifest.folders(run_dir)) == [8, 10], "nothing was moved"
    assert checkpoint.newest_good(run_dir, "sha256", said.append, trusting=True) == 8
    assert list(manifest.folders(run_dir)) == [8]


@pytest.mark.usefixtures("alone")
def test_what_is_not_trusted_is_not_passed_over(run_dir: Path) -> None:
    """Who may write a folder could make any run go back, if that made it go on from before."""
    newest = manifest.folder_of(run_dir, 10)
    newest.chmod(0o770)
    with pytest.raises(UserError, match=r"step-00000010 may be written by others \(drwxrwx---\)"):
        checkpoint.newest_good(run_dir, "sha256", lambda _: None)
    assert checkpoint.newest_good(run_dir, "sha256", lambda _: None, trusting=True) == 10
