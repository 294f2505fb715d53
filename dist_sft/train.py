"""Train: the one loop. Launchers start `python -m dist_sft.train RUN_DIR --attempt N` per rank."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_sft import (
    attention,
    checkpoint,
    data,
    hub,
    manifest,
    rank_program,
    report,
    runs,
    shards,
    world,
)
from dist_sft.asking import check_room, read_prompts
from dist_sft.batches import Batch, Feeder
from dist_sft.chat import Encoder
from dist_sft.config import Recipe, read_training_config
from dist_sft.console import Console
from dist_sft.divergence import Diverged, Guard, name_rows
from dist_sft.engine import Engine, make_accelerator, make_engine, set_learning_rate
from dist_sft.errors import UserError
from dist_sft.examiner import Examiner
from dist_sft.export import export, write_model_files
from dist_sft.metrics import (
    Clock,
    Collectives,
    FlopCounter,
    MetricsFile,
    peak_memory_bytes,
    peak_rate,
)
from dist_sft.model import check_positions, fit_vocabulary, freeze, load_model, resolve_dtype
from dist_sft.optim import learning_rate
from dist_sft.plan import summarize
from dist_sft.prepare import prepare_once
from dist_sft.restoring import Restorer
from dist_sft.runs import Outcome
from dist_sft.saving import Saver
from dist_sft.step import (
    Agreed,
    agree_on_step,
    evaluate,
    explaining_memory,
    run_micro_batches,
    summed,
)
from dist_sft.stopping import StopFlag
from dist_sft.store import Dataset
from dist_sft.tokenizer import Words
from dist_sft.trackers import check_installed, start_trackers
from dist_sft.watchdog import Heart
from dist_sft.world import Place

PROFILED_EVERY = 200  # steps between looks at the collectives; a profiler costs time


def train(run_dir: Path, attempt: int, console: Console) -> Outcome:
    """Train to the end, or to a stop; return how it went. Raises UserError for wrong input."""
    with ExitStack() as stack:
        # 1. Who am I, and what is asked of me?
        place = Place.from_environment()
        heart = Heart()
        heart.beat("preparing")
        recipe, launch = read_training_config(run_dir), runs.read_launch(run_dir)
        dtype = resolve_dtype(recipe.model.dtype, place.device)
        if recipe.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)

        check_installed(recipe.trackers)

        # 2. Fetch the model, encode the data, make random weights: once per node and before ranks
        #    meet, for whoever waits must not wait in a collective that would time out.
        stores, words, located, folder = prepare_once(run_dir, attempt, place, recipe, console)
        train_set, eval_sets = data.open_datasets(stores, recipe.data, recipe.seed)

        # 3. Join the other ranks, and make sure that all are of one mind.
        heart.beat("joining")
        accelerator = make_accelerator(recipe, dtype, run_dir)
        # After a failure other ranks may be in a collective: leaving it politely could hang.
        stack.push(lambda kind, *_: accelerator.end_training() if kind is None else None)
        fingerprint = data.fingerprint(train_set, eval_sets)
        hashes = {
            "recipe": recipe.fingerprint(),
            "data": fingerprint,
            "model": hub.identity(folder),
        }
        world.agree(world.facts_of_this_rank(hashes, place.device))
        if place.world > 1:
            gigabytes = world.all_reduce_rate(place.device) / 1e9
            console.say(f"all-reduce over {place.world} workers: {gigabytes:.2f} GB/s")
        # Before this line a signal ends a rank at once: there is nothing to save yet.
        stop = StopFlag(run_dir / "STOP" if place.rank == 0 else None)
        stop.listen()
        heart.beat("loading")
        peak, peak_source = peak_rate(place.device, dtype)

        # 4. Model, optimizer, sharding; prove that packing is safe on this model.
        console.say(f"loading {folder}")
        model = load_model(located, str(folder), dtype if recipe.deepspeed else torch.float32)
        check_positions(model, {"train": train_set, **eval_sets})
        added = fit_vocabulary(model, stores.vocab_size, recipe.seed)
        if added:
            console.say(f"the tokenizer knows {added} more tokens than the model: embeddings added")
        freeze(model, recipe.model.freeze, console.say)
        flops = FlopCounter(model)
        engine = make_engine(accelerator, model, recipe)
        stack.push(lambda kind, *_: engine.close() if kind is None else None)
        shards.check(engine)
        stock = engine.module.config._attn_implementation
        packed = choose_packing(engine, recipe.train.packing, place.device, dtype, console)

        # 5. The plan: which samples make up every step. Continue where the run was.
        plan = data.make_plan(train_set, recipe.data, recipe.seed, recipe.train.batch_size)
        total = data.total_steps(plan, recipe.train.epochs, recipe.train.steps)
        budget = recipe.train.tokens_per_micro_batch

        def feed(dataset: Dataset) -> Feeder:
            return Feeder(dataset, place.rank, place.world, budget, packed, place.device)

        feeder = feed(train_set)
        eval_feeders = {name: feed(dataset) for name, dataset in eval_sets.items()}
        encoder = data.make_encoder(recipe.data, words)
        examiner = make_examiner(recipe, engine, encoder, words, stock)
        facts = {
            "recipe": recipe.fingerprint(),
            "data": train_set.fingerprint,
            "words": encoder.fingerprint,  # tokenizer and template
            "prompt_words": encoder.prompt_fingerprint,
            "template": recipe.data.template,
            "model": hashes["model"],  # what the run began from
            "zero_stage": recipe.deepspeed and recipe.deepspeed.zero_optimization.stage,
            "code": launch.revision,
        }
        world.on_rank_0(lambda: checkpoint.clean_up(run_dir, attempt))

        restorer = Restorer(
            run_dir, attempt, engine, recipe.checkpoint.verify, launch.options, console.say
        )
        done, streaks = restorer.restore(facts)
        if done > total:
            raise UserError(
                f"train.steps, train.epochs: the newest checkpoint is of step {done}, and the run "
                f"would end at step {total}. Ask for more, or give another run_dir"
            )
        track = start_trackers(accelerator, recipe, run_dir, done, console.say)
        stop.listen()  # again: some trackers bring signal handlers of their own
        metrics = None
        if place.rank == 0:
            metrics = MetricsFile(run_dir / "metrics.jsonl", attempt, console.say)
            stack.callback(metrics.close)
        stack.callback(console.close)

        write_model = partial(
            write_model_files,
            model=engine.module,
            tokenizer=words.tokenizer,
            stop_ids=encoder.stop_ids,
            chat_template=words.template.chat_template,
        )

        saver = Saver(
            run_dir, attempt, engine, facts, write_model, recipe.checkpoint,
            say=console.say, beat=heart.beat, metrics=metrics,
        )  # fmt: skip
        stack.callback(saver.close)

        def agree(batches: list[Batch]) -> Agreed:
            """Agree on a step, or on a part of an evaluation; finish a checkpoint in passing."""
            agreed = agree_on_step(
                batches,
                place.device,
                stopping=stop.reason is not None,
                saving=saver.is_due,
                written=saver.is_written,
            )
            if agreed.written:
                saver.finish()
            return agreed

        def stopped(step: int) -> Outcome:
            if not recipe.checkpoint.on_stop:
                saver.finish()
                how = "not saved (checkpoint.on_stop: false), older ones are"
            else:
                saver.save(step, streaks=guard.streaks)
                how = "saved" if saver.finish() else "not saved (see the log), older ones are"
            by = stop.reason or "another rank"
            reason = f"stopped by {by} after step {step}, which is {how}"
            return Outcome(runs.STOPPED, reason, step, asked_by=by)

        def evaluation(step: int) -> dict[str, Any] | None:
            """Return what the line of a step says of it; None where a stop cut it short."""
            losses: dict[str, float | None] = {}
            for name, held_out in eval_feeders.items():
                value = evaluate(engine, held_out, agree, place.device, heart.beat)
                if value is None:
                    return None
                losses[name] = finite(value)
            found: dict[str, Any] = {"eval_loss": losses} if losses else {}
            if examiner:
                answers = examiner.examine(
                    engine, place.device, lambda: agree([]).stopping, heart.beat
                )
                if answers is None:
                    return None
                found["exact_match"] = examiner.score(answers)
                if place.rank == 0:
                    with contextlib.suppress(OSError):  # a full disk ends no run
                        examiner.write(run_dir, step, answers)
            return found

        def tell(line: dict[str, Any]) -> None:
            if metrics:
                metrics.write(**line)
            track(line)
            evaluated = "eval_loss" in line or "exact_match" in line
            important = evaluated or line["step"] in (1, total)
            console.step(line["step"], describe(line), important=important)

        outlook = summarize(
            plan, train_set.lengths, place.world, budget, packed=packed, steps=total,
            max_steps_looked_at=20,
        )  # fmt: skip
        for rollback in restorer.rollbacks:
            console.say(
                f"steps {rollback.checkpoint + 1} to {rollback.step} are passed over, as the run "
                "went back over them (rollbacks.json)"
            )
        console.say(
            f"training steps {done + 1} to {total}, {plan.steps_per_epoch} per epoch, in {dtype}; "
            f"workers: {place.world}; token efficiency {outlook.token_efficiency:.0%}, "
            f"balance {outlook.balance:.0%}"
        )
        if metrics:
            metrics.write(step=done, event="begun", total=total, workers=place.world)
        console.start(total, done)
        clock = Clock(place.device, heart.beat)
        guard = Guard(recipe.train.on_divergence, recipe.train.max_skipped_steps, streaks)

        # 6. The loop. Everything about a step follows from its number.
        kinds = ["eval_loss"] * bool(eval_feeders) + ["exact_match"] * bool(examiner)
        owed = evaluation_owed(run_dir, done, total, recipe, kinds) if kinds else None
        if owed:
            evaluated = evaluation(done)
            if evaluated is None:
                return stopped(done)
            tell(owed | evaluated)
        evaluated = {}
        lead = launch.options.get("lead")
        due = False  # to save: where the step was not taken, after the next one that is
        for step in range(done + 1, total + 1):
            if restorer.passed(step):
                continue
            began = time.perf_counter()
            heart.step = step
            with clock("data"):
                samples = plan.samples(step)
                batches = feeder.micro_batches(samples)
            with clock("waiting"):
                agreed = agree(batches)
            if agreed.stopping:
                return stopped(step - 1)

            profiled = place.rank == 0 and (step == done + 3 or step % PROFILED_EVERY == 0)
            with Collectives(place.device) if profiled else nullcontext() as collectives:
                where = (recipe.seed, step, place.rank)
                losses = run_micro_batches(engine, batches, agreed.supervised, clock, where)
                loss = summed(losses, place.device) / agreed.supervised
                rate = learning_rate(step, total, recipe.optimizer)
                set_learning_rate(engine, rate)
                with clock("optimizer"), explaining_memory():
                    grad_norm = engine.step()
            seconds = time.perf_counter() - began
            try:
                verdict, reason = guard.judge(
                    step,
                    loss,
                    grad_norm,
                    overflowed=engine.overflowed,
                    name_rows=partial(name_rows, batches, losses, train_set),
                )
                if verdict != "taken":
                    console.say(f"step {step} is not taken: {reason}")
                    if metrics:
                        metrics.write(step=step, event=f"step_{verdict}", reason=reason)
                if verdict == "rollback":
                    saver.finish()
                    saver.close()
                    heart.beat("loading")
                    restorer.go_back(step, reason)
            except Diverged:
                saver.finish()
                raise

            # 7. Evaluate, tell, save.
            lengths = train_set.lengths[samples]
            line: dict[str, Any] = {
                "step": step,
                "loss": loss if verdict == "taken" else None,
                "lr": rate,
                "grad_norm": finite(grad_norm),
                "examples": len(samples),
                "tokens": int(lengths.sum()),
                "supervised_tokens": agreed.supervised,
                "computed_tokens": agreed.computed,
                "seconds": seconds,
                "phases": clock.read(),
                "share_of_peak": flops(lengths, agreed.supervised) / seconds / peak / place.world,
                "peak_memory_bytes": peak_memory_bytes(place.device),
            }
            if collectives:
                line["collectives"] = collectives.seconds()
            evaluated = evaluation(step) if evaluates_after(step, total, recipe) else {}
            tell(line | (evaluated or {}))
            if evaluated is None:
                return stopped(step)
            # The batch script keeps 30 s, or half of less, to put the job back.
            if lead is not None and seconds + saver.seconds > max(lead - 30, lead / 2):
                console.say(
                    f"a step and a save take {seconds + saver.seconds:.1f} s, and of the {lead} s "
                    "between SLURM's warning and its time limit 30 are for other things: raise "
                    "--lead"
                )
                lead = None  # once is enough
            due = due or agreed.saving or is_due(step, recipe.checkpoint.every)
            if due and step < total and verdict == "taken":
                saver.save(step, streaks=guard.streaks, eval_loss=evaluated.get("eval_loss"))
                due = False
        saver.save(total, streaks=guard.streaks, eval_loss=evaluated.get("eval_loss"))

        # 8. The end: a last checkpoint, a model that others can load, a picture of the loss.
        console.close()
        heart.beat("exporting")
        if not saver.finish():
            raise RuntimeError(
                "the last checkpoint cannot be saved; make room, and the same command continues "
                "from the one before"
            )
        if place.rank == 0:
            export(manifest.folder_of(run_dir, total), run_dir / "model", dtype)
            steps = report.read_steps(run_dir / "metrics.jsonl")
            report.draw_loss(steps, run_dir / "loss.png")
            for text in report.summarize(steps, peak_source):
                console.say(text)
        console.say(f"finished {run_dir}: the model is in {run_dir}/model")
        return Outcome(runs.FINISHED, "finished", total)


def evaluates_after(step: int, total: int, recipe: Recipe) -> bool:
    """Tell whether the evaluation sets are looked at after this step."""
    return step == total or is_due(step, recipe.eval.every)


def evaluation_owed(
    run_dir: Path, done: int, total: int, recipe: Recipe, kinds: Sequence[str]
) -> report.Line | None:
    """Return the metrics of the step to go on from where they lack one of the `kinds`.

    A stop has cut its evaluation short.
    """

    def look() -> report.Line | None:
        lines = report.read_steps(run_dir / "metrics.jsonl")
        lacks = (x for x in lines if x["step"] == done and any(kind not in x for kind in kinds))
        line = next(lacks, None)
        if line:
            del line["attempt"]
        return line

    return world.on_rank_0(look) if done and evaluates_after(done, total, recipe) else None


def finite(value: float) -> float | None:
    """Return a number that JSON has, or None."""
    return value if math.isfinite(value) else None


def is_due(step: int, every: int | None) -> bool:
    """Tell whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def make_examiner(
    recipe: Recipe, engine: Engine, encoder: Encoder, words: Words, stock: str
) -> Examiner | None:
    """Read `eval.prompts`, if the recipe has them; raises UserError on every rank."""
    path = recipe.eval.prompts
    if path is None:
        return None
    prompts = world.on_rank_0(lambda: read_prompts(path, encoder))
    check_room(prompts, recipe.eval.max_new_tokens, engine.module)
    text_of = partial(words.tokenizer.decode, skip_special_tokens=False)
    budget = recipe.train.tokens_per_micro_batch
    return Examiner(prompts, encoder, text_of, stock, recipe.eval.max_new_tokens, budget)


def choose_packing(
    engine: Engine, setting: str, device: torch.device, dtype: torch.dtype, console: Console
) -> bool:
    """Prove that packed rows are isolated on this model; say so and pad where they are not."""
    if setting == "off":
        return False
    proof = attention.prove(engine.module, engine, device, dtype)
    # Ranks that lay out rows differently would wait for each other for ever.
    everywhere = torch.tensor(int(proof.holds), device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if everywhere.item():
        engine.module.set_attn_implementation(attention.NAME)
        console.say(f"packing: {proof.reason}")
        return True
    if setting == "on":
        raise UserError(f"train.packing: on, but {proof.reason}; allowed for this model: auto, off")
    console.say(f"packing: {proof.reason}; rows are sorted by length and padded instead")
    return False


def describe(line: dict[str, Any]) -> str:
    """Return a step's numbers for a person."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    text = f"loss {loss}  lr {line['lr']:.2e}  {line['tokens'] / line['seconds']:,.0f} tokens/s"
    for name, loss in line.get("eval_loss", {}).items():
        text += f"  {name} " + ("not finite" if loss is None else f"{loss:.4f}")
    if "exact_match" in line:
        text += f"  exact match {line['exact_match']:.1%}"
    return text


if __name__ == "__main__":
    sys.exit(rank_program.main(train))
