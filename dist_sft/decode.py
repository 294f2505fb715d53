"""From prompts to answers: greedy decoding in batches, as evaluation and the quickstart need it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import GenerationConfig, PreTrainedModel

BATCH_PROMPTS = 64


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the token ids that follow each prompt, without the token that ends it.

    Each of `stop_ids` ends an answer; one that does not end in time is cut after `max_new_tokens`
    tokens.
    """
    pad = stop_ids[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
    )
    # Neighbours of similar length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), BATCH_PROMPTS):
        batch = order[first : first + BATCH_PROMPTS]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            # Padding goes to the left, so that every prompt ends where its answer begins.
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        with torch.inference_mode():
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
        for i, tokens in zip(batch, output[:, longest:].tolist(), strict=True):
            answers[i] = list(takewhile(lambda token: token not in stop_ids, tokens))
    return answers
