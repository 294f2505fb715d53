"""Before ranks meet: one process of a node prepares, everybody else waits for files."""

import json
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny_tokenizers import pad_is_eos

from dist_sft import prepare, runs
from dist_sft.config import Recipe, check
from dist_sft.console import Console
from dist_sft.errors import UserError
from dist_sft.prepare import Prepared, prepare_once
from dist_sft.runs import Outcome
from dist_sft.world import Place


def make_recipe(folder: Path, path: str) -> Recipe:
    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(9)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "run/logs/attempt-0").mkdir(parents=True)
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": path},
        "data": {"train": [{"path": str(folder / "rows.json")}], "cache_dir": str(folder / "c")},
    }
    return check(settings, "recipe.yaml")


def run(recipe: Recipe, node: int, local: int, nodes: int = 1) -> Prepared:
    place = Place(2 * node + local, local, node, nodes, 2 * nodes, torch.device("cpu"))
    return prepare_once(Path(recipe.run_dir), 0, place, recipe, Console(None))


def test_every_rank_gets_the_folder_that_one_has_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def snapshot(name: str, **_: object) -> str:
        fetched.append(name)
        pad_is_eos().save_pretrained(tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    recipe = make_recipe(tmp_path, "org/model")
    found: dict[int, Prepared] = {}
    waiting = threading.Thread(target=lambda: found.update({1: run(recipe, 0, 1)}))
    waiting.start()
    found[0] = run(recipe, 0, 0)
    waiting.join(timeout=60)
    assert fetched == ["org/model"]
    assert found[0].stores == found[1].stores
    assert found[0].model == found[1].model
    assert found[1].model.path == str(found[1].folder) == str(tmp_path / "snapshot")
    assert found[1].words.tokenizer.get_vocab() == pad_is_eos().get_vocab()
    assert [path.name for path in (tmp_path / "run/logs/attempt-0").iterdir()] == ["data-0.json"]


def test_nodes_wait_for_each_other(tmp_path: Path) -> None:
    pad_is_eos().save_pretrained(tmp_path / "model")
    recipe = make_recipe(tmp_path, str(tmp_path / "model"))
    ended: list[int] = []
    first = threading.Thread(target=lambda: ended.append(run(recipe, 0, 0, nodes=2) and 0))
    first.start()
    time.sleep(1.0)
    assert not ended
    run(recipe, 1, 0, nodes=2)
    first.join(timeout=60)
    assert ended == [0]


@pytest.mark.parametrize("why", ["a rank failed", "the attempt ended", "no sign of life"])
def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    recipe = make_recipe(tmp_path, str(tmp_path))
    run_dir = Path(recipe.run_dir)
    if why == "a rank failed":
        kind, message = RuntimeError, "rank 3 gave up: disk full"
        runs.write_failure(run_dir, 0, 3, Outcome(1, "disk full", -1))
    elif why == "the attempt ended":
        kind, message = RuntimeError, "the attempt is over"
        runs.write_outcome(run_dir, 0, Outcome(1, "killed", -1))
    else:
        kind, message = UserError, "node 0 has given no sign of life for 1 s: .*is run_dir not one"
        monkeypatch.setattr(prepare, "ALIVE_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(kind, match=message):
        run(recipe, 0, 1)
    assert time.monotonic() - began < 5.0


def test_a_node_that_takes_its_time_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "ALIVE_SECONDS", 2.0)
    pad_is_eos().save_pretrained(tmp_path / "model")
    recipe = make_recipe(tmp_path, str(tmp_path / "model"))
    original = prepare.load_words

    def slowly(*arguments: object) -> object:
        time.sleep(4.0)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "load_words", slowly)
    other = threading.Thread(target=lambda: run(recipe, 0, 0))
    other.start()
    assert run(recipe, 0, 1).folder == tmp_path / "model"
    other.join()
