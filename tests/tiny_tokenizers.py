"""Tiny tokenizers of the kinds found in the wild, trained in a moment on a few lines."""

import json
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = (
    "Human: Name the capital of France.\n\nAssistant: The capital of France is Paris.",
    "<start>user\nHow are you today?\nI am well, thank you very much for asking!",
    "把下面的句子翻译成英文。今天天气很好，我们去公园散步吧。",
    "Below is an instruction that describes a task. Write a response.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def _byte_level_backend(special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


@cache
def _json(kind: str) -> str:
    if kind == "byte_level":
        return _byte_level_backend(["<|endoftext|>"]).to_str()
    if kind == "adds_bos":
        return _byte_level_backend(["<s>", "</s>"]).to_str()
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    # The trainer takes the byte tokens as special ones; in Llama-2 they are plain entries.
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return json.dumps(state)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS; pad is a token of its own."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_json("byte_level")), eos_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def pad_is_eos() -> PreTrainedTokenizerFast:
    """Byte-level BPE where one token is BOS, EOS, pad and unknown, as in GPT-2 fine-tunes."""
    one = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_json("byte_level")),
        bos_token=one,
        eos_token=one,
        pad_token=one,
        unk_token=one,
    )


def adds_bos() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose post-processor puts `<s>` in front, as Llama-3's does."""
    backend = Tokenizer.from_str(_json("adds_bos"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece style: `▁` for spaces and in front, byte fallback, NFKC, BOS, as in Llama-2."""
    backend = Tokenizer.from_str(_json("metaspace"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "byte_level": byte_level,
    "pad_is_eos": pad_is_eos,
    "adds_bos": adds_bos,
    "metaspace": metaspace,
}
