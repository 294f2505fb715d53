"""Rows -> token samples whose mask is proved. Labels, the mask preview and prompts come from here.

The public face of `rows` (any row -> conversation) and `templates` (conversation -> pieces of
text). Every piece is encoded by itself, so the ids of a prompt cannot depend on its answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dist_sft.errors import UserError
from dist_sft.jinja_template import JinjaTemplate
from dist_sft.mask_proof import Proof, shown
from dist_sft.row_fields import BadRow
from dist_sft.rows import FORMATS, Conversation, ToolCall, Turn, parse
from dist_sft.templates import (
    IM_END,
    IM_START,
    TEMPLATES,
    ChatML,
    MaskError,
    Piece,
    Template,
    alpaca,
    fingerprint,
    human_assistant,
)
from dist_sft.tokens import control_tokens, decode, default_bos, make_codec, token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FORMATS",
    "IGNORE",
    "TEMPLATES",
    "BadRow",
    "Conversation",
    "Dropped",
    "Encoder",
    "MaskError",
    "Outcome",
    "OverlongError",
    "Run",
    "Sample",
    "Template",
    "ToolCall",
    "Turn",
    "add_new_tokens",
    "explain",
    "load_template",
    "parse",
    "token_texts",
]

IGNORE = -100
ENCODING_VERSION = 1
PROBES = (
    "Name the capital of France.\n\nIt is Paris: 1,234.50 of 67890 (89 %)!",
    "  two spaces,\ttabs\r\n\n\nand   ends  ",
    "把下面的句子翻译成英文。今天天气很好，我们去公园散步吧。",
    "naïve café ﬁne Ⅷ ｆｕｌｌ e\u0301 Привет, мир! สวัสดี مرحبا 👩‍🚀🇫🇷",
    "def f(x_1):\n    return {'camelCase': x_1 ** 2}  # don't",
)
"""Texts on which tokenizers differ."""


class Sample(NamedTuple):
    """One encoded row. `learned[i]` says that token i is a target; other labels are `IGNORE`."""

    input_ids: list[int]
    learned: list[bool]
    truncated: bool


class Dropped(NamedTuple):
    """A sound row that gives no sample, by choice of the recipe."""

    reason: Literal["overlong", "no_learned_token"]
    num_tokens: int


Outcome = Sample | Dropped | BadRow


class OverlongError(UserError):
    """Report a row longer than `data.max_length` where `data.overlong` says "error"."""


class _Rendered(NamedTuple):
    """A row between template and tokens."""

    row_index: int
    pieces: list[Piece]
    answers: dict[int, str]
    """The text of each assistant turn that is learned, without its end token."""


def load_template(
    name_or_path: str, tokenizer: "PreTrainedTokenizerBase", key: str = "data.template"
) -> Template:
    """Make one of the built-in `TEMPLATES`, or read a Jinja chat template from a file.

    `key` is its place in the recipe, for messages.

    Raises UserError for an unknown name, an unreadable file and a tokenizer without what the
    template needs; MaskError for a template that never ends the assistant's turn.
    """
    adds_bos = default_bos(tokenizer) is not None
    if name_or_path in ("human-assistant", "alpaca"):
        if not isinstance(tokenizer.eos_token, str):
            raise UserError(
                f"{key}={name_or_path}: ends answers with EOS, and the tokenizer has no "
                f"eos_token; set one in its tokenizer_config.json, or {key} to chatml"
            )
        make = human_assistant if name_or_path == "human-assistant" else alpaca
        return make(tokenizer.eos_token, adds_bos)
    if name_or_path == "chatml":
        missing = [token for token in (IM_START, IM_END) if token_id(tokenizer, token) is None]
        return ChatML(tuple(missing), adds_bos and tokenizer.bos_token != IM_START)
    if name_or_path == "tokenizer":
        if not tokenizer.chat_template:
            raise UserError(
                f"{key}=tokenizer: this tokenizer has no chat template; allowed: "
                "human-assistant, alpaca, chatml, or a Jinja file"
            )
        return JinjaTemplate("tokenizer", None, tokenizer)
    return JinjaTemplate(name_or_path, _read_template(name_or_path, key), tokenizer)


def _read_template(path: str, key: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        close = get_close_matches(path, TEMPLATES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"{key}={path}: no such template or file{hint}; allowed: "
            f"{', '.join(TEMPLATES)}, or a Jinja file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path}: cannot be read as UTF-8 text: {error}") from error


def add_new_tokens(tokenizer: "PreTrainedTokenizerBase", template: Template) -> int:
    """Give the tokenizer the control tokens that it lacks; return how many there were."""
    return int(tokenizer.add_tokens(list(template.new_tokens), special_tokens=True))


class Encoder:
    """Turn rows into samples, and conversations into prompts, with one template and tokenizer.

    `max_length` counts tokens; longer rows are cut on the right, dropped, or an error. `learn`
    says which assistant turns are targets. The tokenizer is only read: add `template.new_tokens`
    before. Rust threads do the encoding unless TOKENIZERS_PARALLELISM=false is in the environment.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int | None = None,
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        learn: Literal["all", "last"] = "all",
    ) -> None:
        assert max_length is None or max_length > 0, max_length
        self.template = template
        self.max_length = max_length
        self.overlong = overlong
        self.learn = learn
        self._codec = make_codec(tokenizer, escapes=template.escapes)
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = {}
        self._bos_id = default_bos(tokenizer)
        self._control_ids = {token: self._id(token) for token in control_tokens(tokenizer)}
        self._end_ids = {self._id(token) for token in template.end_tokens}
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        unknown = tokenizer.unk_token_id
        self._unknown_id = unknown if unknown not in named else None
        self._reserved_ids = {*self._control_ids.values(), *self._end_ids} - {self._unknown_id}
        self.fingerprint = fingerprint(
            ENCODING_VERSION,
            template.fingerprint,
            self._codec.fingerprint,
            self._bos_id,
            sorted(self._control_ids.items()),
            max_length,
            overlong,
            learn,
        )

    @cached_property
    def prompt_fingerprint(self) -> str:
        """Hash what decides the ids of prompts, and nothing that training alone needs.

        What the tokenizer does is tried out: its file may be another one after it was saved, and in
        another version of its library.
        """
        controls = sorted(self._control_ids.items())
        return fingerprint(
            ENCODING_VERSION,
            self.template.words_fingerprint,
            self._bos_id,
            controls,
            sorted(self._end_ids),
            sorted(self._tokenizer.get_vocab().items()),
            self._codec.encode([*PROBES, " ".join(token for token, _ in controls)]),
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """List the tokens that end an answer: generation stops at them."""
        return tuple(sorted(self._end_ids))

    @property
    def bos_id(self) -> int | None:
        """Return the token that every sample begins with, where this tokenizer wants one."""
        return self._bos_id

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids after which the assistant speaks: what training showed before an answer.

        A conversation that ends with an assistant turn gives the prompt of that turn. Raises
        `BadRow` where the template cannot express the conversation, or its words would be read as
        control tokens.
        """
        if conversation.turns[-1].role == "assistant":
            conversation = conversation._replace(turns=conversation.turns[:-1])
        pieces = self.template.prompt(conversation)
        ids_of = self._encode_texts(piece.text for piece in pieces if not piece.control)
        self._check_text_pieces(pieces, ids_of)
        input_ids, _ = self._assemble(pieces, ids_of, frozenset())
        return input_ids

    def expected(self, conversation: Conversation) -> str:
        """Return what the last turn, an assistant's, says, as it is learned, without its end.

        Raises as `encode` does.
        """
        *before, last = conversation.turns
        whole = conversation._replace(turns=(*before, last._replace(learned=True)))
        answers = self._render(0, whole).answers
        return answers[max(answers)]

    def encode(
        self, rows: Sequence[Mapping[str, Any]], format: str = "auto", *, first_row: int = 0
    ) -> list[Outcome]:
        """Return for each row its sample, or why there is none.

        `first_row` is the number of `rows[0]` in its source, for messages. Raises MaskError for a
        row whose mask cannot be proved, OverlongError where `overlong` is "error"; both show the
        row. Broken rows are returned as `BadRow`, not raised.
        """
        outcomes: dict[int, Outcome] = {}
        rendered: list[_Rendered] = []
        for index, row in enumerate(rows):
            try:
                rendered.append(self._render(index, parse(row, format)))
            except BadRow as error:
                outcomes[index] = error
            except MaskError as error:
                raise self._unproved(str(error), first_row + index, row) from error
        ids_of = self._encode_texts(
            piece.text for item in rendered for piece in item.pieces if not piece.control
        )
        proof = Proof(self._end_ids, self._unknown_id, self._control_ids)
        for item in rendered:
            index = item.row_index
            try:
                self._check_text_pieces(item.pieces, ids_of)
                input_ids, learned = self._assemble(item.pieces, ids_of, item.answers.keys())
                proof.collect(index, input_ids, learned, list(item.answers.values()))
                outcomes[index] = Sample(input_ids, learned, truncated=False)
            except BadRow as error:
                outcomes[index] = error
            except MaskError as error:
                raise self._unproved(str(error), first_row + index, rows[index]) from error
        for index, problem in proof.failures(self._codec):
            raise self._unproved(problem, first_row + index, rows[index])
        for index, outcome in outcomes.items():
            if isinstance(outcome, Sample):
                outcomes[index] = self._fit(outcome, first_row + index, rows[index])
        return [outcomes[index] for index in range(len(rows))]

    def _render(self, index: int, conversation: Conversation) -> _Rendered:
        pieces = self.template.render(conversation)
        answers = [turn for turn in conversation.turns if turn.role == "assistant"]
        texts = {}
        for number, turn in enumerate(answers):
            if turn.learned and (self.learn == "all" or number == len(answers) - 1):
                *said, end = [piece for piece in pieces if piece.turn == number] or [Piece("")]
                text = "".join(piece.text for piece in said)
                if not self.template.produces(turn, text):
                    raise MaskError(f"the learned text {shown(text)} is not what the turn says")
                if not (end.control and end.text in self.template.end_tokens):
                    raise MaskError(f"the answer {shown(text)} is not followed by an end token")
                texts[number] = text
        return _Rendered(index, pieces, texts)

    def _encode_texts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Encode every distinct text once, in one call."""
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, self._codec.encode(distinct), strict=True))

    def _assemble(
        self, pieces: list[Piece], ids_of: Mapping[str, list[int]], learned_turns: Iterable[int]
    ) -> tuple[list[int], list[bool]]:
        input_ids: list[int] = []
        learned: list[bool] = []
        wanted = set(learned_turns)
        for piece in pieces:
            ids = [self._id(piece.text)] if piece.control else ids_of[piece.text]
            input_ids += ids
            learned += [piece.turn in wanted] * len(ids)
        if self._bos_id is not None and input_ids[:1] != [self._bos_id]:
            return [self._bos_id, *input_ids], [False, *learned]
        return input_ids, learned

    def _check_text_pieces(self, pieces: Iterable[Piece], ids_of: Mapping[str, list[int]]) -> None:
        """Refuse rows whose words this tokenizer turns into control tokens after all."""
        if not self.template.escapes:
            return
        for piece in pieces:
            if piece.control or self._reserved_ids.isdisjoint(ids_of[piece.text]):
                continue
            found = next(number for number in ids_of[piece.text] if number in self._reserved_ids)
            raise BadRow(
                "control_token_in_text",
                f"the row holds the text of a control token, {decode([found], self._tokenizer)}, "
                f"which this tokenizer cannot keep apart from the real one: {shown(piece.text)}",
            )

    def _fit(self, sample: Sample, row_number: int, row: Mapping[str, Any]) -> Sample | Dropped:
        num_tokens = len(sample.input_ids)
        limit = self.max_length
        if limit is not None and num_tokens > limit:
            if self.overlong == "error":
                raise OverlongError(
                    f"data.max_length={limit}: row {row_number} has {num_tokens} tokens; raise it, "
                    f"or set data.overlong to truncate or drop\nrow {row_number}: {shown(row)}"
                )
            if self.overlong == "drop":
                return Dropped("overlong", num_tokens)
            sample = Sample(sample.input_ids[:limit], sample.learned[:limit], truncated=True)
        if True not in sample.learned:
            return Dropped("no_learned_token", num_tokens)
        return sample

    def _id(self, token: str) -> int:
        if token not in self._ids:
            number = token_id(self._tokenizer, token)
            assert number is not None, f"{token} is no token: call add_new_tokens first"
            self._ids[token] = number
        return self._ids[token]

    def _unproved(self, problem: str, row_number: int, row: Mapping[str, Any]) -> MaskError:
        return MaskError(
            f"data.template={self.template.name}: the mask cannot be proved with this tokenizer: "
            f"{problem}\nrow {row_number}: {shown(row)}"
        )


class Run(NamedTuple):
    """Neighbouring tokens of one kind, as text."""

    text: str
    learned: bool


def explain(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> list[Run]:
    """Return the sample as runs of text, learned and read ones in turn."""
    labelled = zip(sample.input_ids, sample.learned, strict=True)
    return [
        Run(decode([token for token, _ in group], tokenizer), learned)
        for learned, group in groupby(labelled, key=itemgetter(1))
    ]


def token_texts(input_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return a text per token; together they read as the whole.

    A character that is spread over several tokens (Chinese in byte-level vocabularies) stands
    at the last of them, the others get "".
    """
    texts = []
    context = given = 0  # decoding starts at `context`; the text of the tokens up to `given` is out
    for stop in range(1, len(input_ids) + 1):
        old = decode(input_ids[context:given], tokenizer)
        new = decode(input_ids[context:stop], tokenizer)
        if new.endswith("\ufffd") and stop < len(input_ids):
            texts.append("")
        else:
            texts.append(new[len(old) :])
            context, given = given, stop
    return texts
