"""One world of ranks, or none: whoever is not like the others is named on every rank."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks

from dist_sft.errors import UserError
from dist_sft.world import Place, disagreements

PROGRAM = Path(__file__).parent / "ranks" / "agreement.py"
FACTS = {"world size": (3, 3), "recipe": "r", "data": "d", "threads": 1, "torch": "2"}

Rank = tuple[tuple[int, str], dict[str, Any]]


def rank(number: int, **facts: Any) -> Rank:
    changed = {key.replace("_", " "): value for key, value in facts.items()}
    return (number, f"host{number}"), FACTS | changed


@pytest.mark.parametrize(
    ("ranks", "problems"),
    [
        ([rank(0), rank(1), rank(2)], []),
        ([rank(2), rank(0), rank(1)], []),
        (
            [rank(0), rank(1), rank(2, threads=8)],
            [
                "threads: rank 2 on host2 has 8; the others have 1 (OMP_NUM_THREADS is set by the "
                "launcher; something on that host changes it)"
            ],
        ),
        (
            [rank(0, torch="1"), rank(1), rank(2)],
            [
                "torch: rank 0 on host0 has 1; the others have 2 (install the same version on "
                "every host)"
            ],
        ),
        (
            [rank(0, data="x"), rank(1), rank(2, recipe="y")],
            [
                "recipe: rank 2 on host2 has y; the others have r (run_dir must be one folder that "
                "every host sees)",
                "data: rank 0 on host0 has x; the others have d (the files of data.train or "
                "data.eval differ there, or changed while the run started)",
            ],
        ),
        ([rank(0), rank(1), rank(1)], ["ranks are [0, 1, 1], expected 0 to 2, each once"]),
        (
            [rank(0, world_size=(3, 1))],
            ["rank 0 on host0 was started as one of 3, but joined 1"],
        ),
        (
            [rank(0), rank(1, threads=2), rank(2, threads=3)],
            [
                "threads: rank 1 on host1 has 2; rank 2 on host2 has 3; the others have 1 "
                "(OMP_NUM_THREADS is set by the launcher; something on that host changes it)"
            ],
        ),
    ],
)
def test_names_whoever_differs(ranks: list[Rank], problems: list[str]) -> None:
    assert disagreements(ranks) == problems


def test_place_comes_from_the_variables_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "GROUP_RANK": 2, "GROUP_WORLD_SIZE": 3}
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    assert Place.from_environment() == Place(5, 1, 2, 3, 8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("visible", "refused"),
    [("0,1", True), ("GPU-d7a2", True), ("", False), ("-1", False), ("NoDevFiles", False)],
)
def test_gpus_that_do_not_work_are_no_reason_to_train_on_cpus(
    visible: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if refused:
        with pytest.raises(UserError, match=rf"CUDA_VISIBLE_DEVICES={visible} gives this worker"):
            Place.from_environment()
    else:
        assert Place.from_environment().device == torch.device("cpu")


@pytest.mark.parametrize("odd_rank", [None, 1])
def test_real_ranks_agree_or_all_name_the_odd_one(odd_rank: int | None, tmp_path: Path) -> None:
    said = run_ranks(
        PROGRAM, world=2, log_dir=tmp_path, seconds=120, environment={"ODD_RANK": str(odd_rank)}
    )
    if odd_rank is None:
        assert said == ["agreed\n", "agreed\n"]
    else:
        refusal = (
            "the ranks do not agree:\n"
            f"  threads: rank 1 on {socket.gethostname()} has 2; the others have 1 "
            "(OMP_NUM_THREADS is set by the launcher; something on that host changes it)\n"
        )
        assert said == [refusal, refusal]
