"""Submit a run to a Ray cluster from anywhere, through its dashboard, and follow its log.

The recipe travels with the job. Everything else that it names must be on the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_sft import ray_cluster, runs
from dist_sft.errors import UserError
from dist_sft.recipe_yaml import read_tree

RECIPE = "recipe.yaml"
POLL_SECONDS = 1.0
STOP_SECONDS = 300.0
NO_FOLDER = "--folder: the job's folder must be there on the head of the cluster"
NO_PACKAGE = (
    "$(hostname), the head of the cluster: $python cannot import dist_sft. Name one that can by "
    "DIST_SFT_PYTHON, under env_vars in the file of --runtime-env"
)
"""In a shell's double quotes."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def on_cluster(run_dir: str | Path, folder: str | None) -> str:
    """Return the path of a run folder on the cluster, where relative ones count from `folder`."""
    return os.path.normpath(os.path.join(folder or os.getcwd(), run_dir))


def is_http(address: str | None) -> bool:
    """Tell whether an address is that of a dashboard."""
    return bool(address) and str(address).startswith(("http://", "https://"))


def entrypoint(words: Sequence[str], folder: str) -> str:
    """Return the shell line of a job: dist_sft on the cluster, in `folder`.

    RECIPE among the words is the file that came with the job.
    """
    quoted = ['"$recipe"' if word == RECIPE else shlex.quote(word) for word in words]
    refusal = f"exit {runs.WRONG_INPUT}; }}"
    return (
        f"recipe=$PWD/{RECIPE}; python=${{DIST_SFT_PYTHON:-python}}; "
        f"cd {shlex.quote(folder)} || {{ echo {shlex.quote(NO_FOLDER)}; {refusal}; "
        f'"$python" -c "import dist_sft" || {{ echo "{NO_PACKAGE}"; {refusal}; '
        f'exec "$python" -m {" ".join(quoted)}'
    )


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """Read what a job needs from a YAML file, in Ray's words; raises UserError."""
    if path is None:
        return {}
    if not path.is_file():
        raise UserError(f"--runtime-env: {path} is no file")
    content = read_tree(path)
    if "working_dir" in content:
        raise UserError(
            f"--runtime-env: {path} has working_dir, which carries the recipe; code of your own "
            "goes into py_modules or pip, and --folder names the folder on the cluster"
        )
    return content


@contextlib.contextmanager
def client(address: str) -> Iterator[Any]:
    """Talk to a cluster within a block; raise UserError for what it refuses."""
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ModuleNotFoundError:
        raise UserError("Ray is not installed here: pip install 'ray[default]'") from None
    try:
        yield JobSubmissionClient(address)
    except (AuthenticationError, RuntimeError, OSError) as error:
        raise UserError(f"--address: {address}: {error}") from None


def submit(
    address: str,
    line: str,
    run_dir: str,
    runtime_env: Mapping[str, Any],
    recipe: Path | None = None,
) -> int:
    """Submit a job and follow its log to its end; return the launcher's exit code."""
    with client(address) as jobs, tempfile.TemporaryDirectory(prefix="dist_sft-") as name:
        ray_cluster.warn(address)
        environment = dict(runtime_env)
        if recipe is not None:
            shutil.copyfile(recipe, Path(name, RECIPE))
            environment["working_dir"] = name
        job = jobs.submit_job(
            entrypoint=line, runtime_env=environment, metadata={"run_dir": run_dir}
        )
        print(f"job {job}: {run_dir}", flush=True)
        try:
            return follow(jobs, job)
        except KeyboardInterrupt:
            why = ""
        except (RuntimeError, OSError) as error:
            why = f"{address} does not answer any more ({error}): "
        print(
            f"\n{why}the job goes on; its log: ray job logs --follow {job} --address {address}\n"
            f"to stop it: launch/ray_job.py cancel {run_dir} --address {address}",
            file=sys.stderr,
        )
        return runs.FAILED


def follow(jobs: Any, job: str) -> int:
    """Print a job's log until it has ended; return its exit code.

    Raises RuntimeError or OSError where the cluster is lost.
    """

    async def tail() -> None:
        async for text in jobs.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
    except RuntimeError:
        if jobs.get_job_status(job).value not in ENDED:
            raise
        # it ended before its log could be opened
    while (info := jobs.get_job_info(job)).status.value not in ENDED:
        time.sleep(POLL_SECONDS)
    code: int | None = info.driver_exit_code
    if code in (runs.FINISHED, runs.WRONG_INPUT, runs.STOPPED):
        return int(code)
    print(info.message, file=sys.stderr)
    return runs.FAILED


def cancel(address: str, run_dir: str) -> int:
    """Let the run of a folder on the cluster save, then stop its job."""
    with client(address) as jobs:
        mine = [
            info.submission_id
            for info in jobs.list_jobs()
            if info.status.value not in ENDED and info.metadata.get("run_dir") == run_dir
        ]
        if not mine:
            raise UserError(
                f"{run_dir} has no job on {address}; where it was launched on a node of the "
                f"cluster, `dist-sft stop {run_dir}` there stops it"
            )
        environment = jobs.get_job_info(mine[0]).runtime_env or {}
        asking = jobs.submit_job(
            entrypoint=entrypoint(["dist_sft.cli", "stop", run_dir], "/"),
            runtime_env={k: v for k, v in environment.items() if not k.startswith("_")},
        )
        if (
            follow(jobs, asking) != runs.FINISHED
            and jobs.get_job_status(mine[0]).value not in ENDED
        ):
            raise UserError(
                f"job {mine[0]} has not been asked to stop, as it may have yet to begin: cancel it "
                f"again, or end it unsaved with `ray job stop {mine[0]} --address {address}`"
            )
        deadline = time.monotonic() + STOP_SECONDS
        for job in mine:
            while jobs.get_job_status(job).value not in ENDED and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            if jobs.get_job_status(job).value not in ENDED:
                jobs.stop_job(job)
    print(f"ended: {', '.join(mine)}")
    return runs.FINISHED
