"""Parts of a generation run: who takes which, what is finished, and how they become one file."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from generating import rows_in

from dist_sft import merge, output_file, parts, runs
from dist_sft.errors import UserError


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
    plan, filler = parts.Plan(800, 8, 1, {}), "x" * 10_000
    (tmp_path / "parts").mkdir()
    for part in range(plan.parts):
        rows = [json.dumps({"row": n, "text": filler}) + "\n" for n in plan.rows_of(part)]
        tally = parts.Tally(rows=8, lines=8)
        parts.commit(tmp_path, 0, plan, part, "".join(rows).encode(), ["k"] * 8, tally)
    tracemalloc.start()
    output = tmp_path / "out.jsonl"
    merge.merge(tmp_path, 0, plan, None, output, lambda phase: None)  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["row"] for row in rows_in(output.read_bytes())] == [*range(800)]
    assert peak < 1e6 < output.stat().st_size / 5


def test_a_missing_part_is_never_merged_over(tmp_path: Path) -> None:
    plan = parts.Plan(16, 8, 1, {})
    (tmp_path / "parts").mkdir()
    parts.commit(tmp_path, 0, plan, 0, b"{}\n" * 8, ["k"] * 8, parts.Tally(rows=8, lines=8))
    with pytest.raises(RuntimeError, match="1 of 2 parts are missing"):
        merge.merge(tmp_path, 0, plan, None, tmp_path / "o.jsonl", print)  # type: ignore[arg-type]
    assert not (tmp_path / "o.jsonl").exists()


def test_two_workers_that_finish_one_part_leave_one(tmp_path: Path) -> None:
    plan = parts.Plan(8, 8, 1, {})
    (tmp_path / "parts").mkdir()
    told = (tmp_path, 0, plan, 0, b"{}\n" * 8, ["k"] * 8, parts.Tally(rows=8, lines=8))
    assert parts.commit(*told)
    assert not parts.commit(*told)
    assert os.listdir(tmp_path / "parts") == ["part-00000"]


def test_an_orphan_of_an_older_attempt_merges_nothing(tmp_path: Path) -> None:
    plan = parts.Plan(8, 8, 1, {})
    (tmp_path / "parts").mkdir()
    parts.commit(tmp_path, 0, plan, 0, b"{}\n" * 8, ["k"] * 8, parts.Tally(rows=8, lines=8))
    for _ in range(2):
        runs.start_attempt(tmp_path)
    output = tmp_path / "o.jsonl"
    with pytest.raises(runs.SupersededError):
        merge.merge(tmp_path, 0, plan, None, output, lambda phase: None)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*o.jsonl*"))


def test_a_file_that_appears_in_the_last_moment_is_not_replaced(tmp_path: Path) -> None:
    temporary, output = tmp_path / "new", tmp_path / "o.jsonl"
    temporary.write_text("ours")
    output.write_text("precious")
    with pytest.raises(UserError, match="a file that this run did not make"):
        output_file.give_name(tmp_path, temporary, output)
    assert output.read_text() == "precious"
