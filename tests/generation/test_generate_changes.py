"""A generation run whose input, model or recipe has changed: refused, or what holds is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from generating import launch, rows_in, work
from tiny_generation import ROWS, output_of, write

from dist_sft import generate, parts, runs
from dist_sft.config import read_recipe
from dist_sft.errors import UserError

# ---- what has changed ----------------------------------------------------------------------------


def finished_run(
    recipe: dict[str, Any], tmp_path: Path, patch: pytest.MonkeyPatch, **sections: Any
) -> tuple[Path, Path]:
    """Finish a run of prompts of its own; return its recipe and the file of prompts."""
    prompts = tmp_path / "prompts.jsonl"
    shutil.copyfile(recipe["input"][0]["path"], prompts)
    path = write(recipe, tmp_path / "run", input=[{"path": str(prompts)}], **sections)
    assert work(path, patch).code == runs.FINISHED
    return path, prompts


def test_a_changed_input_is_refused_and_unchanged_rows_can_be_kept(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, prompts = finished_run(recipe, tmp_path, monkeypatch)
    assert launch(path) == runs.FINISHED
    assert "is finished already: the answers are in" in capsys.readouterr().out
    lines = prompts.read_text().splitlines()
    lines[10] = json.dumps({"prompt": "something else", "id": "new"})
    del lines[50]
    prompts.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as refused:
        work(path, monkeypatch)
    assert "has answers that were made from something else" in str(refused.value)
    assert f"rows: {ROWS} -> {ROWS - 1}" in str(refused.value)
    assert "input.0: " in str(refused.value)
    assert "--reuse-unchanged" in str(refused.value)
    answered: list[int] = []
    answer = generate.HuggingFace.answer
    monkeypatch.setattr(
        generate.HuggingFace, "answer",
        lambda self, requests: answered.extend(r.row for r in requests) or answer(self, requests),
    )  # fmt: skip
    assert work(path, monkeypatch, "--reuse-unchanged").code == runs.FINISHED
    assert answered == [10]
    old, new = rows_in(greedy), rows_in(output_of(tmp_path / "run").read_bytes())
    assert [row["row"] for row in new] == list(range(ROWS - 1))
    assert new[:10] == old[:10]
    assert new[10]["id"] == "new"
    assert new[11:50] == old[11:50]
    assert [{**row, "row": row["row"] + 1} for row in new[50:]] == old[51:]
    assert "rows whose earlier answers were kept: 116" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generate": {"temperature": 0.5}}, "generate.temperature: 0.0 -> 0.5"),
        ({"generate": {"max_new_tokens": 9}}, "generate.max_new_tokens: 12 -> 9"),
        ({"template": "alpaca"}, 'template: "human-assistant" -> "alpaca"'),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"generate": {"part_rows": 9}}, "generate.part_rows: 8 -> 9"),
    ],
)
def test_changed_settings_are_refused_before_anything_starts(
    recipe: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    (run_dir / "parts" / "part-00000").mkdir(parents=True)
    before = write(recipe, tmp_path / "before")
    config = read_recipe_json(before, run_dir)
    (run_dir / "config.json").write_text(config)
    assert launch(write(recipe, run_dir, **change)) == runs.WRONG_INPUT
    err = capsys.readouterr().err
    assert words in err
    assert "--reuse-unchanged" in err
    assert (run_dir / "config.json").read_text() == config


def read_recipe_json(path: Path, run_dir: Path) -> str:
    output = json.dumps(str(output_of(run_dir)))
    return read_recipe(path, [f"run_dir={run_dir}", f"output.path={output}"]).to_json()


def test_another_model_is_refused_and_nothing_is_kept(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(recipe["model"]["path"], model)
    path, _ = finished_run(recipe, tmp_path, monkeypatch, model={"path": str(model)})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=r"\n  model: .*model \(\w{12}\) -> .*model \(\w{12}\)\n"):
        work(path, monkeypatch)
    assert work(path, monkeypatch, "--reuse-unchanged").code == runs.FINISHED
    assert "earlier answers were kept" not in capsys.readouterr().out


def test_another_place_for_the_output_needs_no_new_answers(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert work(write(recipe, run_dir), monkeypatch).code == runs.FINISHED
    inode = (parts.folder_of(run_dir, 3) / "rows.jsonl").stat().st_ino
    path = write(recipe, run_dir, output={"path": str(tmp_path / "elsewhere.parquet")})
    assert not runs.is_finished(read_recipe(path))
    assert work(path, monkeypatch).code == runs.FINISHED
    assert len(pq.read_table(tmp_path / "elsewhere.parquet")) == ROWS
    assert (parts.folder_of(run_dir, 3) / "rows.jsonl").stat().st_ino == inode
    assert output_of(run_dir).read_bytes() == greedy
