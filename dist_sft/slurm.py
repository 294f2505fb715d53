"""Submit a run to SLURM. `launch/slurm.py` and `python -m dist_sft.slurm` end here. Needs no torch.

A job is `slurm/train.sbatch` or `generate.sbatch` with a run folder; what it does in there,
`batch_job` and `node` say.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_sft import launching, lease, preflight, runs, slurm_options, slurm_queue
from dist_sft.config import AnyRecipe, Recipe, read_config_json, read_recipe
from dist_sft.errors import UserError
from dist_sft.slurm_options import CPUS, GPUS
from dist_sft.slurm_queue import SWEEP, jobs_of, states_of

STOP_SECONDS = 300.0  # what `cancel` gives a run to save


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the recipe, write the run folder, submit the job; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["status"]:
            raise UserError("the status of a run: dist-sft status RUN_DIR")
        if given[:1] == ["cancel"]:
            return cancel(_run_dir(given))
        if given[:1] == ["resume"]:
            return resume(_run_dir(given))
        ours, sbatch = slurm_options.split(given, slurm_options.parser())
        options = slurm_options.parser().parse_intermixed_args(ours)
        return launch(options, sbatch)
    except UserError as error:
        print(error, file=sys.stderr)
        return runs.WRONG_INPUT


@dataclass(frozen=True)
class Plan:
    """What a launch writes and submits."""

    where: Path
    """The run folder, or the one of a sweep."""
    runs: list[tuple[AnyRecipe, runs.Launch]]
    files: dict[Path, str]
    """What is written beside config.json and launch.json of the runs."""
    command: list[str]
    tasks: list[int]
    """Of a sweep, the numbers of the runs in the job array."""

    @property
    def folders(self) -> list[Path]:
        """The run folders."""
        return [Path(recipe.run_dir) for recipe, _ in self.runs]

    def __str__(self) -> str:
        written = dict[Path, str]()
        for recipe, launch in self.runs:
            written[Path(recipe.run_dir) / "config.json"] = recipe.to_json()
            written[Path(recipe.run_dir) / "launch.json"] = launch.to_json()
        parts = [f"# {path}\n{text}" for path, text in (written | self.files).items()]
        return "".join(parts) + f"# command\n{shlex.join(self.command)}"


def launch(options: argparse.Namespace, sbatch: list[str]) -> int:
    """Submit a recipe, or the recipes of a sweep."""
    check(options)
    slurm_options.refuse_a_short_time(options.lead, sbatch)
    plan = make_plan(options, sbatch)
    if plan is None:
        return runs.FINISHED
    if not any(slurm_options.name_of(word) in GPUS for word in sbatch):
        print("no GPUs are asked for (--gpus-per-node): workers run on CPUs", file=sys.stderr)
    if options.dry_run:
        print(plan)
        return runs.FINISHED
    with unless_refused(plan):
        write(plan)
        if options.prepare:
            print(f"prepared {plan.where}; to submit it:\n{shlex.join(plan.command)}")
            return runs.FINISHED
        return submit(plan, options.chain)


def check(options: argparse.Namespace) -> None:
    """Raise UserError where options make no sense, or not here."""
    for name in ("workers_per_node", "lead", "chain"):
        if getattr(options, name) < 1:
            key = "--" + name.replace("_", "-")
            raise UserError(f"{key}: got {getattr(options, name)}; allowed: 1 or more")
    if options.site and not options.site.is_file():
        raise UserError(f"--site: {options.site} is no file")
    if options.site:
        tried = subprocess.run(["bash", "-n", options.site], capture_output=True, text=True)
        if tried.returncode:
            raise UserError(f"--site: bash does not understand it: {tried.stderr.strip()}")
    if options.sweep and options.chain > 1:
        raise UserError("--sweep and --chain: give one of them")
    if not (options.dry_run or options.prepare or shutil.which("sbatch")):
        raise UserError("sbatch is not on PATH: launch on a login node of the cluster")


def make_plan(options: argparse.Namespace, sbatch: list[str]) -> Plan | None:
    """Read the recipes and refuse what cannot work; None where all runs are finished already."""
    _, high = slurm_options.nodes_of(options.nodes)
    where, variants = sweep(options)
    pairs = [(variant, launching.read(variant)) for variant in variants]
    for _, recipe in pairs:
        launching.refuse(preflight.path_mistakes(recipe))
    # Of a sweep that is launched again, with other values perhaps, all runs stay in the list.
    older = slurm_queue.runs_of(where) if (where / SWEEP).exists() else []
    listed = [folder.name for folder in older]
    listed += [n for n in (Path(r.run_dir).name for _, r in pairs) if n not in listed]
    if not options.prepare:
        pairs = [
            pair
            for pair in pairs
            if not launching.is_finished(pair[1], reuse=options.reuse_unchanged)
        ]
    if not pairs:
        return None
    told = {
        "sbatch": [f"--nodes={options.nodes}", f"--signal=B:USR1@{options.lead}", *sbatch],
        "requeue": not options.no_put_back and options.chain == 1,
        "exclude_bad_nodes": options.exclude_bad_nodes,
        "lead": options.lead,
        "folder": os.getcwd(),
    }
    planned = [
        (recipe, launching.launch_of(variant, "slurm", high, options.workers_per_node, **told))
        for variant, recipe in pairs
    ]
    folders = [Path(recipe.run_dir) for recipe, _ in planned]
    site = _site(options.site or files() / "site.sh")
    written = {folder / "site.sh": site for folder in folders}
    tasks = [listed.index(folder.name) for folder in folders] if options.sweep else []
    if options.sweep:
        written[where / SWEEP] = "".join(f"{where.absolute() / name}\n" for name in listed)
    return Plan(where, planned, written, command_for(where, options.job, told, tasks), tasks)


@contextlib.contextmanager
def unless_refused(plan: Plan) -> Iterator[None]:
    """Leave run folders as they were, where the block submits nothing but raises UserError."""
    names = ("config.json", "launch.json", "changes.jsonl", "site.sh", SWEEP)
    folders = {plan.where, *plan.folders}
    new = [folder for folder in folders if not folder.exists()]
    paths = [folder / name for folder in folders for name in names]
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
    jobs = jobs_of(plan.where)
    try:
        yield
    except UserError:
        if jobs_of(plan.where) != jobs:
            raise
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def write(plan: Plan) -> None:
    """Write the run folders; raises UserError where somebody works on one of them."""
    for folder in {plan.where, *plan.folders}:
        refuse_a_second_job(folder)
    for recipe, launch in plan.runs:
        launching.write_run_folder(recipe, launch)
    for folder in {plan.where, *plan.folders}:
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "STOP").unlink(missing_ok=True)
    for path, text in plan.files.items():
        path.write_text(text, encoding="utf-8")


def sweep(options: argparse.Namespace) -> tuple[Path, list[argparse.Namespace]]:
    """Return the run folder, or that of the sweep, and the options of every run.

    A sweep's runs are folders in the recipe's run_dir, with names that say what is different; so do
    the names of their answers.
    """
    words = [f"job={options.job}", *options.overrides]
    recipe = read_recipe(options.recipe, words)
    where = Path(recipe.run_dir)
    if not options.sweep:
        return where, [options]
    axes = []
    for given in options.sweep:
        key, _, values = given.partition("=")
        if not key or not values:
            raise UserError(f"--sweep: got {given}; allowed: KEY=A,B,... as optimizer.lr=1e-5,2e-5")
        axes.append([f"{key}={value}" for value in values.split(",")])
    variants = []
    for words_of_one in itertools.product(*axes):
        name = ",".join(words_of_one).replace("/", "_")
        extra = [*words_of_one, f"run_dir={where / name}"]
        if not isinstance(recipe, Recipe):
            answers = Path(recipe.output.path)
            path = answers.with_name(f"{answers.stem}-{name}{answers.suffix}")
            extra.insert(0, f"output.path={path}")  # first: a sweep may say it otherwise
        changed = vars(options) | {"overrides": [*options.overrides, *extra]}
        variants.append(argparse.Namespace(**changed))
    return where, variants


def command_for(
    where: Path, job: str, told: dict[str, Any], tasks: Sequence[int] = ()
) -> list[str]:
    """Return the command that submits a run folder, or these tasks of a sweep."""
    options: list[str] = told["sbatch"]
    chosen = {slurm_options.name_of(word) for word in options}
    return [
        "sbatch",
        "--parsable",
        f"--job-name={where.name}",
        # One worker's share of a node is no default of SLURM's: it would give one core.
        *(["--exclusive"] if chosen.isdisjoint(CPUS) else []),
        f"--chdir={told['folder']}",
        f"--output={where.absolute()}/logs/slurm-{'%A_%a' if tasks else '%j'}.out",
        "--open-mode=append",
        "--requeue" if told["requeue"] else "--no-requeue",
        *([f"--array={','.join(map(str, tasks))}"] if tasks else []),
        *options,
        str(files() / f"{job}.sbatch"),
        str(where.absolute()),
    ]


def submit(plan: Plan, chain: int = 1) -> int:
    """Submit the job, or a chain of them, and note its number; say how to follow it."""
    # Inside of another job, its variables would be taken for options of this one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    before = None
    log = next(word for word in plan.command if word.startswith("--output=")).partition("=")[2]
    for link in range(chain):
        words = list(plan.command)
        if before is not None:
            words[1:1] = [f"--dependency=afterany:{before}"]
        done = slurm_queue.call(words, env=environment)
        if done.returncode:
            raise UserError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
        before = done.stdout.split()[-1].partition(";")[0]
        noted = {plan.where: before}
        for folder, task in zip(plan.folders, plan.tasks, strict=False):
            noted[folder] = f"{before}_{task}"  # a run of a sweep
        for folder, job in noted.items():
            slurm_queue.note(folder, time=time.time(), job=job, command=words)
        of = f", link {link + 1} of {chain}" if chain > 1 else ""
        print(f"job {before}: {plan.where}{of}")
        print(f"its log: {log.replace('%j', before).replace('%A', before)}")
    print(f"its state: dist-sft status {plan.where}")
    warning = None if before is None else slurm_queue.warning_of(before)
    if warning:
        print(f"{warning} `launch/slurm.py cancel {plan.where}` takes it back", file=sys.stderr)
    return runs.FINISHED


def refuse_a_second_job(folder: Path) -> None:
    """Raise UserError where a job is in the queue for this folder."""
    for job, state in states_of(jobs_of(folder)).items():
        raise UserError(
            f"run_dir: job {job} of {folder} is {state}: wait for it, or end it with "
            f"`launch/slurm.py cancel {folder}`"
        )


def cancel(folder: Path) -> int:
    """Let the run of a folder save, and end its jobs; raises UserError where there is none."""
    jobs = states_of(jobs_of(folder))
    if not jobs:
        raise UserError(f"{folder} has no job in the queue")
    folders = slurm_queue.runs_of(folder)
    for run_dir in folders:
        (run_dir / "STOP").touch()  # first: a job that starts now stops at once
    waiting = [job for job, state in jobs.items() if state.startswith("PENDING")]
    _scancel(waiting)
    left = jobs.keys() - set(waiting)
    if left:
        print(f"jobs that run save and stop: {', '.join(sorted(left))}", flush=True)
        leads = [runs.read_launch(each).options.get("lead", 0) for each in folders]
        deadline = time.monotonic() + max(STOP_SECONDS, *leads)
        while states_of(list(jobs)) and time.monotonic() < deadline:
            time.sleep(2)
        _scancel(list(states_of(list(jobs))))
    print(f"ended: {', '.join(jobs)}")
    for run_dir in folders:
        attempts = runs.attempts(run_dir)
        outcome = runs.read_outcome(run_dir, attempts[-1]) if attempts else None
        print(f"{run_dir}: {outcome.reason if outcome else 'no attempt has ended'}")
    print(f"`launch/slurm.py resume {folder}` continues")
    return runs.FINISHED


def _scancel(jobs: list[str]) -> None:
    done = slurm_queue.call(["scancel", *jobs]) if jobs else None
    if done is not None and done.returncode:
        raise UserError(f"scancel: {done.stderr.strip()}")


def resume(folder: Path) -> int:
    """Submit the job of a run folder again, with the options that it was launched with."""
    if slurm_queue.runs_of(folder) != [folder]:
        raise UserError(f"{folder} is a sweep; give the same command again, or resume single runs")
    launch = runs.read_launch(folder)
    if launch.launcher != "slurm":
        raise UserError(f"{folder} was launched by {launch.launcher}, not by launch/slurm.py")
    recipe = read_config_json(folder)
    if runs.is_finished(recipe):
        print(f"{folder} is finished already")
        return runs.FINISHED
    refuse_a_second_job(folder)
    lease.wait_until_free(folder)
    (folder / "STOP").unlink(missing_ok=True)
    plan = Plan(folder, [(recipe, launch)], {}, command_for(folder, recipe.job, launch.options), [])
    return submit(plan)


def files() -> Path:
    """Return the folder of the batch scripts."""
    here = Path(__file__).parent
    # The wheel carries the folder inside the package; a checkout has it at its top.
    return next(p for p in (here / "slurm_files", here.parent / "slurm") if p.is_dir())


def _site(path: Path) -> str:
    """Return a site's file behind the folder and the Python of the launch, which it may change."""
    head = f"cd {shlex.quote(os.getcwd())} || exit 1\npython={shlex.quote(sys.executable)}\n"
    return head + path.read_text(encoding="utf-8")


def _run_dir(given: list[str]) -> Path:
    if len(given) != 2:
        raise UserError(
            f"launch/slurm.py {given[0]} RUN_DIR takes one run folder and nothing else; got: "
            f"{shlex.join(given[1:]) or 'none'}"
        )
    if not Path(given[1]).is_dir():
        raise UserError(f"RUN_DIR: {given[1]} is no folder")
    return Path(given[1])


if __name__ == "__main__":
    sys.exit(main())
