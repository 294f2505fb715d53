"""Read the fields of a row, each one checked; what is wrong is refused as a `BadRow`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

COLUMNS = (
    "instruction/input/output (alpaca), messages (messages), conversations (sharegpt), "
    "prompt/completion (prompt_completion)"
)


class BadRow(ValueError):
    """Say what is wrong with one row; `reason` is a short stable slug to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def refuse(row: Mapping[str, Any], reason: str, problem: str) -> NoReturn:
    """Raise `BadRow`: the row, named by its columns, and what is wrong with it."""
    raise BadRow(reason, f"the row with columns {', '.join(map(str, row))} {problem}")


def is_absent(value: object) -> bool:
    """Tell whether a table's cell is empty: CSV and Parquet readers give None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def has(row: Mapping[str, Any], key: str) -> bool:
    """Tell whether the row has something in this column."""
    return not is_absent(row.get(key))


def read_text(row: Mapping[str, Any], key: str, *, required: bool = True) -> str:
    """Return the text of a column, "" where an optional one is absent. Raises `BadRow`."""
    value = row.get(key)
    if is_absent(value):
        if required:
            refuse(row, "wrong_columns", f"has no {key!r}; allowed columns: {COLUMNS}")
        return ""
    if not isinstance(value, str):
        refuse(row, "not_text", f"has {key} = {shorten(value)}, which is not text")
    return check_text(row, key, value)


def read_turns(row: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return the turns in a column, at least one, themselves unchecked. Raises `BadRow`."""
    values = read_optional_turns(row, key)
    if not values:
        refuse(row, "wrong_columns", f"has no turns in {key!r}; allowed columns: {COLUMNS}")
    return values


def read_optional_turns(row: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return the turns in a column, which may be written as JSON text, or none. Raises `BadRow`."""
    value = row.get(key)
    if is_absent(value):
        return ()
    if isinstance(value, str):
        value = decode_json(row, value, key)
    if not isinstance(value, Sequence):
        refuse(row, "bad_turns", f"has {key} = {shorten(value)}; allowed: a list of turns")
    return value


def decode_json(row: Mapping[str, Any], value: object, what: str) -> object:
    """Decode a value that is written as JSON text; return any other as it is. Raises `BadRow`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        refuse(row, "bad_json", f"has a {what} that is not JSON ({error}): {shorten(value)}")


def check_text(row: Mapping[str, Any], key: str, text: str) -> str:
    """Return the text; refuse halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse(row, "invalid_unicode", f"has {key} that is not valid Unicode ({error.reason})")
    return text


def shorten(value: object) -> str:
    """Quote a value for a message, in 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
