"""Generate: answer rows, in parts. Launchers start `python -m dist_sft.generate RUN_DIR` per rank.

Workers are independent: nobody waits for another one in a collective. What they have in common is
the run folder: the plan, who has begun a part, and the parts that are finished.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_sft import inputs, merge, parts, rank_program, runs
from dist_sft.answering import COLUMNS, Answerer
from dist_sft.chat import BadRow, Encoder, parse
from dist_sft.config import read_generation_config
from dist_sft.console import Console
from dist_sft.earlier import Earlier
from dist_sft.engines import VLLM, Engine, HuggingFace, Tick
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.inputs import Inputs
from dist_sft.model import positions, resolve_dtype
from dist_sft.parts import Plan, Tally
from dist_sft.paths import cache_folder
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
        dtype = resolve_dtype(recipe.model.dtype, place.device)
        if recipe.deterministic:
            torch.use_deterministic_algorithms(True)

        # 2. Once per node: index the input, fetch the model. Once per run: convert the weights, and
        #    find out whether what is finished was made from the same things.
        found = once_per_node(
            run_dir, attempt, place, console,
            partial(prepare, run_dir, recipe, place, dtype, launch.options, console.say),
            nodes=[0],
        )  # fmt: skip
        plan = parts.read_plan(run_dir)
        assert plan is not None, "node 0 has written it"
        stop = StopFlag(run_dir / "STOP")
        stop.listen()

        # 3. Load what answers.
        heart.beat("loading")
        worker = (place.rank, place.world)
        progress = Progress(run_dir, attempt, plan, worker, heart, stop, console)
        earlier = Earlier(run_dir) if launch.options.get("reuse_unchanged") else None
        answerer = load_answerer(
            recipe, plan, found[place.node_rank], place.device, progress.tick, earlier
        )
        stack.callback(console.close)
        console.start(plan.rows, progress.rows_before, "answering", "row")

        # 4. The parts: one's own share, what others have not begun, in the end what they have not
        #    finished.
        try:
            for part in progress.take():
                with progress.working_on(part):
                    answered = answerer.answer(part)
                    parts.commit(run_dir, attempt, plan, part, *answered)
        except Interrupted as asked:
            console.close()
            return stopped(run_dir, plan, str(asked))
        if place.rank != 0:
            return Outcome(runs.FINISHED, "finished", plan.parts)

        # 5. The end: one file.
        tally = merged(run_dir, recipe, plan, answerer, attempt, heart.beat, console.say)
        console.close()
        runs.write_atomically(run_dir / "summary.json", tally.to_json())
        for line in describe(tally):
            console.say(line)
        took, view = (
            timedelta(seconds=round(progress.seconds)),
            Overview.read(run_dir, attempt, plan),
        )
        console.say(f"this attempt took {took}, {view.tokens_per_second:,.0f} tokens/s")
        console.say(f"finished {run_dir}: the answers are in {recipe.output.path}")
        return Outcome(runs.FINISHED, "finished", plan.parts)


def prepare(
    run_dir: Path,
    recipe: GenerateRecipe,
    place: Place,
    dtype: torch.dtype,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make what the workers of a node need; on node 0, the plan as well. Raises UserError."""
    first = place.node_rank == 0
    cache = cache_folder(recipe.cache_dir)
    index = inputs.index(recipe.input, cache, COLUMNS, say)
    reuse = bool(options.get("reuse_unchanged"))
    path, step = parts.pinned(run_dir, recipe, reuse=reuse)
    located = locate(
        path,
        step,
        revision=recipe.model.revision,
        verify="sha256" if first else "size",
        trusting=bool(options.get("trust_checkpoint")),
        memo=cache / "digests",
        say=say,
    )
    folder = located.folder
    if located.checkpoint:
        folder = (
            run_dir / parts.WEIGHTS / f"{located.identity[:16]}-{str(dtype).removeprefix('torch.')}"
        )
    found = {"inputs": str(index), "words": str(located.words), "model": str(folder)}
    if first:
        rows = Inputs(index)
        words, encoder = load_encoder(recipe, located.words)
        tokens = vocabulary_size(words.tokenizer)
        check_vocabulary(located, tokens, words.new_tokens, recipe.template, "template")
        check_words(located, encoder, say, "template")
        room_for(recipe, located.words)
        refuse_wrong_columns(recipe, rows)
        if recipe.output.path.lower().endswith(".parquet"):
            merge.check_columns(rows)
        merge.refuse_strange(run_dir, Path(recipe.output.path))
        facts = {
            **inputs.fingerprints(recipe.input, cache),
            "model": located.identity[:32],
            "template and tokenizer": encoder.prompt_fingerprint[:32],
            "computed": f"in {dtype} on {place.device.type}",
            "settings": recipe.settings_fingerprint(),
        }
        if place.device.type == "cpu":
            facts["threads"] = str(torch.get_num_threads())
        size = parts.choose_part_rows(recipe.generate.part_rows, len(rows))
        plan = Plan(len(rows), size, recipe.generate.num_samples, facts, str(located.folder))
        parts.adopt(run_dir, plan, reuse=reuse, say=say)
        if located.checkpoint:
            folder.parent.mkdir(exist_ok=True)
            ready(located, folder, dtype, say)
    return found


def load_encoder(recipe: GenerateRecipe, place: Path) -> tuple[Words, Encoder]:
    """Load tokenizer and template; `place` is where the model's own tokenizer is."""
    model = recipe.model.model_copy(update={"path": str(place), "revision": None})
    words = load_words(model, recipe.template, "template")
    return words, Encoder(words.template, words.tokenizer)


def refuse_wrong_columns(recipe: GenerateRecipe, rows: Inputs) -> None:
    """Raise UserError for a source of whose first rows none has a prompt in its columns."""
    for number, source in enumerate(recipe.input):
        problems: list[BadRow | None] = []
        for row in rows.read(rows.first_of(number, LOOKED_AT)):
            try:
                if not isinstance(row, BadRow):
                    parse(row, source.format, answered=False)
                    problems.append(None)
            except BadRow as error:
                problems.append(error if error.reason == "wrong_columns" else None)
        if problems and all(problems):
            raise UserError(f"input.{number}.path={source.path}: {problems[0]}")


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
    recipe: GenerateRecipe,
    plan: Plan,
    found: dict[str, Any],
    device: torch.device,
    tick: Tick,
    earlier: Earlier | None = None,
) -> Answerer:
    """Load model, tokenizer and index, as `prepare` found them on this node."""
    words, encoder = load_encoder(recipe, Path(found["words"]))
    dtype = resolve_dtype(recipe.model.dtype, device)
    folder = Path(found["model"])
    engine: Engine
    if recipe.generate.engine == "vllm":
        engine = VLLM(folder, encoder, recipe, dtype, tick)
    else:
        trusting = recipe.model.trust_remote_code
        model = load(folder, dtype, device, name=recipe.model.path, trust_remote_code=trusting)
        text_of = partial(words.tokenizer.decode, skip_special_tokens=False)
        engine = HuggingFace(model, encoder, text_of, recipe, tick)
    room = room_for(recipe, Path(found["words"]))
    return Answerer(recipe, plan, Inputs(Path(found["inputs"])), encoder, engine, room, earlier)


def stopped(run_dir: Path, plan: Plan, by: str) -> Outcome:
    """Say how far a run is that was asked to stop."""
    done = sum(len(plan.rows_of(part)) for part in parts.finished(run_dir))
    reason = f"stopped by {by}; {done} of {plan.rows} rows are finished"
    return Outcome(runs.STOPPED, reason, len(parts.finished(run_dir)), asked_by=by)


def merged(
    run_dir: Path,
    recipe: GenerateRecipe,
    plan: Plan,
    answerer: Answerer,
    attempt: int,
    beat: Callable[[str], None],
    say: Callable[[str], None],
) -> Tally:
    """Merge all parts; answer those again that are not what was written."""
    while True:
        try:
            return merge.merge(run_dir, plan, answerer.inputs, Path(recipe.output.path), beat)
        except parts.DamagedPart as damage:
            say(f"{damage}; it is answered again")
            parts.set_aside(run_dir, damage.part)
            parts.commit(run_dir, attempt, plan, damage.part, *answerer.answer(damage.part))


if __name__ == "__main__":
    sys.exit(rank_program.main(generate))
