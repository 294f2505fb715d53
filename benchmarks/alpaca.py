"""The text and the tokens of an Alpaca row, as every contestant trains them. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Tokens(NamedTuple):
    """A row as tokens; the first `prompt_length` are not learned."""

    input_ids: list[int]
    prompt_length: int

    @property
    def supervised(self) -> int:
        """Count the tokens that are learned."""
        return len(self.input_ids) - self.prompt_length


def tokenize(
    row: Mapping[str, str],
    encode: Callable[[str], Sequence[int]],
    eos_token_id: int,
    max_length: int,
) -> Tokens:
    """Tokenise one row in the template `human-assistant`, cut at `max_length`.

    `encode` adds no special tokens. Prompt and answer are encoded apart, so that the prompt's
    tokens do not depend on the answer.
    """
    prompt = f"Human: {row['instruction']}\n{row['input']}".strip() + "\n\nAssistant: "
    prompt_ids = list(encode(prompt))[:max_length]
    answer_ids = [*encode(row["output"]), eos_token_id]
    return Tokens((prompt_ids + answer_ids)[:max_length], len(prompt_ids))
