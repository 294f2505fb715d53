"""Kill a rank at every place in a save where something is written, and continue the run.

python killed_saves.py JOB.json OUT.json: see `ranks/cells.py` for the job; `sharding` names its one
cell. A warm parent forks the ranks of every trial, so that a trial costs a second or two and not
the ten that imports take.

A trial: two ranks train a step, save while they train another one, and save again; there a rank
ends by SIGKILL just before its Nth write. Then two new ranks continue from what is there, to step
4. OUT gets, per trial, the rank, N, the place, the step that was continued from, and the SHA-256 of
the final state, which must be that of a run that nobody disturbed.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

import torch.distributed as dist
from cells import Run, write_model
from processes import free_port
from state import whole_state

from dist_sft import checkpoint, digests, manifest

RANKS, LAST = 2, 4
SECONDS = 120.0
TENSORS = 8  # of a file that are alike: it is enough to be killed in one of so many


class Places:
    """Count the places of a save where this process changes the file system; die at one of them."""

    def __init__(self, folder: Path, deadly: int | None, note: Path) -> None:
        self.passed: list[str] = []
        self._folder, self._deadly, self._note = str(folder), deadly, note
        self.armed = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in ("open", "os.rename", "os.mkdir", "os.chmod"):
            return
        if str(arguments[0]).startswith(self._folder):
            self.passing(f"{event} {Path(str(arguments[0])).name}")

    def passing(self, place: str) -> None:
        """Be at a place."""
        if not self.armed:
            return
        self.armed = False  # what is done here counts nowhere
        self.passed.append(place)
        if len(self.passed) == self._deadly:
            self._note.write_text(place)
            os.kill(os.getpid(), signal.SIGKILL)
        self.armed = True


def rank_main(job: SimpleNamespace, run_dir: Path, deadly: int | None, out: Path) -> None:
    """Continue the run in `run_dir` to the end as one rank; write what came out of it."""
    rank = int(os.environ["RANK"])
    run = Run(job, SimpleNamespace(**job.cells[0]))
    places = Places(run_dir, deadly, out.with_suffix(".fired"))
    written = digests.HashingFile.write

    writes = itertools.count()

    def write(file: digests.HashingFile, data: Any) -> None:
        half = len(data) // 2
        written(file, memoryview(data)[:half])
        if next(writes) % TENSORS == 0:
            places.passing("half of a write")
        written(file, memoryview(data)[half:])

    said: list[str] = []
    begun = checkpoint.newest_good(run_dir, "sha256", said.append) or 0
    if begun:
        checkpoint.restore(manifest.folder_of(run_dir, begun), run.engine)
    if rank == 0:
        checkpoint.remove_leftovers(run_dir)
    dist.barrier()
    with ExitStack() as stack:
        stack.enter_context(patch.object(digests.HashingFile, "write", write))
        snapshot, saving = checkpoint.Snapshot(run.engine), None
        for step in range(begun + 1, LAST + 1):
            run.gradient(step)
            run.update(step)
            if saving:
                saving.finish()
                places.armed, saving = False, None
            if step <= 2:
                places.armed = step == 2
                write_files = write_model(run.engine)
                saving = checkpoint.Saving(
                    run_dir, step, run.engine, {}, write_files, snapshot=snapshot
                )
    digest = hashlib.sha256()
    for name, tensor in sorted(whole_state(run.engine).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    result = {"begun": begun, "state": digest.hexdigest(), "places": places.passed, "said": said}
    out.write_text(json.dumps(result))
    dist.barrier()


def fork_ranks(
    job: SimpleNamespace, run_dir: Path, port: int, out: Path, deadly: dict[int, int]
) -> list[dict[str, Any]] | None:
    """Run two ranks; return their results, or None where one was killed, and the other with it."""
    children = {}
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
                "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1",
            }  # fmt: skip
            code = 1
            try:
                rank_main(job, run_dir, deadly.get(rank), out / f"{rank}.json")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(children.values())} do not end")
            time.sleep(0.01)
            continue
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):  # as torchrun does
            for other in children:
                os.kill(other, signal.SIGKILL)
    if any(codes.values()):
        return None
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(sys.argv[2])

    def run(run_dir: Path, **deadly: int) -> list[dict[str, Any]] | None:
        shutil.rmtree(out.parent / "ranks", ignore_errors=True)
        (out.parent / "ranks").mkdir()
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        at = {int(name.removeprefix("rank_")): number for name, number in deadly.items()}
        return fork_ranks(job, run_dir, free_port(), out.parent / "ranks", at)

    undisturbed = run(out.parent / "undisturbed")
    assert undisturbed is not None
    trials = []
    for rank in range(RANKS):
        for number in range(1, len(undisturbed[rank]["places"]) + 1):
            run_dir = out.parent / f"killed-{rank}-{number}"
            survived = run(run_dir, **{f"rank_{rank}": number})
            fired = out.parent / "ranks" / f"{rank}.fired"
            trial = {"rank": rank, "number": number, "survived": survived is not None}
            trial["fired"] = fired.read_text() if fired.exists() else None
            continued = run(run_dir)
            assert continued is not None
            trial |= {"begun": continued[0]["begun"], "state": continued[0]["state"]}
            trial["left"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            trials.append(trial)
            print(trial, flush=True)
            shutil.rmtree(run_dir)
    out.write_text(json.dumps({"undisturbed": undisturbed[0], "trials": trials}))


if __name__ == "__main__":
    main()
