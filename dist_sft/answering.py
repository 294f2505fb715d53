"""One part of a generation run: from rows to output rows, whoever asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dist_sft.chat import Encoder, parse
from dist_sft.earlier import Earlier
from dist_sft.engines import Answer, Engine, Request
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.inputs import Inputs, to_json
from dist_sft.parts import FAILURES_LISTED, Plan, Tally
from dist_sft.row_fields import BadRow
from dist_sft.templates import MaskError

COLUMNS = (
    "row",
    "sample",
    "generated",
    "finish_reason",
    "prompt_tokens",
    "generated_tokens",
    "prompt_truncated",
    "error",
)
"""What the output has beside the input's columns; `error` where there was one."""
OF_A_PLAN = ("input", "settings")
"""Facts of a plan that say nothing of a single row."""
KEPT = COLUMNS[2:]
"""What an earlier answer keeps where its row has moved."""


FAILURES = {
    "error": ("not_finite", "the model's logits are not finite"),
    "memory": ("out_of_memory", "there was not enough memory for this row alone"),
}


class Part(NamedTuple):
    """What a worker hands in."""

    lines: bytes
    keys: list[str]
    """What the answers of each row depend on: row, prompt, model, sampling."""
    tally: Tally


@dataclass
class _Asked:
    """A row with its prompt, or with what is wrong with it."""

    fields: dict[str, Any]
    prompt: list[int] = field(default_factory=list)
    truncated: bool = False
    problem: BadRow | None = None
    key: str = ""


class Answerer:
    """Answer parts of a plan."""

    def __init__(
        self,
        recipe: GenerateRecipe,
        plan: Plan,
        inputs: Inputs,
        encoder: Encoder,
        engine: Engine,
        room: int | None,
        earlier: Earlier | None = None,
    ) -> None:
        """Take what all parts need.

        `room` is how many tokens a prompt may have, None for any number; `earlier` are answers that
        are kept where nothing that they depend on has changed.
        """
        self.inputs = inputs
        self._recipe, self._plan = recipe, plan
        self._encoder, self._engine, self._room = encoder, engine, room
        self._earlier = earlier
        self._salt = _salt(recipe, plan)

    def answer(self, part: int) -> Part:
        """Answer the rows of a part.

        Raises UserError for a row that cannot be answered where generate.on_error is "stop".
        """
        rows, samples = self._plan.rows_of(part), self._plan.samples
        asked = [self._ask(n, row) for n, row in zip(rows, self.inputs.read(rows), strict=True)]
        known = [self._known(n, one) for n, one in zip(rows, asked, strict=True)]
        requests = [
            Request(one.prompt, number, sample)
            for number, one, old in zip(rows, asked, known, strict=True)
            if one.problem is None and old is None
            for sample in range(samples)
        ]
        splits_before = self._engine.splits
        answers = iter(self._engine.answer(requests))
        tally = Tally(out_of_memory=self._engine.splits - splits_before)
        lines = []
        for number, one, old in zip(rows, asked, known, strict=True):
            for sample in range(samples):
                if old is not None:
                    told = {key: old[sample][key] for key in KEPT if key in old[sample]}
                elif one.problem is not None:
                    told = _unanswered(one)
                else:
                    told = _answered(one, next(answers))
                tally.count_line(told["finish_reason"], told["generated_tokens"])
                lines.append(to_json({**one.fields, "row": number, "sample": sample, **told}))
            self._count_row(tally, number, one, reused=old is not None)
        return Part(b"".join(lines), [one.key for one in asked], tally)

    def _ask(self, number: int, row: dict[str, Any] | BadRow) -> _Asked:
        """Make the prompt of a row, or say why there is none."""
        one = _Asked({} if isinstance(row, BadRow) else row)
        try:
            if isinstance(row, BadRow):
                raise row
            source = self._recipe.input[self.inputs.source_of(number)]
            one.prompt = self._encoder.prompt(parse(row, source.format, answered=False))
            self._fit(one)
        except (BadRow, MaskError) as error:
            one.problem = error if isinstance(error, BadRow) else BadRow("template", str(error))
            if self._recipe.generate.on_error == "stop":
                raise UserError(
                    f"input: row {number} cannot be answered: {error}. Correct it, or set "
                    "generate.on_error: record"
                ) from None
        one.key = _hash([self._salt, one.fields, one.prompt, str(one.problem or "")])
        return one

    def _fit(self, one: _Asked) -> None:
        """Cut a prompt that is too long, or raise BadRow."""
        if self._room is None or len(one.prompt) <= self._room:
            return
        if self._recipe.generate.overlong == "error":
            raise BadRow(
                "overlong",
                f"the prompt has {len(one.prompt)} tokens, and beside generate.max_new_tokens: "
                f"{self._recipe.generate.max_new_tokens} the model has room for {self._room}; "
                "generate.overlong: truncate cuts it",
            )
        bos = one.prompt[:1] if one.prompt[0] == self._encoder.bos_id else []
        one.prompt = [*bos, *one.prompt[len(one.prompt) - self._room + len(bos) :]]
        one.truncated = True

    def _known(self, number: int, one: _Asked) -> list[dict[str, Any]] | None:
        """Return the earlier output rows of the same question."""
        if self._earlier is None or one.problem is not None:
            return None
        return self._earlier.find(one.key, number)

    def _count_row(self, tally: Tally, number: int, one: _Asked, *, reused: bool) -> None:
        tally.rows += 1
        tally.prompt_tokens += len(one.prompt)
        tally.prompts_truncated += one.truncated
        tally.reused += reused
        if one.problem is not None:
            tally.errors[one.problem.reason] += 1
            if len(tally.failures) < FAILURES_LISTED:
                tally.failures.append((number, str(one.problem)))


def _answered(one: _Asked, answer: Answer) -> dict[str, Any]:
    if answer.reason in FAILURES:
        one.problem = BadRow(*FAILURES[answer.reason])
        return _unanswered(one)
    return {
        "generated": answer.text,
        "finish_reason": answer.reason,
        "prompt_tokens": len(one.prompt),
        "generated_tokens": len(answer.ids),
        "prompt_truncated": one.truncated,
    }


def _unanswered(one: _Asked) -> dict[str, Any]:
    return {
        "generated": None,
        "finish_reason": "error",
        "prompt_tokens": len(one.prompt),
        "generated_tokens": 0,
        "prompt_truncated": one.truncated,
        "error": str(one.problem),
    }


def _salt(recipe: GenerateRecipe, plan: Plan) -> str:
    """Return what all answers depend on: model, words, sampling; not which rows there are."""
    facts = {key: value for key, value in plan.facts.items() if not key.startswith(OF_A_PLAN)}
    idle = {"batch_tokens", "part_rows", "on_error"}
    return _hash([facts, recipe.seed, recipe.generate.model_dump(mode="json", exclude=idle)])


def _hash(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
