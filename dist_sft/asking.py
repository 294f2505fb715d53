"""Prompts with known answers: read from rows, answered greedily, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from dist_sft.chat import BadRow, Encoder, parse
from dist_sft.decode import Answer, Decoder, Request
from dist_sft.errors import UserError
from dist_sft.model import positions
from dist_sft.sampling import Sampling
from dist_sft.sources import open_source

ROWS = 1024  # read at once


class Prompts(NamedTuple):
    """Prompts, and what should follow them."""

    ids: list[list[int]]
    expected: list[str]


def read_prompts(path: str, encoder: Encoder, key: str = "eval.prompts") -> Prompts:
    """Read rows as training reads them: prompt, and the last answer. Raises UserError."""
    prompts = Prompts([], [])
    for batch in open_source(path, key=key).batches(ROWS):
        for number, row in enumerate(batch.rows, start=batch.first_row):
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = parse(row)
                prompts.ids.append(encoder.prompt(conversation))
                prompts.expected.append(encoder.expected(conversation))
            except (BadRow, UserError) as error:
                raise UserError(f"{key}={path}: row {number}: {error}") from error
    return prompts


def check_room(prompts: Prompts, max_new_tokens: int, model: PreTrainedModel) -> None:
    """Raise UserError where a prompt and its answer are more than the model takes."""
    limit = positions(model.config.get_text_config())
    longest = max(map(len, prompts.ids))
    if limit and longest + max_new_tokens > limit:
        raise UserError(
            f"eval.max_new_tokens: got {max_new_tokens}, and eval.prompts has prompts of up to "
            f"{longest} tokens, but the model takes {limit}, answers included (its config's "
            f"max_position_embeddings); allowed: up to {limit - longest}"
        )


def is_exact(answer: str, expected: str) -> bool:
    """Tell whether an answer is the expected one, white space around it aside."""
    return answer.strip() == expected.strip()


def ask(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    text_of: Callable[[list[int]], str],
    max_new_tokens: int,
    batch_tokens: int,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[Answer]:
    """Answer prompts greedily; the arguments are those of `Decoder`."""
    sampling = Sampling(max_new_tokens)
    decoder = Decoder(model, stop_ids, sampling, text_of, agree=agree)
    return decoder.answer([Request(prompt) for prompt in prompts], batch_tokens)
