"""All parts of a generation run, in the order of their rows, as one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_sft import runs
from dist_sft.digests import sha256
from dist_sft.errors import UserError
from dist_sft.inputs import Inputs
from dist_sft.once import sync
from dist_sft.parts import Plan, Tally, finished, read_part
from dist_sft.row_fields import BadRow

FILE = "output.json"
"""Says, from before it gets its name, which file this run has made: {path, size, sha256}."""
SCHEMA_ROWS = 4096


def merge(
    run_dir: Path, plan: Plan, inputs: Inputs, output: Path, beat: Callable[[str], None]
) -> Tally:
    """Write the output file; return what became of all rows.

    Memory is bounded by a part. A file that this run has not made is never replaced. Raises
    DamagedPart, and UserError where the output cannot be written.
    """
    missing = plan.parts - len(finished(run_dir))
    if missing:
        raise RuntimeError(f"{missing} of {plan.parts} parts are missing")
    total = Tally()

    def parts() -> Iterator[bytes]:
        for part in range(plan.parts):
            beat("merging")
            lines, tally = read_part(run_dir, plan, part)
            total.add(tally)
            yield lines

    temporary = output.with_name(f".{output.name}.{run_dir.name}.tmp")
    try:
        refuse_strange(run_dir, output)
        if output.suffix.lower() == ".parquet":
            _write_parquet(parts(), temporary, inputs, output)
        else:
            with open(temporary, "wb") as file:
                file.writelines(parts())
        if (total.rows, total.lines) != (plan.rows, plan.rows * plan.samples):
            raise RuntimeError(f"parts have {total.rows} rows, and the input has {plan.rows}")
        sync(temporary)
        told = {"size": temporary.stat().st_size, "sha256": sha256(temporary)}
        content = json.dumps({"path": str(output.absolute()), **told})
        runs.write_atomically(run_dir / FILE, content + "\n")
        temporary.rename(output)
        sync(output.absolute().parent)
    except OSError as error:
        raise UserError(f"output.path={output}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return total


def refuse_strange(run_dir: Path, output: Path) -> None:
    """Raise UserError where the output cannot be, or is a file that this run did not make."""
    if output.is_dir():
        raise UserError(f"output.path={output}: this is a folder; give the name of a file in it")
    if not output.exists():
        return
    try:
        told = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    if told.get("size") != output.stat().st_size or told["sha256"] != sha256(output):
        raise UserError(
            f"output.path={output}: there is a file that this run did not make; remove it, or give "
            "another path"
        )


def check_columns(inputs: Inputs) -> None:
    """Raise UserError where the input's columns do not fit into a Parquet file."""
    _schema(inputs)


def _schema(inputs: Inputs) -> Any:
    """Return the columns of the output: those of the input, and what is added."""
    import pyarrow as pa

    found = pa.schema([])
    for start in range(0, len(inputs), SCHEMA_ROWS):
        rows = inputs.read(range(start, min(len(inputs), start + SCHEMA_ROWS)))
        try:
            table = _table([row for row in rows if not isinstance(row, BadRow)])
            found = pa.unify_schemas([found, table.schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(
                f"output.path: rows {start} to {start + len(rows) - 1} do not fit into the columns "
                f"of a Parquet file: {error}. Give an output.path that ends in .jsonl"
            ) from None
    added = [
        ("row", pa.int64()),
        ("sample", pa.int64()),
        ("generated", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("generated_tokens", pa.int64()),
        ("prompt_truncated", pa.bool_()),
        ("error", pa.string()),
    ]
    return pa.schema([*found, *(pa.field(name, kind) for name, kind in added)])


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a table; each column that any of them has."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _write_parquet(parts: Iterable[bytes], path: Path, inputs: Inputs, output: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(inputs)
    try:
        with pq.ParquetWriter(path, schema) as writer:
            for lines in parts:
                rows = [json.loads(line) for line in lines.splitlines()]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    except pa.ArrowException as error:
        raise UserError(
            f"output.path={output}: cannot be written as Parquet: {error}. Give an output.path "
            "that ends in .jsonl: finished rows stay"
        ) from None
