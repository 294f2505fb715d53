"""Offline generation: every row once, in order, the same bytes whatever happened on the way."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny_generation
from tiny_generation import BROKEN, ROWS, output_of, row_of, write

from dist_sft import generate, local, merge, parts, progress, runs
from dist_sft.answering import COLUMNS
from dist_sft.cli import main as dist_sft
from dist_sft.config import read_config_json
from dist_sft.console import Console
from dist_sft.errors import UserError
from dist_sft.runs import Outcome

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "num_samples": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_generation.make(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def greedy(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return what nobody disturbed."""
    path = write(recipe, tmp_path_factory.mktemp("greedy") / "run")
    with pytest.MonkeyPatch.context() as patch:
        assert work(path, patch).code == runs.FINISHED
    return output_of(path.with_suffix("")).read_bytes()


@pytest.fixture(autouse=True)
def _no_signals_left() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def work(
    path: Path, patch: pytest.MonkeyPatch, *options: str, rank: int = 0, world: int = 1
) -> Outcome:
    """Do what one worker of a launch does, in this process."""
    assert local.main(["generate", str(path), "--prepare", *options]) == runs.FINISHED
    return attempt(path.with_suffix(""), patch, rank, world)


def attempt(run_dir: Path, patch: pytest.MonkeyPatch, rank: int = 0, world: int = 1) -> Outcome:
    number = runs.start_attempt(run_dir)
    variables = {
        "RANK": rank, "LOCAL_RANK": 0, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "WORLD_SIZE": world,
    }  # fmt: skip
    for name, value in variables.items():
        patch.setenv(name, str(value))
    outcome = generate.generate(run_dir, number, Console(None))
    if rank == 0:
        runs.write_outcome(run_dir, number, outcome)
    return outcome


def rows_in(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def after(count: int, happens: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let something happen when a worker hands in a part for this time."""
    commit, calls = parts.commit, Counter[str]()

    def committed(*arguments: Any) -> bool:
        calls["commit"] += 1
        done = commit(*arguments)
        if calls["commit"] == count:
            happens()
        return done

    patch.setattr(parts, "commit", committed)


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
    claim = parts.claim
    monkeypatch.setattr(parts, "claim", lambda *a: a[-1] not in (3, 9) and claim(*a))
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


def launch(path: Path, *options: str) -> int:
    return local.main(["generate", str(path), *options])


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
    from dist_sft.config import read_recipe

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
    with pytest.raises(UserError, match=r"\n  model: \w{32} -> \w{32}\n"):
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
    assert not runs.is_finished(local_recipe(path))
    assert work(path, monkeypatch).code == runs.FINISHED
    assert len(pq.read_table(tmp_path / "elsewhere.parquet")) == ROWS
    assert (parts.folder_of(run_dir, 3) / "rows.jsonl").stat().st_ino == inode
    assert output_of(run_dir).read_bytes() == greedy


def local_recipe(path: Path) -> Any:
    from dist_sft.config import read_recipe

    return read_recipe(path)


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


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_every_worker_would_take_every_part_its_own_share_first(workers: int, count: int) -> None:
    shares = []
    for worker in range(workers):
        order = list(parts.in_order(worker, workers, count))
        assert sorted(order) == list(range(count))
        shares.append(order[: count * (worker + 1) // workers - count * worker // workers])
    assert sorted(part for share in shares for part in share) == list(range(count))


def test_parts_follow_from_the_number_of_rows() -> None:
    sizes = {rows: parts.choose_part_rows("auto", rows) for rows in (1, 64, 500, 2000, 10**7)}
    assert sizes == {1: 64, 64: 64, 500: 64, 2000: 250, 10**7: 256}
    plan = parts.Plan(10**7, 256, 1, {})
    assert plan.parts == 39063
    assert plan.rows_of(39062) == range(9999872, 10**7)


def test_merging_holds_one_part_at_a_time(tmp_path: Path) -> None:
    """Ten million rows do not fit into memory: what is merged is read a part at a time."""
    plan = parts.Plan(64, 8, 1, {})
    (tmp_path / "parts").mkdir()
    for part in range(8):
        lines = b"".join(json.dumps({"row": n}).encode() + b"\n" for n in plan.rows_of(part))
        parts.commit(tmp_path, 0, plan, part, lines, ["k"] * 8, parts.Tally(rows=8, lines=8))
    seen: list[int] = []
    temporary = tmp_path / ".out.jsonl.tmp"

    def beat(phase: str) -> None:
        found = list(tmp_path.glob(".out.jsonl.*"))
        seen.append(sum(path.stat().st_size for path in found))

    tally = merge.merge(tmp_path, plan, None, tmp_path / "out.jsonl", beat)  # type: ignore[arg-type]
    assert tally.rows == 64
    assert not temporary.exists()
    assert [row["row"] for row in rows_in((tmp_path / "out.jsonl").read_bytes())] == [*range(64)]
    assert len(seen) == 8


def test_a_missing_part_is_never_merged_over(tmp_path: Path) -> None:
    plan = parts.Plan(16, 8, 1, {})
    (tmp_path / "parts").mkdir()
    parts.commit(tmp_path, 0, plan, 0, b"{}\n" * 8, ["k"] * 8, parts.Tally(rows=8, lines=8))
    with pytest.raises(RuntimeError, match="1 of 2 parts are missing"):
        merge.merge(tmp_path, plan, None, tmp_path / "o.jsonl", print)  # type: ignore[arg-type]
    assert not (tmp_path / "o.jsonl").exists()


def test_two_workers_that_finish_one_part_leave_one(tmp_path: Path) -> None:
    plan = parts.Plan(8, 8, 1, {})
    (tmp_path / "parts").mkdir()
    told = (tmp_path, 0, plan, 0, b"{}\n" * 8, ["k"] * 8, parts.Tally(rows=8, lines=8))
    assert parts.commit(*told)
    assert not parts.commit(*told)
    assert os.listdir(tmp_path / "parts") == ["part-00000"]


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
