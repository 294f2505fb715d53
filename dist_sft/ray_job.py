"""Run a recipe on Ray. `launch/ray_job.py` and `python -m dist_sft.ray_job` end here.

Reads the command line, checks, writes the run folder, submits. What runs it, `ray_driver` says. It
needs no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_sft import launching, lease, node, preflight, ray_cluster, ray_driver, ray_submit, runs
from dist_sft.config import AnyRecipe, read_config_json
from dist_sft.errors import UserError
from dist_sft.recipe_yaml import read_tree
from dist_sft.zero import shipped

DEFAULT_RESTARTS = 3
WAIT_SECONDS = 45
RESIZE_SECONDS = 60
DASHBOARD = "http://HOST:PORT"
ADDRESSES = f"auto|HOST:PORT|{DASHBOARD}"


def parser() -> argparse.ArgumentParser:
    """Return the command line of the Ray launcher."""
    result = argparse.ArgumentParser(
        prog="launch/ray_job.py",
        description="Run a recipe on Ray. The same command again continues the run.",
        epilog="launch/ray_job.py cancel RUN_DIR: save and end a run. launch/ray_job.py resume "
        "RUN_DIR: go on with it as it was launched.",
    )
    launching.add_arguments(result)
    result.add_argument("--workers", type=int, metavar="N", help="default: one per GPU, else 1")
    result.add_argument("--min-workers", type=int, metavar="N", help="grow and shrink: at least N")
    result.add_argument("--max-workers", type=int, metavar="N", help="grow and shrink: at most N")
    result.add_argument(
        "--resources-per-worker",
        action="append",
        default=[],
        metavar="NAME=COUNT,...",
        help="what Ray reserves for a worker (default: CPU=1, and GPU=1 where there are GPUs)",
    )
    result.add_argument(
        "--address",
        metavar=ADDRESSES,
        help="a cluster that runs (default: start Ray on this machine, for this run)",
    )
    result.add_argument(
        "--resize-every",
        type=int,
        default=RESIZE_SECONDS,
        metavar="SECONDS",
        help="how often to look whether the cluster has grown, between --min-workers and "
        f"--max-workers (default {RESIZE_SECONDS}); a resize saves, and starts all workers anew",
    )
    result.add_argument(
        "--restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help="start again after a failure, at most N times without a new checkpoint "
        f"(default {DEFAULT_RESTARTS})",
    )
    result.add_argument(
        "--wait",
        type=int,
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"for a cluster that is too small or busy, before giving up (default {WAIT_SECONDS})",
    )
    add_submission(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the recipe, write the run folder, run it on Ray; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["cancel"], ["resume"]):
        options = parser_of_commands().parse_args(given)
        command = cancel if options.command == "cancel" else resume
    else:
        options, command = parser().parse_intermixed_args(given), launch
    return launching.exit_code_of(lambda: command(options))


def parser_of_commands() -> argparse.ArgumentParser:
    """Return the command line of what is done to a run folder."""
    result = argparse.ArgumentParser(prog="launch/ray_job.py")
    commands = result.add_subparsers(dest="command", required=True)
    for name, words, addresses, default in (
        ("cancel", "let a run save, and end it", DASHBOARD, "none, where RUN_DIR is seen"),
        ("resume", "go on with a run as it was launched", ADDRESSES, "as it was launched"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
        command.add_argument("--address", metavar=addresses, help=f"default: {default}")
        add_submission(command, runs_something=name == "resume")
    return result


def add_submission(to: argparse.ArgumentParser, runs_something: bool = True) -> None:
    """Add what is for http:// addresses only."""
    to.add_argument(
        "--folder",
        metavar="DIR",
        help="with http://: the job's folder on the cluster (default: the one you are in)",
    )
    if runs_something:
        to.add_argument(
            "--runtime-env",
            type=Path,
            metavar="FILE",
            help="with http://: what the job needs, in Ray's words, as a YAML file",
        )


def launch(options: argparse.Namespace) -> int:
    """Run a recipe, or submit it."""
    size, per_worker = size_of(options), resources_of(options)
    http = ray_submit.is_http(options.address)
    recipe = launching.read(options, here=not http)
    if options.prepare and http:
        raise UserError(
            "--prepare: it writes the run folder from here; where the cluster sees it, too, leave "
            f"--address out now, and then: launch/ray_job.py resume {recipe.run_dir} --address "
            f"{options.address}"
        )
    if not options.prepare and not http:
        if launching.is_finished(recipe, reuse=options.reuse_unchanged):
            return runs.FINISHED
        launching.refuse(preflight.path_mistakes(recipe))
    if options.dry_run:
        print(dry_run(options, recipe, size, per_worker))
        return runs.FINISHED
    if http:
        return ray_submit.submit(
            options.address,
            submitted(options, recipe),
            ray_submit.on_cluster(recipe.run_dir, options.folder),
            ray_submit.read_runtime_env(options.runtime_env),
            Path(options.recipe),
        )
    told = {
        "workers": list(size),
        "resources_per_worker": per_worker,
        "address": options.address,
        "wait": options.wait,
        "resize_every": options.resize_every,
        "folder": os.getcwd(),
    }
    how = launching.launch_of(options, "ray", 1, size[1], **told)
    seen = launching.write_run_folder(recipe, how)
    run_dir = Path(recipe.run_dir)
    if options.prepare:
        print(f"prepared {run_dir}; to start it: launch/ray_job.py resume {run_dir}")
        return runs.FINISHED
    remove_stop(run_dir)
    return ray_driver.run(run_dir, how, seen)


def submitted(options: argparse.Namespace, recipe: AnyRecipe) -> str:
    """Return the line that a job runs on the cluster: this launch, from within."""
    words = ["dist_sft.ray_job", options.job, ray_submit.RECIPE, *options.overrides]
    sharding = read_tree(options.recipe, options.overrides).get("deepspeed")
    if isinstance(sharding, str) and sharding not in shipped():  # a file of this machine
        words.append("deepspeed=" + json.dumps(json.loads(recipe.to_json())["deepspeed"]))
    for name in ("workers", "min_workers", "max_workers", "restarts", "wait", "resize_every"):
        if getattr(options, name) is not None:
            words.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    for name in ("resources_per_worker", "allow_change"):
        words += [f"--{name.replace('_', '-')}={value}" for value in getattr(options, name)]
    for name in ("reuse_unchanged", "trust_checkpoint"):
        if getattr(options, name):
            words.append(f"--{name.replace('_', '-')}")
    return ray_submit.entrypoint([*words, "--address=auto"], options.folder or os.getcwd())


def cancel(options: argparse.Namespace) -> int:
    """Let a run save, and see it ended; raises UserError where there is none."""
    run_dir: Path = options.run_dir
    if ray_submit.is_http(options.address):
        return ray_submit.cancel(options.address, ray_submit.on_cluster(run_dir, options.folder))
    if options.address:
        raise UserError(
            f"--address: got {options.address}; allowed: {DASHBOARD}, from where {run_dir} is not "
            "seen; none on a machine that sees it"
        )
    refuse_elsewhere(run_dir)
    held = lease.read(run_dir) if runs.read_launch(run_dir).launcher == "ray" else None
    if held is None or lease.is_gone(held.owner):
        raise UserError(f"nobody works on {run_dir} from Ray: there is nothing to cancel")
    (run_dir / "STOP").touch()
    deadline = time.monotonic() + ray_submit.STOP_SECONDS
    while lease.read(run_dir) is not None and time.monotonic() < deadline:
        time.sleep(ray_driver.LOOK_SECONDS)
    if lease.read(run_dir) is not None:
        raise UserError(
            f"{run_dir} has not stopped in {ray_submit.STOP_SECONDS:.0f} s; `dist-sft status "
            f"{run_dir}` tells who works on it: end that process, or its job with `ray job stop`"
        )
    print(f"ended; `launch/ray_job.py resume {run_dir}` continues")
    return runs.FINISHED


def resume(options: argparse.Namespace) -> int:
    """Go on with a run as it was launched."""
    run_dir: Path = options.run_dir
    if ray_submit.is_http(options.address):
        there = ray_submit.on_cluster(run_dir, options.folder)
        words = ["dist_sft.ray_job", "resume", there, "--address=auto"]
        return ray_submit.submit(
            options.address,
            ray_submit.entrypoint(words, options.folder or os.getcwd()),
            there,
            ray_submit.read_runtime_env(options.runtime_env),
        )
    refuse_elsewhere(run_dir)
    how = runs.read_launch(run_dir)
    if how.launcher != "ray":
        raise UserError(f"{run_dir} was launched by {how.launcher}, not by launch/ray_job.py")
    if runs.is_finished(read_config_json(run_dir)):
        print(f"{run_dir} is finished already")
        return runs.FINISHED
    seen = lease.wait_until_free(run_dir)
    remove_stop(run_dir)
    if options.address:
        how = replace(how, options=how.options | {"address": options.address})
    return ray_driver.run(run_dir, how, seen)


def refuse_elsewhere(run_dir: Path) -> None:
    """Raise UserError where a run folder is not seen from here."""
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is not there; a run that is on a cluster elsewhere needs "
            f"--address {DASHBOARD}, of the cluster's dashboard"
        )


def remove_stop(run_dir: Path) -> None:
    """Forget that the run was asked to stop; raise UserError where no person wants it to go on."""
    stop = run_dir / "STOP"
    if stop.exists() and int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        raise UserError(
            f"{stop} asks this run to stop, and it was SLURM that started it again; submit it "
            "again, and it goes on"
        )
    stop.unlink(missing_ok=True)


def size_of(options: argparse.Namespace) -> tuple[int, int]:
    """Return the least and the largest number of workers; raises UserError."""
    low, high = options.min_workers, options.max_workers
    if (low is None) != (high is None):
        raise UserError("--min-workers, --max-workers: give both of them, or --workers")
    if low is None or high is None:
        low = high = (node.count_gpus() or 1) if options.workers is None else options.workers
    elif options.workers is not None:
        raise UserError("--workers: give it, or --min-workers and --max-workers, not both")
    if not 1 <= low <= high:
        key, got = ("--workers", low) if low == high else ("--min-workers", f"{low} of {high}")
        raise UserError(f"{key}: got {got}; allowed: 1 or more, and no more than --max-workers")
    return low, high


def resources_of(options: argparse.Namespace) -> dict[str, float]:
    """Return what Ray reserves for a worker; raises UserError."""
    resources = {"CPU": 1.0}
    for given in itertools.chain.from_iterable(x.split(",") for x in options.resources_per_worker):
        name, _, count = given.partition("=")
        try:
            resources[name] = float(count)
            if not name or resources[name] < 0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--resources-per-worker: got {given}; allowed: NAME=COUNT,... as CPU=4,GPU=1"
            ) from None
    if resources.get("GPU", 0) not in (0, 1):
        raise UserError(
            f"--resources-per-worker: got GPU={resources['GPU']:g}; allowed: GPU=1, as every "
            "worker computes on one GPU, or GPU=0"
        )
    return resources


def dry_run(
    options: argparse.Namespace,
    recipe: AnyRecipe,
    size: tuple[int, int],
    per_worker: dict[str, float],
) -> str:
    """Return what a run would use: the recipe, what Ray is asked for, a rank's command."""
    run_dir, http = Path(recipe.run_dir), ray_submit.is_http(options.address)
    if "GPU" not in per_worker and options.address is None and node.count_gpus():
        per_worker = per_worker | {"GPU": 1.0}
    unknown = options.address is not None and "GPU" not in per_worker
    asked = {
        "address": options.address,
        **({"entrypoint": submitted(options, recipe)} if http else {}),
        "num_workers": size[0] if size[0] == size[1] else list(size),
        "resources_per_worker": per_worker
        | ({"GPU": "1 where the cluster has any"} if unknown else {}),
        "resize_every": options.resize_every,
        "restarts": options.restarts,
        "wait": options.wait,
    }
    text = f"# {run_dir}/config.json\n{recipe.to_json()}# Ray\n{json.dumps(asked, indent=2)}"
    if http:  # the cluster has a Python of its own, and knows the attempts
        return text
    attempt, gpus = max(runs.attempts(run_dir), default=-1) + 1, int(per_worker.get("GPU", 0))
    threads = ray_cluster.threads_for(recipe.threads_per_worker, per_worker)
    variables = [f"{key}={value}" for key, value in node.rank_environment(threads, gpus).items()]
    command = [*variables, *node.rank_command(run_dir, recipe.job, attempt)]
    return f"{text}\n# command of each worker's rank\n{shlex.join(command)}"


if __name__ == "__main__":
    sys.exit(main())
