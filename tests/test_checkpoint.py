"""What one sharding saves, every other one loads: the same state, bit by bit, on any ranks."""

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from matrix import VOCABULARY, Cell, make_job, make_model
from processes import run_ranks
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from dist_sft import manifest, shards, weights
from dist_sft.model import DTYPES
from dist_sft.pieces import Reader

PROGRAM = Path(__file__).parent / "ranks" / "state.py"
pytestmark = pytest.mark.timeout(1800)  # three process groups, started by whichever test is first
STATE_KEYS = {"fp32", "exp_avg", "exp_avg_sq"}
SHARDINGS = (None, "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
EXACT = tuple(
    Cell(sharding, model=model)
    for sharding, model in zip(SHARDINGS, ("tied", "untied") * 3, strict=True)
)
BF16 = tuple(Cell(sharding, dtype="bfloat16") for sharding in SHARDINGS)
# The tied weight goes by its second name here, the untied head alone; a layer, and norms.
FREEZE = ("lm_head.weight", "model.layers.0.*", "*layernorm.weight")
FROZEN = tuple(cell._replace(freeze=FREEZE) for cell in EXACT)
FROZEN_BF16 = tuple(
    Cell(sharding, dtype="bfloat16", model="untied", freeze=FREEZE)
    for sharding in (None, "zero1", "zero2", "zero3")
)
# Convolutions as matrices, a cache of its own shape, experts in one tensor, a buffer to keep.
OTHERS = tuple(
    Cell(sharding, packed=False, model=model)
    for sharding, model in (
        (None, "gpt2"),
        ("zero2", "bloom"),
        ("zero3", "mixtral"),
        ("zero3", "deepseek_v3"),
    )
)
# All their layouts in one group, with and without frozen weights.
ODD = tuple(
    Cell(f"odd-zero{stage}", dtype=dtype, model=model, freeze=freeze)
    for stage, dtype, model, freeze in (
        (1, "float32", "tied", ()),
        (2, "bfloat16", "untied", FREEZE),
        (3, "float32", "untied", FREEZE),
        (3, "bfloat16", "tied", ()),
    )
)
FP16 = tuple(Cell(sharding, dtype="float16") for sharding in ("zero1", "zero2", "zero3"))
GROUPS = (EXACT, BF16, FROZEN, FROZEN_BF16, FP16)
CELLS = sum(GROUPS, ()) + ODD


class Loading(NamedTuple):
    """Load what `saver` saved on two ranks into another sharding on `world` ranks."""

    saver: Cell
    loader: Cell
    world: int

    def __str__(self) -> str:
        return f"{self.saver}-into-{self.loader.deepspeed}-{self.loader.dtype}-on-{self.world}"


def other_shardings(world: int, turn: int) -> list[Loading]:
    """Pair every saver with a loader `turn` places further round."""
    return [
        Loading(saver, group[(i + turn) % len(group)]._replace(model=saver.model), world)
        for group in GROUPS
        for i, saver in enumerate(group)
    ]


LOADINGS = (
    *(Loading(cell, cell, 2) for cell in CELLS),
    *(Loading(cell, cell._replace(deepspeed=None), 3) for cell in ODD),
    *(Loading(cell, cell, 1) for cell in ODD),
    Loading(FP16[0], FP16[0]._replace(dtype="bfloat16"), 3),
    Loading(BF16[1], BF16[1]._replace(dtype="float16"), 3),
    *other_shardings(1, turn=1),
    *other_shardings(3, turn=2),
)


def keys_by_name(state: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = defaultdict(set)
    for name, _, key in (entry.partition("|") for entry in state):
        keys[name].add(key)
    return keys


def is_frozen(name: str, cell: Cell) -> bool:
    names = {name}
    if cell.model == "tied" and name == "model.embed_tokens.weight":
        names.add("lm_head.weight")
    return any(fnmatchcase(n, pattern) for n in names for pattern in cell.freeze)


def as_held(frozen: torch.Tensor, cell: Cell) -> torch.Tensor:
    """Round a frozen weight as a layout does that keeps it in what it computes in."""
    return frozen.to(DTYPES[cell.dtype]).float() if cell.deepspeed else frozen


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: x for name, x in model.state_dict().items() if name not in parameters}


@dataclass(frozen=True)
class Outcome:
    """What a rank program left after saving or loading."""

    state: dict[str, torch.Tensor]
    scaler: dict[str, float]
    """Of the loss, in float16."""
    losses: list[float]
    """Of the steps after the checkpoint."""


def outcome(path: Path, losses: list[float]) -> Outcome:
    state = load_file(path)
    scaler = {key: float(state.pop(key)) for key in list(state) if key.startswith("scaler|")}
    return Outcome(state, {key.removeprefix("scaler|"): x for key, x in scaler.items()}, losses)


@dataclass(frozen=True)
class Outcomes:
    folder: Path
    saved: dict[Cell, Outcome]
    loaded: dict[Loading, Outcome]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Save and load everything on two ranks, then load on one and on three."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {n: make_model(folder / n, tied=n == "tied") for n in ("tied", "untied")}
    # Whoever loads begins with other weights: what is not loaded, frozen ones too, would show.
    others = {n: make_model(folder / f"other-{n}", tied=n == "tied", seed=1) for n in models}
    for name in (cell.model for cell in OTHERS):
        models[name] = folder / name
        other = tiny_model(name, vocab_size=VOCABULARY)
        for buffer in persistent_buffers(other).values():
            buffer.fill_(0.125)  # not what a new model has
        other.save_pretrained(folder / name)
    saved: dict[Cell, Outcome] = {}
    loaded: dict[Loading, Outcome] = {}
    for world in (2, 1, 3):
        savings = [(cell, cell, True) for cell in CELLS + OTHERS] if world == 2 else []
        loadings = [loading for loading in LOADINGS if loading.world == world]
        work = savings + [(loading.saver, loading.loader, False) for loading in loadings]
        here = folder / f"{world}-ranks"
        here.mkdir()
        states = [here / f"{number}.safetensors" for number in range(len(work))]
        tasks = [
            {
                "cell": cell._asdict(),
                "model": str(models[cell.model] if save else others[cell.model]),
                "folder": str(folder / str(saver)),
                "save": save,
                "state": str(path),
            }
            for (saver, cell, save), path in zip(work, states, strict=True)
        ]
        (here / "job.json").write_text(json.dumps(make_job(here, models, (), tasks=tasks)))
        arguments = (here / "job.json", here / "out.json")
        run_ranks(PROGRAM, *arguments, world=world, log_dir=here, seconds=600)
        losses = json.loads((here / "out.json").read_text())
        found = [outcome(path, x) for path, x in zip(states, losses, strict=True)]
        saved |= dict(zip(CELLS + OTHERS, found[: len(savings)], strict=False))
        loaded |= dict(zip(loadings, found[len(savings) :], strict=True))
    return Outcomes(folder, saved, loaded)


@pytest.mark.parametrize("loading", LOADINGS, ids=str)
def test_any_layout_loads_the_same_state(loading: Loading, outcomes: Outcomes) -> None:
    before, after = outcomes.saved[loading.saver], outcomes.loaded[loading]
    scaled = loading.saver.dtype == "float16"
    assert int(before.state["steps"]) == (1 if scaled else 3)  # two were skipped
    keys = keys_by_name(before.state)
    frozen = {name for name in keys if is_frozen(name, loading.saver)}
    assert keys.pop("steps") == {""}
    assert all(keys[n] == ({"fp32"} if n in frozen else STATE_KEYS) for n in keys)
    assert all(x.any() for key, x in before.state.items() if key.partition("|")[0] not in frozen)
    expected = {
        key: as_held(x, loading.loader) if key.partition("|")[0] in frozen else x
        for key, x in before.state.items()
    }
    assert expected.keys() == after.state.keys()
    different = [k for k, tensor in expected.items() if not torch.equal(tensor, after.state[k])]
    assert not different
    if loading.world == 2:
        assert after.losses == before.losses  # the same layout goes on bit by bit
    elif loading.saver.dtype != loading.loader.dtype:  # and float16 skips steps
        assert after.losses[0] == pytest.approx(before.losses[0], rel=5e-3)
    else:
        tolerance = 1e-6 if loading.saver.dtype == "float32" else 2e-3
        assert after.losses == pytest.approx(before.losses, rel=tolerance)


@pytest.mark.parametrize("folder", ["model", "model-in-shards"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_exported_model_has_the_weights(cell: Cell, folder: str, outcomes: Outcomes) -> None:
    exported = AutoModelForCausalLM.from_pretrained(outcomes.folder / str(cell) / folder)
    assert exported.dtype == torch.float32  # whatever it was trained in
    state = outcomes.saved[cell].state
    trained = {name: state[f"{name}|fp32"] for name, _ in exported.named_parameters()}
    assert len(trained) == sum(key.endswith("|fp32") for key in state)
    assert all(torch.equal(p, trained[name]) for name, p in exported.named_parameters())
    tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert tied == (cell.model == "tied")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS + OTHERS, ids=str)
def test_weights_to_answer_with_are_those_of_the_checkpoint(
    cell: Cell, dtype: str, outcomes: Outcomes, tmp_path: Path
) -> None:
    run_dir = outcomes.folder / str(cell)
    located = weights.locate(str(manifest.folder_of(run_dir, 3)), memo=tmp_path, say=print)
    folder = weights.ready(located, tmp_path / "weights", DTYPES[dtype], print)
    model = weights.load(folder, DTYPES[dtype], torch.device("cpu"))
    state = outcomes.saved[cell].state
    names = dict(model.named_parameters())
    assert len(names) == sum(key.endswith("|fp32") for key in state)
    for name, weight in names.items():
        assert torch.equal(weight, state[f"{name}|fp32"].to(weight.dtype)), name


@pytest.mark.parametrize("loading", LOADINGS, ids=str)
def test_the_loss_scale_goes_on_where_it_was(loading: Loading, outcomes: Outcomes) -> None:
    before, after = outcomes.saved[loading.saver].scaler, outcomes.loaded[loading].scaler
    if loading.saver.dtype == "float16":
        found = [before[key] for key in shards.SCALER]
        assert found == [2.0**17, 3, 1, 1]  # it was halved once, at the second overflow
    if loading.saver.dtype == loading.loader.dtype:
        assert after == before
    elif loading.loader.dtype == "float16":  # from a run without one it begins anew
        assert (after["cur_scale"], after["cur_iter"], after["cur_hysteresis"]) == (2.0**16, 0, 2)
    else:
        assert not after


def test_a_restored_loss_scaler_behaves_as_the_one_that_was_saved() -> None:
    settings = {"init_scale": 2**16, "scale_window": 5, "min_scale": 1, "delayed_shift": 2}

    def new() -> SimpleNamespace:
        scaler = DynamicLossScaler(**settings, consecutive_hysteresis=False)
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))

    rng = random.Random(0)
    overflows = [rng.random() < 0.2 for _ in range(60)]
    scales: list[float] = []
    first = new()
    with patch.object(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1)):
        for step, overflow in enumerate(overflows):
            saved = json.loads(json.dumps(shards.loss_scale(first)))
            second = new()
            shards.set_loss_scale(second, saved)
            for each in (first, second):
                each.optimizer.loss_scaler.update_scale(overflow)
            assert shards.loss_scale(first) == shards.loss_scale(second), step
            assert vars(first.optimizer.loss_scaler) == vars(second.optimizer.loss_scaler)
            scales.append(first.optimizer.loss_scaler.loss_scale)
    assert len(set(scales)) > 3
    assert any(a < b for a, b in pairwise(scales)), "it rises, too"


@pytest.mark.parametrize("cell", FROZEN + FROZEN_BF16, ids=str)
def test_frozen_weights_stay_what_they_were(cell: Cell, outcomes: Outcomes) -> None:
    initial = load_file(outcomes.folder / cell.model / "model.safetensors")
    state = outcomes.saved[cell].state
    frozen = {name for name in initial if is_frozen(name, cell)}
    assert len(frozen) == 16
    reader = Reader(manifest.folder_of(outcomes.folder / str(cell), 3))
    assert reader.frozen == frozen
    for name, weight in initial.items():
        before = as_held(weight, cell)
        assert torch.equal(state[f"{name}|fp32"], before) == (name in frozen), name
        assert torch.equal(reader.tensor(name), state[f"{name}|fp32"]), name


@pytest.mark.parametrize("folder", ["model", "model-in-shards"])
@pytest.mark.parametrize("cell", OTHERS, ids=str)
def test_other_architectures_export(cell: Cell, folder: str, outcomes: Outcomes) -> None:
    place = outcomes.folder / str(cell) / folder
    exported, report = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not any(report.values()), report
    state = outcomes.saved[cell].state
    names = [name for name, _ in exported.named_parameters()]
    assert sorted(f"{name}|fp32" for name in names) == sorted(k for k in state if "|fp32" in k)
    assert all(torch.equal(p, state[f"{n}|fp32"]) for n, p in exported.named_parameters())
    buffers = persistent_buffers(exported)
    assert bool(buffers) == (cell.model == "deepseek_v3")
    assert all((buffer == 0.125).all() for buffer in buffers.values())
    assert exported.config.use_cache
    assert exported.generation_config.eos_token_id == [3]
