"""What only a CUDA device can show: the kernel, half precision, and the launched program on NCCL.

One GPU is enough, so everything here has one rank. `make test-gpu` runs it.
"""

import json
import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import torch
from launching import read, run, write
from matrix import Cell
from test_attention import LENGTHS, PACKABLE, WINDOW, alone, packed_inputs, rows_of, supervised
from test_same_mathematics import (
    BF16_TOLERANCE,
    SHARDINGS,
    Problem,
    assert_same,
    compute,
    differences,
    problem,
    relative,
)
from tiny_models import tiny_model
from tiny_tokenizers import pad_is_eos
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dist_sft import attention, manifest, parts, report
from dist_sft.decode import Decoder, Request
from dist_sft.errors import UserError
from dist_sft.sampling import Sampling
from dist_sft.step import explaining_memory

__all__ = ["problem"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
ON_GPU = [Cell(*axes) for axes in product(SHARDINGS, (True, False), (24, 1000))]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_kernel_computes_what_is_computed_segment_by_segment(
    dtype: torch.dtype, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, heads, sum(LENGTHS), 64, generator=generator).to(dtype)
        for heads in (8, 2, 2)
    ]
    upstream = torch.randn(1, sum(LENGTHS), 8, 64, generator=generator)

    def attend(device: torch.device, computed_in: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, computed_in).requires_grad_() for x in qkv]
        mask = None if window is None else torch.tensor(window)
        output, _ = attention.segment_attention(
            nn.Module(), *leaves, attention_mask=mask, **packed_inputs(LENGTHS, device)
        )
        output.backward(upstream.to(device, computed_in))
        assert all(x.grad is not None for x in leaves)
        return [x.float().cpu() for x in (output.detach(), *(x.grad for x in leaves))]

    for found, expected in zip(attend(GPU, dtype), attend(CPU, torch.float32), strict=True):
        assert ((found - expected).norm() / expected.norm()).item() < 1e-2


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_models_compute_the_same_in_bfloat16(name: str) -> None:
    model = tiny_model(name)
    rows, keep = rows_of(LENGTHS), supervised(LENGTHS)
    with torch.no_grad():
        expected = alone(model, rows, keep)
    model.to(GPU, torch.bfloat16)

    assert attention.prove(model, model, GPU, torch.bfloat16) == attention.Proof(
        True, "isolated bit by bit"
    )
    with torch.no_grad(), attention.implementation(model, attention.NAME):
        found = model(
            input_ids=torch.cat(rows, dim=1).to(GPU),
            logits_to_keep=torch.cat(keep, dim=1).to(GPU),
            **packed_inputs(LENGTHS, GPU),
        ).logits
    difference = (found.float().cpu() - expected).norm() / expected.norm()
    print(name, difference.item())
    assert difference < 0.05


def test_bloom_takes_the_fallback() -> None:
    model = tiny_model("bloom").to(GPU, torch.bfloat16)
    assert not attention.prove(model, model, GPU, torch.bfloat16).holds


def test_float32_computes_the_same_as_on_cpu(problem: Problem) -> None:
    assert_same(problem, compute(problem, 1, ON_GPU))


def test_bfloat16_learns_alike(problem: Problem) -> None:
    cells = [cell._replace(dtype="bfloat16") for cell in ON_GPU if cell.budget == 24]
    for cell, result in compute(problem, 1, cells).items():
        reference = problem.references[cell.model]
        print(cell, differences(result, reference))
        assert result["losses"] == pytest.approx(reference.losses, rel=BF16_TOLERANCE)
        assert result["norms"] == pytest.approx(reference.norms, rel=10 * BF16_TOLERANCE)


def test_float16_learns_alike_but_for_the_steps_that_its_loss_scale_skips(
    problem: Problem,
) -> None:
    scaled = [c for c in ON_GPU if c.deepspeed not in (None, "zero2-offload")]  # refused
    cells = [cell._replace(dtype="float16") for cell in scaled if cell.budget == 24]
    for cell, result in compute(problem, 1, cells).items():
        reference = problem.references[cell.model]
        skipped = [n for n, norm in enumerate(result["norms"], 1) if not math.isfinite(norm)]
        print(cell, "skipped", skipped, relative(result["losses"], reference.losses))
        assert len(skipped) <= 2
        assert result["losses"] == pytest.approx(reference.losses, rel=4 * BF16_TOLERANCE)


def test_out_of_memory_is_explained() -> None:
    with pytest.raises(UserError, match="zero3-offload"), explaining_memory():
        torch.empty(2**45, dtype=torch.uint8, device=GPU)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    pad_is_eos().save_pretrained(folder / "tokenizer")
    rows = [
        {"instruction": f"Add {a} and {b}.", "input": "加" * (a % 7), "output": str(a + b)}
        for a in range(8)
        for b in range(8)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }  # fmt: skip
    return {
        "model": {"config": config, "tokenizer": str(folder / "tokenizer")},
        "data": {
            "train": [{"path": str(folder / "rows.json")}],
            "eval_fraction": 0.1,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"batch_size": 8, "steps": 9, "tokens_per_micro_batch": 100},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 2, "keep": 9},
        "eval": {"every": 4},
    }


def losses(run_dir: Path) -> list[float]:
    lines = report.read_steps(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))
    return [line["loss"] for line in lines] + [
        loss for line in lines for loss in line.get("eval_loss", {}).values()
    ]


@pytest.mark.parametrize(
    ("deepspeed", "dtype"),
    [
        ("null", "bfloat16"),
        ("zero1", "bfloat16"),
        ("zero2", "bfloat16"),
        ("zero2", "float16"),
        ("zero2", "float32"),
        ("zero3", "bfloat16"),
        ("zero3", "float16"),
        ("zero2-offload", "bfloat16"),
        ("zero3-offload", "float16"),
    ],
)
def test_a_run_learns(recipe: dict[str, Any], deepspeed: str, dtype: str, tmp_path: Path) -> None:
    path = write(recipe, tmp_path / "run")
    chosen = [f"deepspeed={deepspeed}", f"model.dtype={dtype}"]
    code, out, err = run(path, *chosen, workers=1)
    assert code == 0, out + err
    curve = losses(tmp_path / "run")
    assert curve[8] < 0.9 * curve[0]
    line = report.read_steps(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0 < line["share_of_peak"] < 1
    assert 0 < sum(line["phases"].values()) <= line["seconds"]
    assert 0 < line["peak_memory_bytes"] < 2**34
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("deepspeed", ["null", "zero2", "zero3"])
def test_deterministic_runs_stop_and_continue_bit_by_bit(
    recipe: dict[str, Any], deepspeed: str, tmp_path: Path
) -> None:
    chosen = [f"deepspeed={deepspeed}", "model.dtype=bfloat16", "deterministic=true"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run_dir in (whole, stopped):
        code, out, err = run(write(recipe, run_dir), *chosen, "train.steps=9", workers=1)
        assert code == 0, out + err
    assert losses(whole) == losses(stopped)
    for step in (6, 8, 9):  # as if it had been killed in step 5
        shutil.rmtree(manifest.folder_of(stopped, step))
    (stopped / "logs/attempt-0/outcome.json").unlink()
    code, out, err = run(write(recipe, stopped), *chosen, workers=1)
    assert code == 0, out + err
    assert "continuing after step 4" in read(stopped / "logs/attempt-1/rank-0.log")
    assert losses(whole) == losses(stopped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_the_same_bytes_again(dtype: str, tmp_path: Path) -> None:
    """Drawn ones, whatever parts of them an earlier attempt has finished."""
    recipe = tiny_generation.make(tmp_path)
    drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "num_samples": 2}
    chosen, outputs = [f"model.dtype={dtype}", "deterministic=true"], []
    for name in ("whole", "again"):
        run_dir = tmp_path / name
        path = tiny_generation.write(recipe, run_dir, generate=recipe["generate"] | drawn)
        code, out, err = run(path, *chosen, workers=1, job="generate")
        assert code == 0, out + err
        outputs.append(tiny_generation.output_of(run_dir).read_bytes())
    for part in (2, 3, 11):  # as if it had been killed before
        shutil.rmtree(parts.folder_of(run_dir, part))
    tiny_generation.output_of(run_dir).unlink()
    code, out, err = run(path, *chosen, workers=1, job="generate")
    assert code == 0, out + err
    assert outputs[0] == outputs[1] == tiny_generation.output_of(run_dir).read_bytes()


def test_memory_that_does_not_suffice_splits_batches(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=2**20).to(GPU)
    told: list[tuple[int, int]] = []
    decoder = Decoder(
        model, (2,), Sampling(4), str, shrunk=lambda rows, places: told.append((rows, places))
    )
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        answers = decoder.answer([Request([3] * 4000) for _ in range(512)], 10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told, "there was room for all at once: make the prompts longer"
    assert {answer.reason for answer in answers} <= {"eos", "length"}
