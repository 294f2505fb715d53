"""The real launcher, real workers: generation is stopped, killed, and finished."""

import signal
from pathlib import Path

import pytest
import tiny_generation
from launching import ranks_of, run, start, wait_until
from tiny_generation import output_of, write

from dist_sft import parts, runs
from dist_sft.cli import main as dist_sft

ROWS = 600
GENERATE = {"max_new_tokens": 40, "part_rows": 6, "batch_tokens": 900}  # some seconds of work


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_stopped_killed_and_finished_on_other_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_generation.make(tmp_path, ROWS)
    undisturbed = write(recipe, tmp_path / "undisturbed", generate=GENERATE)
    code, out, err = run(undisturbed, workers=1, job="generate")
    assert code == runs.FINISHED, err
    assert f"row {ROWS}/{ROWS}" not in err
    assert "tokens/s" in out
    assert "ETA" in out

    path, run_dir = write(recipe, tmp_path / "run", generate=GENERATE), tmp_path / "run"
    # 1. Three workers, and a person who stops them.
    launcher = start(path, workers=3, job="generate")
    wait_until(lambda: len(parts.finished(run_dir)) >= 5, launcher)
    assert dist_sft(["stop", str(run_dir)]) == 0
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == runs.STOPPED, err
    assert f" of {ROWS} rows are finished" in err
    assert "the same command continues the run" in err
    stopped_at = len(parts.finished(run_dir))
    assert 5 <= stopped_at < 100
    # 2. Two workers, one of which is killed; the launcher starts them again.
    launcher = start(path, "--restarts", "1", workers=2, job="generate")
    wait_until(lambda: len(parts.finished(run_dir)) >= stopped_at + 5, launcher)
    capsys.readouterr()
    assert dist_sft(["status", str(run_dir)]) == 0
    assert "; left: 0:0" in capsys.readouterr().out
    # Not rank 0, whose last word is the run's: torchrun ends it by a TERM that nobody asked for.
    (victim,) = [one for one in ranks_of(launcher, "generate") if one.environ()["RANK"] == "1"]
    victim.send_signal(signal.SIGKILL)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == runs.FINISHED, err
    assert "ended by SIGKILL, killed from outside" in err
    assert "starting again behind part" in err
    assert len(runs.attempts(run_dir)) == 3
    assert not (run_dir / "weights").exists()
    assert output_of(run_dir).read_bytes() == output_of(tmp_path / "undisturbed").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_row_that_ends_the_run_is_named_whichever_worker_meets_it(tmp_path: Path) -> None:
    recipe = tiny_generation.make(tmp_path, ROWS)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    lines[7], lines[31], lines[590] = lines[0], lines[1], '{"prompt": ""}'
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = write(recipe, tmp_path / "run", generate=GENERATE | {"on_error": "stop"})
    code, _, err = run(path, workers=2, job="generate")
    assert code == runs.WRONG_INPUT, err
    assert "input: row 590 cannot be answered: " in err
