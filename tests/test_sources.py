"""Every kind of source gives the same rows, and every mistake in one a message to act on."""

import csv
import json
import subprocess
import sys
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_sft import json_array
from dist_sft.chat import BadRow
from dist_sft.errors import UserError
from dist_sft.sources import content_hash, open_source

ROWS = [
    {"instruction": "Add.", "input": "2 + 3", "output": "5"},
    {"instruction": "翻译", "input": "", "output": 'a "quoted", two\nline answer'},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]


def read(path, **options):
    batches = open_source(str(path), **options).batches(2)
    return [row for batch in batches for row in batch.rows]


def problem(path, **options):
    with pytest.raises(UserError) as caught:
        read(path, **options)
    return str(caught.value)


def write_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)


WRITERS = {
    "rows.json": write_json,
    "ROWS.JSON": write_json,
    "lines.json": write_jsonl,
    "rows.jsonl": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["rows.json", "lines.json", "rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert read(tmp_path / name) == ROWS


def test_batches_number_their_rows(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    batches = list(open_source(str(tmp_path / "rows.jsonl")).batches(2))
    assert [(batch.first_row, len(batch.rows)) for batch in batches] == [(0, 2), (2, 1)]


def test_a_saved_dataset_dict_is_read_by_split(tmp_path):
    parts = {"train": ROWS, "test": ROWS[:1]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split="test") == ROWS[:1]
    text = problem(tmp_path / "saved", split="validation", key="data.eval.1")
    assert "data.eval.1.split=validation" in text
    assert "available: train, test" in text


def test_the_hub_is_asked_once_and_named_by_its_fingerprint(monkeypatch):
    asked = []
    dataset = datasets.Dataset.from_list(ROWS)

    def load_dataset(name, split):
        asked.append((name, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/name", split="train[:3]")
    assert [row for batch in source.batches(9) for row in batch.rows] == ROWS
    assert asked == [("owner/name", "train[:3]")]
    before = content_hash(source)
    dataset = datasets.Dataset.from_list(ROWS[:1])
    assert before == content_hash(source) != content_hash(open_source("owner/name"))


# ---- content ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "saved"])
def test_the_hash_follows_the_content_and_not_the_place(tmp_path, name):
    for folder, rows in {"a": ROWS, "b": ROWS, "c": ROWS[:2]}.items():
        (tmp_path / folder).mkdir()
        WRITERS[name](tmp_path / folder / name, rows)
    a, b, c = (content_hash(open_source(str(tmp_path / folder / name))) for folder in "abc")
    assert a == b != c


# ---- mistakes in a path ----------------------------------------------------------------------


def test_missing_file_is_told_with_near_matches(tmp_path):
    write_json(tmp_path / "alpaca_zh.json", ROWS)
    text = problem(tmp_path / "alpaca-zh.json", key="data.eval.0")
    assert "data.eval.0.path=" in text
    assert f"did you mean {tmp_path / 'alpaca_zh.json'}?" in text


def test_missing_file_without_near_matches(tmp_path):
    assert f"no such file (looked in {tmp_path})" in problem(tmp_path / "rows.json")
    assert "the folder nowhere does not exist" in problem("nowhere/rows.json")


def test_unknown_type_lists_what_is_allowed(tmp_path):
    (tmp_path / "rows.txt").write_text("hello")
    text = problem(tmp_path / "rows.txt")
    assert ".txt" in text
    assert ".json, .jsonl, .csv, .parquet" in text


def test_a_plain_file_has_no_splits(tmp_path):
    write_json(tmp_path / "rows.json", ROWS)
    assert "remove data.train.0.split" in problem(tmp_path / "rows.json", split="test")


def test_a_folder_that_is_no_saved_dataset(tmp_path):
    assert "not one written by Dataset.save_to_disk" in problem(tmp_path)


def test_a_saved_dataset_without_rows(tmp_path):
    datasets.Dataset.from_dict({"instruction": []}).save_to_disk(tmp_path / "saved")
    assert "the saved Dataset cannot be read" in problem(tmp_path / "saved")


def test_a_saved_dataset_that_is_broken(tmp_path):
    write_saved(tmp_path / "saved", ROWS)
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"nothing")
    assert "the saved Dataset cannot be read" in problem(tmp_path / "saved")


def test_an_unreachable_hub_names_the_way_out(tmp_path):
    # The real thing, in its own process: offline is decided when `datasets` is imported.
    code = (
        "import sys; from dist_sft.sources import open_source, UserError\n"
        "try: open_source('nobody/nothing')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "data.train.0.path=nobody/nothing: neither a local file or folder" in done.stdout
    assert "data.train.0.path=/path/to/file.jsonl" in done.stdout


def test_an_unknown_split_on_the_hub(monkeypatch):
    def load_dataset(name, split):
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = problem("owner/name", split="valid")
    assert "data.train.0.split=valid" in text
    assert "Should be one of ['train']" in text


# ---- mistakes in a file ----------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", " \n\n"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_an_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "rows" in problem(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet"])
def test_a_file_without_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    if name == "rows.json":
        (tmp_path / name).write_text("[ ]")
    elif name == "rows.csv":
        (tmp_path / name).write_text("instruction,output\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"instruction": []}), tmp_path / name)
    assert "holds no rows" in problem(tmp_path / name)


BROKEN_ARRAYS = {
    '[\n {"a": 1},\n {"a": oops}\n]': "line 3, column 8: Expecting value",
    '[\n {"a": 1}\n {"a": 2}\n]': "line 3, column 2: expected , or ], found {",
    '[\n {"a": 1},\n]': "line 3, column 1: Expecting value",
    '[\n {"a": 1},\n {"a": "x': "line 3, column 8: Unterminated string",
    '[\n {"a": 1}': "line 2, column 10: expected , or ], found the end",
    '[\n {"a": 1}]\n x': "line 3, column 2: text after the end",
    "oops": "line 1, column 1: expected [, found o",
    '[{"a": ' + "1" * 5000 + "}]": "line 1, column 2: Exceeds the limit",
    '[{"a": ' + "[" * 100_000 + "]": "line 1, column 2: ",
}


@pytest.mark.parametrize("content", BROKEN_ARRAYS, ids=range(len(BROKEN_ARRAYS)))
@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_broken_json_is_located(tmp_path, monkeypatch, content, piece_bytes):
    monkeypatch.setattr(json_array, "PIECE_BYTES", piece_bytes)
    (tmp_path / "rows.json").write_text(content)
    text = problem(tmp_path / "rows.json")
    assert f"rows.json: broken JSON at {BROKEN_ARRAYS[content]}" in text


def test_a_json_element_that_is_no_object_is_one_bad_row(tmp_path):
    (tmp_path / "rows.json").write_text('[{"a": 1},\n 12, "x",\n [1], null, true]')
    first, *others = read(tmp_path / "rows.json")
    assert first == {"a": 1}
    assert [str(row) for row in others] == [
        "line 2: a row must be an object {...}, not a number",
        "line 2: a row must be an object {...}, not a string",
        "line 3: a row must be an object {...}, not an array",
        "line 3: a row must be an object {...}, not null",
        "line 3: a row must be an object {...}, not a boolean",
    ]
    assert {row.reason for row in others} == {"not_an_object"}


def test_broken_lines_are_single_bad_rows(tmp_path):
    lines = [b'{"a": 1}', b"", b'{"a": }', b"[1]", b'{"a": "\xff"}', b'{"a": 2}\r', b"1" * 5000]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "rows.jsonl")
    assert rows[0] == {"a": 1}
    assert rows[4] == {"a": 2}
    bad = [row for row in rows if isinstance(row, BadRow)]
    reasons = ["broken_json", "not_an_object", "not_utf8", "broken_json"]
    assert [row.reason for row in bad] == reasons
    assert "line 3, column 7: Expecting value" in str(bad[0])
    assert "line 4: a row must be an object" in str(bad[1])
    assert "not UTF-8 at line 5 (byte 29 of the file)" in str(bad[2])
    assert "line 7, column 1: Exceeds the limit" in str(bad[3])


def test_an_array_named_jsonl(tmp_path):
    write_json(tmp_path / "rows.jsonl", ROWS)
    assert "rename it to .json" in problem(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("piece_bytes", [1, 5, 1 << 20])
def test_json_that_is_not_utf8_is_located(tmp_path, monkeypatch, piece_bytes, bom):
    monkeypatch.setattr(json_array, "PIECE_BYTES", piece_bytes)
    content = bom + '[{"a": "é"},\n {"a": "'.encode() + "翻".encode("gb18030") + b'"}]'
    (tmp_path / "rows.json").write_bytes(content)
    expected = f"not UTF-8 at line 2 (byte {22 + len(bom)} of the file)"
    assert expected in problem(tmp_path / "rows.json")


def test_csv_that_is_not_utf8_is_located(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"instruction,output\nhi,\xb7\xad\n")
    assert "not UTF-8 at line 2 (byte 22 of the file)" in problem(tmp_path / "rows.csv")


@pytest.mark.parametrize("line", ["What is 2 + 3?,5", "prompt,prompt", "instruction;output"])
def test_csv_without_a_header(tmp_path, line):
    (tmp_path / "rows.csv").write_text(f"{line}\nSay hi.,hi\n")
    text = problem(tmp_path / "rows.csv")
    assert "line 1 is not a header" in text
    assert "instruction, prompt, messages, conversations" in text


def test_csv_with_uneven_columns(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion\n"a\nb",c\n\nd\ne,f,g\n')
    good, short, long = read(tmp_path / "rows.csv")
    assert good == {"prompt": "a\nb", "completion": "c"}
    assert (short.reason, str(short)) == (
        "uneven_columns",
        "line 5: 1 columns, but the header has 2",
    )
    assert "line 6: 3 columns" in str(long)


def test_csv_with_an_open_quote(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion\na,b\nc,"d\ne,f\n')
    assert "broken CSV in the row that starts at line 3" in problem(tmp_path / "rows.csv")


def test_csv_cells_may_be_long(tmp_path):
    rows = [{"prompt": "a", "completion": "x" * 200_000}]
    write_csv(tmp_path / "rows.csv", rows)
    assert read(tmp_path / "rows.csv") == rows


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "rows.parquet").write_text("PAR1 but not really")
    assert "not a readable Parquet file" in problem(tmp_path / "rows.parquet")


# ---- the window over a JSON array ------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(json_values, max_size=8), st.integers(1, 50), st.booleans(), st.booleans())
def test_any_array_reads_like_json_loads(tmp_path_factory, values, piece_bytes, ascii_only, indent):
    file = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(values, ensure_ascii=ascii_only, indent=2 if indent else None)
    file.write_bytes(text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "PIECE_BYTES", piece_bytes)
        read_values = [value for _, value in json_array.read_json_array(file, "blame")]
    assert read_values == json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_reading_takes_the_memory_of_a_batch_not_of_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_array, "PIECE_BYTES", 1 << 16)
    rows = [{"instruction": f"question {i}", "output": "x" * 2000} for i in range(4_000)]
    WRITERS[name](tmp_path / name, rows)
    source = open_source(str(tmp_path / name))
    tracemalloc.start()
    try:
        assert sum(len(batch.rows) for batch in source.batches(100)) == len(rows)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20 < (tmp_path / name).stat().st_size / 3
    finally:
        tracemalloc.stop()
