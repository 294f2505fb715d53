"""Offline generation: every row once, in order, the same bytes whatever happened on the way."""

import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from generating import KILLED, after, attempt, rows_in, work, work_until_killed
from tiny_generation import BROKEN, ROWS, output_of, row_of, write

from dist_sft import generate, local, parts, progress, runs
from dist_sft.cli import main as dist_sft
from dist_sft.config import read_config_json
from dist_sft.merge import COLUMNS

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "num_samples": 2}


# ---- what comes out ------------------------------------------------------------------------------


def test_every_row_comes_out_once_in_order_with_all_its_fields(greedy: bytes) -> None:
    rows = rows_in(greedy)
    assert [(row["row"], row["sample"]) for row in rows] == [(n, 0) for n in range(ROWS)]
    for number, row in enumerate(rows):
        added = {key: row[key] for key in COLUMNS if key in row}
        if number in BROKEN:
            assert added["finish_reason"] == "error"
            assert added["generated"] is None
            assert added["error"]
            continue
        assert {key: row[key] for key in row if key not in COLUMNS} == row_of(number)
        assert added.keys() == set(COLUMNS) - {"error"}
        assert added["prompt_tokens"] > 0
        assert added["finish_reason"] in ("eos", "length")
        assert (added["generated_tokens"] == 12) == (added["finish_reason"] == "length")
        assert not added["prompt_truncated"]
    assert len({row["generated"] for row in rows}) > ROWS / 2


def test_samples_stand_together_and_differ(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run", generate=SAMPLED)
    assert work(path, monkeypatch).code == runs.FINISHED
    rows = rows_in(output_of(tmp_path / "run").read_bytes())
    assert [(r["row"], r["sample"]) for r in rows] == [(n, s) for n in range(ROWS) for s in (0, 1)]
    pairs = [
        (rows[2 * n]["generated"], rows[2 * n + 1]["generated"])
        for n in range(ROWS)
        if n not in BROKEN
    ]
    assert sum(one != other for one, other in pairs) > 0.9 * len(pairs)


def test_parquet_holds_the_same_rows(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run", suffix=".parquet")
    assert work(path, monkeypatch).code == runs.FINISHED
    found = pq.read_table(output_of(tmp_path / "run", ".parquet")).to_pylist()
    names = {name for row in rows_in(greedy) for name in row}
    assert found == [{**dict.fromkeys(found[0]), **row} for row in rows_in(greedy)]
    assert found[0].keys() == names


def test_the_summary_counts_rows_tokens_reasons_and_failures(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write(recipe, tmp_path / "run")
    assert work(path, monkeypatch).code == runs.FINISHED
    out = capsys.readouterr().out
    rows = rows_in(greedy)
    reasons = Counter(row["finish_reason"] for row in rows)
    assert f"{ROWS} rows, {ROWS} answers" in out
    assert f"error {len(BROKEN)}" in out
    assert f"length {reasons['length']}" in out
    assert f"{sum(row['generated_tokens'] for row in rows):,} generated" in out
    assert "rows that could not be answered: 2 (broken_json 1, empty_prompt 1)" in out
    assert "  row 7: broken JSON at line 8" in out
    assert dist_sft(["status", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"rows {ROWS} of {ROWS} (100.0%); finished parts: 15 of 15" in out
    assert "rows that could not be answered: 2" in out


@pytest.mark.parametrize("overlong", ["error", "truncate"])
def test_a_prompt_too_long_is_an_error_or_cut_on_the_left(
    recipe: dict[str, Any], overlong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(recipe["model"]["path"], model)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 60
    (model / "config.json").write_text(json.dumps(config))
    path = write(
        recipe, tmp_path / "run", model={"path": str(model)}, generate={"overlong": overlong}
    )
    assert work(path, monkeypatch).code == runs.FINISHED
    rows = [r for r in rows_in(output_of(tmp_path / "run").read_bytes()) if r["row"] not in BROKEN]
    room = 60 - 12
    if overlong == "truncate":
        cut = [row for row in rows if row["prompt_truncated"]]
        assert 10 < len(cut) < ROWS / 2
        assert {row["prompt_tokens"] for row in cut} == {room}
        assert all(row["prompt_tokens"] <= room for row in rows)
        assert not any("error" in row for row in rows)
    else:
        wrong = [row for row in rows if "error" in row]
        assert 10 < len(wrong) < ROWS / 2
        assert all(row["prompt_tokens"] > room for row in wrong)
        assert f"has room for {room}" in wrong[0]["error"]


# ---- whatever happens on the way -----------------------------------------------------------------


def test_it_goes_on_where_it_was_stopped(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(progress, "LOOK_SECONDS", 0.0)
        after(4, (run_dir / "STOP").touch, patch)
        outcome = work(path, patch)
    assert (outcome.code, outcome.asked_by) == (runs.STOPPED, "STOP file")
    assert outcome.reason == f"stopped by STOP file; 32 of {ROWS} rows are finished"
    assert not output_of(run_dir).exists()
    assert dist_sft(["status", str(run_dir)]) == 0
    assert f"rows 32 of {ROWS} (26.7%); finished parts: 4 of 15" in capsys.readouterr().out
    (run_dir / "STOP").unlink()
    kept = (parts.folder_of(run_dir, 0) / "manifest.json").stat().st_ino
    assert work(path, monkeypatch).code == runs.FINISHED
    assert output_of(run_dir).read_bytes() == greedy
    assert (parts.folder_of(run_dir, 0) / "manifest.json").stat().st_ino == kept


def test_any_worker_of_any_number_gives_the_same_bytes(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    with monkeypatch.context() as patch:  # the third of five, who takes the others' parts, too
        taken: list[int] = []
        answer = generate.Answerer.answer
        patch.setattr(
            generate.Answerer, "answer", lambda self, part: taken.append(part) or answer(self, part)
        )
        assert work(path, patch, rank=2, world=5).code == runs.FINISHED
    assert taken[:3] == [6, 7, 8]
    assert sorted(taken) == list(range(15))
    assert not output_of(run_dir).exists()
    assert attempt(run_dir, monkeypatch).code == runs.FINISHED
    assert output_of(run_dir).read_bytes() == greedy


def test_a_part_that_another_worker_never_finishes_is_taken_over(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    make = parts.Claims.make
    monkeypatch.setattr(
        parts.Claims, "make", lambda self, part: part not in (3, 9) and make(self, part)
    )
    assert work(path, monkeypatch).code == runs.FINISHED
    assert output_of(run_dir).read_bytes() == greedy


def test_a_worker_leaves_a_part_that_another_one_has_finished(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "other"
    assert work(write(recipe, other), monkeypatch).code == runs.FINISHED
    left = Counter[str]()
    tick = progress.Progress.tick

    def meanwhile(self: progress.Progress, *told: int) -> None:
        final = parts.folder_of(run_dir, 2)
        if self._word.part == 2 and not final.exists():
            shutil.copytree(parts.folder_of(other, 2), final)
        try:
            tick(self, *told)
        except progress.Abandoned:
            left["left"] += 1
            raise

    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(progress.Progress, "tick", meanwhile)
    assert work(write(recipe, run_dir), monkeypatch).code == runs.FINISHED
    assert left == {"left": 1}
    assert output_of(run_dir).read_bytes() == greedy


@pytest.mark.parametrize("damage", ["byte", "line", "manifest", "another plan"])
def test_a_damaged_part_is_answered_again(
    recipe: dict[str, Any], greedy: bytes, damage: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    part = parts.folder_of(run_dir, 5)

    def spoil() -> None:
        name = "rows.jsonl" if damage in ("byte", "line") else "manifest.json"
        text = (part / name).read_bytes()
        changed = {
            "byte": text.replace(b"why", b"who", 1),
            "line": b"\n".join(text.splitlines()[1:]),
            "manifest": text[:-9],
            "another plan": text.replace(b'"plan": "', b'"plan": "0'),
        }[damage]
        assert changed != text
        (part / name).write_bytes(changed)

    after(15, spoil, monkeypatch)
    assert work(write(recipe, run_dir), monkeypatch).code == runs.FINISHED
    assert "part 5: " in capsys.readouterr().out
    assert output_of(run_dir).read_bytes() == greedy
    assert len(list((run_dir / "parts").glob(".part-00005.damaged-*"))) == 1


def test_an_orphan_of_an_older_attempt_hands_nothing_in(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    after(3, lambda: runs.start_attempt(run_dir) and None, monkeypatch)
    with pytest.raises(runs.SupersededError, match="a newer attempt works on"):
        work(path, monkeypatch)
    assert parts.finished(run_dir) == {0, 1, 2}
    assert not list((run_dir / "parts").glob(".*"))


def test_the_run_is_finished_only_while_its_output_is_there(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run")
    assert work(path, monkeypatch).code == runs.FINISHED
    assert runs.is_finished(read_config_json(tmp_path / "run"))
    output_of(tmp_path / "run").unlink()
    assert not runs.is_finished(read_config_json(tmp_path / "run"))
    assert work(path, monkeypatch).code == runs.FINISHED
    assert output_of(tmp_path / "run").read_bytes() == greedy


def test_a_sample_without_an_answer_costs_no_other_one(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, hurt = (write(recipe, tmp_path / name, generate=SAMPLED) for name in ("whole", "hurt"))
    assert work(whole, monkeypatch).code == runs.FINISHED
    answer = generate.HuggingFace.answer

    def failing(self: Any, requests: Any) -> Any:
        return [
            said._replace(reason="memory", text="", ids=[]) if asked[1:] == (12, 0) else said
            for asked, said in zip(requests, answer(self, requests), strict=True)
        ]

    monkeypatch.setattr(generate.HuggingFace, "answer", failing)
    assert work(hurt, monkeypatch).code == runs.FINISHED
    rows, others = (rows_in(output_of(tmp_path / name).read_bytes()) for name in ("hurt", "whole"))
    (lost,) = [n for n, row in enumerate(rows) if (row["row"], row["sample"]) == (12, 0)]
    assert rows[lost]["error"] == "there was not enough memory for this row alone"
    assert rows[:lost] + rows[lost + 1 :] == others[:lost] + others[lost + 1 :]
    assert "could not be answered: 3 (broken_json 1, out_of_memory 1, empty_prompt 1)" in (
        capsys.readouterr().out
    )


def test_a_stop_while_a_damaged_part_is_answered_again(
    recipe: dict[str, Any], greedy: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)

    def spoil() -> None:
        (parts.folder_of(run_dir, 5) / "rows.jsonl").write_text("")
        (run_dir / "STOP").touch()

    with monkeypatch.context() as patch:
        patch.setattr(progress, "LOOK_SECONDS", 0.0)
        take = progress.Progress.take

        def without_a_look_at_the_end(self: Any) -> Any:
            yield from take(self)
            spoil()

        patch.setattr(progress.Progress, "take", without_a_look_at_the_end)
        assert work(path, patch).code == runs.STOPPED
    assert 5 not in parts.finished(run_dir)
    (run_dir / "STOP").unlink()
    assert work(path, monkeypatch).code == runs.FINISHED
    assert output_of(run_dir).read_bytes() == greedy


# ---- a kill at any write -------------------------------------------------------------------------


@pytest.mark.timeout(280)
@pytest.mark.parametrize("reuse", [False, True], ids=["fresh", "reuse"])
def test_a_kill_before_any_change_of_a_name_costs_nothing(
    recipe: dict[str, Any], reuse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child is ended at the first such call, at the second, and so on, until it gets through."""
    prompts = tmp_path / "prompts.jsonl"
    lines = Path(recipe["input"][0]["path"]).read_text().splitlines()[:40]
    sections = {
        "input": [{"path": str(prompts)}],
        "generate": {"part_rows": 20},
        "cache_dir": str(tmp_path),
    }
    options = ["--reuse-unchanged"] if reuse else []
    run_dir = tmp_path / "run"
    prompts.write_text("\n".join(lines) + "\n")
    path = write(recipe, run_dir, **sections)
    if reuse:
        assert work(path, monkeypatch).code == runs.FINISHED
        lines[3] = '{"prompt": "another one"}'
        prompts.write_text("\n".join(lines) + "\n")
        shutil.copytree(run_dir, tmp_path / "before")
        shutil.copyfile(output_of(run_dir), tmp_path / "answers-before")
    else:
        assert work(write(recipe, tmp_path / "whole", **sections), monkeypatch).code == 0
    wanted: set[bytes] = set()
    for calls in range(200):
        shutil.rmtree(run_dir, ignore_errors=True)
        output_of(run_dir).unlink(missing_ok=True)
        if reuse:
            shutil.copytree(tmp_path / "before", run_dir)
            shutil.copyfile(tmp_path / "answers-before", output_of(run_dir))
        code = in_a_child(path, options, calls)
        if code == KILLED:
            assert work(path, monkeypatch, *options).code == runs.FINISHED, calls
        else:
            assert code == runs.FINISHED
        wanted.add(output_of(run_dir).read_bytes())
        left = [p.name for p in tmp_path.glob(".run-answers*")]
        left += [p.name for p in (run_dir / "parts").glob(".*")]
        assert not left, (calls, left)
        if code != KILLED:
            break
    assert calls > 8
    assert len(wanted) == 1
    rows = rows_in(wanted.pop())
    assert [row["row"] for row in rows] == list(range(40))
    if reuse:
        assert rows[3]["prompt"] == "another one"
    else:
        assert rows == rows_in(output_of(tmp_path / "whole").read_bytes())


def in_a_child(path: Path, options: list[str], calls: int) -> int | None:
    """Do a worker's work in another process, that ends itself before one of its calls."""
    run_dir = path.with_suffix("")
    assert local.main(["generate", str(path), "--prepare", *options]) == runs.FINISHED
    number = runs.start_attempt(run_dir)
    # Of this process, in which tests have had threads, nothing can be forked.
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["dist_sft.generate"])
    child = clean.Process(target=work_until_killed, args=(run_dir, number, calls))
    child.start()
    child.join(timeout=60)
    code, _ = child.exitcode, child.kill()
    return code
