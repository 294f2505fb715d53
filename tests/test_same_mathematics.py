"""The mathematics does not depend on the machine: every way to compute a run gives the same one.

The reference is what anybody would write: one process, the global batch padded into one tensor,
Hugging Face's own loss, torch's AdamW. Against it stand the product's functions over 1, 2 and 3
ranks, packed and padded, under several token budgets, with and without ZeRO.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrix import (
    BATCH_SIZE,
    CLIP,
    LEARNING_RATE,
    ROWS,
    SEED,
    STEPS,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Cell,
    Row,
    make_job,
    make_model,
    make_rows,
)
from processes import run_ranks
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dist_sft.plan import Plan, layout

PROGRAM = Path(__file__).parent / "ranks" / "mathematics.py"
GRADIENT_STEPS = (1, 2, 4, STEPS)  # the fourth has fillers
TOLERANCE = 1e-5
BF16_TOLERANCE = 5e-3  # 20 steps differ by 1.2e-3, 8e-3 in the gradient's norm
# Below the longest row; some micro-batches on every rank; the whole step in one.
BUDGETS = (24, 64, 1000)
# The embedding and the first layer, and in the second a matrix and a vector among trained ones.
FREEZE = ("model.embed_tokens.*", "model.layers.0.*", "*.o_proj.weight", "*.k_proj.bias")
SHARDINGS = (None, "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")


@dataclass(frozen=True)
class Curve:
    """What a run computed, step by step."""

    losses: list[float]
    norms: list[float]
    """Norm of the whole gradient before clipping."""
    eval_loss: float


def train_plainly(
    folder: Path, rows: list[Row], gradients: Path, freeze: Sequence[str] = ()
) -> Curve:
    """Train as a textbook would; write the gradients of every step, before clipping, to a file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = ("proj.weight", "embed_tokens.weight", "lm_head.weight")
    vectors = ("norm.weight", ".bias")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(fnmatchcase(name, pattern) for pattern in freeze)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if name.endswith(matrices)]
    others = [p for name, p in trained if name.endswith(vectors)]
    assert len(decayed) + len(others) == len(trained)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    )
    plan = Plan((ROWS,), (1.0,), SEED, BATCH_SIZE)
    losses, norms, kept = [], [], {}
    for step in range(1, STEPS + 1):
        loss = model(**padded([rows[i] for i in plan.samples(step)])).loss
        loss.backward()
        kept |= {f"{step}|{n}": p.grad.clone() for n, p in trained}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    save_file(kept, gradients)
    with torch.no_grad():
        eval_loss = model(**padded(rows)).loss.item()
    return Curve(losses, norms, eval_loss)


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    labels = torch.full(shape, -100)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n] = torch.tensor(row.input_ids)
        mask[i, :n] = 1
        labels[i, :n] = torch.where(torch.tensor(row.learned), ids[i, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Problem:
    folder: Path
    models: dict[str, Path]
    references: dict[str, Curve]
    gradients: dict[str, Path]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Problem]:
    folder = tmp_path_factory.mktemp("mathematics")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = make_rows()
    names = ("tied", "untied")
    models = {name: make_model(folder / name, tied=name == "tied") for name in names}
    models["frozen"] = models["untied"]  # a reference of its own
    gradients = {name: folder / f"{name}.safetensors" for name in models}
    references = {
        name: train_plainly(path, rows, gradients[name], FREEZE if name == "frozen" else ())
        for name, path in models.items()
    }
    torch.set_num_threads(threads)
    return Problem(folder, models, references, gradients)


def compute(
    problem: Problem, world: int, cells: Sequence[Cell], seconds: float = 250
) -> dict[Cell, Any]:
    """Train the cells on some ranks, all in one process group: to start one takes 8 s."""
    folder = problem.folder / f"{world}-ranks-{len(cells)}-cells"
    references = {name: str(path) for name, path in problem.gradients.items()}
    job = make_job(
        folder, problem.models, cells, references=references, gradient_steps=GRADIENT_STEPS
    )
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    arguments = (folder / "job.json", folder / "out.json")
    run_ranks(PROGRAM, *arguments, world=world, log_dir=folder, seconds=seconds)
    return dict(zip(cells, json.loads((folder / "out.json").read_text()), strict=True))


def differences(result: dict[str, Any], reference: Curve) -> dict[str, float]:
    """Return the largest relative difference of everything that a cell computed."""
    return {
        "gradient": max(result["gradients"]),
        "loss": relative(result["losses"], reference.losses),
        "gradient norm": relative(result["norms"], reference.norms),
        "evaluation": relative([result["eval_loss"]], [reference.eval_loss]),
    }


def relative(ours: list[float], truth: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, truth, strict=False))


def assert_same(problem: Problem, results: dict[Cell, Any]) -> None:
    """Compare every cell with the reference; name all that differ, and by how much."""
    worst = {cell: differences(r, problem.references[cell.model]) for cell, r in results.items()}
    print(*(f"{cell}: {spread}" for cell, spread in worst.items()), sep="\n")
    wrong = {
        str(cell): {what: f"{x:.1e}" for what, x in spread.items() if not x <= TOLERANCE}
        for cell, spread in worst.items()
    }
    assert not {cell: spread for cell, spread in wrong.items() if spread}


def test_reference_meets_what_is_hard(problem: Problem) -> None:
    """A comparison proves little where clipping never acts or the steps all look alike."""
    for name, reference in problem.references.items():
        assert min(reference.norms) < CLIP < max(reference.norms)
        learned = 0.95 if name == "frozen" else 0.9  # half as much of it can learn
        assert reference.losses[-1] < learned * reference.losses[0]
    sizes = [len(samples_of(step)) for step in range(1, STEPS + 1)]
    assert sizes == [8, 8, 8, 1] * 5
    micro_batches = {budget: micro_batches_of(budget) for budget in BUDGETS}
    assert micro_batches == {24: {1, 2, 3, 4}, 64: {1, 2}, 1000: {1}}


def samples_of(step: int) -> np.ndarray:
    return Plan((ROWS,), (1.0,), SEED, BATCH_SIZE).samples(step)


def micro_batches_of(budget: int, world: int = 2) -> set[int]:
    lengths = np.array([len(row.input_ids) for row in make_rows()])
    steps = (samples_of(step) for step in range(1, STEPS + 1))
    return {len(layout(lengths[rows], world, budget, packed=True)[0]) for rows in steps}


EXACT_ON_TWO = (
    Cell(),
    Cell(packed=False, budget=24, model="untied"),
    Cell("zero1", budget=24),
    Cell("zero2", model="untied"),
    Cell("zero2", packed=False, budget=1000),
    Cell("zero3", checkpointing=True),
    Cell("zero2-offload"),
)
FROZEN = (
    Cell(model="frozen", freeze=FREEZE, budget=24),
    Cell("zero1", model="frozen", freeze=FREEZE, checkpointing=True),
    Cell("zero2", model="frozen", freeze=FREEZE),
    Cell("zero3", model="frozen", freeze=FREEZE, checkpointing=True),
    Cell(model="frozen", freeze=FREEZE, checkpointing=True, packed=False),
)
BF16 = tuple(Cell(deepspeed, dtype="bfloat16") for deepspeed in SHARDINGS)
BROKEN = (
    Cell("zero2", fault="world size left out", steps=2),
    Cell("zero1", fault="attention mask of ones", steps=2),
    Cell("zero2", fault="boundary always", steps=2),
    Cell("zero2", fault="round robin", steps=2),
    # The last: it leaves one rank in a collective until the other one ends.
    Cell("zero2", fault="boundary never", steps=2),
)


@pytest.fixture(scope="module")
def on_two_ranks(problem: Problem) -> dict[Cell, Any]:
    return compute(problem, 2, EXACT_ON_TWO + FROZEN + BF16 + BROKEN)


def test_two_ranks_compute_the_same(problem: Problem, on_two_ranks: dict[Cell, Any]) -> None:
    assert_same(problem, {cell: on_two_ranks[cell] for cell in EXACT_ON_TWO})


def test_frozen_parameters_change_nothing_else(
    problem: Problem, on_two_ranks: dict[Cell, Any]
) -> None:
    assert_same(problem, {cell: on_two_ranks[cell] for cell in FROZEN})


@pytest.mark.parametrize("cell", BF16, ids=str)
def test_bfloat16_learns_alike(cell: Cell, problem: Problem, on_two_ranks: dict[Cell, Any]) -> None:
    result, reference = on_two_ranks[cell], problem.references[cell.model]
    print(differences(result, reference))
    assert result["losses"] == pytest.approx(reference.losses, rel=BF16_TOLERANCE)
    assert result["norms"] == pytest.approx(reference.norms, rel=4 * BF16_TOLERANCE)


@pytest.mark.parametrize("cell", BROKEN, ids=str)
def test_comparison_notices_what_is_left_out(
    cell: Cell, problem: Problem, on_two_ranks: dict[Cell, Any]
) -> None:
    result = on_two_ranks[cell]
    if cell.fault == "boundary never":  # DeepSpeed refuses to hand out a gradient
        assert "Gradients are only available immediately after backward" in result["error"]
    elif cell.fault == "round robin":  # DeepSpeed gives master weights to the wrong parameters
        assert "are not those that the model computes with" in result["error"]
    else:
        assert differences(result, problem.references[cell.model])["gradient"] > 100 * TOLERANCE


def test_one_rank_computes_the_same(problem: Problem) -> None:
    cells = (Cell(budget=1000), Cell("zero2", packed=False, budget=24), Cell("zero3"))
    assert_same(problem, compute(problem, 1, cells))


def test_three_ranks_compute_the_same(problem: Problem) -> None:
    cells = (
        Cell(packed=False),
        Cell("zero1"),
        Cell("zero2", budget=24),
        Cell("zero3", model="untied"),
    )
    assert_same(problem, compute(problem, 3, cells))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_whole_matrix(world: int, problem: Problem) -> None:
    axes = product(SHARDINGS, (True, False), BUDGETS)
    models = cycle(("untied", "tied", "tied"))  # each meets every sharding and every budget
    cells = [Cell(*axis, model) for axis, model in zip(axes, models, strict=False)]
    cells += [Cell(deepspeed, checkpointing=True, model="untied") for deepspeed in SHARDINGS]
    assert_same(problem, compute(problem, world, cells, seconds=1700))
