"""Load what is trained: the model, its tokenizer, and random weights where a config is given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_sft import config as settings
from dist_sft.errors import UserError
from dist_sft.once import DamagedError, make_once
from dist_sft.paths import explain_missing
from dist_sft.store import Dataset

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `model.dtype` into what the model computes in on this device.

    Raises UserError for float16 on CPU, where nothing can train in it.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError(
            "model.dtype: float16 needs a GPU and this machine has none; "
            "allowed here: auto, float32, bfloat16"
        )
    return DTYPES[name]


def make_random_weights(recipe: settings.Recipe, vocab_size: int, folder: Path) -> None:
    """Write the model that `model.config` describes, with random weights, unless it is there.

    One process does this before any sharding: with ZeRO-3 alive, random numbers fall differently.
    Raises UserError for a config that describes no causal language model, or has unknown keys.
    """
    assert recipe.model.config is not None
    keys: dict[str, Any] = {**recipe.model.config, "vocab_size": vocab_size}
    _check_model_type(keys["model_type"])
    try:
        architecture = AutoConfig.for_model(**keys)
        _check_keys(keys, architecture)
    except UserError:
        raise
    except Exception as error:  # whatever the model's own code raises on settings that do not fit
        raise _cannot_be_built(error) from error

    def make(unfinished: Path) -> None:
        torch.manual_seed(recipe.seed)
        try:
            model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        except Exception as error:  # or on sizes
            raise _cannot_be_built(error) from error
        model.save_pretrained(unfinished)

    def load() -> None:
        if not folder.is_dir():
            raise DamagedError(f"{folder} is missing")

    make_once(folder, make=make, load=load, what="random weights")


def _cannot_be_built(error: Exception) -> UserError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"model.config describes no model that can be built: {said}")


def _check_model_type(model_type: object) -> None:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"model.config.model_type: got {model_type!r}{hint}; allowed: the causal language "
            "models of transformers, such as llama, qwen3 or gpt2"
        )


def _check_keys(keys: dict[str, Any], architecture: PreTrainedConfig) -> None:
    """Refuse a key that transformers stored without knowing it: nothing would ever use it."""
    plain = type(architecture)()
    for name in keys:
        if name in vars(architecture) and not hasattr(plain, name):
            near = get_close_matches(name, plain.to_dict(), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            kind = architecture.model_type
            raise UserError(f"model.config.{name}: {kind} has no such setting{hint}")


def load_model(model: settings.Model, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model for training, in `dtype`; raises as `load_pretrained` does."""
    loaded = load_pretrained(
        folder,
        dtype,
        name=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    if model.gradient_checkpointing:
        loaded.activation_checkpointing_enable({"use_reentrant": False})
    loaded.train()
    return loaded


def load_pretrained(
    folder: str,
    dtype: torch.dtype,
    *,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal language model in `dtype`; `options` are for transformers.

    `name` is what the recipe calls it. Raises UserError when the folder or hub name holds no
    loadable safetensors weights, or not all.
    """
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model.path: {name or folder} cannot be loaded: {explain_missing(folder, error)}"
            "\nGive a folder with config.json and complete safetensors weights, or a hub name."
        ) from error
    # transformers fills gaps with random numbers and goes on.
    gaps = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if gaps:
        raise UserError(
            f"model.path: in {name or folder}, config.json and the weights do not belong "
            f"together: {len(gaps)} weights are missing or have other sizes, such as {gaps[0]}"
        )
    accepted = inspect.signature(loaded.forward).parameters.values()
    if not any(p.name == "logits_to_keep" or p.kind is p.VAR_KEYWORD for p in accepted):
        raise UserError(
            f"model.path: {type(loaded).__name__}.forward takes no logits_to_keep; a model with "
            "code of its own needs that argument: the positions whose logits are wanted, a bool "
            "tensor like input_ids"
        )
    return cast(PreTrainedModel, loaded)


def check_positions(model: PreTrainedModel, datasets: Mapping[str, Dataset]) -> None:
    """Raise UserError where rows are longer than the model has positions.

    Learned positions end there, with an index error at best; rotary ones go on untrained, silently.
    """
    limit = positions(model.config.get_text_config())
    for name, dataset in datasets.items():
        longest = int(dataset.lengths.max(initial=0))
        if limit and longest - 1 > limit:  # the last token of a row is only ever a target
            raise UserError(
                f"data.max_length: {name} has rows of up to {longest} tokens, but the model takes "
                f"{limit} (its config's max_position_embeddings); set data.max_length: {limit}"
            )


def positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model was made for, stretched ones included; None for any."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or getattr(config, "alibi", False):
        return None
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "factor" not in rope:
        return limit
    return max(limit, int(rope["factor"] * rope.get("original_max_position_embeddings", limit)))


def fit_vocabulary(model: PreTrainedModel, tokens: int, seed: int) -> int:
    """Give every token of the tokenizer an embedding; return how many rows were added."""
    rows: int = model.get_input_embeddings().num_embeddings
    if tokens <= rows:
        return 0
    torch.manual_seed(seed)  # every rank must invent the same rows
    model.resize_token_embeddings(tokens)
    return tokens - rows


def freeze(
    model: PreTrainedModel, patterns: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> None:
    """Stop training the parameters whose names match, and `say` what is frozen, if anything is.

    What the model's own code froze stays frozen. A tied weight is one parameter: any of its names
    freezes it. Raises UserError for a pattern without a match, or if nothing is left to train.
    """
    by_itself = [name for name, p in model.named_parameters() if not p.requires_grad]
    if by_itself:
        say(
            f"the model's own code keeps {len(by_itself)} parameters frozen, such as {by_itself[0]}"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matched: set[str] = set()
    for pattern in patterns:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            near = get_close_matches(pattern, parameters, n=3, cutoff=0.0)
            raise UserError(
                f"model.freeze: {pattern!r} matches no parameter of the model; near names: "
                f"{', '.join(near)}"
            )
        matched.update(names)
    for name in matched:
        parameters[name].requires_grad_(False)
    for name in sorted(parameters.keys() - matched):
        same = [other for other in sorted(matched) if parameters[other] is parameters[name]]
        if same:
            say(f"model.freeze: {same[0]} is the same weight as {name}, frozen there, too")
    everything = list(model.parameters())
    frozen = [p for p in everything if not p.requires_grad]
    if len(frozen) == len(everything):
        raise UserError(
            f"model.freeze: {', '.join(patterns) or 'the model itself'} leaves nothing to train: "
            f"all {len(everything)} parameters are frozen"
        )
    if frozen:
        say(
            f"frozen: {len(frozen)} of {len(everything)} parameters, {_numel(frozen):,} of "
            f"{_numel(everything):,} weights"
        )


def _numel(parameters: Sequence[nn.Parameter]) -> int:
    # ZeRO-3 leaves a flat piece in place of the parameter; ds_shape is the real one.
    return sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in parameters)
