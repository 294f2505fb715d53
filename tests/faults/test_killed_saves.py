"""A rank may be killed anywhere in a save: the run goes on as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import Cell, make_job, make_model

PROGRAM = Path(__file__).parent / "killed_saves.py"
ROOT = PROGRAM.parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "sharding",
    [
        None,
        "zero2",
        pytest.param("zero1", marks=pytest.mark.matrix),
        pytest.param("zero3", marks=pytest.mark.matrix),
    ],
)
def test_a_save_that_is_killed_anywhere(sharding: str | None, tmp_path: Path) -> None:
    models = {"tied": make_model(tmp_path / "model", tied=True)}
    job = make_job(tmp_path, models, [Cell(sharding)])
    (tmp_path / "job.json").write_text(json.dumps(job))
    out = tmp_path / "trials" / "out.json"
    out.parent.mkdir()
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path / "job.json", out],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    undisturbed, trials = result["undisturbed"], result["trials"]
    places = {trial["fired"] for trial in trials}
    print(len(trials), sorted(map(str, places)))
    assert {trial["rank"] for trial in trials} == {0, 1}
    for trial in trials:
        assert trial["fired"], f"nobody was killed: {trial}"
        assert not trial["survived"]
        assert trial["state"] == undisturbed["state"], trial
        assert trial["begun"] in (1, 2)
        assert trial["left"] == ["step-00000001", "step-00000002"]
    assert {trial["begun"] for trial in trials} == {1, 2}, "before and after the rename"
    assert {"half of a write", "os.rename .step-00000002.attempt-0.tmp"} <= places
