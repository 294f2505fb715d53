"""Read a JSON array of any size element by element; say line and column of a mistake.

The standard library's decoder, run over a window of text that slides along the file. So a 10 GB
array needs the memory of a few of its elements, where `json.load` needs several times 10 GB.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from dist_sft.errors import UserError

PIECE_BYTES = 1 << 20
# What the decoder finds this close to the end of the window may change when the text goes on: "0."
# is a zero and a mistake, and the beginning of "0.5"; "-Infinit" is longest.
EDGE_CHARS = 16
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_array(file: Path, blame: str) -> Iterator[tuple[int, object]]:
    """Yield (line from 1, element) for the elements of the one array that `file` holds.

    Raises UserError, beginning with `blame`, where the file is not UTF-8 or not one JSON array.
    """
    window = _Window(file, blame)
    if window.next_char() == "":
        return
    window.expect("[")
    if window.next_char() == "]":
        window.expect("]")
    else:
        separator = ","
        while separator == ",":
            window.next_char()
            yield window.line(), window.value()
            separator = window.expect(",]")
    if window.next_char():
        raise window.error("text after the end of the array")


def json_problem(error: Exception, line: int, column: int) -> str:
    """Say what is wrong with JSON text, and where."""
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return f"broken JSON at line {line}, column {column}: {what}"


def not_utf8(line: int, offset: int) -> str:
    """Say where the first byte is that is not UTF-8."""
    return (
        f"not UTF-8 at line {line} (byte {offset} of the file); convert the file, for example with "
        f"iconv -f GB18030 -t UTF-8"
    )


class _Window:
    """Hold the part of the text around the next element, and where in the file it is."""

    def __init__(self, file: Path, blame: str) -> None:
        self._blame = blame
        self._pieces = _decoded(file, blame)
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        # A place whose line and column are known, so that no text before it is counted again.
        self._marked = 0
        self._mark = (1, 1)

    def line(self) -> int:
        self._mark, self._marked = self._place(self._at), self._at
        return self._mark[0]

    def next_char(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end."""
        while True:
            space = WHITE_SPACE.match(self._text, self._at)
            assert space is not None, "it matches nothing, too"
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def expect(self, allowed: str) -> str:
        found = self.next_char()
        if found == "" or found not in allowed:
            raise self.error(f"expected {' or '.join(allowed)}, found {found or 'the end'}")
        self._at += 1
        return found

    def value(self) -> object:
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = "Unterminated string" in error.msg or len(self._text) - error.pos < EDGE_CHARS
                if not (cut and self._grow()):
                    line, column = self._place(error.pos)
                    raise UserError(
                        f"{self._blame}: {json_problem(error, line, column)}"
                    ) from error
            except (ValueError, RecursionError) as error:  # a number or a nesting beyond all limits
                line, column = self._place(self._at)
                raise UserError(f"{self._blame}: {json_problem(error, line, column)}") from error
            else:
                if len(self._text) - end >= EDGE_CHARS or not self._grow():
                    self._at = end
                    return value

    def error(self, what: str) -> UserError:
        line, column = self._place(self._at)
        return UserError(f"{self._blame}: {json_problem(ValueError(what), line, column)}")

    def _place(self, at: int) -> tuple[int, int]:
        line, column = self._mark
        newlines = self._text.count("\n", self._marked, at)
        if newlines:
            return line + newlines, at - self._text.rfind("\n", self._marked, at)
        return line, column + at - self._marked

    def _grow(self) -> bool:
        """Drop what was read and double the rest, so that one huge element costs linear time."""
        rest = self._text[self._at :]
        pieces = [rest]
        num_chars = len(rest)
        for piece in self._pieces:
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars >= 2 * len(rest):
                break
        if len(pieces) == 1:
            return False
        self._mark = self._place(self._at)
        self._text, self._at, self._marked = "".join(pieces), 0, 0
        return True


def _decoded(file: Path, blame: str) -> Iterator[str]:
    """Yield the text of `file` in pieces, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = lines = 0
    with file.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            offset = len(codecs.BOM_UTF8)
        else:
            stream.seek(0)
        while True:
            raw = stream.read(PIECE_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                lines += error.object.count(b"\n", 0, error.start)
                bad_byte = offset - pending + error.start
                raise UserError(f"{blame}: {not_utf8(lines + 1, bad_byte)}") from error
            if not raw:
                return
            offset += len(raw)
            lines += text.count("\n")
            yield text
