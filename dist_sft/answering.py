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
from dist_sft.merge import COLUMNS
from dist_sft.parts import FAILURES_LISTED, Plan, Tally
from dist_sft.row_fields import BadRow
from dist_sft.templates import MaskError

OF_A_PLAN = ("input", "settings", "computed", "libraries", "threads")
"""Facts of a plan that say nothing of a single row's answer, or only of its last bits."""
KEPT = tuple(COLUMNS)[2:]
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

    row: int
    fields: dict[str, Any]
    prompt: list[int] = field(default_factory=list)
    truncated: bool = False
    problem: BadRow | None = None
    key: str = ""
    earlier: list[dict[str, Any]] | None = None
    """Output rows of an earlier plan that hold."""


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
        new = [one for one in asked if one.problem is None and one.earlier is None]
        splits_before = self._engine.splits
        answers = iter(
            self._engine.answer(
                [Request(one.prompt, one.row, sample) for one in new for sample in range(samples)]
            )
        )
        tally = Tally(out_of_memory=self._engine.splits - splits_before)
        lines = []
        for one in asked:
            if one.earlier is not None:
                told = [{key: old[key] for key in KEPT if key in old} for old in one.earlier]
            elif one.problem is not None:
                told = [_unanswered(one, one.problem)] * samples
            else:
                told = [self._judged(one, next(answers)) for _ in range(samples)]
            _count(tally, one, told)
            lines += [
                to_json({**one.fields, "row": one.row, "sample": sample, **columns})
                for sample, columns in enumerate(told)
            ]
        return Part(b"".join(lines), [one.key for one in asked], tally)

    def _ask(self, number: int, row: dict[str, Any] | BadRow) -> _Asked:
        """Make the prompt of a row, or say why there is none."""
        one = _Asked(number, {} if isinstance(row, BadRow) else row)
        try:
            if isinstance(row, BadRow):
                raise row
            source = self._recipe.input[self.inputs.source_of(number)]
            one.prompt = self._encoder.prompt(parse(row, source.format, answered=False))
            self._fit(one)
        except (BadRow, MaskError) as error:
            bad = error if isinstance(error, BadRow) else BadRow("template", str(error))
            one.problem = self._recorded(one, bad)
        # Rows that are the same have answers of their own.
        which = int(self.inputs.occurrences[number])
        one.key = _hash([self._salt, one.fields, which, one.prompt, str(one.problem or "")])
        if self._earlier is not None and one.problem is None:
            one.earlier = self._earlier.find(one.key)
        return one

    def _recorded(self, one: _Asked, problem: BadRow) -> BadRow:
        """Return a problem that is to be recorded; raise UserError where it ends the run."""
        if self._recipe.generate.on_error == "stop":
            raise UserError(
                f"input: row {one.row} cannot be answered: {problem}. Correct it, or set "
                "generate.on_error: record"
            )
        return problem

    def _judged(self, one: _Asked, answer: Answer) -> dict[str, Any]:
        """Return what an answer puts into the output."""
        if answer.reason in FAILURES:
            return _unanswered(one, self._recorded(one, BadRow(*FAILURES[answer.reason])))
        return {
            "generated": answer.text,
            "finish_reason": answer.reason,
            "prompt_tokens": len(one.prompt),
            "generated_tokens": len(answer.ids),
            "prompt_truncated": one.truncated,
        }

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


def _unanswered(one: _Asked, problem: BadRow) -> dict[str, Any]:
    return {
        "generated": None,
        "finish_reason": "error",
        "prompt_tokens": len(one.prompt),
        "generated_tokens": 0,
        "prompt_truncated": one.truncated,
        "error": str(problem),
    }


def _count(tally: Tally, one: _Asked, told: list[dict[str, Any]]) -> None:
    """Count a row and its output rows."""
    tally.rows += 1
    tally.prompt_tokens += len(one.prompt)
    tally.prompts_truncated += one.truncated
    tally.reused += one.earlier is not None
    for columns in told:
        tally.lines += 1
        tally.reasons[columns["finish_reason"]] += 1
        tally.generated_tokens += columns["generated_tokens"]
    wrong = next((columns["error"] for columns in told if "error" in columns), None)
    if wrong is not None:
        reasons = {text: reason for reason, text in FAILURES.values()}
        tally.errors[one.problem.reason if one.problem else reasons[wrong]] += 1
        if len(tally.failures) < FAILURES_LISTED:
            tally.failures.append((one.row, wrong))


def _salt(recipe: GenerateRecipe, plan: Plan) -> str:
    """Return what all answers depend on: model, words, sampling; not which rows there are."""
    facts = {key: value for key, value in plan.facts.items() if not key.startswith(OF_A_PLAN)}
    idle = {"batch_tokens", "part_rows", "on_error", "prepack_weights"}
    return _hash([facts, recipe.seed, recipe.generate.model_dump(mode="json", exclude=idle)])


def _hash(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
