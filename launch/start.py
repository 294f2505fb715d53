"""Start one of the launchers beside this file, or say which Python has what it needs."""

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRONG_INPUT = 2


def start(name: str) -> int:
    """Run `dist_sft.NAME` as a program; return its exit code."""
    try:
        module = import_module(f"dist_sft.{name}")
    except (ImportError, SyntaxError) as error:  # the latter of a Python that is too old
        print(explain(error), file=sys.stderr)
        return WRONG_INPUT
    code: int = module.main()
    return code


def explain(error: Exception) -> str:
    """Say what to do where this Python cannot import dist_sft, or what dist_sft needs."""
    version = ".".join(map(str, sys.version_info[:2]))
    advice = "python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ."
    if (ROOT / ".venv/bin/python").exists():
        advice = f". {ROOT}/.venv/bin/activate"
    return (
        f"{sys.executable} (Python {version}) cannot run this: {error}\n"
        "Activate the environment that dist_sft is installed in. For this checkout:\n"
        f"    {advice}"
    )
