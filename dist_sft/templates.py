"""Conversation -> pieces of text, each one learned or not: the built-in templates.

A template decides the words; `chat.Encoder` turns them into tokens and proves the mask. Templates
written in Jinja live in `jinja_template.py`. The same words as Jinja for those who serve the model
are in `chat_templates/`: change both.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dist_sft.errors import UserError
from dist_sft.row_fields import BadRow
from dist_sft.rows import Conversation, ToolCall, Turn

TEMPLATES = ("human-assistant", "alpaca", "chatml", "tokenizer")
"""Names that `data.template` may have; anything else is a Jinja file."""


class MaskError(UserError):
    """Refuse a template and tokenizer that together give no provable mask."""


class Piece(NamedTuple):
    """A piece of rendered text that is encoded by itself.

    `turn` counts assistant turns from 0 and names the one that has to produce this text; None for
    text that is only read. `control` text is one entry of the vocabulary and goes in by its id.
    """

    text: str
    turn: int | None = None
    control: bool = False


class Template(Protocol):
    """What the encoder needs to know about a template."""

    @property
    def name(self) -> str:
        """Name the template in messages."""

    @property
    def fingerprint(self) -> str:
        """Hash everything that decides the rendered text."""

    @property
    def words_fingerprint(self) -> str:
        """Hash the same, whatever the template is called and wherever it is from."""

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """List the control tokens that the tokenizer lacks."""

    @property
    def end_tokens(self) -> frozenset[str]:
        """List the control tokens that end an assistant turn."""

    @property
    def escapes(self) -> bool:
        """Tell whether control tokens written in text pieces stay plain text."""

    @property
    def chat_template(self) -> str | None:
        """Give the same words as Jinja text for an exported tokenizer; None: it has them."""

    def render(self, conversation: Conversation) -> list[Piece]:
        """Render for training; each assistant turn's pieces end with one end token."""

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """Render up to where the assistant begins to speak."""

    def produces(self, turn: Turn, text: str) -> bool:
        """Tell whether `text` is what the assistant says in `turn` and nothing else."""


def fingerprint(*parts: object) -> str:
    """Hash values as JSON text, in hex."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def _read_chat_template(name: str, adds_bos: bool) -> str:
    """Return the Jinja text of a built-in template, BOS in front where training puts it there.

    Whoever renders it, `apply_chat_template` or vLLM's chat server, encodes with
    add_special_tokens=False: BOS has to be in the text. The text is the one of training, but its
    tokens need not be: training encodes every piece by itself, a server the whole. They part
    - where an earlier answer merges with what is before it ("Assistant: " and "Paris" give the
      token " Paris" in byte-level vocabularies), or lacks SentencePiece's "▁" in front;
    - at every piece, the prompt's last one too, where SentencePiece puts "▁" in front of the
      whole text only (Metaspace's prepend_scheme "first": Llama tokenizers with `legacy` false);
    - where a control token swallows the white space beside it.
    There a served model reads its prompt in slightly other tokens than it was trained on. In both
    the cue ends before the answer's first token, so answers begin as they were learned.
    """
    text = (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return "{{- bos_token }}\n" + text if adds_bos else text


@dataclass(frozen=True)
class PlainTemplate:
    """Words only: questions and a cue separated by blank lines, every answer ended by EOS."""

    name: str
    question: Callable[[Turn, bool], str]
    """Words a user turn; the flag says that it is the first one."""
    cue: str
    """Asks the assistant to speak."""
    end: str
    adds_bos: bool = False
    """The tokenizer wants BOS in front, so the exported chat template writes it."""
    new_tokens: tuple[str, ...] = ()
    escapes: bool = True
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """Hash name and version: the words live in this file."""
        return fingerprint(self.name, self.version, self.end)

    @property
    def words_fingerprint(self) -> str:
        """Hash the same."""
        return self.fingerprint

    @property
    def end_tokens(self) -> frozenset[str]:
        """Give EOS."""
        return frozenset([self.end])

    @property
    def chat_template(self) -> str:
        """Give the Jinja text; `eos_token` stands for EOS in it."""
        return _read_chat_template(self.name, self.adds_bos)

    def render(self, conversation: Conversation) -> list[Piece]:
        """Render for training."""
        self._check(conversation)
        return list(self._pieces(conversation.turns))

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """Render for generation: the training text of an empty answer, without it and its end."""
        answer = Turn("assistant", "")
        return self.render(Conversation((*conversation.turns, answer), conversation.tools))[:-2]

    def produces(self, turn: Turn, text: str) -> bool:
        """Compare with the turn's own words."""
        return text == turn.content

    def _pieces(self, turns: tuple[Turn, ...]) -> Iterator[Piece]:
        blocks: list[str] = []
        answers = questions = 0
        for turn in turns:
            if turn.role == "system":
                blocks.append(turn.content.strip())
            elif turn.role == "user":
                blocks.append(self.question(turn, questions == 0))
                questions += 1
            else:
                lead = "\n\n" if answers else ""
                yield Piece(lead + "\n\n".join([*blocks, self.cue]))
                yield Piece(turn.content, answers)
                yield Piece(self.end, answers, control=True)
                answers += 1
                blocks = []

    def _check(self, conversation: Conversation) -> None:
        turns = conversation.turns
        if conversation.tools or any(turn.role == "tool" or turn.tool_calls for turn in turns):
            raise BadRow(
                "tools_not_expressible",
                f"the template {self.name} has no words for tools and tool calls; set data.template"
                " to chatml, to tokenizer, or to a file that has",
            )
        if any(turn.role == "system" for turn in turns[1:]):
            raise BadRow(
                "late_system",
                f"the template {self.name} takes one system turn, at the start; set data.template"
                " to chatml",
            )


def _human_assistant_question(turn: Turn, first: bool) -> str:
    # The published wording is ("Human: " + instruction + "\n" + input).strip().
    return f"Human: {turn.text}".strip()


_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)


def _alpaca_question(turn: Turn, first: bool) -> str:
    words = f"### Instruction:\n{turn.content}"
    if turn.input:
        words += f"\n\n### Input:\n{turn.input}"
    if not first:
        return words
    return (_ALPACA_WITH_INPUT if turn.input else _ALPACA_WITHOUT_INPUT) + words


def human_assistant(eos: str, adds_bos: bool) -> PlainTemplate:
    """Make the template "Human: ... Assistant: ..."."""
    return PlainTemplate("human-assistant", _human_assistant_question, "Assistant: ", eos, adds_bos)


def alpaca(eos: str, adds_bos: bool) -> PlainTemplate:
    """Make the template of Stanford's Alpaca, word for word."""
    return PlainTemplate("alpaca", _alpaca_question, "### Response:", eos, adds_bos)


IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True)
class ChatML:
    """`<|im_start|>role`, words, `<|im_end|>`; tools as Hermes and Qwen2.5 word them."""

    new_tokens: tuple[str, ...] = ()
    adds_bos: bool = False
    """The tokenizer wants another BOS than `<|im_start|>` in front."""
    name: str = "chatml"
    escapes: bool = True
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """Hash name and version: the words live in this file."""
        return fingerprint(self.name, self.version)

    @property
    def words_fingerprint(self) -> str:
        """Hash the same."""
        return self.fingerprint

    @property
    def end_tokens(self) -> frozenset[str]:
        """Give `<|im_end|>`."""
        return frozenset([IM_END])

    @property
    def chat_template(self) -> str:
        """Give the Jinja text."""
        return _read_chat_template(self.name, self.adds_bos)

    def render(self, conversation: Conversation) -> list[Piece]:
        """Render for training."""
        return list(self._pieces(conversation))

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """Render for generation: the training text of an empty answer, without it and its end."""
        answer = Turn("assistant", "")
        return self.render(Conversation((*conversation.turns, answer), conversation.tools))[:-2]

    def produces(self, turn: Turn, text: str) -> bool:
        """Compare with the turn's own words and calls."""
        return text == _words_and_calls(turn)

    def _pieces(self, conversation: Conversation) -> Iterator[Piece]:
        answers = 0
        for number, (role, text) in enumerate(_chatml_blocks(conversation)):
            if number:
                yield Piece("\n")
            yield Piece(IM_START, control=True)
            if role == "assistant":
                yield Piece("assistant\n")
                yield Piece(text, answers)
                yield Piece(IM_END, answers, control=True)
                answers += 1
            else:
                yield Piece(f"{role}\n{text}")
                yield Piece(IM_END, control=True)


def _chatml_blocks(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Give (role, text) for each block; neighbouring tool results share one."""
    turns = conversation.turns
    if conversation.tools:
        system = ""
        if turns[0].role == "system":
            system, turns = f"{turns[0].content}\n\n", turns[1:]
        yield "system", system + _tool_list(conversation.tools)
    results: list[str] = []
    for turn in turns:
        if turn.role == "tool":
            results.append(_tool_response(turn.content))
            continue
        if results:
            yield "user", "\n".join(results)
            results = []
        yield turn.role, _words_and_calls(turn)
    if results:
        yield "user", "\n".join(results)


def _tool_list(tools: tuple[Mapping[str, Any], ...]) -> str:
    return _TOOLS_HEAD + "".join(f"\n{_dump(tool)}" for tool in tools) + _TOOLS_TAIL


def _tool_response(content: str) -> str:
    # Hermes files hold results that are wrapped already.
    if content.lstrip().startswith("<tool_response>"):
        return content
    return f"<tool_response>\n{content}\n</tool_response>"


def _words_and_calls(turn: Turn) -> str:
    parts = [turn.text] if turn.text or not turn.tool_calls else []
    return "\n".join([*parts, *map(_tool_call, turn.tool_calls)])


def _tool_call(call: ToolCall) -> str:
    body = _dump({"name": call.name, "arguments": call.arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def _dump(value: object) -> str:
    # Tables may hold dates in a tool's schema; they read best as text.
    return json.dumps(value, ensure_ascii=False, default=str)
