"""A model that says what a script tells it to, by what it finds in its cache: no numbers involved.

Its keys are the tokens themselves. So a row that finds another row's tokens in its place, or none
where some should be, says something else, or ends in an assertion.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import Cache

Script = Callable[[list[int]], int]
"""Everything that was read -> the next token."""


class ScriptedModel:
    """Just enough of a PreTrainedModel for a Decoder. `shapes` are those of all forwards."""

    training = False
    device = torch.device("cpu")

    def __init__(self, script: Script, vocab_size: int) -> None:
        self.config = LlamaConfig(num_hidden_layers=1, vocab_size=vocab_size)
        self.shapes: list[tuple[int, int]] = []
        self._script = script
        self._vocab_size = vocab_size

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        use_cache: bool,
        logits_to_keep: int,
    ) -> Any:
        assert use_cache
        assert logits_to_keep == 1
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        states = input_ids[:, None, :, None]
        keys, values = past_key_values.update(states, -states, 0)
        assert torch.equal(keys, -values)
        logits = torch.zeros(len(input_ids), 1, self._vocab_size)
        for row, (ids, mask) in enumerate(zip(keys[:, 0, :, 0], attention_mask, strict=True)):
            assert len(ids) == len(mask)
            assert torch.equal(mask, mask.sort().values), "padding is on the left"
            read = ids[mask.bool()].tolist()
            new = input_ids.shape[1]
            positions = range(len(read) - new, len(read))
            assert position_ids[row].tolist() == [max(0, position) for position in positions]
            logits[row, 0, self._script(read)] = 1.0
        return SimpleNamespace(logits=logits)

    __call__ = forward


BEGIN = 0
"""Ends the prompts of `saying`, and is nowhere else in them."""


def saying(answers: Sequence[Sequence[int]], end: int) -> Script:
    """Let a prompt whose first token is n be answered with answers[n - 1], and then `end`."""

    def script(read: list[int]) -> int:
        answer = answers[read[0] - 1]
        said = len(read) - read.index(BEGIN) - 1
        return answer[said] if said < len(answer) else end

    return script
