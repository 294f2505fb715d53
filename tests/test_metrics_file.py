"""Lines of metrics.jsonl on a disk that is full for a while: they are lost, and the run is not."""

import json
from pathlib import Path

import pytest

from dist_sft.metrics import MetricsFile
from dist_sft.report import read_steps


def test_a_full_disk_is_told_once_and_costs_lines(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.symlink_to("/dev/full")
    metrics = MetricsFile(path, 0, said.append)
    metrics.write(step=1, loss=2.0)
    metrics.write(step=2, loss=2.0)
    metrics.close()
    assert said == ["metrics.jsonl cannot be written, lines are lost: No space left on device"]


def test_half_a_line_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    metrics = MetricsFile(path, 0, said.append)
    metrics.write(step=1, loss=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_file", Half(path))
        metrics.write(step=2, loss=2.0)
    metrics.write(step=3, loss=2.0)
    metrics.close()
    assert [line["step"] for line in read_steps(path)] == [1, 3]
    assert said == ["metrics.jsonl cannot be written, lines are lost: No space left on device"]


def test_half_a_line_of_a_killed_attempt_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"attempt": 0, "step": 1}\n{"attempt": 0, "st')
    metrics = MetricsFile(path, 1)
    metrics.write(step=2, loss=2.0)
    metrics.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"attempt": 1, "step": 2, "loss": 2.0}


class Half:
    """A file on a disk with room for half of what is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: bytes) -> int:
        with open(self._path, "ab") as file:
            return file.write(text[: len(text) // 2])
