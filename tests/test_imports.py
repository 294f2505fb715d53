"""What answers at once stays light: launchers and recipes import nothing that takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "matplotlib", "ray")
# Processor time and not seconds on the clock: the machine may be busy. The best of three, because
# the first start of a cold machine reads files that the next ones find in memory.
PROCESSOR_SECONDS = 1.0
TRIES = 3

PROGRAM = """
import os, runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], sys.path[0] = script, os.path.dirname(script)  # as Python does
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
print("seconds:", sum(os.times()[:4]))
"""


def run(*arguments: object) -> tuple[set[str], float]:
    """Run a script to its end; return what it has imported and the processor seconds it took."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    *_, loaded, seconds = done.stdout.splitlines()
    return set(loaded.split()[1:]), float(seconds.split()[1])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "m"},
        "data": {"train": [{"path": str(path)}]},  # any file that is there
        "deepspeed": "zero2",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("launcher", ["local", "ray_job"])
@pytest.mark.parametrize("option", ["--help", "--dry-run", "--prepare"])
def test_launcher_answers_at_once(recipe: Path, option: str, launcher: str) -> None:
    runs = [run(f"launch/{launcher}.py", "train", recipe, option) for _ in range(TRIES)]
    for loaded, _ in runs:
        assert loaded >= {"dist_sft", "pydantic"}
        assert loaded.isdisjoint(HEAVY)
    assert min(seconds for _, seconds in runs) < PROCESSOR_SECONDS


def test_reading_a_recipe_is_light(recipe: Path, tmp_path: Path) -> None:
    program = tmp_path / "read.py"
    program.write_text(f"from dist_sft.config import read_recipe\nread_recipe({str(recipe)!r})\n")
    loaded, _ = run(program)
    assert "dist_sft" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("launcher", ["local", "slurm", "ray_job"])
def test_a_python_without_dist_sft_says_so(launcher: str) -> None:
    """-S: without what is installed."""
    script = ROOT / f"launch/{launcher}.py"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", script, "train"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    version = ".".join(map(str, sys.version_info[:2]))
    assert (
        first == f"{sys.executable} (Python {version}) cannot run this: No module named 'dist_sft'"
    )
    assert rest[0].startswith("Activate the environment that dist_sft is installed in.")
    assert ".venv" in rest[1]
