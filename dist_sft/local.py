"""Launch a run on this machine. `launch/local.py` and `python -m dist_sft.local` end here."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_sft import launching, lease, node, preflight, runs
from dist_sft.config import AnyRecipe
from dist_sft.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the command line of the local launcher."""
    result = argparse.ArgumentParser(
        prog="launch/local.py",
        description="Run a recipe on this machine. The same command again continues the run.",
    )
    launching.add_arguments(result)
    result.add_argument("--workers", type=int, metavar="N", help="default: one per GPU, else 1")
    result.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again after a crash, at most N times without a new checkpoint or part",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the recipe, write the run folder, run the workers; return the exit code.

    A dry run refuses what a run would refuse. `--prepare` does not ask what this machine has: the
    run folder that it writes may be started on another one, with `python -m dist_sft.node`. Nor
    does a finished run: it needs nothing any more.
    """
    options = parser().parse_intermixed_args(arguments)
    return launching.exit_code_of(lambda: launch(options))


def launch(options: argparse.Namespace) -> int:
    """Run a recipe, or say what would be run."""
    gpus = node.count_gpus()
    workers = gpus or 1 if options.workers is None else options.workers
    if workers < 1:
        raise UserError(f"--workers: got {workers}; allowed: 1 or more")
    recipe = launching.read(options)
    run_dir = Path(recipe.run_dir)
    if not options.prepare:
        if launching.is_finished(recipe, reuse=options.reuse_unchanged):
            return runs.FINISHED
        mistakes = preflight.path_mistakes(recipe)
        launching.refuse(mistakes + preflight.machine_mistakes(recipe, workers, gpus))
    if options.dry_run:
        print(dry_run(recipe, workers, gpus))
        return runs.FINISHED
    how = launching.launch_of(options, "local", 1, workers)
    seen = launching.write_run_folder(recipe, how)
    if options.prepare:
        print(f"prepared {run_dir}")
        return runs.FINISHED
    (run_dir / "STOP").unlink(missing_ok=True)
    return run_until_it_ends(run_dir, options.restarts, seen)


def run_until_it_ends(run_dir: Path, restarts: int, seen: lease.Lease | None) -> int:
    """Run attempts until one does not crash, or `restarts` in a row brought no new checkpoint."""
    in_vain = 0
    while True:
        before = runs.progress(run_dir)
        attempt = lease.claim(run_dir, seen)
        code = node.run(run_dir, attempt)
        if code != runs.FAILED:
            return code
        if max(runs.attempts(run_dir)) > attempt:
            print("another launcher has taken over: no restart", file=sys.stderr)
            return code
        in_vain = 1 if runs.progress(run_dir) > before else in_vain + 1
        if in_vain > restarts:
            if restarts:
                print(f"gave up after {restarts} restarts without progress", file=sys.stderr)
            return code
        seen = lease.wait_until_free(run_dir)
        what = "part" if (run_dir / "parts").exists() else "step"
        print(
            f"starting again behind {what} {runs.progress(run_dir)} (restarts without a newer one: "
            f"{in_vain} of {restarts})",
            file=sys.stderr,
        )


def dry_run(recipe: AnyRecipe, workers: int, gpus: int) -> str:
    """Return exactly what a run would use: the resolved recipe and the workers' command line."""
    run_dir = Path(recipe.run_dir)
    attempt = max(runs.attempts(run_dir), default=-1) + 1
    command = node.torchrun_command(run_dir, recipe.job, attempt, node.Group(1, workers))
    threads = node.threads_for(recipe.threads_per_worker, workers, gpus)
    variables = [f"{key}={value}" for key, value in node.rank_environment(threads, gpus).items()]
    return (
        f"# {run_dir}/config.json\n{recipe.to_json()}# command\n{shlex.join(variables + command)}"
    )


if __name__ == "__main__":
    sys.exit(main())
