"""The recipe: one frozen, typed tree, that reports every mistake in it at once.

People write sparse YAML; machines write and read the resolved `config.json`. Nothing here may
import torch, transformers, datasets or accelerate: `--help` and `--dry-run` must answer at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dist_sft import generate_recipe
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.recipe_errors import did_you_mean, explain
from dist_sft.recipe_yaml import read_tree
from dist_sft.sections import (
    Count,
    Fraction,
    Job,
    Number,
    PathText,
    Positive,
    PositiveNumber,
    RowSource,
    Section,
    Watchdog,
)
from dist_sft.zero import DeepSpeed, load_deepspeed

# What may differ when a run is continued, with all that is below it: it never changes what is
# learned. A checkpoint holds the state by parameter name and can be read into any sharding.
MAY_CHANGE = frozenset(
    {
        "data.cache_dir",
        "deepspeed",
        "train.tokens_per_micro_batch",
        "train.on_divergence",
        "train.max_skipped_steps",
        "model.gradient_checkpointing",
        "checkpoint",
        "eval",
        "trackers",
        "watchdog",
    }
)
LENGTH = frozenset({"train.steps", "train.epochs"})
"""What may grow where the rate of a step does not depend on where the run ends."""


class Model(Section):
    """What is trained."""

    path: PathText | None = None
    """A model folder (safetensors), a hub name, or a run folder: the model that it exported
    (RUN/model), which is there once the run has finished."""
    config: dict[str, Any] | None = None
    """Instead of `path`: a transformers config (`model_type: llama`, sizes) for random weights.
    The vocabulary size follows the tokenizer."""
    tokenizer: PathText | None = None
    """Tokenizer folder or hub name; by default the one beside the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in; auto is bfloat16 on GPU and float32 on CPU. Master weights and
    optimizer state are float32 always."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by patterns on their names: `model.embed_tokens.*`,
    `model.layers.[0-3].*`. `*` stands for anything, dots too. Each must match something."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("set exactly one of path (a model) and config (random weights)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model made from config needs tokenizer: a folder or hub name")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example 'llama'")
        return self


class Source(RowSource):
    """One place that examples come from."""

    name: str | None = None
    """Name in logs and metrics; by default the file's name."""
    weight: PositiveNumber = 1.0
    """Passes over this source per epoch: 1.0 every row once, 0.5 half of them, 2.0 twice."""

    @property
    def label(self) -> str:
        """Return the name that logs and metrics use."""
        return self.name or Path(self.path).stem


class Data(Section):
    """What is learned and evaluated, and how rows become tokens."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """What is learned; several sources are a mixture."""
    eval: tuple[Source, ...] = ()
    """What is evaluated, each source under its own name."""
    eval_fraction: Fraction = 0.0
    """Instead of `eval`: hold out this fraction of the training rows, duplicates kept together."""
    template: PathText = "human-assistant"
    """human-assistant, alpaca, chatml, tokenizer (its own chat template), or a Jinja file."""
    learn: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned."""
    max_length: Positive = 2048
    """Longest example, in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to longer ones; a cut answer learns no end token."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Broken rows stop the run, or are skipped, counted and listed."""
    cache_dir: PathText | None = None
    """Where encoded data is kept; by default ~/.cache/dist_sft. Every node needs to reach it."""

    @model_validator(mode="after")
    def _eval_once(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("set eval or eval_fraction, not both")
        if any(source.weight != 1.0 for source in self.eval):
            raise ValueError("weight has no meaning in eval: every row counts once")
        names = [source.label for source in self.eval]
        if len(set(names)) < len(names):
            raise ValueError(f"eval sources need different names, got {names}: set eval.N.name")
        return self


class Train(Section):
    """How long, and in which pieces."""

    batch_size: Positive = 32
    """Examples per optimizer step, over all ranks."""
    epochs: PositiveNumber | None = None
    """Passes over the data (1 if neither epochs nor steps is set)."""
    steps: Positive | None = None
    """Optimizer steps, instead of `epochs`."""
    tokens_per_micro_batch: Positive = 4096
    """Tokens that go through the model at once on one rank: memory only, never the result."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Rows without padding, isolated from each other. auto falls back to padding where the
    model fails the isolation proof; on stops instead."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """When loss or gradient is not finite: stop; leave up to `max_skipped_steps` steps in a row
    out, then stop; or, after these, go back to the newest checkpoint, or to an older one where
    that has not helped, and go on behind the batch."""
    max_skipped_steps: Count = 3
    """How many steps in a row skip and rollback leave out."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("set epochs or steps, not both (the other one: null)")
        return self


class Optimizer(Section):
    """AdamW and its learning rate."""

    lr: PositiveNumber = 2e-5
    """Peak learning rate of AdamW."""
    weight_decay: Number = 0.0
    """Decay of matrices; biases, norms and other vectors are never decayed."""
    beta1: Fraction = 0.9
    """AdamW's first moment."""
    beta2: Fraction = 0.999
    """AdamW's second moment."""
    eps: PositiveNumber = 1e-8
    """AdamW's epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Fraction = 0.0
    """Fraction of all steps in which the rate rises linearly from 0."""
    warmup_steps: Count | None = None
    """The same as a number of steps, instead of `warmup_ratio`."""
    min_lr_ratio: Annotated[Number, Field(le=1.0)] = 0.0
    """Where linear and cosine end, as a fraction of `lr`."""
    clip: PositiveNumber | None = 1.0
    """Largest norm of the whole gradient; null leaves it alone."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_ratio and self.warmup_steps is not None:
            raise ValueError("set warmup_ratio or warmup_steps, not both")
        return self


class Checkpoint(Section):
    """When the state is saved, and how long it is kept."""

    every: Positive | None = None
    """Steps between checkpoints; there is always one at the end, and on a stop."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes between checkpoints, beside `every`; null: 15 where `every` is null, too."""
    keep: Annotated[int, Field(ge=2)] = 3
    """How many of the newest checkpoints stay on disk; the best by evaluation loss stays, too."""
    keep_every: Positive | None = None
    """Checkpoints of steps that this divides stay for good."""
    asynchronous: bool = True
    """Copy the state and write it while training goes on: 12 bytes of CPU memory per parameter,
    divided by the ranks. false: training waits until it is written."""
    on_stop: bool = True
    """Save when asked to stop; false leaves at once, and the next launch repeats some steps."""
    mode: Literal["private", "group", "all"] = "private"
    """Who may read checkpoints: you (700, 600), your group (750, 640), everybody (755, 644)."""
    verify: Literal["size", "sha256"] = "sha256"
    """What is compared with the manifest before a checkpoint is loaded."""


class Eval(Section):
    """When the evaluation sets are looked at, and prompts answered."""

    every: Positive | None = None
    """Steps between evaluations; null: only at the end."""
    prompts: PathText | None = None
    """Rows with answers, in a file as for `data.eval`: every evaluation answers them greedily and
    counts how many answers are exact. What is answered is in `RUN_DIR/samples`."""
    max_new_tokens: Positive = 64
    """Longest answer to `prompts`, in tokens."""


class Recipe(Job):
    """A whole training run."""

    job: Literal["train"] = "train"
    """What the recipe is for; the launcher's word decides."""
    seed: Annotated[Count, Field(lt=2**63)] = 0
    """Seed of data order, random weights and dropout."""
    model: Model
    """What is trained."""
    data: Data
    """What it learns from."""
    train: Train = Train()
    """How long, and in which pieces."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its learning rate."""
    deepspeed: Annotated[DeepSpeed | None, BeforeValidator(load_deepspeed)] = None
    """ZeRO sharding: a JSON file, one of zero1, zero2, zero3, zero2-offload, zero3-offload,
    or null for plain data parallel."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved, and how long it is kept."""
    eval: Eval = Eval()
    """When the evaluation sets are looked at."""
    watchdog: Watchdog = Watchdog()
    """When a run counts as hung: its ranks are ended, with their stacks in the logs."""
    trackers: tuple[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive",
                "swanlab", "trackio"], ...
    ] = ()  # fmt: skip
    """Where metrics go beside metrics.jsonl; each needs its own package."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        evaluates = self.data.eval or self.data.eval_fraction or self.eval.prompts
        if self.eval.every and not evaluates:
            raise ValueError(
                "eval.every is set but there is nothing to evaluate: "
                "set data.eval, data.eval_fraction or eval.prompts"
            )
        if self.eval.prompts is None and self.eval.max_new_tokens != Eval().max_new_tokens:
            raise ValueError("eval.max_new_tokens has no effect without eval.prompts")
        if self.model.revision is not None and self.model.path is None:
            raise ValueError("model.revision is for a model.path on the hub, and there is none")
        if self.optimizer.min_lr_ratio and self.optimizer.schedule == "constant":
            raise ValueError(
                "optimizer.min_lr_ratio has no effect with schedule: constant; leave it out, or "
                "set schedule: linear or cosine"
            )
        if self.model.dtype == "float16" and self.deepspeed is None:
            raise ValueError(
                "model.dtype float16 needs loss scaling, which comes with DeepSpeed: "
                "set deepspeed: zero1, zero2 or zero3, or model.dtype: bfloat16"
            )
        if self.model.dtype == "float16" and self.deepspeed:
            zero = self.deepspeed.zero_optimization
            if zero.offloads_optimizer and zero.stage < 3:
                raise ValueError(
                    "model.dtype float16 with an offloaded optimizer needs ZeRO stage 3: below, "
                    "DeepSpeed 0.19 skips every step after the first overflow. Set deepspeed: "
                    "zero3-offload, or model.dtype: bfloat16"
                )
        return self


AnyRecipe = Recipe | GenerateRecipe
JOBS: dict[str, type[AnyRecipe]] = {"train": Recipe, "generate": GenerateRecipe}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a YAML recipe, apply `dotted.key=value` overrides and check everything.

    Its `job` says what it is a recipe for; one that does not say is for training.

    Raises UserError with every mistake found, one per line, each with its dotted path, what was
    given and what is allowed.
    """
    return check(read_tree(path, overrides), origin=str(path))


def read_training(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe as `read_recipe` does; raise UserError where it is for another job."""
    return _for_training(read_recipe(path, overrides), f"{path}")


def read_training_config(run_dir: str | Path) -> Recipe:
    """Read the resolved recipe of a training run; raise UserError for a run of another job."""
    return _for_training(read_config_json(run_dir), f"RUN_DIR: {run_dir}")


def read_generation_config(run_dir: str | Path) -> GenerateRecipe:
    """Read the resolved recipe of a generation run."""
    recipe = read_config_json(run_dir)
    assert isinstance(recipe, GenerateRecipe), "its job was launched"
    return recipe


def _for_training(recipe: AnyRecipe, what: str) -> Recipe:
    if not isinstance(recipe, Recipe):
        raise UserError(f"{what} is for job: {recipe.job}, and this is about training")
    return recipe


def read_config_json(run_dir: str | Path) -> AnyRecipe:
    """Read the resolved recipe that a launcher wrote into a run folder."""
    path = Path(run_dir) / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run_dir} is not a run folder: it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return check(tree, origin=str(path))


def check(tree: dict[str, Any], origin: str) -> AnyRecipe:
    """Turn a plain tree into a recipe; raise UserError that lists every mistake."""
    job = tree.get("job", "train") if isinstance(tree, dict) else "train"
    kind = JOBS.get(job) if isinstance(job, str) else None
    if kind is None:
        words = " or ".join(map(repr, JOBS))
        raise UserError(
            f"1 mistake in {origin}:\n  job: got {job!r}; allowed: {words}"
            f"{did_you_mean(str(job), list(JOBS))}"
        )
    if isinstance(tree, dict):
        _refuse_another_job(tree, job, origin)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, kind, tree)
        noun = "mistake" if len(lines) == 1 else "mistakes"
        raise UserError("\n  ".join([f"{len(lines)} {noun} in {origin}:", *lines])) from None


def _refuse_another_job(tree: dict[str, Any], job: str, origin: str) -> None:
    """Raise UserError for a recipe that has the main section of another job, and not its own."""
    section = {"train": "data", "generate": "input"}
    for other, main in section.items():
        if other != job and main in tree and section[job] not in tree:
            raise UserError(
                f"{origin} is a recipe for {other} (it has {main}: and no {section[job]}:), and "
                f"was given to {job}"
            )


def difference(old: AnyRecipe, new: AnyRecipe) -> dict[str, str]:
    """Return the settings in which two recipes differ as key: "old -> new"; run_dir is none."""
    before, after = (recipe.model_dump(mode="json", exclude={"run_dir"}) for recipe in (old, new))
    return dict(_changes(before, after, ""))


def may_change(key: str, old: AnyRecipe, new: AnyRecipe, taken: int | None = None) -> bool:
    """Tell whether a key of `difference` may differ when a run is continued.

    Where no step depends on the end, that may move, but not to before the steps that are `taken`.
    """
    if isinstance(old, Recipe) and isinstance(new, Recipe):
        if key in LENGTH:
            not_too_short = taken is not None and (new.train.steps or 0) >= taken
            return (is_longer(old, new) or not_too_short) and not any(
                recipe.optimizer.schedule != "constant" or recipe.optimizer.warmup_ratio
                for recipe in (old, new)
            )
        allowed = MAY_CHANGE
    else:
        allowed = generate_recipe.MAY_CHANGE
    return any(key == setting or key.startswith(f"{setting}.") for setting in allowed)


def is_longer(old: AnyRecipe, new: AnyRecipe) -> bool:
    """Tell whether a recipe asks for more training; only data could compare steps with epochs."""
    if not (isinstance(old, Recipe) and isinstance(new, Recipe)):
        return False
    before, after = old.train, new.train
    if before.steps is None and after.steps is None:
        return (after.epochs or 1.0) > (before.epochs or 1.0)
    return before.steps is not None and after.steps is not None and after.steps > before.steps


def _changes(old: Any, new: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(old, list) and isinstance(new, list):
        old, new = ({str(i): item for i, item in enumerate(items)} for items in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            inner = f"{key}.{name}".strip(".")
            yield from _changes(old.get(name, _MISSING), new.get(name, _MISSING), inner)
    elif old != new:
        yield key, f"{_shown(old)} -> {_shown(new)}"


_MISSING = object()


def _shown(value: Any) -> str:
    return "(not set)" if value is _MISSING else json.dumps(value, ensure_ascii=False)
