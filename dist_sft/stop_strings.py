"""Where answers end by what they say: stop strings, wherever the borders between tokens are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN = 8  # tokens before the longest stop string that are decoded with it
BROKEN = "\ufffd"  # what bytes are shown as that are no character, or none yet


class StopStrings:
    """Look for the first of some strings in a text that comes token by token.

    `text_of` makes text of ids.
    """

    def __init__(self, strings: Sequence[str], text_of: Callable[[list[int]], str]) -> None:
        assert all(strings), "an empty string is everywhere"
        self._strings = strings
        self._text_of = text_of
        self._longest = max((len(string.encode()) for string in strings), default=0)

    def cut(self, ids: list[int]) -> str | None:
        """Return the text before the first stop string, or None where there is none yet."""
        if not self._strings:
            return None
        # A token is at least a byte, mostly. The newest ones tell whether a string has come, unless
        # they begin within a character, or are tokens without text.
        tail = self._text_of(ids[-self._longest - MARGIN :])
        whole = BROKEN not in tail and len(tail.encode()) >= self._longest
        if whole and not any(string in tail for string in self._strings):
            return None
        text = self._text_of(ids)
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        return text[: min(places)] if places else None

    def sure(self, text: str) -> str:
        """Leave out a last character that is not whole yet, and what may begin a stop string."""
        text = text.rstrip(BROKEN)
        starts = (string[:n] for string in self._strings for n in range(1, len(string)))
        return text[: len(text) - max((len(x) for x in starts if text.endswith(x)), default=0)]
