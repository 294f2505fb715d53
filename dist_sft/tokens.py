"""What we ask of a tokenizer: exact pieces in, exact text back, nothing added on its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer

from dist_sft.templates import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Codec(Protocol):
    """Encode and decode many texts in one call, without special tokens, padding or cutting."""

    @property
    def fingerprint(self) -> str:
        """Hash everything that decides the ids."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text by itself."""

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, control tokens included."""


class RustCodec:
    """Work on a private copy of the Rust tokenizer, so that the caller's keeps its settings."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", escapes: bool) -> None:
        backend: Any = tokenizer.backend_tokenizer
        self._rust: Any = Tokenizer.from_str(backend.to_str())
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.encode_special_tokens = escapes
        self.fingerprint = fingerprint(self._rust.to_str(), escapes)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text by itself."""
        encodings = self._rust.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, control tokens included."""
        texts: list[str] = self._rust.decode_batch(batch, skip_special_tokens=False)
        return texts


class PythonCodec:
    """Go through the tokenizer's own call, for tokenizers without a Rust backend."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", escapes: bool) -> None:
        self._tokenizer: Any = tokenizer
        self._escapes = escapes
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        self.fingerprint = fingerprint(type(tokenizer).__name__, vocabulary, escapes)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text by itself."""
        return [
            self._tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=self._escapes,
                padding=False,
                truncation=False,
                verbose=False,
            )["input_ids"]
            for text in texts
        ]

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, control tokens included."""
        return [decode(ids, self._tokenizer) for ids in batch]


def make_codec(tokenizer: "PreTrainedTokenizerBase", *, escapes: bool) -> Codec:
    """Choose by the tokenizer; with `escapes`, control tokens in a text stay plain text."""
    return RustCodec(tokenizer, escapes) if tokenizer.is_fast else PythonCodec(tokenizer, escapes)


def decode(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of `ids` as it is: control tokens shown, spaces not tidied up."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int | None:
    """Return the id of one entry of the vocabulary, None where there is no such entry."""
    number: Any = tokenizer.convert_tokens_to_ids(token)
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        return None  # an unknown token's id stands for everything unknown
    return int(number)


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """List the special tokens: those that a text can contain only by accident."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(
        [*map(str, tokenizer.all_special_tokens), *(str(token) for token in added if token.special)]
    )


def default_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return BOS where the tokenizer's own way of encoding a text starts with it."""
    ids: list[int] = tokenizer("a")["input_ids"]
    bos: Any = tokenizer.bos_token_id
    return int(bos) if bos is not None and ids[:1] == [bos] else None
