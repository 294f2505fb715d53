"""Show one row as the model meets it: what is read, what is learned, and what becomes of it.

Everything comes from the encoder that makes the training labels; nothing is worked out again here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_sft import config
from dist_sft.chat import BadRow, Dropped, Encoder, OverlongError, Sample, explain, parse
from dist_sft.chat import token_texts as texts_of
from dist_sft.config import Data
from dist_sft.data import make_encoder
from dist_sft.errors import UserError
from dist_sft.mask_proof import shown
from dist_sft.sources import Row, open_source
from dist_sft.tokenizer import Words
from dist_sft.tokens import control_tokens, decode

BATCH_ROWS = 1024
ELIDE_OVER = 160
"""Longest run of tokens of one kind that a short view shows whole."""

LEARNED, READ, CONTROL, HEADING = "bold green", "bright_black", "reverse", "bold cyan"


class Source(NamedTuple):
    """One source of a recipe and its place in it."""

    key: str
    """train.N or eval.N"""
    settings: config.Source

    def __str__(self) -> str:
        return f"{self.settings.label} ({self.key})"


class Token(NamedTuple):
    """One token of a sample."""

    id: int
    text: str
    """Empty for the first tokens of a character that is spread over several."""
    learned: bool
    control: bool


@dataclass(frozen=True)
class Look:
    """What there is to see of one row."""

    title: str
    fate: str
    """What becomes of the row, in words; empty for one that is used as it is."""
    tokens: tuple[Token, ...] = ()
    answers: tuple[str, ...] = ()
    """What the model must produce, each run of learned tokens decoded by itself."""
    prompt: str = ""
    """What generation starts from."""
    prompt_tokens: int = 0
    prompt_agrees: bool = True
    """The prompt's ids are those that training showed before the answer."""


# ---- finding a row ---------------------------------------------------------------------------


def sources_of(data: Data) -> list[Source]:
    """List the sources of a recipe, those of training first."""
    pairs = (("train", data.train), ("eval", data.eval))
    return [Source(f"{kind}.{i}", s) for kind, group in pairs for i, s in enumerate(group)]


def find_source(data: Data, name: str | None) -> Source:
    """Return the source of that name or key, the first one by default. Raises UserError."""
    sources = sources_of(data)
    if name is None:
        return sources[0]
    found = [source for source in sources if name in (source.key, source.settings.label)]
    if len(found) != 1:
        problem = f"{len(found)} sources have this name" if found else "no such source"
        allowed = ", ".join(map(str, found or sources))
        raise UserError(f"--source {name}: {problem}; allowed, by name or key: {allowed}")
    return found[0]


def read_rows(source: Source, numbers: Collection[int]) -> dict[int, Row]:
    """Read these rows of a source, and nothing behind the last of them.

    Raises UserError with the allowed range where the source has no row of some number.
    """
    wanted = set(numbers)
    found: dict[int, Row] = {}
    count = 0
    opened = open_source(
        source.settings.path, split=source.settings.split, key=f"data.{source.key}"
    )
    for first_row, rows in opened.batches(BATCH_ROWS):
        count = first_row + len(rows)
        found |= {n: rows[n - first_row] for n in sorted(wanted) if first_row <= n < count}
        if len(found) == len(wanted):
            return found
    missing = min(wanted - found.keys())
    raise UserError(f"row {missing}: {source} has {count:,} rows; allowed: 0 to {count - 1}")


# ---- looking at it ---------------------------------------------------------------------------


def look_at(number: int, row: Row, source: Source, data: Data, words: Words) -> Look:
    """Encode one row as training does, and say what becomes of it.

    A row that is left out is shown whole, as far as it can be encoded. Raises MaskError.
    """
    title = f"{source} row {number}"
    if isinstance(row, BadRow):
        return Look(title, _broken(row, data))
    whole_encoder = Encoder(words.template, words.tokenizer, learn=data.learn)
    (whole,) = whole_encoder.encode([row], source.settings.format, first_row=number)
    if isinstance(whole, BadRow):
        return Look(title, f"{_broken(whole, data)}\n{shown(row)}")
    if isinstance(whole, Dropped):
        return Look(title, f"left out ({whole.reason}): no assistant turn of it is learned")
    sample, fate = _within_limit(whole, number, row, source, data, words)
    conversation = parse(row, source.settings.format)
    prompt = whole_encoder.prompt(conversation)
    return Look(
        title,
        fate,
        tokens_of(sample, words),
        tuple(run.text for run in explain(sample, words.tokenizer) if run.learned),
        decode(prompt, words.tokenizer),
        len(prompt),
        prompt == whole.input_ids[: len(prompt)],
    )


def _within_limit(
    whole: Sample, number: int, row: Row, source: Source, data: Data, words: Words
) -> tuple[Sample, str]:
    assert not isinstance(row, BadRow)
    try:
        (outcome,) = make_encoder(data, words).encode([row], source.settings.format)
    except OverlongError:
        return whole, f"refused: {explain_length(whole, data.max_length)} (data.overlong: error)"
    if isinstance(outcome, Dropped):
        return whole, f"left out ({outcome.reason}): {explain_length(whole, data.max_length)}"
    assert isinstance(outcome, Sample), outcome
    if outcome.truncated:
        return outcome, f"cut: {explain_length(whole, data.max_length)}"
    return outcome, ""


def _broken(problem: BadRow, data: Data) -> str:
    what = "stops the run" if data.on_bad_row == "error" else "is left out"
    return f"broken ({problem.reason}): {problem} (data.on_bad_row: {data.on_bad_row}: it {what})"


def explain_length(whole: Sample, max_length: int) -> str:
    """Say how a row's length compares with data.max_length, and what that does to its answer."""
    lost, learned = sum(whole.learned[max_length:]), sum(whole.learned)
    text = f"it has {len(whole.input_ids):,} tokens and data.max_length is {max_length:,}"
    if lost == learned:
        return f"{text}; the first learned token is number {whole.learned.index(True) + 1:,}"
    return f"{text}; {lost:,} of {learned:,} learned tokens lie behind it"


def tokens_of(sample: Sample, words: Words) -> tuple[Token, ...]:
    """Return a sample's tokens with their texts, which read as the whole when put together."""
    special = control_tokens(words.tokenizer) | words.template.end_tokens
    texts = texts_of(sample.input_ids, words.tokenizer)
    names = words.tokenizer.convert_ids_to_tokens(list(sample.input_ids))
    return tuple(
        Token(number, text, learned, name in special)
        for number, text, learned, name in zip(
            sample.input_ids, texts, sample.learned, names, strict=True
        )
    )


# ---- on a terminal ---------------------------------------------------------------------------


def uses_colour(console: Console) -> bool:
    """Tell whether colours reach the reader; where they do not, brackets mark what is learned."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def legend(console: Console) -> Text:
    """Explain how learned and ignored tokens are told apart."""
    if uses_colour(console):
        return Text.assemble(("learned", LEARNED), "  ", ("only read", READ), "  ",
                             ("control token", CONTROL))  # fmt: skip
    return Text("⟦learned⟧  only read")


def show_look(console: Console, look: Look, *, short: bool = False, table: bool = False) -> None:
    """Print a row; `short` leaves out the middle of long runs and all but the mask."""
    console.print()
    console.print(Text(look.title, HEADING), soft_wrap=True)
    if look.fate:
        console.print(Text(look.fate, "yellow"), soft_wrap=True)
    if not look.tokens:
        return
    learned = sum(token.learned for token in look.tokens)
    share = f"{learned / len(look.tokens):.0%}"
    console.print(f"{len(look.tokens):,} tokens, {learned:,} learned ({share})", highlight=False)
    if short:
        console.print(mask_text(look.tokens, console, elide=True), soft_wrap=True)
        return
    _section(console, "What the model sees", legend(console))
    console.print(mask_text(look.tokens, console), soft_wrap=True)
    answers = "answer" if len(look.answers) == 1 else f"{len(look.answers)} answers"
    _section(console, "What it must produce", Text(answers))
    for answer in look.answers:
        console.print(Text(show_end(answer), LEARNED), soft_wrap=True)
    _section(console, "What generation starts from", Text(f"{look.prompt_tokens:,} tokens, ")
             + _agreement(look))  # fmt: skip
    console.print(Text(show_end(look.prompt)), soft_wrap=True)
    if table:
        console.print()
        console.print(token_table(look.tokens))


def _agreement(look: Look) -> Text:
    if not look.prompt_agrees:
        return Text("NOT what training shows before the answer", "bold red")
    if look.prompt_tokens > len(look.tokens):
        return Text("of which training sees only the first part", "yellow")
    return Text("the same ids as in training")


def _section(console: Console, title: str, note: Text) -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), "  [", note, "]"), soft_wrap=True)


def mask_text(tokens: Sequence[Token], console: Console, *, elide: bool = False) -> Text:
    """Return the decoded text with learned tokens marked: by colour, else by brackets."""
    colour = uses_colour(console)
    text = Text()
    for learned, run in groupby(tokens, key=lambda token: token.learned):
        style = LEARNED if learned else READ
        if learned and not colour:
            text.append("⟦")
        for piece, control in _pieces(list(run), elide=elide):
            text.append(piece, f"{style} {CONTROL}" if control else style)
        if learned and not colour:
            text.append("⟧")
    return text


def _pieces(run: list[Token], *, elide: bool) -> Iterator[tuple[str, bool]]:
    """Yield (text, is a control token) of a run; the borders of a mask are what matters in it."""
    half = ELIDE_OVER // 2
    left_out = len(run) - 2 * half
    if elide and left_out > 0:
        yield from _pieces(run[:half], elide=False)
        yield f" [... {left_out:,} tokens ...] ", False
        yield from _pieces(run[-half:], elide=False)
        return
    for control, group in groupby(run, key=lambda token: token.control):
        yield "".join(token.text for token in group), control


def show_end(text: str) -> str:
    """Make white space at the end of a text visible: it decides how an answer begins."""
    body = text.rstrip()
    end = text[len(body) :]
    return body + end.replace(" ", "␣").replace("\t", "⇥").replace("\n", "↵\n").removesuffix("\n")


def token_table(tokens: Sequence[Token]) -> Table:
    """Return a table with one line per token."""
    table = Table("position", "id", "text", "learned", box=None, header_style="bold")
    for position, token in enumerate(tokens):
        text = Text(repr(token.text)[1:-1] if token.text else "(part of the next character)")
        table.add_row(
            str(position), str(token.id), text, "learned" if token.learned else "",
            style=LEARNED if token.learned else READ,
        )  # fmt: skip
    return table
