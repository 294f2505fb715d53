"""What the README promises first: one command, and a model that answers where it could not."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns_every_skill(tmp_path: Path) -> None:
    for name in ("configs", "deepspeed_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dist_sft.quickstart"],
        cwd=tmp_path, text=True, capture_output=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 180, "the README promises less than 3 minutes on 2 cores"
    scores = re.findall(r"│ ([a-z ]+?) +│ +(\d+)% +│ +(\d+)% +│", done.stdout)
    assert len(scores) == 9, done.stdout
    for skill, before, after in scores:
        assert int(before) == 0, skill
        assert int(after) >= 60, f"{skill}: {after} %"
    assert "run folder: runs/quickstart" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "loss.png").stat().st_size > 10_000
