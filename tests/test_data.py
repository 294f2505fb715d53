"""Preparing data: with the tokenizer's threads, which are put away afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_tokenizers import pad_is_eos

from dist_sft import data
from dist_sft.config import Recipe, check
from dist_sft.errors import UserError
from dist_sft.tokenizer import load_words

NAME = "TOKENIZERS_PARALLELISM"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    pad_is_eos().save_pretrained(tmp_path / "tokenizer")
    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "tokenizer")},
        "data": {
            "train": [{"path": str(tmp_path / "rows.json")}],
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    return check(settings, "recipe.yaml")


@pytest.mark.parametrize("before", [None, "false"])
def test_the_environment_is_put_back(
    before: str | None, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    words = load_words(recipe.model, recipe.data.template)
    seen = []
    data.prepare(recipe.data, words, print, progress=lambda rows: seen.append(os.environ[NAME]))
    assert seen == ["true"]
    assert os.environ.get(NAME) == before
    Path(recipe.data.train[0].path).write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        data.prepare(recipe.data, words, print)
    assert os.environ.get(NAME) == before


# As a rank does it. A child that waited for threads it does not have would be ended by the alarm.
RANK = """
import os, signal, sys
from pathlib import Path
from dist_sft import data
from dist_sft.config import read_config_json
from dist_sft.tokenizer import load_words

threads = lambda: len(os.listdir("/proc/self/task"))
recipe = read_config_json(sys.argv[1])
before = threads()
words = load_words(recipe.model, recipe.data.template)  # uses them where nothing turns them off
data.prepare(recipe.data, words, print)
assert threads() > before, "the tokenizer used no threads"
child = os.fork()
if not child:
    signal.alarm(20)
    words.tokenizer([f"row {i}" for i in range(1000)])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "a child waits for threads"
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize("before", [None, "false"])
def test_threads_are_used_and_do_no_harm_to_a_child(
    before: str | None, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(recipe.to_json())
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    environment |= {} if before is None else {NAME: before}
    done = subprocess.run(
        [sys.executable, "-c", RANK, tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_an_evaluation_set_never_stands_for_the_training_set() -> None:
    train, other, held_out = (SimpleNamespace(fingerprint=name) for name in ("a", "b", "c"))
    evals = {"train": held_out}
    assert data.fingerprint(train, evals) != data.fingerprint(other, evals)
    assert data.fingerprint(train, evals) != data.fingerprint(train, {"train": other})


def test_a_nodes_own_disk_gets_a_verified_copy(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, said = tmp_path / "scratch", list[str]()
    words = load_words(recipe.model, recipe.data.template)
    ((_, folder),) = data.prepare(recipe.data, words, print).train
    monkeypatch.setenv("DIST_SFT_SCRATCH", str(scratch))
    ((_, copy),) = data.prepare(recipe.data, words, print).train
    shared, near = Path(folder), Path(copy)
    assert near == scratch / shared.name
    written = near.stat().st_mtime_ns
    assert data.on_this_node(shared, "rows", said.append) == near
    assert near.stat().st_mtime_ns == written, "it is copied once"
    content = bytearray((near / "tokens.u32").read_bytes())
    content[0] ^= 1
    (near / "tokens.u32").write_bytes(content)
    assert data.on_this_node(shared, "rows", said.append) == near
    assert "the copy of rows in" in said[-1]
    assert "made again" in said[-1]
    assert (near / "tokens.u32").read_bytes() == (shared / "tokens.u32").read_bytes()

    monkeypatch.setenv("DIST_SFT_SCRATCH", str(tmp_path / "full"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert data.on_this_node(shared, "rows", said.append) == shared
    assert "and 0.0 GB are free: it is read from" in said[-1]
