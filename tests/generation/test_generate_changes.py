"""A generation run whose input, model or recipe has changed: refused, or what holds is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from generating import after, attempt, launch, rows_in, work
from tiny_generation import ROWS, output_of, write

from dist_sft import generate, parts, progress, runs
from dist_sft.config import read_recipe
from dist_sft.console import Console
from dist_sft.errors import UserError
from dist_sft.prepack import PrepackedLinear

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
    assert "rows that kept earlier answers: 116 of 119" in capsys.readouterr().out


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
    assert f"rows that kept earlier answers: 0 of {ROWS}" in capsys.readouterr().out


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


def test_each_of_rows_that_are_the_same_keeps_an_answer_of_its_own(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    same = [json.dumps({"prompt": "who?"})] * 20
    prompts.write_text("\n".join(same) + "\n")
    sections = {"input": [{"path": str(prompts)}], "cache_dir": str(tmp_path)}
    drawn = {"temperature": 1.0, "num_samples": 2}
    path = write(recipe, tmp_path / "run", generate=recipe["generate"] | drawn, **sections)
    assert work(path, monkeypatch).code == runs.FINISHED
    old = [row["generated"] for row in rows_in(output_of(tmp_path / "run").read_bytes())]
    assert len(set(old)) > 30
    prompts.write_text("\n".join([json.dumps({"prompt": "first?"}), *same, *same]) + "\n")
    assert work(path, monkeypatch, "--reuse-unchanged").code == runs.FINISHED
    new = [row["generated"] for row in rows_in(output_of(tmp_path / "run").read_bytes())]
    assert new[2:42] == old, "those that were there keep theirs, though their places are others"
    assert len(set(new)) > 60, "and new ones have none of theirs"


def test_rows_that_could_not_be_answered_are_tried_again(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run")
    answer = generate.HuggingFace.answer
    with monkeypatch.context() as patch:
        patch.setattr(
            generate.HuggingFace, "answer",
            lambda self, requests: [
                said._replace(reason="memory") if asked.row == 9 else said
                for asked, said in zip(requests, answer(self, requests), strict=True)
            ],
        )  # fmt: skip
        assert work(path, patch).code == runs.FINISHED
    assert rows_in(output_of(tmp_path / "run").read_bytes())[9]["finish_reason"] == "error"
    smaller = write(recipe, tmp_path / "run", generate={"batch_tokens": 200})
    assert work(smaller, monkeypatch, "--reuse-unchanged").code == runs.FINISHED
    new, old = rows_in(output_of(tmp_path / "run").read_bytes()), rows_in(greedy)
    assert new[9]["finish_reason"] == old[9]["finish_reason"]
    assert new[:9] + new[10:] == old[:9] + old[10:]


def test_weights_that_lie_otherwise_may_change_last_bits_and_no_more(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is not continued unnoticed; with --reuse-unchanged, it keeps all answers."""
    finished_run(recipe, tmp_path, monkeypatch)
    loaded: list[torch.nn.Module] = []
    load = generate.load
    monkeypatch.setattr(
        generate, "load", lambda *args, **how: loaded.append(load(*args, **how)) or loaded[-1]
    )
    sections = {"input": [{"path": str(tmp_path / "prompts.jsonl")}]}
    plain = write(recipe, tmp_path / "run", generate={"prepack_weights": False}, **sections)
    assert launch(plain) == runs.WRONG_INPUT
    monkeypatch.setattr(
        generate.HuggingFace, "answer", lambda self, requests: [1 / 0 for _ in requests]
    )
    assert work(plain, monkeypatch, "--reuse-unchanged").code == runs.FINISHED
    assert rows_in(output_of(tmp_path / "run").read_bytes()) == rows_in(greedy)
    assert not any(isinstance(layer, PrepackedLinear) for layer in loaded[-1].modules())


def test_the_wish_to_reuse_counts_once(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart by a scheduler goes on with what the launch began, and does not look again."""
    path, prompts = finished_run(recipe, tmp_path, monkeypatch)
    run_dir = tmp_path / "run"
    prompts.write_text(prompts.read_text() + '{"prompt": "one more"}\n')
    with monkeypatch.context() as patch:
        patch.setattr(progress, "LOOK_SECONDS", 0.0)
        after(3, (run_dir / "STOP").touch, patch)
        assert work(path, patch, "--reuse-unchanged").code == runs.STOPPED
    (run_dir / "STOP").unlink()
    assert "reuse_unchanged" not in runs.read_launch(run_dir).options
    prompts.write_text(prompts.read_text() + '{"prompt": "and another"}\n')
    with pytest.raises(UserError, match=f"rows: {ROWS + 1} -> {ROWS + 2}"):
        attempt(run_dir, monkeypatch)
    assert len(parts.finished(run_dir)) == 3


def test_a_mistake_in_a_recipe_costs_no_run_folder(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run", generate={"on_error": "stop", "part_rows": 50})
    with pytest.raises(UserError, match=r"set generate\.on_error: record"):
        work(path, monkeypatch)
    runs.write_outcome(tmp_path / "run", 0, runs.Outcome(runs.WRONG_INPUT, "row 7", -1))
    assert work(write(recipe, tmp_path / "run"), monkeypatch).code == runs.FINISHED
    assert output_of(tmp_path / "run").read_bytes() == greedy


def test_what_another_node_sees_must_be_the_same(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run")
    assert work(path, monkeypatch).code == runs.FINISHED
    run_dir, told = tmp_path / "run", Console(None).say
    first = json.loads((runs.attempt_dir(run_dir, 0) / "data-0.json").read_text())
    settings, launched = read_recipe(path), runs.read_launch(run_dir)
    here = (run_dir, 0, settings, launched, torch.device("cpu"), told)
    assert generate.prepare(*here, first) == first
    for key in ("input", "model", "template and tokenizer"):
        with pytest.raises(UserError, match=f": {key}: this node sees something else"):
            generate.prepare(*here, first | {key: "x"})


def test_a_finished_run_needs_nothing_but_its_output(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, prompts = finished_run(recipe, tmp_path, monkeypatch)
    run_dir = tmp_path / "run"
    output_of(run_dir).write_text("somebody else's\n")
    assert launch(path) == runs.WRONG_INPUT
    assert "there is a file that this run did not make" in capsys.readouterr().err
    output_of(run_dir).unlink()
    assert work(path, monkeypatch).code == runs.FINISHED
    prompts.rename(tmp_path / "gone.jsonl")
    capsys.readouterr()
    monkeypatch.setattr("dist_sft.preflight.missing_paths", lambda recipe: [])
    assert launch(path) == runs.FINISHED
    assert "is finished already" in capsys.readouterr().out
