"""What every launcher does before workers start: check the recipe, write the run folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_sft import lease, runs
from dist_sft.config import JOBS, AnyRecipe, read_recipe
from dist_sft.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all launchers understand."""
    parser.add_argument("job", choices=list(JOBS), help="what to run")
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any setting")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--prepare", action="store_true", help="write the run folder, and stop")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="continue although this setting (dotted, or a section) differs from the run's",
    )
    parser.add_argument(
        "--reuse-unchanged",
        action="store_true",
        help="generate: go on although input, model or settings differ from the run's; rows keep "
        "the answers that do not depend on what is different",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="use a checkpoint that other users own or may write",
    )


def read(options: argparse.Namespace, *, here: bool = True) -> AnyRecipe:
    """Read the recipe, and refuse what its run folder refuses, which may not be `here`."""
    recipe = read_recipe(options.recipe, [f"job={options.job}", *options.overrides])
    if options.restarts < 0:
        raise UserError(f"--restarts: got {options.restarts}; allowed: 0 or more")
    if recipe.job == "generate" and options.allow_change:
        raise UserError("--allow-change is for training; for generation there is --reuse-unchanged")
    if recipe.job == "train" and options.reuse_unchanged:
        raise UserError("--reuse-unchanged is for generation; for training there is --allow-change")
    if here:
        runs.check(recipe, allowed(options))
    return recipe


def allowed(options: argparse.Namespace) -> list[str]:
    """Return the settings that may differ from those of the run that is there."""
    return [runs.ALL] if options.reuse_unchanged else options.allow_change


def is_finished(recipe: AnyRecipe, *, reuse: bool = False) -> bool:
    """Tell whether there is nothing to do, and say so; with `reuse`, generation looks itself."""
    if reuse or not runs.is_finished(recipe) or _has_changed(recipe):
        return False
    if recipe.job == "generate":
        print(f"{recipe.run_dir} is finished already: the answers are in {recipe.output.path}")
        return True
    print(
        f"{recipe.run_dir} is finished already; for another run give another run_dir, "
        "for more of this one more steps (under a constant schedule)"
    )
    return True


def _has_changed(recipe: AnyRecipe) -> bool:
    """Tell whether a finished generation run was made from other rows or another model."""
    if recipe.job != "generate":
        return False
    from dist_sft import parts
    from dist_sft.inputs import fingerprints
    from dist_sft.locate import locate
    from dist_sft.paths import cache_folder

    plan, cache = parts.read_plan(Path(recipe.run_dir)), cache_folder(recipe.cache_dir)
    if plan is None:
        return True
    try:
        found = fingerprints(recipe.input, cache)
        model = Path(recipe.model.path)
        # A checkpoint never changes, and what is on the hub is fetched for a run alone.
        if model.exists() and Path(plan.model) == model:
            told = locate(
                str(model), verify="size", trusting=True, memo=cache / "digests",
                say=lambda line: None,
            )  # fmt: skip
            found["model"] = told.identity
    except UserError:  # it is not there any more, and nothing needs it
        return False
    return any(plan.facts.get(key) != value for key, value in found.items())


def refuse(mistakes: list[str]) -> None:
    """Raise UserError where there are mistakes."""
    if mistakes:
        raise UserError("\n".join(mistakes))


def launch_of(
    options: argparse.Namespace, launcher: str, nodes: int, workers_per_node: int, **told: Any
) -> runs.Launch:
    """Return what launch.json keeps; `told` is kept beside the options of all launchers."""
    told |= {
        "overrides": options.overrides,
        "allow_change": allowed(options),
        "trust_checkpoint": options.trust_checkpoint,
        "restarts": options.restarts,
    }
    if options.reuse_unchanged:
        told["reuse_unchanged"] = True
    return runs.Launch(launcher, nodes, workers_per_node, told, runs.code_revision())


def write_run_folder(recipe: AnyRecipe, launch: runs.Launch) -> lease.Lease | None:
    """Make or take the run folder when nobody works on it; return the lease left in it."""
    seen = lease.wait_until_free(Path(recipe.run_dir))
    runs.create(recipe, launch)
    return seen


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a launcher whose workers are this process's; tell a person's mistakes without a trace."""
    try:
        return run()
    except UserError as error:
        print(error, file=sys.stderr)
        return runs.WRONG_INPUT
    except KeyboardInterrupt:  # while workers run, a relay takes care of it
        print("\nstopped while no worker was running", file=sys.stderr)
        return runs.STOPPED
