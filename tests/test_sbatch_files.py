"""Mistakes that sbatch files of other projects contain, and no file here may."""

import re
import subprocess
from pathlib import Path

import pytest
from launching import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def mistakes(text: str) -> list[str]:
    """List what must not be in a batch script, a line each."""
    found = []
    for line in text.splitlines():
        if line.startswith("#SBATCH") and "$" in line:
            found.append(f"sbatch expands no variable: {line}")
        if re.search(r"\|\|\s*(echo\s+)?[\"']?(localhost|127\.0\.0\.1)", line):
            found.append(f"every node would form a world of its own: {line}")
        if re.search(r"\$\{?SLURM_(PROCID|NODEID|LOCALID)", line):
            found.append(f"expanded in the batch shell, where it is 0: {line}")
        if re.search(r"MASTER_PORT=[\"']?\d+[\"']?\s*$", line):
            found.append(f"two jobs on a node would meet at the same port: {line}")
        if re.search(r"\b(grep|awk|sed)\b.*\.(yaml|yml|json)", line):
            found.append(f"YAML and JSON are not lines: {line}")
        if re.search(r"GPUS_PER_NODE=[\"']?\d", line):
            found.append(f"the number of GPUs is of one cluster: {line}")
        if re.match(r"\s*module\s+load", line):
            found.append(f"modules are of one cluster, and belong into the site file: {line}")
        if re.match(r"\s*\w+=\(\s*\"\$\w+\"\s*\)", line):
            found.append(f"an array of one element: {line}")
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
    assert [path.name for path in SCRIPTS] == ["train.sbatch"]
