"""The proof that a mask is right, from the finished ids alone."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress

from dist_sft.row_fields import BadRow
from dist_sft.templates import MaskError
from dist_sft.tokens import Codec

SHOWN_CHARACTERS = 400


class Proof:
    """Prove masks from the finished ids alone, the decoding of many rows in one call."""

    def __init__(
        self, end_ids: set[int], unknown_id: int | None, control_tokens: Iterable[str]
    ) -> None:
        self._end_ids = end_ids
        self._unknown_id = unknown_id
        controls = "|".join(map(re.escape, control_tokens))
        self._around_control = re.compile(rf" *({controls}) *" if controls else r"(?!)()")
        self._claims: list[tuple[int, list[int], str]] = []

    def collect(
        self, index: int, input_ids: list[int], learned: list[bool], answers: list[str]
    ) -> None:
        """Check a row's runs of learned tokens and note what each has to decode to."""
        runs = list(_true_runs(learned))
        if len(runs) != len(answers):
            raise MaskError(f"{len(answers)} answers gave {len(runs)} runs of learned tokens")
        for (start, stop), answer in zip(runs, answers, strict=True):
            *body, last = input_ids[start:stop]
            if last not in self._end_ids or not self._end_ids.isdisjoint(body):
                raise MaskError(f"the answer {shown(answer)} does not end with one end token")
            if self._unknown_id is not None and self._unknown_id in body:
                raise BadRow(
                    "unknown_characters",
                    f"an answer has characters that the tokenizer does not know: {shown(answer)}",
                )
            self._claims.append((index, body, answer))

    def failures(self, codec: Codec) -> Iterator[tuple[int, str]]:
        """Give (row index, problem) for each answer that its learned tokens do not decode to."""
        decoded = codec.decode([body for _, body, _ in self._claims])
        for (index, _, answer), text in zip(self._claims, decoded, strict=True):
            if text != answer and self._normal(text) != self._normal(answer):
                yield index, f"the learned tokens decode to {shown(text)}, not to {shown(answer)}"

    def _normal(self, text: str) -> str:
        """Remove what SentencePiece tokenizers normalise: compatibility forms, spaces in front.

        Their decoders also put spaces beside control tokens, which some templates use in answers.
        Nothing else is free: a tokenizer that loses line breaks or accents is refused.
        """
        text = unicodedata.normalize("NFKC", text).lstrip(" ")
        return self._around_control.sub(r"\1", text)


def _true_runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Give (start, stop) of each longest run of True."""
    stop = 0
    with suppress(ValueError):  # list.index, which is far faster than a loop over the flags
        while True:
            start = flags.index(True, stop)
            stop = len(flags)
            with suppress(ValueError):
                stop = flags.index(False, start)
            yield start, stop


def shown(value: object) -> str:
    """Quote a text or a row, shortened to what a person reads."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
