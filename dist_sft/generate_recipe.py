"""The recipe of `job: generate`: prompts in, answers out. Imports as little as `config`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dist_sft.sections import (
    Count,
    Job,
    Number,
    PathText,
    Positive,
    PositiveNumber,
    RowSource,
    Section,
    Watchdog,
)

# What may differ when a run is continued: no answer depends on it.
MAY_CHANGE = frozenset({"cache_dir", "output", "watchdog", "generate.on_error"})
OUTPUTS = (".jsonl", ".parquet")


class GenerateModel(Section):
    """Which model answers."""

    path: PathText
    """A model folder (safetensors), a hub name, a training run (its newest good checkpoint is read
    directly), or one checkpoint of a run (RUN/checkpoints/step-N)."""
    step: Literal["newest", "best"] | Positive = "newest"
    """Which checkpoint of a training run: the newest, the best by evaluation loss, or a step."""
    tokenizer: PathText | None = None
    """Tokenizer folder or hub name; by default the one beside the model."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in; auto is bfloat16 on GPU and float32 on CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


def _known_type(path: str) -> str:
    if Path(path).suffix.lower() not in OUTPUTS:
        raise ValueError(f"allowed: a path that ends in {' or '.join(OUTPUTS)}")
    return path


class Output(Section):
    """Where answers go."""

    path: Annotated[PathText, AfterValidator(_known_type)]
    """File to write, .jsonl or .parquet; it appears when all rows are done, in their order."""


class Generate(Section):
    """How rows are answered."""

    max_new_tokens: Positive = 256
    """Longest answer, in tokens."""
    temperature: Number = 0.0
    """0 takes the most probable token; above, tokens are drawn."""
    top_p: Annotated[PositiveNumber, Field(le=1.0)] = 1.0
    """Draw from the fewest tokens that have this probability together."""
    top_k: Count = 0
    """Draw from so many of the most probable tokens; 0: from all."""
    repetition_penalty: PositiveNumber = 1.0
    """Above 1: tokens that prompt or answer have already become less probable."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts before which an answer ends, beside the template's end tokens."""
    num_samples: Positive = 1
    """Answers per row."""
    batch_tokens: Positive = 8192
    """Tokens, prompts and answers, whose keys and values are in memory at once. Another number
    gives the same answers but for rounding, and other bytes may follow from that."""
    part_rows: Literal["auto"] | Positive = "auto"
    """Rows that one worker answers at a time, and that are lost with it; auto: up to 256."""
    overlong: Literal["error", "truncate"] = "error"
    """A prompt that leaves no room for max_new_tokens: an error, or cut on the left."""
    on_error: Literal["record", "stop"] = "record"
    """Rows that cannot be answered: recorded, with finish_reason error, or the end of the run."""
    prepack_weights: bool = True
    """On CPU: lay the weights of linear layers out for oneDNN. Faster, as measured on AMD, but then
    workers of one node do not share their memory."""
    engine: Literal["hf", "vllm"] = "hf"
    """hf: dist_sft's own decoding on the Hugging Face model; vllm: where that is installed."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if not self.temperature:
            idle = [key for key in ("top_p", "top_k") if key in self._changed()]
            if idle:
                raise ValueError(
                    f"{', '.join(idle)}: no effect with temperature: 0, which takes the most "
                    "probable token; leave it out, or set temperature: 1.0"
                )
            if self.num_samples > 1:
                raise ValueError(
                    f"num_samples: {self.num_samples} with temperature: 0 gives the same answer "
                    "each time; set temperature: 1.0, or num_samples: 1"
                )
        return self

    def _changed(self) -> set[str]:
        fields = type(self).model_fields
        return {name for name, field in fields.items() if getattr(self, name) != field.default}


class GenerateRecipe(Job):
    """A whole generation run."""

    job: Literal["generate"] = "generate"
    """What the recipe is for; the launcher's word decides."""
    model: GenerateModel
    """Which model answers."""
    input: Annotated[tuple[RowSource, ...], Field(min_length=1)]
    """Rows to answer, in any format that training reads; an answer in them is not looked at."""
    output: Output
    """Where answers go."""
    template: PathText = "human-assistant"
    """human-assistant, alpaca, chatml, tokenizer (its own chat template), or a Jinja file: the
    one that the model was trained with."""
    generate: Generate = Generate()
    """How rows are answered."""
    cache_dir: PathText | None = None
    """Where the indexed input is kept; by default ~/.cache/dist_sft."""
    watchdog: Watchdog = Watchdog()
    """When a run counts as hung: its workers are ended, with their stacks in the logs."""

    def settings_fingerprint(self) -> str:
        """Return a hash of the settings that answers depend on, where they are not named by it."""
        told = self.model_dump(mode="json", include={"seed", "template", "generate", "input"})
        for idle in ("on_error", "prepack_weights"):  # of which the plan has other facts
            del told["generate"][idle]
        told["input"] = [source["format"] for source in told["input"]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
