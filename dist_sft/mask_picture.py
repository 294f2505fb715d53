"""Draw the mask of one sample as a picture: a bar for every token, high and green where learned.

The tokens run like a text, each bar as wide as its label. Fonts are looked for by the characters
that they have, as no font that comes with matplotlib has Chinese in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager, get_font
from matplotlib.patches import Patch, Rectangle

from dist_sft.look import Token

MAX_TOKENS = 1200
MAX_LABEL = 28

# Lengths are in columns (a Latin letter of the label font) and in rows of one and a half of them.
INCHES_PER_COLUMN, INCHES_PER_ROW = 0.105, 0.1575
LINE_COLUMNS = 110.0
MARGIN, HEAD = 2.0, 5.4
LINE_HEIGHT = 3.5
GAP, SMALL_GAP = 0.4, 0.12
"""Between pieces of text, and between the tokens of one character."""
MIN_BAR = 0.6
LEARNED_HEIGHT, READ_HEIGHT = 1.0, 0.3
LABEL_BELOW = 1.25
FONT_POINTS = 11.0
LATIN_FONT = "DejaVu Sans Mono"  # comes with matplotlib
# Wide characters are a whole em, and the Latin letters of this font 0.602 of it.
WIDE = 1 / 0.602
PREFERRED = ("NotoSansCJK", "NotoSansSC", "SourceHanSans", "wqy", "DroidSansFallback", "Noto")

GREEN, DARK_GREEN, GREY, DARK_GREY = "#2a9d6f", "#14573c", "#c9ced6", "#5b6472"
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})


class Fonts(NamedTuple):
    """Font families to be tried in turn, and the characters that none of them has."""

    families: tuple[str, ...]
    missing: frozenset[str]


class Cell(NamedTuple):
    """A piece of text with the bars of its tokens, and its place in columns and lines.

    It has several tokens where a character is spread over them.
    """

    tokens: tuple[Token, ...]
    label: str
    left: float
    width: float
    line: int


def draw(tokens: Sequence[Token], title: str, path: Path) -> list[str]:
    """Write a PNG; return what a person should know about it: missing fonts, tokens left out."""
    notes = []
    shown = tokens[:MAX_TOKENS]
    if len(shown) < len(tokens):
        notes.append(f"the picture shows the first {len(shown):,} of {len(tokens):,} tokens")
    fonts = find_fonts({*title, *(c for token in shown for c in token.text.translate(VISIBLE))})
    if fonts.missing:
        notes.append(_advice(fonts.missing))
    learned = sum(token.learned for token in tokens)
    subtitle = f"{len(tokens):,} tokens, {learned:,} learned ({learned / len(tokens):.0%})"
    title = drawable(title, fonts.missing)
    figure = _figure(place(shown, fonts.missing), title, subtitle, fonts)
    figure.savefig(path, dpi=150, facecolor="white")
    return notes


# ---- fonts -----------------------------------------------------------------------------------


def find_fonts(characters: Collection[str]) -> Fonts:
    """Find installed fonts that together have as many of the characters as possible."""
    families = [LATIN_FONT]
    missing = {c for c in characters if c.isprintable()} - _covered(
        fontManager.findfont(LATIN_FONT), characters
    )
    # Not matplotlib's own list: it is cached and does not know a font installed a minute ago.
    files = sorted(findSystemFonts(), key=_preference) if missing else []
    for file in files:
        found = _covered(file, missing)
        if found:
            known = len(fontManager.ttflist)
            fontManager.addfont(file)
            families.append(fontManager.ttflist[known].name)  # a collection adds several
            missing -= found
        if not missing:
            break
    return Fonts(tuple(families), frozenset(missing))


def _preference(file: str) -> tuple[int, bool, str]:
    name = Path(file).name
    rank = next((i for i, p in enumerate(PREFERRED) if name.startswith(p)), len(PREFERRED))
    return rank, "Regular" not in name, file


def _covered(file: str, characters: Iterable[str]) -> set[str]:
    try:
        font = get_font(file)
    except (OSError, RuntimeError):  # not every installed font can be read and drawn
        return set()
    if not font.scalable:
        return set()
    return {c for c in characters if font.get_char_index(ord(c))}


def _advice(missing: Collection[str]) -> str:
    sample = " ".join(sorted(missing)[:5])
    return (
        f"no installed font has {len(missing)} of the characters ({sample}): the picture shows "
        "their code points. For Chinese, Japanese and Korean install a font, for example "
        "apt-get install fonts-noto-cjk (or the smaller fonts-wqy-microhei)"
    )


# ---- labels and places -----------------------------------------------------------------------


def label_of(text: str, missing: Collection[str]) -> str:
    """Return the label of a piece of text, with signs for white space."""
    label = drawable(text.translate(VISIBLE), missing)
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def drawable(text: str, missing: Collection[str]) -> str:
    """Write characters that cannot be drawn as their code points."""
    return "".join(c if c.isprintable() and c not in missing else f"<U+{ord(c):04X}>" for c in text)


def columns(label: str) -> float:
    """Return the width of a label in columns."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in label)
    return len(label) - wide + wide * WIDE


def place(tokens: Sequence[Token], missing: Collection[str] = ()) -> list[Cell]:
    """Put the tokens one after another, and go on in the next line where one is full."""
    cells: list[Cell] = []
    left, line = 0.0, 0
    for group in _characters(tokens):
        label = label_of(group[-1].text, missing)
        width = max(MIN_BAR * len(group), columns(label))
        if left and left + width > LINE_COLUMNS:
            left, line = 0.0, line + 1
        cells.append(Cell(group, label, left, width, line))
        left += width + GAP
    return cells


def _characters(tokens: Sequence[Token]) -> Iterator[tuple[Token, ...]]:
    """Group the tokens that make up one character, whose text stands at the last of them."""
    group: list[Token] = []
    for token in tokens:
        group.append(token)
        if token.text:
            yield tuple(group)
            group = []
    if group:  # cut in the middle of a character
        yield tuple(group)


# ---- drawing ---------------------------------------------------------------------------------


def _figure(cells: Sequence[Cell], title: str, subtitle: str, fonts: Fonts) -> Figure:
    width = LINE_COLUMNS + 2 * MARGIN
    height = HEAD + (cells[-1].line + 1) * LINE_HEIGHT
    figure = Figure(figsize=(width * INCHES_PER_COLUMN, height * INCHES_PER_ROW))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-MARGIN, LINE_COLUMNS + MARGIN)
    axes.set_ylim(height, 0.0)
    axes.set_axis_off()
    # Without parse_math=False two dollar signs in a row's text would start a formula.
    style: dict[str, Any] = {"family": list(fonts.families), "parse_math": False}
    axes.text(0, 2.2, title, fontsize=14, color="#222222", **style)
    axes.text(0, 3.7, subtitle, fontsize=FONT_POINTS, color=DARK_GREY, **style)
    axes.legend(
        handles=[
            Patch(facecolor=GREEN, label="learned: the model must produce it"),
            Patch(facecolor=GREY, label="only read"),
            Patch(facecolor="white", edgecolor=DARK_GREY, label="outlined: control token"),
        ],
        loc="lower right",
        bbox_to_anchor=(LINE_COLUMNS, 3.9),
        bbox_transform=axes.transData,
        borderaxespad=0,
        borderpad=0,
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )
    for cell in cells:
        _draw_cell(axes, cell, HEAD + cell.line * LINE_HEIGHT, style)
    return figure


def _draw_cell(axes: Axes, cell: Cell, top: float, style: dict[str, Any]) -> None:
    step = (cell.width + SMALL_GAP) / len(cell.tokens)
    base = top + LEARNED_HEIGHT
    for number, token in enumerate(cell.tokens):
        height = LEARNED_HEIGHT if token.learned else READ_HEIGHT
        corner = (cell.left + number * step, base - height)
        color, edge = (GREEN, DARK_GREEN) if token.learned else (GREY, DARK_GREY)
        outline = edge if token.control else "none"
        axes.add_patch(
            Rectangle(
                corner, step - SMALL_GAP, height, facecolor=color, edgecolor=outline, linewidth=1.3
            )
        )
    axes.text(
        cell.left + cell.width / 2,
        base + LABEL_BELOW,
        cell.label,
        ha="center",
        va="baseline",
        fontsize=FONT_POINTS,
        color=DARK_GREEN if cell.tokens[-1].learned else DARK_GREY,
        **style,
    )
