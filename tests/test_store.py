"""Encoded once, by one process, under a name that follows the content; damage is noticed."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_sft import digests, once
from dist_sft.chat import BadRow, Dropped, MaskError, Sample
from dist_sft.digests import sha256
from dist_sft.encoding import BATCH_ROWS, build_or_open
from dist_sft.errors import UserError
from dist_sft.once import DamagedError, make_once
from dist_sft.sources import open_source
from dist_sft.store import COLUMNS, Dataset, Store, split_fraction

SPAWN = multiprocessing.get_context("spawn")
ROWS = [{"instruction": text} for text in ("one two", "three", "one two", "long " * 9, "none")]


class WordEncoder:
    """Make a token of each word, by its length; learn every token but the first."""

    def __init__(self, fingerprint="words", on_call=lambda first_row: None):
        self.fingerprint = fingerprint
        self.calls = 0
        self._on_call = on_call

    def encode(self, rows, format="auto", *, first_row=0):
        self.calls += 1
        self._on_call(first_row)
        return [self._outcome(row) for row in rows]

    def _outcome(self, row):
        if "instruction" not in row:
            return BadRow("wrong_columns", f"has {', '.join(row)}")
        words = row["instruction"].split()
        if words == ["none"]:
            return Dropped("no_learned_token", 1)
        ids = [len(word) + (1 << 20) for word in ["start", *words]][:6]
        return Sample(ids, [False, *[True] * (len(ids) - 1)], truncated=len(words) > 5)


def write(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def build(path, cache, encoder=None, **options):
    return build_or_open(
        open_source(str(path)), encoder or WordEncoder(), cache, name="n", **options
    )


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


# ---- what is stored --------------------------------------------------------------------------


def test_samples_come_back(source, cache):
    store = build(source, cache)
    assert len(store) == 4
    ids, learned = store.sample(1)
    assert (ids.dtype, learned.dtype) == (np.int64, np.bool_)
    assert ids.tolist() == [(1 << 20) + 5] * 2
    assert learned.tolist() == [False, True]
    assert store.lengths.tolist() == [3, 2, 3, 6]
    assert store.lengths.dtype == np.int64
    assert [store.row_number(i) for i in range(4)] == [0, 1, 2, 3]
    hashes = store.content_hashes
    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 3


def test_everything_is_counted(source, cache):
    write(source, [*ROWS, "oops\n", "[]\n", *[{"x": 1}] * 7])
    meta = build(source, cache, on_bad_row="skip").meta
    assert (meta.rows, meta.samples, meta.truncated, meta.duplicates) == (14, 4, 1, 1)
    assert (meta.tokens, meta.learned_tokens) == (14, 10)
    assert meta.dropped == {"no_learned_token": 1}
    counts = {reason: bad.count for reason, bad in meta.bad_rows.items()}
    assert counts == {"broken_json": 1, "not_an_object": 1, "wrong_columns": 7}
    assert meta.rows == meta.samples + sum(meta.dropped.values()) + sum(counts.values())
    assert meta.bad_rows["wrong_columns"].first == tuple((row, "has x") for row in range(7, 12))
    assert meta.bad_rows["broken_json"].first[0][1].startswith("broken JSON at line 6")


def test_batches_join_without_a_seam(source, cache):
    rows = [{"instruction": "a " * (i % 7 + 1)} for i in range(2 * BATCH_ROWS + 5)]
    done = []
    store = build(write(source, rows), cache, progress=done.append)
    assert done == [BATCH_ROWS, 2 * BATCH_ROWS, len(rows)]
    assert store.lengths.tolist() == [min(i % 7 + 2, 6) for i in range(len(rows))]
    assert store.row_numbers.tolist() == list(range(len(rows)))


def test_memory_does_not_grow_with_the_rows(source, cache):
    def peak(num_rows):
        rows = ({"instruction": f"{i} words here and there"} for i in range(num_rows))
        write(source, rows)
        tracemalloc.start()
        try:
            build(source, cache)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # A row's share is what the count of duplicates takes, a few numbers; a kept row would be 1 kB.
    assert peak(8 * BATCH_ROWS) - peak(2 * BATCH_ROWS) < 6 * BATCH_ROWS * 64


# ---- names -----------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing(source, cache):
    first = build(source, cache)
    encoder = WordEncoder()
    second = build(source, cache, encoder)
    assert encoder.calls == 0
    assert (second.path, second.meta) == (first.path, first.meta)


def test_the_name_follows_content_encoder_and_options(source, cache, tmp_path):
    moved = write(tmp_path / "moved.jsonl", ROWS)
    assert build(source, cache).path == build(moved, cache).path
    others = [
        build(write(tmp_path / "more.jsonl", ROWS * 2), cache),
        build(source, cache, WordEncoder("other")),
        build(source, cache, row_format="alpaca"),
        build(source, cache, on_bad_row="skip"),
    ]
    assert len({build(source, cache).path, *(store.path for store in others)}) == 5


def test_two_builds_are_the_same_to_the_byte(source, tmp_path):
    a, b = build(source, tmp_path / "a").path, build(source, tmp_path / "b").path
    assert a.name == b.name
    for name in (*COLUMNS, "meta.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# ---- mistakes --------------------------------------------------------------------------------


def refusal(source, cache, **options):
    with pytest.raises(UserError) as caught:
        build(source, cache, **options)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()], "something is left behind"
    return str(caught.value)


@pytest.mark.parametrize(("row", "what"), [({"x": 1}, "has x"), ("oops\n", "at line 6, column 1")])
def test_a_broken_row_is_refused(source, cache, row, what):
    text = refusal(write(source, [*ROWS, row]), cache)
    assert f"data.train.0.path={source}: row 5 (from 0) is broken" in text
    assert what in text
    assert "data.on_bad_row=skip" in text


def test_no_row_left(source, cache):
    write(source, [{"instruction": "none"}] * 3 + ["oops\n"])
    text = refusal(source, cache, on_bad_row="skip")
    assert "no row is left to learn from: 4 rows read, 3 dropped (no_learned_token)" in text
    assert "1 broken (broken_json; row 3: broken JSON at line 4" in text


def test_an_unreadable_source_leaves_nothing(source, cache):
    assert "holds no rows" in refusal(write(source, []), cache)


def test_a_refusal_of_the_encoder_names_the_source(source, cache):
    def refuse(first_row):
        raise MaskError(f"no mask, row {first_row}")

    with pytest.raises(MaskError, match=re.escape(f"data.train.0.path={source}: no mask, row 0")):
        build(source, cache, WordEncoder(on_call=refuse))


def test_a_source_that_changes_while_it_is_read(source, cache):
    encoder = WordEncoder(on_call=lambda first_row: write(source, ROWS * 2))
    assert "changed while it was being read" in refusal(source, cache, encoder=encoder)


def test_a_cache_that_cannot_be_made(source, tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_dir=.*not a folder to write to"):
        build(source, source / "cache")


# ---- damage ----------------------------------------------------------------------------------


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


DAMAGES = {"flipped": flip, "cut": cut, "missing": lambda file: file.unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*COLUMNS, "meta.json"])
def test_damage_is_noticed_and_repaired(source, cache, name, damage):
    whole = build(source, cache)
    content = (whole.path / name).read_bytes()
    DAMAGES[damage](whole.path / name)
    with pytest.raises(DamagedError, match=re.escape(str(whole.path))):
        Store.open(whole.path, name="n", digest=sha256)
    lines = []
    again = build(source, cache, say=lines.append)
    assert len(lines) == 1
    assert "the encoded data: damaged" in lines[0]
    assert (again.path / name).read_bytes() == content


@pytest.mark.parametrize("name", COLUMNS)
def test_checking_sizes_only_reads_nothing(source, cache, name):
    store = build(source, cache)
    flip(store.path / name)
    Store.open(store.path, name="n")
    cut(store.path / name)
    with pytest.raises(DamagedError, match="bytes instead of"):
        Store.open(store.path, name="n")


def test_a_changed_number_in_the_meta_data(source, cache):
    meta = build(source, cache).path / "meta.json"
    meta.write_text(meta.read_text().replace('"rows": 5', '"rows": 6'))
    with pytest.raises(DamagedError, match=r"meta\.json was changed"):
        Store.open(meta.parent, name="n")


def test_a_store_of_another_version(source, cache):
    store = build(source, cache)
    replace(store.meta, files={}).write(store.path)
    with pytest.raises(DamagedError, match="written by another version"):
        Store.open(store.path, name="n")


def test_what_was_read_through_before_is_not_read_again(source, cache, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    store = build(source, cache)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert build(source, cache).path == store.path
    # A flipped byte is noticed all the same, also with the time of modification put back.
    tokens = store.path / "tokens.u32"
    whole, before = tokens.read_bytes(), tokens.stat()
    time.sleep(0.1)  # longer than a tick of the file system's clock
    flip(tokens)
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
    lines = []
    build(source, cache, say=lines.append)
    assert "damaged" in lines[0]
    assert tokens.read_bytes() == whole


# ---- several processes -----------------------------------------------------------------------


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def build_in_child(source, cache, note, first_row_to_stop_at):
    """Build; stop in the batch that begins with that row until `note.go` is there."""

    def stop(first_row):
        note.with_suffix(".encoding").touch()
        if first_row == first_row_to_stop_at:
            note.with_suffix(".stopped").touch()
            wait_for(note.with_suffix(".go").exists)

    def say(line):
        note.with_suffix(".said").write_text(line)

    store = build(source, cache, WordEncoder(on_call=stop), say=say)
    note.with_suffix(".done").write_text(store.path.name)


def start(*arguments):
    process = SPAWN.Process(target=build_in_child, args=arguments)
    process.start()
    return process


def temporary_folders(cache):
    return list(cache.glob("*.tmp"))


def test_of_two_processes_one_builds_and_the_other_waits(source, cache, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    first = start(source, cache, a, 0)
    wait_for(a.with_suffix(".stopped").exists)
    second = start(source, cache, b, -1)
    wait_for(b.with_suffix(".said").exists)
    assert "waiting for another process" in b.with_suffix(".said").read_text()
    a.with_suffix(".go").touch()
    for process in (first, second):
        process.join(20)
        assert process.exitcode == 0
    assert not b.with_suffix(".encoding").exists(), "the second one encoded, too"
    assert a.with_suffix(".done").read_text() == b.with_suffix(".done").read_text()
    assert not temporary_folders(cache)


def test_a_killed_builder_leaves_nothing_that_matters(source, cache, tmp_path):
    write(source, [{"instruction": f"a {i}"} for i in range(3 * BATCH_ROWS)])
    note = tmp_path / "note"
    builder = start(source, cache, note, BATCH_ROWS)
    wait_for(note.with_suffix(".stopped").exists)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(20)
    assert builder.exitcode == -signal.SIGKILL
    [left] = temporary_folders(cache)
    assert (left / "tokens.u32").exists(), "killed before it began"
    assert not (left / "meta.json").exists(), "killed after it had finished"
    # Another data set's builder cleans up as well, and the killed one's next start succeeds.
    build(write(tmp_path / "other.jsonl", ROWS), cache)
    assert not temporary_folders(cache)
    assert len(build(source, cache)) == 3 * BATCH_ROWS


def test_a_running_builder_keeps_its_folder(source, cache, tmp_path):
    note = tmp_path / "note"
    builder = start(source, cache, note, 0)
    wait_for(note.with_suffix(".stopped").exists)
    [in_use] = temporary_folders(cache)
    for path in (*in_use.iterdir(), in_use):  # only its lock says now that it is not abandoned
        os.utime(path, (0, 0))
    build(write(tmp_path / "other.jsonl", ROWS[:2]), cache)
    assert temporary_folders(cache) == [in_use]
    note.with_suffix(".go").touch()
    builder.join(20)
    assert builder.exitcode == 0


def test_what_another_host_left_is_removed_when_it_is_old(source, cache):
    store = build(source, cache)
    left = [cache / f"{store.path.name}.node-{i}.example.{i + 1}.0123abcd.tmp" for i in range(2)]
    for folder in left:
        folder.mkdir()
        (folder / "tokens.u32").touch()
    for path in (left[0] / "tokens.u32", left[0]):
        os.utime(path, (0, 0))
    flip(store.path / "tokens.u32")
    build(source, cache)
    assert temporary_folders(cache) == [left[1]]


def test_a_file_system_without_locks(source, cache, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(once.fcntl, "flock", flock)
    lines = []
    assert len(build(source, cache, say=lines.append)) == 4
    assert "has no file locks" in lines[0]


def test_the_loser_of_a_race_takes_what_the_winner_made(tmp_path):
    path = tmp_path / "made"

    def load():
        if not (path / "content").exists():
            raise DamagedError("not there")
        return (path / "content").read_text()

    def make(folder):
        (folder / "content").write_text("loser's")
        path.mkdir()
        (path / "content").write_text("winner's")

    assert make_once(path, make=make, load=load, what="it") == "winner's"
    assert not temporary_folders(tmp_path)


def test_a_folder_that_cannot_be_named_is_an_error(tmp_path):
    def make(folder):
        (tmp_path / "made").write_text("a file is in the way")

    def load():
        raise DamagedError("not there")

    with pytest.raises(NotADirectoryError):
        make_once(tmp_path / "made", make=make, load=load, what="it")
    assert not temporary_folders(tmp_path)


# ---- several stores --------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path, cache):
    named = {
        "a": [{"instruction": "none"}, {"instruction": "x"}, {"instruction": "x y"}],
        "b": [{"instruction": "x y z"}, {"instruction": "none"}, {"instruction": "x"}],
    }
    return [
        build_or_open(
            open_source(str(write(tmp_path / f"{name}.jsonl", rows))),
            WordEncoder(),
            cache,
            name=name,
        )
        for name, rows in named.items()
    ]


def test_a_data_set_numbers_all_samples(stores):
    data = Dataset(stores)
    assert len(data) == 4
    assert data.rows_per_source == (2, 2)
    assert data.lengths.tolist() == [2, 3, 4, 2]
    assert [len(data.sample(i)[0]) for i in range(4)] == [2, 3, 4, 2]
    assert [data.locate(i) for i in range(4)] == [("a", 1), ("a", 2), ("b", 0), ("b", 2)]
    assert data.content_hashes[0] == data.content_hashes[3]
    with pytest.raises(AssertionError):
        data.sample(4)


def test_a_selection_is_a_data_set_too(stores):
    data = Dataset(stores).select(np.array([1, 2, 3]))
    assert len(data) == 3
    assert data.rows_per_source == (1, 2)
    assert data.lengths.tolist() == [3, 4, 2]
    assert [data.locate(i) for i in range(3)] == [("a", 2), ("b", 0), ("b", 2)]
    assert data.select(np.array([0, 2])).locate(1) == ("b", 2)
    assert data.content_hashes.tolist() == Dataset(stores).content_hashes[1:].tolist()


def test_the_fingerprint_tells_data_sets_apart(stores):
    data = Dataset(stores)
    assert data.fingerprint == Dataset(list(stores)).fingerprint
    others = [Dataset(stores[:1]), Dataset(stores[::-1]), data.select(np.array([0, 1]))]
    others += [data.select(np.array([0, 2]))]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


# ---- holding out -----------------------------------------------------------------------------

hash_arrays = st.lists(st.integers(0, 40), min_size=2, max_size=200).map(
    lambda values: np.array(values, np.uint64)
)


@given(hash_arrays, st.floats(0.001, 0.999), st.integers(0, 2**63))
def test_held_out_samples_have_no_twin_in_training(hashes, fraction, seed):
    try:
        train, held_out = split_fraction(hashes, fraction, seed)
    except UserError:
        wanted = max(1, round(fraction * len(hashes)))
        sizes = Counter(hashes.tolist()).values()
        assert len(sizes) == 1 or min(sizes) > wanted or wanted == len(hashes)
        return
    assert sorted([*train, *held_out]) == list(range(len(hashes)))
    assert all(a < b for side in (train, held_out) for a, b in pairwise(side.tolist()))
    assert not set(hashes[train].tolist()) & set(hashes[held_out].tolist())
    missing = max(1, round(fraction * len(hashes))) - len(held_out)
    assert missing >= 0
    if missing:  # then nothing that is left would fit
        assert min(Counter(hashes[train].tolist()).values()) > missing


@given(hash_arrays, st.integers(0, 9), st.randoms(use_true_random=False))
def test_the_side_of_a_sample_does_not_depend_on_its_place(hashes, seed, random):
    hashes = np.unique(hashes)
    if len(hashes) < 2:
        return
    order = list(range(len(hashes)))
    random.shuffle(order)
    _, held_out = split_fraction(hashes, 0.3, seed)
    _, held_out_shuffled = split_fraction(hashes[order], 0.3, seed)
    assert set(hashes[held_out].tolist()) == set(hashes[order][held_out_shuffled].tolist())


def test_the_fraction_is_exact_where_samples_differ_and_the_seed_decides():
    hashes = np.arange(10_000, dtype=np.uint64)
    first, again, other = (split_fraction(hashes, 0.02, seed)[1] for seed in (0, 0, 1))
    assert len(first) == len(other) == 200
    assert first.tolist() == again.tolist()
    assert len(set(first.tolist()) & set(other.tolist())) < 20
    # Spread evenly: each tenth of the data gives about a tenth.
    assert np.histogram(first, 10, (0, 10_000))[0].min() >= 8


def test_held_out_samples_never_change_between_versions():
    """A run that continues must not learn what it held out before: never edit these."""
    _, held_out = split_fraction(np.arange(1000, dtype=np.uint64), 0.008, 42)
    assert held_out.tolist() == [44, 98, 127, 222, 379, 398, 595, 664]


@pytest.mark.parametrize("hashes", [[7], [7, 7, 7]])
def test_a_division_that_is_impossible(hashes):
    with pytest.raises(UserError, match=r"data.eval_fraction=0.5: .* 1 of them different"):
        split_fraction(np.array(hashes, np.uint64), 0.5, 0)
