"""Load what is trained: the model, its tokenizer, and random weights where a config is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import set_seed

from dist_sft import config as settings
from dist_sft.errors import UserError
from dist_sft.once import DamagedError, make_once

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
    """
    assert recipe.model.config is not None
    keys: dict[str, Any] = {**recipe.model.config, "vocab_size": vocab_size}
    try:
        architecture = AutoConfig.for_model(**keys)
        set_seed(recipe.seed)
        random_model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.config describes no model that can be built: {error}") from error

    def load() -> None:
        if not folder.is_dir():
            raise DamagedError(f"{folder} is missing")

    make_once(folder, make=random_model.save_pretrained, load=load, what="random weights")


def load_model(model: settings.Model, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model for training, in `dtype`.

    Raises UserError when the folder or hub name holds no loadable safetensors weights.
    """
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {model.path or folder} cannot be loaded: {error}\n"
            "Give a folder with config.json and safetensors weights, or a hub name."
        ) from error
    loaded.config.use_cache = False
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    loaded.train()
    return loaded


def fit_vocabulary(model: PreTrainedModel, tokens: int, seed: int) -> int:
    """Give every token of the tokenizer an embedding; return how many rows were added."""
    rows: int = model.get_input_embeddings().num_embeddings
    if tokens <= rows:
        return 0
    set_seed(seed)  # every rank must invent the same rows
    model.resize_token_embeddings(tokens)
    return tokens - rows
