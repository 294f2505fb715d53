"""Which checkpoints are kept, which is the best, and which may have been changed by others."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from dist_sft import checkpoint, lease, manifest
from dist_sft.cli import main
from dist_sft.errors import UserError
from dist_sft.rollback import Rollback, record_rollback
from dist_sft.runs import Launch
from dist_sft.status import status


def make(run_dir: Path, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        folder = manifest.folder_of(run_dir, step)
        folder.mkdir(parents=True)
        evaluated = None if loss is None else {"held_out": loss, "other": -loss}
        content = {"format": manifest.FORMAT, "step": step, "files": {}, "eval_loss": evaluated}
        manifest.write(folder, content)


def kept(run_dir: Path) -> list[int]:
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name[0] == "."]
    return list(manifest.folders(run_dir))


def test_pruning_keeps_the_newest_the_best_and_every_kth(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: 1.2, 7: None}
    make(tmp_path, losses)
    assert manifest.best(tmp_path) == 2
    checkpoint.prune(tmp_path, 2, keep_every=4)
    assert kept(tmp_path) == [2, 4, 6, 7]
    checkpoint.prune(tmp_path, 2)
    assert kept(tmp_path) == [2, 6, 7]


def test_nothing_evaluated_has_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, {1: None, 2: None, 3: None})
    assert manifest.best(tmp_path) is None
    checkpoint.prune(tmp_path, 2)
    assert kept(tmp_path) == [2, 3]
    assert main(["verify", str(tmp_path), "--step", "best"]) == 2
    assert "no checkpoint was evaluated" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    make(tmp_path, {1: 3.0, 2: 2.0})
    folder = manifest.folder_of(tmp_path, 3)
    folder.mkdir()
    unknown = {"held_out": None, "other": 1.0}
    manifest.write(
        folder, {"format": manifest.FORMAT, "step": 3, "files": {}, "eval_loss": unknown}
    )
    assert manifest.best(tmp_path) == 2


def test_damaged_checkpoints_do_not_count_when_old_ones_go(tmp_path: Path) -> None:
    make(tmp_path, dict.fromkeys((1, 2, 3, 4, 5)))
    for damaged in (2, 4):
        (manifest.folder_of(tmp_path, damaged) / manifest.NAME).unlink()
    checkpoint.prune(tmp_path, 2)
    assert kept(tmp_path) == [3, 4, 5], "two good ones stay, and what lies between them"


def go_back(run_dir: Path, *rollbacks: Rollback) -> None:
    for rollback in rollbacks:
        record_rollback(run_dir, rollback, 0, "the loss is nan")


def test_checkpoints_that_a_run_went_back_from_count_for_nothing(tmp_path: Path) -> None:
    make(tmp_path, {2: 5.0, 4: 4.0, 6: 3.0, 8: 1.0})
    go_back(tmp_path, Rollback(8, 9), Rollback(6, 10))
    make(tmp_path, {10: 2.0})  # of a stop right after going back: the state is that of step 6
    assert list(manifest.folders(tmp_path)) == [2, 4, 6, 10]
    assert manifest.best(tmp_path) == 10
    checkpoint.prune(tmp_path, 2)
    assert list(manifest.every_folder(tmp_path)) == [6, 10], "and 8 would be a dead end"


def test_nothing_goes_while_something_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0})
    with monkeypatch.context() as patch:
        Flaky(patch, manifest.NAME, 3, within="step-00000001")
        checkpoint.prune(tmp_path, 2)
    assert kept(tmp_path) == [1, 2, 3, 4], "the first one may be the best, and it is"
    checkpoint.prune(tmp_path, 2)
    assert kept(tmp_path) == [1, 3, 4]


def test_a_checkpoint_under_another_steps_name_is_not_believed(tmp_path: Path) -> None:
    make(tmp_path, {10: None})
    manifest.folder_of(tmp_path, 10).rename(manifest.folder_of(tmp_path, 77))
    (problem,) = manifest.check(manifest.folder_of(tmp_path, 77))[1]
    assert str(problem).endswith("step-00000077 is the checkpoint of step 10")


def test_a_checkpoint_of_another_format_is_not_called_damaged(tmp_path: Path) -> None:
    manifest.write(tmp_path, {"format": manifest.FORMAT + 1})
    with pytest.raises(UserError, match="install the version that wrote it"):
        manifest.check(tmp_path)


def test_names_that_lead_out_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    for name in ("../../elsewhere", "/elsewhere", "model/../../elsewhere"):
        manifest.write(tmp_path, {"format": manifest.FORMAT, "step": 1, "files": {name: {}}})
        with pytest.raises(manifest.DamagedCheckpoint, match="is not within the folder"):
            manifest.read(tmp_path)


def test_what_a_killed_pruning_left_is_in_nobodys_way(tmp_path: Path) -> None:
    make(tmp_path, {1: None, 2: None, 3: None})
    old = tmp_path / "checkpoints" / ".step-00000001.old"
    old.mkdir()
    (old / "manifest.json").touch()
    checkpoint.prune(tmp_path, 2)
    assert kept(tmp_path) == [2, 3]


def test_leftovers_go(tmp_path: Path) -> None:
    make(tmp_path, {1: None})
    for name in (".step-00000002.attempt-0.tmp", ".step-00000000.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    checkpoint.remove_leftovers(tmp_path)
    assert kept(tmp_path) == [1]


@pytest.mark.parametrize("step", ["2", "best"])
def test_a_step_is_named_by_number_or_as_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    make(tmp_path, {1: 2.0, 2: 1.0, 3: 3.0})
    assert main(["verify", str(tmp_path), "--step", step]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].split() == ["step", "saved", "on", "files", "size", "eval", "loss", "verdict"]
    row = "2 1 rank, ZeRO none 0 0 bytes 1.0000 (best) whole"
    assert [" ".join(line.split()) for line in told[3:] if line.strip()] == [row]
    assert main(["verify", str(tmp_path), "--step", "x"]) == 2
    assert "allowed: best, or one of the checkpoints [1, 2, 3]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("run/checkpoints/step-00000002", "is one checkpoint; give {0}/run{1}"),
        ("run/checkpoints/step-00000003", "is one checkpoint; give {0}/run{2}"),
        ("run/checkpoints", "is within a run's folder; give {0}/run"),
        ("missing", "does not exist; give the folder that is run_dir in the recipe"),
        ("run/config.json", "is a file; give the folder that is run_dir in the recipe"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "export", "status", "stop"])
def test_a_path_that_is_not_a_runs_folder_says_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, told: str, command: str
) -> None:
    make(tmp_path / "run", {2: None})
    (tmp_path / "run/config.json").touch()
    others = [str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(tmp_path / path), *others]) == 2
    steps = (" --step 2", " --step 3") if command in ("verify", "export") else ("", "")
    assert capsys.readouterr().err == (
        f"RUN_DIR: {tmp_path / path} {told.format(tmp_path, *steps)}\n"
    )


def test_a_run_may_be_called_as_a_part_of_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "checkpoints" / "step-00000007"
    make(run_dir, {2: None})
    assert main(["verify", str(run_dir)]) == 0
    make(run_dir.parent, {2: None})
    assert main(["verify", str(run_dir.parent)]) == 0


def test_files_that_nobody_reads_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, {1: None})
    note = manifest.folder_of(tmp_path, 1) / "model" / "note.txt"
    note.parent.mkdir()
    note.touch()
    assert main(["verify", str(tmp_path)]) == 0
    assert f"{note}: not in the manifest, and nothing reads it" in capsys.readouterr().out


class Flaky:
    """A file system that fails some of the times at which a file of that name is read."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        name: str,
        times: int,
        *,
        error: int = errno.ESTALE,
        within: str = "",
    ) -> None:
        self.left, read = times, Path.read_bytes

        def read_bytes(path: Path) -> bytes:
            if path.name == name and within in str(path) and self.left:
                self.left -= 1
                raise OSError(error, os.strerror(error), str(path))
            return read(path)

        patch.setattr(Path, "read_bytes", read_bytes)
        patch.setattr(manifest, "PAUSES", (0.01, 0.01))


def test_a_passing_error_of_the_file_system_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {1: None})
    flaky = Flaky(monkeypatch, manifest.NAME, 2)
    assert manifest.check(manifest.folder_of(tmp_path, 1))[1] == []
    assert flaky.left == 0


@pytest.mark.parametrize(("error", "kind"), [("ESTALE", "out of reach"), ("EIO", "lost")])
def test_what_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, kind: str
) -> None:
    make(tmp_path, {1: None})
    folder, number = manifest.folder_of(tmp_path, 1), getattr(errno, error)
    Flaky(monkeypatch, manifest.NAME, 3, error=number)
    (problem,) = manifest.check(folder)[1]
    assert problem.kind == kind
    assert str(problem) == f"{folder / manifest.NAME}: {os.strerror(number)}"
    (folder / manifest.NAME).unlink()
    (problem,) = manifest.check(folder)[1]
    assert problem.kind == "damaged"


def test_a_folder_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a run folder: it has no checkpoints and no config" in capsys.readouterr().err
    (tmp_path / "config.json").touch()
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"RUN_DIR: {tmp_path} has no checkpoint yet\n"


def test_what_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    make(tmp_path, {1: None})
    folder = manifest.folder_of(tmp_path, 1)
    folder.chmod(0o700)
    file = folder / manifest.NAME
    file.chmod(0o600)
    assert manifest.untrusted(folder) is None
    file.chmod(0o664)
    assert manifest.untrusted(folder) == f"{file} may be written by others (-rw-rw-r--)"


def test_what_belongs_to_others_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {1: None})
    folder = manifest.folder_of(tmp_path, 1)
    owner = folder.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    assert manifest.untrusted(folder) == (f"{folder.parent} belongs to another user ({owner})")


def test_status_and_stop_are_about_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").touch()
    for command in ("status", "stop"):
        for path in (tmp_path, tmp_path / "nothing", tmp_path / "recipe.yaml"):
            assert main([command, str(path)]) == 2
    capsys.readouterr()
    launch = Launch("local", 1, 1, {}, "0")
    (tmp_path / "launch.json").write_text(json.dumps(asdict(launch)))
    assert main(["stop", str(tmp_path)]) == 2
    assert "nobody works on" in capsys.readouterr().err
    (tmp_path / "logs/attempt-0").mkdir(parents=True)
    with lease.hold(tmp_path, 0):
        assert f"owner: process {os.getpid()} on " in status(tmp_path)[1]
        assert status(tmp_path)[2] == "attempt 0: works, if its owner is alive"
        held = json.loads((tmp_path / "lease.json").read_text())
    held["owner"]["started"] = "1"  # another process had this number
    (tmp_path / "lease.json").write_text(json.dumps(held))
    assert status(tmp_path)[1].startswith(f"owner: nobody; process {os.getpid()} on ")
    assert status(tmp_path)[2] == "attempt 0: no outcome: it was killed"
    assert main(["stop", str(tmp_path)]) == 2
    assert "nobody works on" in capsys.readouterr().err
    (tmp_path / "launch.json").unlink()
    assert not (tmp_path / "STOP").exists()
    with pytest.raises(UserError, match="is no run folder, or not prepared"):
        status(tmp_path)
