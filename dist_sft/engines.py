"""What answers requests: dist_sft's own decoding, or vLLM where that is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dist_sft.chat import Encoder
from dist_sft.decode import Answer, Decoder, Request
from dist_sft.errors import UserError
from dist_sft.generate_recipe import Generate, GenerateRecipe
from dist_sft.preflight import named_gpus
from dist_sft.sampling import Sampling

__all__ = ["VLLM", "Answer", "Engine", "HuggingFace", "Request"]

AT_ONCE = 256  # requests that vLLM gets; in between it can be asked to stop
Tick = Callable[[int, int], None]
"""Hear how many tokens were chosen, and how many answers they ended; may raise to leave."""


class Engine(Protocol):
    """Answer requests; the same ones in one call get the same answers."""

    splits: int
    """How often a batch did not fit into memory and was split: bytes may differ from then on."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all of them, in their order."""


def sampling_of(generate: Generate, seed: int) -> Sampling:
    """Return what a recipe says about how answers are chosen."""
    return Sampling(
        max_new_tokens=generate.max_new_tokens,
        temperature=generate.temperature,
        top_k=generate.top_k,
        top_p=generate.top_p,
        repetition_penalty=generate.repetition_penalty,
        stop=generate.stop,
        seed=seed,
    )


class HuggingFace:
    """The decoding loop of `decode`, on a model that is loaded here."""

    def __init__(
        self, model: Any, encoder: Encoder, text_of: Callable[[list[int]], str],
        recipe: GenerateRecipe, tick: Tick,
    ) -> None:  # fmt: skip
        """Answer with `model`; `tick` hears of every step."""
        self.splits = 0
        self._batch_tokens = recipe.generate.batch_tokens
        sampling = sampling_of(recipe.generate, recipe.seed)
        self._decoder = Decoder(
            model, encoder.stop_ids, sampling, text_of, tick, shrunk=self._count_split
        )

    def _count_split(self, rows: int, places: int) -> None:
        self.splits += 1

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests, in their order."""
        return self._decoder.answer(requests, self._batch_tokens)


class VLLM:
    """vLLM's offline engine (https://docs.vllm.ai), where it is installed.

    Its batches follow from what else is being answered: unlike `hf`, it does not promise the same
    bytes from another number of workers.
    """

    splits = 0

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        recipe: GenerateRecipe,
        dtype: torch.dtype,
        local_rank: int,
        tick: Tick,
    ) -> None:
        """Load the model from a Hugging Face folder. Raises UserError where there is no vLLM."""
        # It starts processes of its own, which would all compute on the first GPU.
        gpus = named_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", "")) or list(
            map(str, range(torch.cuda.device_count()))
        )
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank]
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"generate.engine: vllm cannot be imported ({error}); install it, or set "
                "generate.engine: hf"
            ) from None
        self._tick, self._make = tick, vllm.SamplingParams
        self._generate, self._seed, self._stop_ids = recipe.generate, recipe.seed, encoder.stop_ids
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=recipe.model.trust_remote_code,
            seed=recipe.seed % 2**31,
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests, in their order."""
        answers = []
        for start in range(0, len(requests), AT_ONCE):
            some = requests[start : start + AT_ONCE]
            said = self._llm.generate(
                [{"prompt_token_ids": list(request.prompt)} for request in some],
                [self._sampling(request) for request in some],
                use_tqdm=False,
            )
            new = [self._read(one.outputs[0]) for one in said]
            self._tick(sum(len(answer.ids) for answer in new), len(new))
            answers += new
        return answers

    def _sampling(self, request: Request) -> Any:
        generate = self._generate
        noise = np.random.Philox(key=[self._seed, request.row], counter=[0, 0, 0, request.sample])
        return self._make(
            max_tokens=generate.max_new_tokens,
            temperature=generate.temperature,
            top_p=generate.top_p,
            top_k=generate.top_k or -1,
            repetition_penalty=generate.repetition_penalty,
            stop=list(generate.stop),
            stop_token_ids=list(self._stop_ids),
            seed=int(noise.random_raw() >> 33),
            ignore_eos=True,  # the template's end tokens are the ones that count
            skip_special_tokens=False,
        )

    def _read(self, completion: Any) -> Answer:
        ids = [*completion.token_ids]
        if completion.finish_reason == "length":
            return Answer(completion.text, ids, "length")
        if isinstance(completion.stop_reason, str):
            return Answer(completion.text, ids, "stop")
        if ids[-1:] == [completion.stop_reason]:
            del ids[-1]
        return Answer(completion.text, ids, "eos")
