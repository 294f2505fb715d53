"""Mistakes that sbatch files of other projects contain, and no file here may."""

import re
import subprocess
from pathlib import Path

import pytest
from launching import ROOT

SCRIPTS = sorted(
    path for path in ROOT.rglob("*.sbatch") if not {".venv", "build"} & set(path.parts)
)


WRONG = {
    r"^#SBATCH.*\$": "sbatch expands no variable",
    r"(\|\|\s*(echo\s+)?|:-|MASTER_ADDR=)[\"']?(localhost|127\.0\.0\.1)": (
        "every node would form its own world"
    ),
    r"\$\{?SLURM_(PROCID|NODEID|LOCALID)": "expanded in the batch shell, where it is 0",
    r"MASTER_PORT=[\"']?\d+[\"']?\s*$": "two jobs on a node would meet at the same port",
    r"\b(grep|awk|sed)\b.*\.(yaml|yml|json)": "YAML and JSON are not lines",
    r"GPUS_PER_NODE=[\"']?\d": "the number of GPUs is of one cluster",
    r"^\s*module\s+load": "modules are of one cluster, and belong into the site file",
    r"^\s*\w+=\(\s*\"\$\w+\"\s*\)": "an array of one element",
}


def mistakes(text: str) -> list[str]:
    """List what must not be in a batch script, a line each."""
    found = [
        f"{why}: {line}"
        for line in text.splitlines()
        for pattern, why in WRONG.items()
        if re.search(pattern, line)
    ]
    head = {m[1] for m in re.finditer(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)}
    if "requeue" in head and "signal" not in head:
        found.append("--requeue without --signal: the work since the last checkpoint is lost")
    if "requeue" in head and "--open-mode=append" not in text:
        found.append("a second start would overwrite the log of the first")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_known_mistake(script: Path) -> None:
    assert mistakes(script.read_text()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "line",
    [
        "#SBATCH --nodes=$NUM_NODES",
        "head=$(scontrol show hostnames | head -1 || echo localhost)",
        "export MASTER_ADDR=${MASTER_ADDR:-localhost}",
        "MASTER_ADDR=127.0.0.1",
        'srun bash -c "torchrun --machine_rank $SLURM_PROCID"',
        "MASTER_PORT=6000",
        "lr=$(grep lr recipe.yaml | awk '{print $2}')",
        "GPUS_PER_NODE=8",
        "module load cuda/12.1",
        'nodes_array=("$nodes")',
        "#SBATCH --requeue",
    ],
)
def test_the_mistakes_are_found(line: str) -> None:
    assert mistakes(line), line


def test_there_are_scripts() -> None:
    assert [path.name for path in SCRIPTS] == ["generate.sbatch", "ray.sbatch", "train.sbatch"]
