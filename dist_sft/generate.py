"""Generate: answer rows, in parts. Launchers start `python -m dist_sft.generate RUN_DIR` per rank.

Workers are independent: nobody waits for another one in a collective. What they have in common is
the run folder: the plan, who has begun a part, and the parts that are finished.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from dist_sft import earlier, inputs, merge, output_file, parts, rank_program, runs
from dist_sft.answering import Answerer
from dist_sft.chat import BadRow, Encoder, parse
from dist_sft.config import read_generation_config
from dist_sft.console import Console
from dist_sft.earlier import Earlier
from dist_sft.engines import VLLM, Engine, HuggingFace, Tick
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.inputs import Inputs
from dist_sft.locate import Located
from dist_sft.model import positions, resolve_dtype
from dist_sft.parts import Plan, Tally
from dist_sft.paths import cache_folder
from dist_sft.prepack import can_prepack
from dist_sft.prepare import once_per_node
from dist_sft.progress import Interrupted, Overview, Progress, describe
from dist_sft.runs import Outcome
from dist_sft.stopping import StopFlag
from dist_sft.tokenizer import Words, load_words, vocabulary_size
from dist_sft.watchdog import Heart
from dist_sft.weights import check_vocabulary, check_words, load, locate, ready
from dist_sft.world import Place

LOOKED_AT = 100  # rows of a source, of which one at least must have a prompt


def generate(run_dir: Path, attempt: int, console: Console) -> Outcome:
    """Answer all rows, or go on until a stop; return how it went. Raises UserError."""
    with ExitStack() as stack:
        # 1. Who am I, and what is asked of me?
        place = Place.from_environment()
        heart = Heart()
        heart.beat("preparing")
        recipe, launch = read_generation_config(run_dir), runs.read_launch(run_dir)
        if recipe.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)

        # 2. Once per node: index the input, fetch the model. Once per run: convert the weights, and
        #    find out whether what is finished was made from the same things.
        make = partial(prepare, run_dir, attempt, recipe, launch, place.device, console.say)
        found = once_per_node(
            run_dir, attempt, place, console, make, nodes=[0], after_the_first=True
        )[place.node_rank]  # fmt: skip
        plan = parts.read_plan(run_dir)
        assert plan is not None, "node 0 has written it"
        stop = StopFlag(run_dir / "STOP")
        stop.listen()

        # 3. Load what answers.
        heart.beat("loading")
        worker = (place.rank, place.world)
        progress = Progress(run_dir, attempt, plan, worker, heart, stop, console)
        answerer = load_answerer(run_dir, recipe, plan, found, place, progress.tick)
        stack.callback(console.close)
        console.start(plan.rows, progress.rows_before, "answering", "row")

        # 4. The parts: one's own share, what others have not begun, in the end what they have not
        #    finished. The first worker makes one file of them.
        try:
            for part in progress.take():
                with progress.working_on(part):
                    answered = answerer.answer(part)
                    parts.commit(run_dir, attempt, plan, part, *answered)
            said = []
            if place.rank == 0:
                said = finish(
                    run_dir, attempt, recipe, plan, answerer, progress.seconds, heart.beat,
                    console.say,
                )  # fmt: skip
        except Interrupted as asked:
            console.close()
            return stopped(run_dir, plan, str(asked))
        console.close()
        for line in said:
            console.say(line)
        return Outcome(runs.FINISHED, "finished", plan.parts)


def finish(
    run_dir: Path,
    attempt: int,
    recipe: GenerateRecipe,
    plan: Plan,
    answerer: Answerer,
    seconds: float,
    beat: Callable[[str], None],
    say: Callable[[str], None],
) -> list[str]:
    """Make one file of all parts, and `summary.json`; return what to say after `seconds`."""
    output = Path(recipe.output.path)
    tally = merged(run_dir, attempt, plan, answerer, output, beat, say)
    if (run_dir / earlier.FOLDER).exists():
        say(f"rows that kept earlier answers: {tally.reused:,} of {tally.rows:,}")
    runs.write_atomically(run_dir / "summary.json", tally.to_json())
    rate = Overview.read(run_dir, attempt, plan).tokens_per_second
    return [
        *describe(tally),
        f"this attempt took {timedelta(seconds=round(seconds))}, {rate:,.0f} tokens/s",
        f"finished {run_dir}: the answers are in {recipe.output.path}",
    ]


def prepare(
    run_dir: Path,
    attempt: int,
    recipe: GenerateRecipe,
    launch: runs.Launch,
    device: torch.device,
    say: Callable[[str], None],
    first: dict[str, Any] | None,
) -> dict[str, Any]:
    """Make what the workers of a node need; on the first node, the plan as well.

    On others, `first` is what was made there. Raises UserError for wrong input, and where this node
    sees something else than the first one.
    """
    cache, dtype = cache_folder(recipe.cache_dir), resolve_dtype(recipe.model.dtype, device)
    index, sources = inputs.index(recipe.input, cache, tuple(merge.COLUMNS), say)
    reuse = first is None and bool(launch.options.get("reuse_unchanged"))
    located = find_model(run_dir, recipe, cache, dtype, launch, say, reuse=reuse, check=not first)
    words, encoder = load_encoder(recipe, located.words)
    converted = run_dir / parts.WEIGHTS / f"{located.identity[:16]}-{name_of(dtype)}"
    found = {
        "input": index.name,
        "model": located.identity,
        "template and tokenizer": encoder.prompt_fingerprint,
        "places": {
            "inputs": str(index),
            "words": str(located.words),
            "model": str(converted if located.checkpoint else located.folder),
        },
    }
    if first is not None:
        for key, value in found.items():
            if key != "places" and value != first[key]:
                raise UserError(
                    f"{socket.gethostname()}: {key}: this node sees something else than the first "
                    "one; give paths that are the same everywhere, and model.revision for a name "
                    "on the hub"
                )
        return found
    rows = Inputs(index)
    tokens = vocabulary_size(words.tokenizer)
    check_vocabulary(located, tokens, words.new_tokens, recipe.template, "template")
    check_words(located, encoder, say, "template")
    room_for(recipe, located.words)
    refuse_wrong_columns(recipe, rows)
    if recipe.output.path.lower().endswith(".parquet"):
        merge.check_columns(rows, lambda phase: None)
    output_file.made(run_dir, Path(recipe.output.path))
    facts = {
        **sources,
        "model": located.identity,
        "template and tokenizer": encoder.prompt_fingerprint,
        "computed": f"in {dtype} on {device_name(device)}{layout(recipe, dtype, device)}",
        "libraries": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "settings": recipe.settings_fingerprint(),
    }
    if device.type == "cpu":
        facts["threads"] = str(torch.get_num_threads())
    size = parts.choose_part_rows(recipe.generate.part_rows, len(rows))
    plan = Plan(len(rows), size, recipe.generate.num_samples, facts, str(located.folder))
    parts.adopt(run_dir, plan, reuse=reuse, say=say)
    if reuse:  # once: a restart goes on with this plan
        options = {k: v for k, v in launch.options.items() if k != "reuse_unchanged"}
        runs.write_launch(run_dir, replace(launch, options=options))
    parts.remove_leftovers(run_dir, attempt)
    if located.checkpoint:
        converted.parent.mkdir(exist_ok=True)
        ready(located, converted, dtype, say)
    return found


def find_model(
    run_dir: Path,
    recipe: GenerateRecipe,
    cache: Path,
    dtype: torch.dtype,
    launch: runs.Launch,
    say: Callable[[str], None],
    *,
    reuse: bool,
    check: bool,
) -> Located:
    """Return where the model is: what this run has converted already, or what the recipe means.

    `check` reads every byte of a checkpoint.
    """
    plan = parts.read_plan(run_dir)
    if plan is not None and not reuse:
        identity = plan.facts["model"]
        converted = run_dir / parts.WEIGHTS / f"{identity[:16]}-{name_of(dtype)}"
        if converted.is_dir():
            return Located(converted, False, converted, None, cache / "digests", known=identity)
    path, step = parts.pinned(run_dir, recipe, reuse=reuse)
    return locate(
        path,
        step,
        revision=recipe.model.revision,
        verify="sha256" if check else "size",
        trusting=bool(launch.options.get("trust_checkpoint")),
        memo=cache / "digests",
        say=say,
    )


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as recipes have it."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Return what computes, as far as last bits depend on it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def layout(recipe: GenerateRecipe, dtype: torch.dtype, device: torch.device) -> str:
    """Return how weights lie, as far as last bits depend on it."""
    wanted = recipe.generate.engine == "hf" and recipe.generate.prepack_weights
    return ", weights prepacked" if wanted and can_prepack(dtype, device) else ""


def load_encoder(recipe: GenerateRecipe, place: Path) -> tuple[Words, Encoder]:
    """Load tokenizer and template; `place` is where the model's own tokenizer is."""
    model = recipe.model.model_copy(update={"path": str(place), "revision": None})
    words = load_words(model, recipe.template, "template")
    return words, Encoder(words.template, words.tokenizer)


def refuse_wrong_columns(recipe: GenerateRecipe, rows: Inputs) -> None:
    """Raise UserError for a source of whose first rows none has a prompt."""
    for number, source in enumerate(recipe.input):
        problems: list[BadRow | None] = []
        for row in rows.read(rows.first_of(number, LOOKED_AT)):
            try:
                if isinstance(row, BadRow):
                    raise row
                parse(row, source.format, answered=False)
                problems.append(None)
            except BadRow as error:
                problems.append(error)
        if all(problems):
            raise UserError(
                f"input.{number}.path={source.path}: none of the first {len(problems)} rows has a "
                f"prompt; the first one: {problems[0]}. For generation a column prompt is enough"
            )


def room_for(recipe: GenerateRecipe, words: Path) -> int | None:
    """Return how many tokens a prompt may have; None for any number. Raises UserError for none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(words, trust_remote_code=recipe.model.trust_remote_code)
    limit = positions(config.get_text_config())
    if limit is None:
        return None
    room = limit - recipe.generate.max_new_tokens
    if room < 1:
        raise UserError(
            f"generate.max_new_tokens: got {recipe.generate.max_new_tokens}, but the model takes "
            f"{limit} tokens, prompt and answer together (its config's max_position_embeddings); "
            f"allowed: less than {limit}"
        )
    return room


def load_answerer(
    run_dir: Path,
    recipe: GenerateRecipe,
    plan: Plan,
    found: dict[str, Any],
    place: Place,
    tick: Tick,
) -> Answerer:
    """Load model, tokenizer and index, as `prepare` found them on this node."""
    places = {name: Path(path) for name, path in found["places"].items()}
    words, encoder = load_encoder(recipe, places["words"])
    dtype, folder = resolve_dtype(recipe.model.dtype, place.device), places["model"]
    engine: Engine
    if recipe.generate.engine == "vllm":
        engine = VLLM(folder, encoder, recipe, dtype, place.local_rank, tick)
    else:
        trusting = recipe.model.trust_remote_code
        model = load(
            folder, dtype, place.device, name=recipe.model.path, trust_remote_code=trusting,
            prepacked=recipe.generate.prepack_weights,
        )  # fmt: skip
        text_of = partial(words.tokenizer.decode, skip_special_tokens=False)
        engine = HuggingFace(model, encoder, text_of, recipe, tick)
    reused = run_dir / earlier.FOLDER / "keys.npy"
    kept = Earlier(run_dir) if reused.exists() else None
    room = room_for(recipe, places["words"])
    return Answerer(recipe, plan, Inputs(places["inputs"]), encoder, engine, room, kept)


def stopped(run_dir: Path, plan: Plan, by: str) -> Outcome:
    """Say how far a run is that was asked to stop."""
    done = sum(len(plan.rows_of(part)) for part in parts.finished(run_dir))
    reason = f"stopped by {by}; {done} of {plan.rows} rows are finished"
    return Outcome(runs.STOPPED, reason, len(parts.finished(run_dir)), asked_by=by)


def merged(
    run_dir: Path,
    attempt: int,
    plan: Plan,
    answerer: Answerer,
    output: Path,
    beat: Callable[[str], None],
    say: Callable[[str], None],
) -> Tally:
    """Merge all parts; answer those again that are not what was written."""
    try:
        return merge.merge(run_dir, attempt, plan, answerer.inputs, output, beat)
    except merge.Damaged as damage:
        for problem in damage.problems:
            say(f"{problem}; it is answered again")
            parts.set_aside(run_dir, problem.part)
            answered = answerer.answer(problem.part)
            parts.commit(run_dir, attempt, plan, problem.part, *answered)
    return merge.merge(run_dir, attempt, plan, answerer.inputs, output, beat)


if __name__ == "__main__":
    sys.exit(rank_program.main(generate))
