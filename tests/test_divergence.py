"""What becomes of steps that are not finite, and what a run folder remembers of going back."""

import json
import math
from pathlib import Path

import pytest

from dist_sft.divergence import (
    MAX_OVERFLOWS,
    BadRows,
    Diverged,
    Guard,
    Policy,
    explain_divergence,
)
from dist_sft.report import read_steps
from dist_sft.rollback import Rollback, read_rollbacks, record_rollback

ROWS = BadRows(["alpaca row 30"], ["alpaca row 10", "alpaca row 30"])


def judge(guard: Guard, step: int, loss: float, norm: float = 1.0, overflowed: bool = False) -> str:
    return guard.judge(step, loss, norm, overflowed=overflowed, name_rows=lambda: ROWS)[0]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (-math.inf, 1.0)])
def test_a_run_stops_with_the_rows(loss: float, norm: float) -> None:
    guard = Guard("stop", 3)
    assert judge(guard, 16, 2.0) == "taken"
    with pytest.raises(Diverged, match=r"in step 17; .*: alpaca row 30\. .*train\.on_divergence"):
        judge(guard, 17, loss, norm)


def test_some_steps_in_a_row_are_left_out() -> None:
    guard = Guard("skip", 2)
    losses = [2.0, math.nan, math.nan, 2.0, math.nan, math.nan]
    verdicts = [judge(guard, step, loss) for step, loss in enumerate(losses, start=1)]
    assert verdicts == ["taken", "skipped", "skipped"] * 2
    with pytest.raises(Diverged, match="after 2 steps in a row were left out"):
        judge(guard, 7, math.nan)


def test_then_the_run_goes_back() -> None:
    guard = Guard("rollback", 1)
    verdicts = [judge(guard, step, math.nan) for step in (1, 2, 3, 4)]
    assert verdicts == ["skipped", "rollback"] * 2
    assert judge(Guard("rollback", 0), 1, math.nan) == "rollback"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_stop_in_the_middle_of_a_streak_changes_nothing(policy: Policy) -> None:
    losses = [math.nan, 2.0, math.nan, math.nan, math.nan]
    whole, before = Guard(policy, 2), None
    for step, loss in enumerate(losses, start=1):
        stopped = Guard(policy, 2, before)
        try:
            expected = judge(whole, step, loss)
        except Diverged:
            with pytest.raises(Diverged):
                judge(stopped, step, loss)
            break
        assert judge(stopped, step, loss) == expected
        before = json.loads(json.dumps(stopped.streaks))
    assert step == 5
    guard = Guard("stop", 0, {"skipped": 0, "overflows": MAX_OVERFLOWS - 1})
    with pytest.raises(Diverged, match=f"steps 1 to {MAX_OVERFLOWS} were all skipped"):
        judge(guard, MAX_OVERFLOWS, 2.0, math.inf, overflowed=True)


def test_a_loss_scale_that_is_too_high_is_no_divergence_for_a_while() -> None:
    guard = Guard("stop", 0)
    for step in range(1, MAX_OVERFLOWS):
        assert judge(guard, step, 2.0, math.inf, overflowed=True) == "taken"
    assert judge(guard, MAX_OVERFLOWS, 2.0) == "taken"
    for step in range(17, 17 + MAX_OVERFLOWS - 1):
        judge(guard, step, 2.0, math.inf, overflowed=True)
    with pytest.raises(Diverged, match="steps 17 to 31 were all skipped"):
        judge(guard, 31, 2.0, math.inf, overflowed=True)
    with pytest.raises(Diverged, match="the loss is nan"):
        judge(Guard("stop", 0), 1, math.nan, math.inf, overflowed=True)


def test_rows_are_named_as_closely_as_they_are_known() -> None:
    text = explain_divergence(math.nan, math.nan, 17, ROWS)
    assert text == "the loss is nan in step 17; the micro-batches of these rows: alpaca row 30"
    text = explain_divergence(2.0, math.inf, 17, BadRows([], [f"a row {i}" for i in range(25)]))
    assert text.startswith("the gradient's norm is inf in step 17; its rows: a row 0, a row 1")
    assert text.endswith("a row 19 and 5 more")


def test_a_rollback_is_remembered_and_its_steps_count_for_nothing(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    record_rollback(tmp_path, Rollback(2, 4), 0, "the loss is nan")
    record_rollback(tmp_path, Rollback(5, 6), 1, "the loss is nan again")
    assert read_rollbacks(tmp_path) == [Rollback(2, 4), Rollback(5, 6)]
    assert [s for s in range(1, 8) if Rollback(2, 4).covers(s)] == [3, 4]
    lines = [{"attempt": 0, "step": s, "loss": None if s == 7 else 1.0} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [line["step"] for line in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 5, 8]


def test_steps_of_an_older_attempt_that_the_newest_has_not_reached_are_left_out(
    tmp_path: Path,
) -> None:
    lines = [{"attempt": 0, "step": s, "loss": 1.0} for s in range(1, 10)]
    lines += [{"attempt": 1, "step": s, "loss": 2.0} for s in (5, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    steps = read_steps(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["attempt"]) for x in steps] == [
        *((s, 0) for s in range(1, 5)),
        (5, 1),
        (6, 1),
    ]
