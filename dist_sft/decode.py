"""From prompts to answers: greedy decoding in batches, as evaluation and the quickstart need it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

BATCH_PROMPTS = 64


def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], end: int, max_new_tokens: int
) -> list[list[int]]:
    """Return the token ids that follow each prompt, without the end token.

    `end` is the token id that ends an answer; an answer that does not end in time is cut after
    `max_new_tokens` tokens.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    # Neighbours of similar length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), BATCH_PROMPTS):
        batch = order[first : first + BATCH_PROMPTS]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), longest), end)
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
            answers[i] = tokens[: tokens.index(end)] if end in tokens else tokens
    return answers
