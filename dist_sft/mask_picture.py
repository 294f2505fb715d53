"""Draw the mask of one sample as a picture: a bar for every token, high and green where learned.

The tokens run like a text, each bar as wide as its label. Fonts are looked for character by
character, as no font that comes with matplotlib has Chinese in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager, get_font
from matplotlib.patches import Patch, Rectangle

from dist_sft.inspect import Token

MAX_TOKENS = 1200
LINE_COLUMNS = 110.0
"""Width of a line of bars; one column is a Latin letter of the label font."""
LINE_HEIGHT = 3.4
GAP = 0.35
LEARNED_HEIGHT, READ_HEIGHT = 1.0, 0.3
MAX_LABEL = 28
INCHES_PER_COLUMN = 0.105
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


class Placed(NamedTuple):
    """A token with its label and its place, in columns and lines."""

    token: Token
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
    fonts = find_fonts({*title, *(c for token in shown for c in _visible(token.text))})
    if fonts.missing:
        notes.append(_advice(fonts.missing))
    learned = sum(token.learned for token in tokens)
    subtitle = f"{len(tokens):,} tokens, {learned:,} learned ({learned / len(tokens):.0%})"
    figure = _figure(place(shown, fonts.missing), label_of(title, fonts.missing), subtitle, fonts)
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
            fontManager.addfont(file)
            families.append(fontManager.ttflist[-1].name)
            missing -= found
        if not missing:
            break
    return Fonts(tuple(families), frozenset(missing))


def _preference(file: str) -> tuple[int, str]:
    name = Path(file).name
    return next((i for i, p in enumerate(PREFERRED) if name.startswith(p)), len(PREFERRED)), file


def _covered(file: str, characters: Iterable[str]) -> set[str]:
    try:
        font = get_font(file)
    except RuntimeError:  # not every installed font is one that FreeType can draw
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


def _visible(text: str) -> str:
    return text.translate(VISIBLE)


def label_of(text: str, missing: Collection[str]) -> str:
    """Return a label that can be drawn: white space as signs, what no font has as code points."""
    parts = [c if c.isprintable() and c not in missing else f"<{ord(c):X}>" for c in _visible(text)]
    label = "".join(parts)
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def columns(label: str) -> float:
    """Return the width of a label in columns."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in label)
    return len(label) - wide + wide * WIDE


def place(tokens: Sequence[Token], missing: Collection[str] = ()) -> list[Placed]:
    """Put the tokens one after another, and go on in the next line where one is full."""
    placed = []
    left, line = 0.0, 0
    for token in tokens:
        label = label_of(token.text, missing)
        width = max(1.0, columns(label))
        if left and left + width > LINE_COLUMNS:
            left, line = 0.0, line + 1
        placed.append(Placed(token, label, left, width, line))
        left += width + GAP
    return placed


# ---- drawing ---------------------------------------------------------------------------------


def _figure(placed: Sequence[Placed], title: str, subtitle: str, fonts: Fonts) -> Figure:
    lines = placed[-1].line + 1
    margin = 2.0
    total_columns, total_height = LINE_COLUMNS + 2 * margin, lines * LINE_HEIGHT + 6.0
    inches_per_row = INCHES_PER_COLUMN * 1.5
    figure = Figure(figsize=(total_columns * INCHES_PER_COLUMN, total_height * inches_per_row))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-margin, LINE_COLUMNS + margin)
    axes.set_ylim(total_height, 0.0)
    axes.set_axis_off()
    style: dict[str, Any] = {"family": list(fonts.families), "parse_math": False}
    axes.text(0, 2.0, title, fontsize=14, weight="bold", color="#222222", **style)
    axes.text(0, 3.5, subtitle, fontsize=FONT_POINTS, color=DARK_GREY, **style)
    axes.legend(
        handles=[
            Patch(facecolor=GREEN, label="learned: the model must produce it"),
            Patch(facecolor=GREY, label="only read"),
            Patch(facecolor="white", edgecolor=DARK_GREY, label="outlined: control token"),
        ],
        loc="upper right",
        bbox_to_anchor=(LINE_COLUMNS, 0.6),
        bbox_transform=axes.transData,
        borderaxespad=0,
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )
    for item in placed:
        _draw_token(axes, item, 5.2 + item.line * LINE_HEIGHT, style)
    return figure


def _draw_token(axes: Axes, item: Placed, top: float, style: dict[str, Any]) -> None:
    learned = item.token.learned
    height = LEARNED_HEIGHT if learned else READ_HEIGHT
    base = top + LEARNED_HEIGHT
    axes.add_patch(
        Rectangle(
            (item.left, base - height),
            item.width,
            height,
            facecolor=GREEN if learned else GREY,
            edgecolor=DARK_GREEN if item.token.control else "none",
            linewidth=1.3,
        )
    )
    axes.text(
        item.left + item.width / 2,
        base + 0.35,
        item.label,
        ha="center",
        va="top",
        fontsize=FONT_POINTS,
        color=DARK_GREEN if learned else DARK_GREY,
        **style,
    )
