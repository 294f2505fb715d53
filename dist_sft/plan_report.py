"""Foretell a run: its steps, tokens, efficiency, learning rate, and the rows of any step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dist_sft.config import Optimizer, Recipe
from dist_sft.data import make_plan, total_steps
from dist_sft.errors import UserError
from dist_sft.optim import learning_rate
from dist_sft.plan import Plan, Summary, layout, micro_batch_cost, summarize
from dist_sft.store import Dataset

PACKINGS = {"auto": (True, False), "on": (True,), "off": (False,)}


def show_plan(console: Console, recipe: Recipe, train: Dataset, workers: int) -> None:
    """Print what the run will come to on that many workers."""
    plan = make_plan(train, recipe.data, recipe.seed, recipe.train.batch_size)
    steps = total_steps(plan, recipe.train.epochs, recipe.train.steps)
    budget = recipe.train.tokens_per_micro_batch
    layouts = PACKINGS[recipe.train.packing]
    summaries = [
        summarize(plan, train.lengths, workers, budget, packed=packed, steps=steps)
        for packed in layouts
    ]
    summary = summaries[0]
    share = supervised_share(plan, train)

    facts = Table.grid(padding=(0, 2))
    facts.add_row("steps", f"{steps:,} in {summary.epochs:.3g} epochs of {plan.steps_per_epoch:,}")
    facts.add_row("examples", _examples(plan))
    facts.add_row(
        "tokens",
        f"{summary.tokens_per_epoch:,} per epoch, "
        f"{round(summary.tokens_per_epoch / plan.steps_per_epoch):,} per step",
    )
    facts.add_row("supervised", f"{share:.1%} of the tokens are learned")
    facts.add_row("learning rate", milestones(steps, recipe.optimizer))
    console.print(facts, highlight=False)

    console.print()
    title = f"workers: {workers:,}, tokens per micro-batch: {budget:,}"
    console.print(title, style="bold cyan", highlight=False)
    console.print(layout_table(summaries, layouts))
    if len(layouts) > 1:
        console.print("packed, unless the model fails the isolation proof at the start")
    if summary.sampled_steps < steps:
        console.print(f"measured on {summary.sampled_steps:,} of the steps", highlight=False)


def layout_table(summaries: Sequence[Summary], layouts: Sequence[bool]) -> Table:
    """Return a column of figures for each layout."""
    table = Table("", *("packed" if packed else "padded" for packed in layouts), box=None,
                  header_style="bold", pad_edge=False)  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "token efficiency: real tokens / computed ones": [
            f"{s.token_efficiency:.1%}" for s in summaries
        ],
        "balance: mean rank / busiest rank": [f"{s.balance:.1%}" for s in summaries],
        "micro-batches per rank and step, mean": [
            f"{s.micro_batches_per_step:.1f}" for s in summaries
        ],
        "micro-batches per rank and step, most": [
            f"{s.max_micro_batches_per_step}" for s in summaries
        ],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def supervised_share(plan: Plan, train: Dataset) -> float:
    """Return learned tokens / tokens of an epoch, each source as often as it is drawn."""
    tokens = learned = 0.0
    parts = zip(train.stores, plan.draws_by_source, strict=True)
    for store, draws in parts:
        per_draw = draws / store.meta.samples
        tokens += store.meta.tokens * per_draw
        learned += store.meta.learned_tokens * per_draw
    return learned / tokens


def milestones(steps: int, settings: Optimizer) -> str:
    """Say where the learning rate begins, peaks and ends."""
    rates = (learning_rate(step, steps, settings) for step in range(1, steps + 1))
    peak = next((step for step, rate in enumerate(rates, 1) if rate == settings.lr), None)
    first, last = (f"{learning_rate(step, steps, settings):.2e}" for step in (1, steps))
    if peak is None:
        return f"{first} at step 1, still warming up at the last step with {last}"
    start = f"{first} at step 1, " if peak > 1 else ""
    warmed = " (end of warm-up)" if peak > 1 else ""
    return (
        f"{start}{settings.lr:.2e} at step {peak:,}{warmed}, {settings.schedule} to {last} "
        f"at step {steps:,}"
    )


def _examples(plan: Plan) -> str:
    text = f"{plan.draws_per_epoch:,} per epoch, {plan.batch_size:,} per step"
    last = plan.draws_per_epoch % plan.batch_size
    return f"{text}, {last:,} in the last step of an epoch" if last else text


def show_step(console: Console, recipe: Recipe, train: Dataset, workers: int, step: int) -> None:
    """Print which rows are in a step, and which rank computes them in which micro-batch.

    Raises UserError for a step that the run does not have.
    """
    plan = make_plan(train, recipe.data, recipe.seed, recipe.train.batch_size)
    steps = total_steps(plan, recipe.train.epochs, recipe.train.steps)
    if not 1 <= step <= steps:
        raise UserError(f"--step: got {step}; allowed: 1 to {steps}, steps count from 1")
    samples = plan.samples(step)
    lengths = train.lengths[samples]
    packed = recipe.train.packing != "off"
    ranks = layout(lengths, workers, recipe.train.tokens_per_micro_batch, packed=packed)

    rate = learning_rate(step, steps, recipe.optimizer)
    console.print(
        f"step {step:,} of {steps:,}, epoch {plan.epoch_of(step) + 1}: {len(samples):,} examples, "
        f"{int(lengths.sum()):,} tokens, learning rate {rate:.2e}, "
        f"{'packed' if packed else 'padded'}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("rank", "micro-batch", "tokens", "rows", box=None, header_style="bold",
                  pad_edge=False)  # fmt: skip
    for rank, micro_batches in enumerate(ranks):
        for number, positions in enumerate(micro_batches):
            tokens = micro_batch_cost(lengths[positions].tolist(), packed=packed)
            rows = rows_by_source(train, samples[positions].tolist())
            table.add_row(str(rank), str(number), f"{tokens:,}", rows or "(filler)")
    console.print(table)


def rows_by_source(train: Dataset, samples: Sequence[int]) -> str:
    """Return the rows of some samples as text: source and row numbers in it."""
    numbers: dict[str, list[int]] = {}
    for sample in samples:
        name, row = train.locate(sample)
        numbers.setdefault(name, []).append(row)
    return "; ".join(f"{name} {', '.join(map(str, rows))}" for name, rows in numbers.items())
