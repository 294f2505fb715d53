"""The `dist-sft` command: everything that needs no cluster.

Only what a command needs is imported, when it runs: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_sft import __version__, chat_command, run_commands
from dist_sft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from dist_sft.config import Recipe
    from dist_sft.data import Stores
    from dist_sft.tokenizer import Words

WRONG_INPUT = 2  # as argparse exits, and as launchers do


def parser() -> argparse.ArgumentParser:
    """Return the command line; each command names the function that runs it."""
    result = argparse.ArgumentParser(
        prog="dist-sft",
        description="Look at data, plans and finished runs. To train: launch/local.py --help.",
        epilog="dist-sft COMMAND --help says more about a command.",
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = result.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_plan(commands)
    _add_verify_resume(commands)
    run_commands.add(commands)
    chat_command.add(commands)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    top = parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["train"]:  # the launcher has a parser of its own
        top.error(f"training is started by: launch/local.py {shlex.join(words)}")
    options, rest = top.parse_known_args(words)
    # argparse gives a command its key=value words only up to the first option behind them.
    overrides = getattr(options, "overrides", None)
    if rest and (overrides is None or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides is not None:
        options.overrides = [*overrides, *rest]
    try:
        return options.run(options) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT


# ---- inspect ---------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="show what is learned: totals of the data, the mask of a row",
        description="Show the data as the model meets it. Without --row: what the data sets come "
        "to, and the first samples. Starts no workers and loads no model.",
    )
    _add_recipe(command)
    command.add_argument("--row", type=int, metavar="N", help="show row N of a source, from 0")
    command.add_argument(
        "--source", metavar="NAME", help="which one: its name, or train.N or eval.N"
    )
    command.add_argument("--tokens", action="store_true", help="list the row's tokens as well")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw the row's mask")
    command.add_argument(
        "--no-color", action="store_true", help="mark learned text by brackets, not by colour"
    )
    command.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    if options.row is None and (options.source or options.tokens or options.png):
        raise UserError("--source, --tokens and --png are about one row: add --row N")
    recipe, words = _read(options)
    console = _console(no_color=options.no_color)
    if options.row is not None:
        _inspect_row(options, recipe, words, console)
        return
    from dist_sft.data import open_datasets
    from dist_sft.totals import show_totals

    train, evals = open_datasets(_encode(recipe, words), recipe.data, recipe.seed)
    show_totals(console, recipe.data, words, train, evals)


def _inspect_row(
    options: argparse.Namespace, recipe: Recipe, words: Words, console: Console
) -> None:
    from dist_sft.look import find_source, look_at, read_rows, show_look

    source = find_source(recipe.data, options.source)
    row = read_rows(source, [options.row])[options.row]
    look = look_at(options.row, row, source, recipe.data, words)
    show_look(console, look, table=options.tokens)
    if options.png is not None:
        if not look.tokens:
            raise UserError(f"--png: there is nothing to draw: {look.fate}")
        from dist_sft.mask_picture import draw

        try:
            notes = draw(look.tokens, look.title, options.png)
        except OSError as error:
            raise UserError(f"--png: cannot write {options.png}: {error}") from error
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        console.print(f"\ndrawn to {options.png}", highlight=False, soft_wrap=True)


# ---- plan ------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="foretell a run: steps, tokens, efficiency, the rows of a step",
        description="Foretell a run, or show which rows are in one of its steps.",
    )
    _add_recipe(command)
    command.add_argument("--workers", type=int, metavar="N", help="default: one per GPU, else 1")
    command.add_argument("--step", type=int, metavar="N", help="show the rows of step N, from 1")
    command.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from dist_sft.node import count_gpus

    workers = count_gpus() or 1 if options.workers is None else options.workers
    if workers < 1:
        raise UserError(f"--workers: got {workers}; allowed: 1 or more")
    recipe, words = _read(options)
    from dist_sft.data import open_datasets
    from dist_sft.plan_report import show_plan, show_step

    train, _ = open_datasets(_encode(recipe, words), recipe.data, recipe.seed)
    if options.step is None:
        show_plan(_console(), recipe, train, workers)
    else:
        show_step(_console(), recipe, train, workers, options.step)


# ---- verify-resume ---------------------------------------------------------------------------


def _add_verify_resume(commands: Any) -> None:
    command = commands.add_parser(
        "verify-resume",
        help="prove that a killed run goes on exactly",
        description="Run a few steps of a recipe twice in a scratch folder, once killed and "
        "continued, and compare losses and state bit by bit. Exit code 1 where they differ.",
    )
    _add_recipe(command)
    command.add_argument("--workers", type=int, metavar="N", help="default: one per GPU, else 1")
    command.add_argument("--steps", type=int, default=6, metavar="N", help="default: 6")
    command.add_argument("--kill-at", type=int, default=3, metavar="N", help="default: 3")
    command.set_defaults(run=_verify_resume)


def _verify_resume(options: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    from dist_sft.node import count_gpus

    if not 1 <= options.kill_at < options.steps:
        raise UserError(
            f"--kill-at: got {options.kill_at}; allowed: 1 to {options.steps - 1}, below --steps"
        )
    from dist_sft.verify_resume import verify_resume

    workers = count_gpus() or 1 if options.workers is None else options.workers
    with TemporaryDirectory(prefix="dist_sft-") as scratch:
        verdict = verify_resume(
            Path(options.recipe), options.overrides, workers, options.steps, options.kill_at,
            Path(scratch), say=lambda line: print(line, flush=True),
        )  # fmt: skip
    print(verdict.told)
    return 0 if verdict.equal else 1


# ---- what commands share ---------------------------------------------------------------------


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="YAML file")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any setting of the recipe"
    )


def _read(options: argparse.Namespace) -> tuple[Recipe, Words]:
    from dist_sft.config import read_training

    recipe = read_training(options.recipe, options.overrides)
    from dist_sft.tokenizer import load_words

    return recipe, load_words(recipe.model, recipe.data.template)


def _encode(recipe: Recipe, words: Words) -> Stores:
    """Encode what is not encoded yet, with a sign of life on stderr; stdout has only results."""
    from rich.console import Console

    from dist_sft.data import prepare

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("encoding") as status:
        return prepare(
            recipe.data,
            words,
            say=lambda line: console.print(line, markup=False),
            progress=lambda rows: status.update(f"encoding: {rows:,} rows"),
        )


def _console(*, no_color: bool = False) -> Console:
    from rich.console import Console

    # None lets rich follow NO_COLOR. Lines for a file or a pipe need not fit a terminal.
    console = Console(no_color=no_color or None)
    if not console.is_terminal:
        console.width = 120
    return console


if __name__ == "__main__":
    sys.exit(main())
