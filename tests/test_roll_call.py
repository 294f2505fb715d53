"""Nodes that cannot work together are named before anything is loaded."""

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import free_port

from dist_sft import manifest, preflight, roll_call, runs
from dist_sft.config import Recipe
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.roll_call import Node, NotTogether, compare


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "SECONDS", 2.0)
    monkeypatch.setattr(roll_call, "CONNECT_SECONDS", 1.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": str(tmp_path),
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": [{"path": "rows.json"}]},
        }
    )


def node(rank: int, **facts: str) -> Node:
    return Node(rank, f"n{rank}", {"torch": "2.13", "GPUs": "8", **facts})


def test_nodes_that_agree_have_no_problem() -> None:
    assert compare([node(0), node(1)]) == ([], [])


def test_the_odd_one_out_is_named_and_blamed() -> None:
    problems, bad = compare([node(0), node(1, GPUs="7"), node(2)])
    assert problems == ["GPUs: n1 has 7; the other 2 have 8"]
    assert bad == ["n1"]


def test_of_two_that_differ_nobody_is_blamed() -> None:
    problems, bad = compare([node(0), node(1, torch="2.12")])
    assert problems == ["torch: n1 has 2.12; the other 1 have 2.13"]
    assert bad == []


def test_a_nodes_own_problem_is_its_own() -> None:
    broken = replace(node(2), problems=["a GPU is gone"])
    assert compare([node(0), node(1), broken]) == (["n2: a GPU is gone"], ["n2"])


def test_what_most_suffer_from_is_nobodys_fault() -> None:
    full = [replace(node(rank), problems=["no room for a checkpoint"]) for rank in range(3)]
    problems, bad = compare([*full, node(3)])
    assert problems == [f"n{rank}: no room for a checkpoint" for rank in range(3)]
    assert bad == []
    assert compare(full[:1])[1] == []


@pytest.mark.parametrize(
    ("missing", "nodes", "blamed"),
    [
        ([2], 4, ["n2"]),
        ([1, 2], 4, []),
        ([1, 2, 3], 4, ["n0"]),
        ([1], 2, []),
        ([2, 3], 5, ["n2", "n3"]),
    ],
)
def test_who_is_to_blame_for_nodes_that_do_not_appear(
    missing: list[int], nodes: int, blamed: list[str]
) -> None:
    found = [node(rank) for rank in range(nodes) if rank not in missing]
    problems, bad = compare(found, {rank: f"n{rank}" for rank in missing})
    assert [said.partition(" did")[0] for said in problems] == [f"node {r} (n{r})" for r in missing]
    assert bad == blamed


@pytest.mark.parametrize(
    ("cut_off", "nodes", "blamed"),
    [([2], 4, ["n2"]), ([1, 2, 3], 4, ["n0"]), ([1, 2], 4, []), ([1], 2, []), ([1, 2], 3, ["n0"])],
)
def test_who_is_to_blame_for_a_way_that_is_cut(
    cut_off: list[int], nodes: int, blamed: list[str]
) -> None:
    found = [
        replace(node(rank), unreachable="cannot reach n0:24711" if rank in cut_off else None)
        for rank in range(nodes)
    ]
    problems, bad = compare(found)
    assert problems == [f"n{rank}: cannot reach n0:24711" for rank in cut_off]
    assert bad == blamed


@pytest.mark.parametrize(
    ("given", "visible", "gpus", "there", "told"),
    [
        ("2", None, 2, 0, []),
        ("4", None, 2, 0, []),
        ("2", None, 1, 0, ["--workers-per-node is 2, SLURM gave this job 2 GPUs on this node, "]),
        ("1", None, 8, 0, ["--workers-per-node is 2, SLURM gave this job 1 GPUs on this node, "]),
        (None, None, 0, 0, []),
        (None, None, 0, 8, ["this node has 8 GPUs, and the job may use none of them: ask for "]),
        (None, "", 0, 8, []),
        ("2", "", 0, 8, []),
    ],
)
def test_gpus_are_those_that_were_asked_for(
    given: str | None, visible: str | None, gpus: int, there: int, told: list[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    for name, value in (("SLURM_GPUS_ON_NODE", given), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(roll_call, "NVIDIA", tmp_path)
    for number in range(there):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    found = list(roll_call._too_few_gpus(2, gpus))
    assert [line[: len(start)] for line, start in zip(found, told, strict=True)] == told


Take = Callable[..., list[str | None]]


@pytest.fixture
def take(tmp_path: Path, recipe: Recipe) -> Take:
    """Take a roll call with a thread for every node; return what each was told, or None."""

    def taken(ranks: list[int], nodes: int, **changes: Any) -> list[str | None]:
        runs.attempt_dir(tmp_path, 0).mkdir(parents=True)
        told: dict[int, str | None] = dict.fromkeys(ranks)
        facts = {"workers": 2, "gpus": 0, "threads": 1}
        port = changes.pop("port", free_port())

        def one(rank: int) -> None:
            mine = facts | (changes if rank == ranks[-1] else {})
            try:
                roll_call.take(tmp_path, 0, recipe, rank, nodes, ("127.0.0.1", port), **mine)
            except NotTogether as problem:
                told[rank] = str(problem)

        threads = [threading.Thread(target=one, args=[rank]) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [told[rank] for rank in ranks]

    return taken


def test_everybody_is_there(take: Take, tmp_path: Path) -> None:
    assert take([0, 1, 2], 3) == [None, None, None]
    verdict = json.loads((tmp_path / "logs/attempt-0/roll_call.json").read_text())
    assert verdict["problems"] == verdict["bad"] == []
    assert [node["rank"] for node in verdict["nodes"]] == [0, 1, 2]


def test_all_nodes_hear_what_is_wrong_with_one(take: Take, tmp_path: Path) -> None:
    told = take([0, 1, 2], 3, threads=4)
    expected = f"threads per worker: {socket.gethostname()} has 4; the other 2 have 1"
    assert told == [f"the nodes cannot work together:\n  {expected}"] * 3
    assert roll_call.bad_hosts(tmp_path, 0) == [socket.gethostname()]


def test_a_node_that_does_not_appear_is_named(
    take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_SFT_HOSTS", "n1 n2 n3 ")
    told = take([0, 1], 3)
    assert told[0] == told[1]
    assert told[0] is not None
    assert "node 2 (n3) did not appear in 3 s: is it down, or does it not see" in told[0]
    assert roll_call.bad_hosts(tmp_path, 0) == ["n3"]


def test_a_port_that_is_taken_is_no_nodes_fault(take: Take, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        told = take([0, 1, 2], 3, port=port)
    expected = f"{socket.gethostname()}: nobody can listen at port {port}: Address already in use"
    assert told == [f"the nodes cannot work together:\n  {expected}"] * 3
    assert roll_call.bad_hosts(tmp_path, 0) == []


def test_a_file_that_is_half_written_is_waited_for(
    take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failures = Path.read_text, iter([OSError(116, "Stale file handle")] * 3)

    def now_and_then(path: Path, **words: Any) -> str:
        if path.name == "roll_call.json" and (failure := next(failures, None)):
            raise failure
        return read(path, **words)

    monkeypatch.setattr(Path, "read_text", now_and_then)
    assert take([0, 1], 2) == [None, None]
    assert next(failures, None) is None


def test_a_first_node_that_is_not_there_is_no_riddle(take: Take) -> None:
    (told,) = take([1], 2)
    assert told is not None
    assert told.startswith("node 0 said nothing for 2 s: is it down, or is ")


def test_too_many_workers_for_the_gpus_of_a_node(take: Take) -> None:
    told = take([0, 1], 2, gpus=1)
    assert told[0] is not None
    assert "--workers-per-node: got 2, but there is 1 GPU here" in told[0]


def test_a_checkpoint_that_does_not_fit_is_foreseen(
    take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]},
            "b": {"dtype": "BF16", "shape": [7], "data_offsets": [30, 44]},
        }
    ).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(44)
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(roll_call, "checkpoint_bytes", lambda recipe: 10**18)
    told = take([0, 1], 2)
    assert told[0] is not None
    assert "GB, and one checkpoint needs 1000000000.0 GB" in told[0]
    recipe = Recipe.model_validate(
        {
            "run_dir": str(tmp_path),
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": [{"path": "rows.json"}]},
        }
    )
    assert preflight.checkpoint_bytes(recipe) == 12 * 22


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("float32", 4)])
def test_what_a_checkpoint_takes_that_answers(tmp_path: Path, dtype: str, size: int) -> None:
    """Nothing where the model is a folder as it is, or where it has been converted before."""
    recipe = GenerateRecipe.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "trained"), "dtype": dtype},
            "input": [{"path": "rows.json"}],
            "output": {"path": "answers.jsonl"},
        }
    )
    assert preflight.weights_bytes(recipe) is None
    for step, rows in ((5, 10**9), (10, 10**15)):
        folder = manifest.folder_of(tmp_path / "trained", step)
        folder.mkdir(parents=True)
        told = {"format": manifest.FORMAT, "step": step, "files": {}}
        manifest.write(folder, {**told, "shapes": {"a": [rows, 3], "b": [7]}})
    assert preflight.weights_bytes(recipe) == size * (3 * 10**15 + 7)
    assert next(roll_call.too_full(tmp_path, recipe)).endswith(
        f"GB, and the weights of {tmp_path}/trained need {size * 3e6:.1f} GB"
    )
    chosen = recipe.model.model_copy(
        update={"path": str(manifest.folder_of(tmp_path / "trained", 5))}
    )
    one = recipe.model_copy(update={"model": chosen})
    assert preflight.weights_bytes(one) == size * (3 * 10**9 + 7)
    (tmp_path / "run/weights/abc").mkdir(parents=True)
    (tmp_path / "run/weights/abc/config.json").touch()
    assert preflight.weights_bytes(recipe) is None
