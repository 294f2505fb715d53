"""Steps that take long and cost nothing, for the jobs of tests: their PYTHONPATH has this folder.

RUN_DIR.slow holds seconds, and a number of attempts: in so many of them, from the first one on, a
rank sleeps that long before every step of training and every token of generation. It may change,
or go, while they run.
"""

import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

HEARTBEATS = "dist_sft.watchdog"
BEFORE = ("data", "generating")


def pause() -> None:
    _, run_dir, attempt = sys.argv[:3]
    try:
        seconds, attempts = Path(f"{run_dir}.slow").read_text().split()
    except (FileNotFoundError, ValueError):  # gone, or written in this moment
        return
    if int(attempt.removeprefix("--attempt=")) < int(attempts):
        time.sleep(float(seconds))


class SlowHearts(SourceFileLoader):
    """Loads the module by which ranks tell what they are about to do."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        beat = module.Heart.beat

        def slowly(heart: object, phase: str) -> None:
            if phase in BEFORE:
                pause()
            beat(heart, phase)

        module.Heart.beat = slowly


class Finder(PathFinder):
    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != HEARTBEATS:
            return None
        spec = super().find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = SlowHearts(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder)
