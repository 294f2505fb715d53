"""Tiny random models by name, made from configs: nothing is downloaded."""

import math
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import pad_is_eos
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCAB = 61
WINDOW = 7  # shorter than the tests' rows

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
ONE_WINDOW_ONE_FULL = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | {"sliding_window": WINDOW},
    "gemma3_text": LLAMA_LIKE | {"sliding_window": WINDOW, "layer_types": ONE_WINDOW_ONE_FULL},
    "phi3": LLAMA_LIKE | {"sliding_window": WINDOW},
    "gpt_neox": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "olmo2": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "cohere": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "lfm2": LLAMA_LIKE | {"layer_types": ["conv", "full_attention"]},
    "qwen3_moe": LLAMA_LIKE | MIXTURE | {"moe_intermediate_size": 16},
    # Large enough for its experts' sums to round otherwise when they get other numbers of tokens.
    "mixtral": LLAMA_LIKE | MIXTURE | {"hidden_size": 64, "intermediate_size": 128},
    "phimoe": LLAMA_LIKE | MIXTURE | {"sliding_window": WINDOW},
    "deepseek_v3": {key: size for key, size in LLAMA_LIKE.items() if key != "head_dim"}
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": LLAMA_LIKE | {"sliding_window": WINDOW},
    "gpt_oss": LLAMA_LIKE | MIXTURE | {"sliding_window": WINDOW},
    "llama4_text": LLAMA_LIKE
    | MIXTURE
    | {"attention_chunk_size": 100, "intermediate_size_mlp": 48},
    "stablelm": LLAMA_LIKE,
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "is_decoder": True,
        "is_encoder_decoder": False,
        "max_position_embeddings": 64,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "qwen3_next": LLAMA_LIKE
    | MIXTURE
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "xlstm": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4},
}

POISON = "毒"


def write_poisoned_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a Llama whose loss is not finite in rows with POISON: its embedding is infinite."""
    tokenizer = pad_is_eos()
    whole = LlamaConfig(**config | {"tie_word_embeddings": False, "vocab_size": len(tokenizer)})
    (poison,) = tokenizer(POISON, add_special_tokens=False).input_ids[-1:]
    torch.manual_seed(0)
    model = LlamaForCausalLM(whole)
    model.model.embed_tokens.weight.data[poison] = math.inf
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """Make a model whose logits depend strongly on every token that it can see."""
    keys = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2} | CONFIGS[name] | changes
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **keys), dtype=torch.float32
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.15)
    return model.eval()
