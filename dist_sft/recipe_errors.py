"""Words for mistakes in a recipe: which key, what was given, what is allowed, what to write."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

# Names that people bring along from TrainingArguments, TRL, axolotl and LLaMA-Factory.
FOREIGN = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_ratio",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip",
    "gradient_clipping": "optimizer.clip",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "output_dir": "run_dir",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16 (or auto, which is that on GPU)",
    "fp16": "model.dtype: float16 (or auto, which is bfloat16 on GPU)",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "trust_remote_code": "model.trust_remote_code",
    "dataset": "data.train: [{path: ...}]",
    "dataset_name": "data.train: [{path: ...}]",
    "datasets": "data.train: [{path: ...}]",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "chat_template": "data.template",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "packing": "train.packing: auto, on or off",
    "sample_packing": "train.packing: auto, on or off",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every: a number of steps",
    "eval_strategy": "eval.every: a number of steps",
    "evaluation_strategy": "eval.every: a number of steps",
    "per_device_eval_batch_size": "nothing: train.tokens_per_micro_batch decides",
    "optim": "nothing: the optimizer is AdamW",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "report_to": "trackers: [...]",
    "deepspeed_config": "deepspeed",
    "assistant_only_loss": "nothing: only assistant text is ever learned (see data.learn)",
    "completion_only_loss": "nothing: only assistant text is ever learned (see data.learn)",
    "train_on_inputs": "nothing: only assistant text is ever learned (see data.learn)",
    "logging_steps": "nothing: every step is logged",
    "resume_from_checkpoint": "nothing: the same command again continues the run",
    "dataloader_num_workers": "nothing: encoded data is memory-mapped",
    "workers": "nothing: give the launcher --workers N",
    "nproc_per_node": "nothing: give the launcher --workers N",
    "group_by_length": "nothing: batches are laid out without padding",
}
# The same for generation: names of generate(), vLLM, and of other programs' recipes.
FOREIGN_GENERATE = {
    "max_tokens": "generate.max_new_tokens",
    "max_length": "generate.max_new_tokens, which counts the answer alone",
    "max_new_tokens": "generate.max_new_tokens",
    "do_sample": "generate.temperature: 0 takes the most probable token, above it draws",
    "temperature": "generate.temperature",
    "top_p": "generate.top_p",
    "top_k": "generate.top_k",
    "repetition_penalty": "generate.repetition_penalty",
    "num_return_sequences": "generate.num_samples",
    "n": "generate.num_samples",
    "best_of": "generate.num_samples",
    "num_beams": "nothing: answers are the most probable token by token, or drawn",
    "stop_strings": "generate.stop",
    "stop_sequences": "generate.stop",
    "batch_size": "generate.batch_tokens: tokens in memory at once, prompts and answers",
    "per_device_eval_batch_size": "generate.batch_tokens",
    "gpu_memory_utilization": "generate.batch_tokens: tokens in memory at once",
    "backend": "generate.engine: hf or vllm",
    "output_dir": "run_dir for the run, output.path for the answers",
    "output_path": "output.path",
    "output_file": "output.path",
    "dataset": "input: [{path: ...}]",
    "dataset_name": "input: [{path: ...}]",
    "data": "input: [{path: ...}]",
    "prompts": "input: [{path: ...}]",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "checkpoint": "model.step: newest, best or a number",
    "chat_template": "template",
    "resume": "nothing: the same command again continues the run",
    "workers": "nothing: give the launcher --workers N",
}
_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size")
_ACCUMULATION = "gradient_accumulation_steps"

LONGEST_SHOWN = 120  # characters of a value in a message


def explain(error: ValidationError, recipe: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """Return one line per mistake: `dotted.key: what was given; what is allowed`."""
    said: dict[str, list[str]] = {}
    for detail in error.errors():
        path = _path(detail["loc"], recipe)
        # A list whose items are wrong is reported as too short as well: the items say it better.
        if detail["type"] == "too_short" and detail["input"]:
            continue
        key = ".".join(str(part) for part in path) or "recipe"
        said.setdefault(key, []).append(_say(detail, path, recipe, tree))
    return [f"{key}: {_either(texts)}" for key, texts in said.items()]


def _either(texts: list[str]) -> str:
    """Join what the members of a union say about one value."""
    first, *others = dict.fromkeys(texts)
    return " or ".join([first, *(text.partition("allowed: ")[2] for text in others)])


def _say(
    detail: ErrorDetails,
    path: list[str | int],
    recipe: type[BaseModel],
    tree: Mapping[str, Any],
) -> str:
    given, kind = detail["input"], detail["type"]
    context = detail.get("ctx", {})
    if kind == "missing":
        return "missing; it has no default"
    if kind == "extra_forbidden":
        return f"unknown key{_instead(path, given, recipe, tree)}"
    if kind == "value_error":
        shown = f"{given!r}: " if isinstance(given, str) else ""
        return f"{shown}{context['error']}"
    if kind == "literal_error":
        allowed = f"{context['expected']}{_near(given, context)}"
    elif kind == "model_type":
        allowed = f"settings of its own, such as {{{_example_key(path, recipe)}: ...}}"
    elif kind in _ALLOWED:
        allowed = _ALLOWED[kind].format(**context)
    else:
        return f"got {_shown(given)}; {detail['msg']}"
    return f"got {_shown(given)}; allowed: {allowed}"


# pydantic's kinds of mistakes, in words that fit behind "allowed:".
_ALLOWED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "invalid_key": "keys that are words",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "string_type": "text (put it in quotes)",
    "too_short": "at least one item",
    "tuple_type": "a list, such as [...]",
}


def _shown(given: object) -> str:
    if given is None or isinstance(given, bool):
        return json.dumps(given)  # as YAML has it
    text = repr(given)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _example_key(path: list[str | int], recipe: type[BaseModel]) -> str:
    section = _section_at(path, recipe)
    assert section is not None, "pydantic asks for settings only where a section is declared"
    needed = (name for name, field in section.model_fields.items() if field.is_required())
    return next(needed, next(iter(section.model_fields)))


def _near(given: object, context: Mapping[str, Any]) -> str:
    words = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
    return did_you_mean(str(given).lower(), words)


def did_you_mean(name: str, allowed: list[str]) -> str:
    """Ask for the word that is an abbreviation of the other one, or looks alike."""
    short = [
        word
        for word in allowed
        if min(len(name), len(word)) > 2
        and (word.startswith(name) or (name.startswith(word) and name[len(word) :].isalpha()))
    ]
    near = short or difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _instead(
    path: list[str | int], given: object, recipe: type[BaseModel], tree: Mapping[str, Any]
) -> str:
    """Say which key was meant; what other programs call it goes before what looks alike."""
    name = str(path[-1])
    trains = "train" in recipe.model_fields
    if trains and (name in _PER_DEVICE or name == _ACCUMULATION):
        return _batch_advice(path, tree)
    foreign = FOREIGN if trains else FOREIGN_GENERATE
    if name in foreign:
        return f"; in dist_sft this is {_with_value(foreign[name], given)}"
    allowed = _known_keys(path[:-1], recipe)
    elsewhere = [full for full in _all_keys(recipe) if full.rsplit(".", 1)[-1] == name]
    question = did_you_mean(name, allowed) or (elsewhere and f" (did you mean {elsewhere[0]!r}?)")
    return question or f"; allowed: {', '.join(allowed)}"


def _with_value(target: str, given: object) -> str:
    """Complete what to write with the value that was given, where it means the same here."""
    if given is None or isinstance(given, dict | list):
        return target
    value = given if isinstance(given, str) else _shown(given)
    bare_key = not set(target) & {":", " "}
    return f"{target}: {value}" if bare_key else target.replace("...", str(value))


def _batch_advice(path: list[str | int], tree: Mapping[str, Any]) -> str:
    section: Any = tree
    for part in path[:-1]:
        section = section[part]
    per_device = next((section[name] for name in _PER_DEVICE if name in section), None)
    factors = [per_device if isinstance(per_device, int) else "per-device size"]
    if isinstance(section.get(_ACCUMULATION), int):
        factors.append(section[_ACCUMULATION])
    product = " x ".join([*map(str, factors), "number of workers"])
    known = all(isinstance(factor, int) for factor in factors)
    example = f", so {2 * math.prod(factors)} on two" if known else ""
    return (
        f"; set train.batch_size: {product}{example} (examples per optimizer "
        "step over all ranks; accumulation follows from train.tokens_per_micro_batch)"
    )


def section_of(annotation: object) -> type[BaseModel] | None:
    """Return the settings class inside an annotation such as `tuple[Source, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := section_of(arg))), None)


def _section_at(path: list[str | int], recipe: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = recipe
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = section_of(field.annotation) if field else None
    return section


def _known_keys(path: list[str | int], recipe: type[BaseModel]) -> list[str]:
    section = _section_at(path, recipe)
    return list(section.model_fields) if section else []


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        keys += _all_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def _path(loc: tuple[int | str, ...], recipe: type[BaseModel]) -> list[str | int]:
    """Drop what pydantic adds to a location to tell the members of a union apart."""
    path: list[str | int] = []
    section: type[BaseModel] | None = recipe
    for part in loc:
        if section is None:
            break
        path.append(part)
        if isinstance(part, str):
            field = section.model_fields.get(part)
            section = section_of(field.annotation) if field else None
    return path
