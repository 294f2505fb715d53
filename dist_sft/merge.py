"""All parts of a generation run, in the order of their rows, as one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_sft import output_file, runs
from dist_sft.digests import sha256
from dist_sft.errors import UserError
from dist_sft.inputs import Inputs
from dist_sft.once import sync
from dist_sft.parts import DamagedPart, Plan, Tally, finished, read_part
from dist_sft.row_fields import BadRow

COLUMNS = {
    "row": "int64",
    "sample": "int64",
    "generated": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "generated_tokens": "int64",
    "prompt_truncated": "bool",
    "error": "string",
}
"""What the output has beside the input's columns, and its type in Parquet; `error` where there is
one."""
ROWS_AT_ONCE = 2**16  # of a row group in Parquet; each costs room in the footer

Beat = Callable[[str], None]


class Damaged(RuntimeError):
    """Report parts that are not what was written."""

    def __init__(self, problems: list[DamagedPart]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def merge(
    run_dir: Path, attempt: int, plan: Plan, inputs: Inputs, output: Path, beat: Beat
) -> Tally:
    """Write the output file; return what became of all rows.

    Memory is bounded by a row group. A file that this run has not made is never replaced. Raises
    Damaged, SupersededError where a newer attempt works on the run, and UserError where the output
    cannot be written.
    """
    missing = plan.parts - len(finished(run_dir))
    if missing:
        raise RuntimeError(f"{missing} of {plan.parts} parts are missing")
    total, damaged = Tally(), list[DamagedPart]()

    def parts() -> Iterator[bytes]:
        for part in range(plan.parts):
            beat("merging")
            try:
                lines, tally = read_part(run_dir, plan, part)
            except DamagedPart as problem:
                damaged.append(problem)
                continue
            total.add(tally)
            if not damaged:  # or the file counts for nothing
                yield lines

    temporary = output.with_name(f".{output.name}.{run_dir.name}.{attempt}.tmp")
    try:
        made = output_file.made(run_dir, output)
        for left in output.parent.glob(f".{output.name}.{run_dir.name}.*.tmp"):
            left.unlink()  # by an attempt that was killed
        if output.suffix.lower() == ".parquet":
            _write_parquet(parts(), temporary, inputs, beat)
        else:
            with open(temporary, "wb") as file:
                file.writelines(parts())
        if damaged:
            raise Damaged(damaged)
        if (total.rows, total.lines) != (plan.rows, plan.rows * plan.samples):
            raise RuntimeError(f"parts have {total.rows} rows, and the input has {plan.rows}")
        beat("merging")
        sync(temporary)
        next_one = {"size": temporary.stat().st_size, "sha256": sha256(temporary)}
        beat("merging")
        runs.check_newest(run_dir, attempt)
        output_file.tell(run_dir, [*made, next_one])
        output_file.give_name(run_dir, temporary, output)
    except OSError as error:
        raise UserError(
            f"output.path={output}: cannot be written: {error.strerror or error}; finished rows "
            "stay, and the same command goes on"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return total


# ---- Parquet -----------------------------------------------------------------------------------


def check_columns(inputs: Inputs, beat: Beat) -> None:
    """Raise UserError where the input's columns do not fit into a Parquet file."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(inputs, beat)
    try:
        pq.write_table(schema.empty_table(), io.BytesIO())
    except pa.ArrowException as error:
        raise UserError(
            f"output.path: the input's columns do not fit into a Parquet file: {error}. Give an "
            "output.path that ends in .jsonl"
        ) from None


def _schema(inputs: Inputs, beat: Beat) -> Any:
    """Return the columns of the output: those of the input, and what is added."""
    import pyarrow as pa

    found = pa.schema([])
    for start in range(0, len(inputs), ROWS_AT_ONCE):
        beat("merging")
        rows = inputs.read(range(start, min(len(inputs), start + ROWS_AT_ONCE)))
        try:
            table = _table([row for row in rows if not isinstance(row, BadRow)])
            found = pa.unify_schemas([found, table.schema], promote_options="permissive")
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise UserError(
                f"output.path: rows {start} to {start + len(rows) - 1} do not fit into the columns "
                f"of a Parquet file: {error}. Give an output.path that ends in .jsonl"
            ) from None
    return pa.schema([*found, *(pa.field(name, kind) for name, kind in COLUMNS.items())])


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a table; each column that any of them has."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _write_parquet(parts: Iterable[bytes], path: Path, inputs: Inputs, beat: Beat) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(inputs, beat)
    waiting: list[dict[str, Any]] = []
    try:
        with pq.ParquetWriter(path, schema) as writer:
            for lines in parts:
                waiting += map(json.loads, lines.splitlines())
                if len(waiting) >= ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise UserError(
            f"output.path: answers do not fit into a Parquet file: {error}. Give an output.path "
            "that ends in .jsonl: finished rows stay"
        ) from None
