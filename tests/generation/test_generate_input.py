"""Input, output and settings that cannot work: refused, and nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
from generating import after, launch, work
from tiny_generation import output_of, write

from dist_sft import parts, runs
from dist_sft.errors import UserError

# ---- wrong input ---------------------------------------------------------------------------------


def nothing_is_half_written(run_dir: Path, suffix: str = ".jsonl") -> bool:
    left = [path.name for path in run_dir.parent.glob(f".{run_dir.name}*")]
    return not (output_of(run_dir, suffix).exists() or parts.finished(run_dir) or left)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "who?"}\n{"question": "why?"}\n', "fits no known format"),
        ("", "the file is empty, it holds no rows"),
        ("[1]\n", "line 1 starts a JSON array"),
        ('{"prompt": "who?", "row": 3}\n', "rows have the column 'row', which the output needs"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "1"}\n', "do not fit into the columns"),
        ('{"prompt": "a", "x": "\\ud800"}\n', "do not fit into the columns"),
        (f'{{"prompt": "a", "x": {10**30}}}\n', "do not fit into the columns"),
        ('{"prompt": "a", "x": {}}\n', "do not fit into a Parquet file"),
    ],
)
def test_input_that_cannot_be_answered_is_refused(
    recipe: dict[str, Any], text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    suffix = ".parquet" if "columns of" in words or "do not fit" in words else ".jsonl"
    path = write(
        recipe, tmp_path / "run", suffix, input=[{"path": str(tmp_path / "in.jsonl")}],
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        work(path, monkeypatch)
    assert nothing_is_half_written(tmp_path / "run", suffix)
    assert not list((tmp_path / "cache").glob("input-*.tmp"))


def test_an_answer_longer_than_the_model_is_refused(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run", generate={"max_new_tokens": 10**6})
    with pytest.raises(UserError, match=r"generate\.max_new_tokens: got 1000000, but the model"):
        work(path, monkeypatch)
    assert nothing_is_half_written(tmp_path / "run")


def test_a_row_that_cannot_be_answered_ends_the_run_where_that_was_asked_for(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run", generate={"on_error": "stop"})
    with pytest.raises(UserError, match="input: row 7 cannot be answered: broken JSON at line 8"):
        work(path, monkeypatch)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("missing/answers.jsonl", "there is no folder"),
        ("folder.jsonl", "this is a folder"),
        ("there.jsonl", "there is a file that this run did not make"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(
    recipe: dict[str, Any], output: str, words: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "there.jsonl").write_text("precious\n")
    path = write(recipe, tmp_path / "run", output={"path": str(tmp_path / output)})
    assert launch(path) == runs.WRONG_INPUT
    err = capsys.readouterr().err
    assert "output.path=" in err
    assert words in err
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "there.jsonl").read_text() == "precious\n"


def test_a_file_that_appears_at_the_output_meanwhile_is_not_replaced(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    output = output_of(run_dir)
    with monkeypatch.context() as patch:
        after(15, lambda: output.write_text("precious\n") and None, patch)
        with pytest.raises(UserError, match="there is a file that this run did not make"):
            work(path, patch)
    assert output.read_text() == "precious\n"
    output.unlink()
    assert work(path, monkeypatch).code == runs.FINISHED
    assert output.read_bytes() == greedy


def test_run_folders_of_two_jobs_are_not_mixed(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(recipe, tmp_path / "run")
    (tmp_path / "run").mkdir()
    training = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d.json"}]}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(training))
    assert launch(path) == runs.WRONG_INPUT
    assert "belongs to a run of job: train; give another run_dir" in capsys.readouterr().err
