"""The launched program against a textbook loop: files in, losses, rates and weights out.

`test_same_mathematics.py` compares the functions of a step over many layouts; this compares what
a user runs, with its encoding, schedule, evaluation and export, in two layouts.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launching import run, write
from safetensors.torch import load_file
from tiny_tokenizers import pad_is_eos
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dist_sft import report
from dist_sft.plan import Plan

ROWS, HELD_OUT, BATCH_SIZE, STEPS, SEED = 22, 9, 8, 7, 3
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-3, 0.1, 5.0
TOLERANCE = 1e-5

pytestmark = pytest.mark.timeout(600)


class Example(NamedTuple):
    ids: list[int]
    labels: list[int]


def make_rows(first: int, count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Add {n} to {n}.", "input": "加" * (n % 7), "output": "ab" * (1 + n % 9)}
        for n in range(first, first + count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("textbook")
    tokenizer = pad_is_eos()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(make_rows(0, ROWS)))
    (folder / "held_out.json").write_text(json.dumps(make_rows(ROWS, HELD_OUT)))
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "seed": SEED,
        "data": {
            "train": [{"path": str(folder / "rows.json")}],
            "eval": [{"path": str(folder / "held_out.json")}],
            "cache_dir": str(folder / "cache"),
        },
        "train": {"batch_size": BATCH_SIZE, "steps": STEPS, "tokens_per_micro_batch": 60},
        "optimizer": {
            "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "clip": CLIP, "warmup_steps": 2,
            "schedule": "cosine",
        },
        "eval": {"every": 3},
    }  # fmt: skip


@pytest.fixture(scope="module")
def textbook(recipe: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Train in one process, padded, with the model's own loss: (a line per step, weights)."""
    tokenizer = pad_is_eos()
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)

    def encode(row: dict[str, str]) -> Example:
        question = f"Human: {row['instruction']}\n{row['input']}".strip() + "\n\nAssistant: "
        prompt = tokenizer(question).input_ids
        answer = [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
        return Example(prompt + answer, [-100] * len(prompt) + answer)

    def loss_of(examples: list[Example]) -> torch.Tensor:
        pad = max(len(example.ids) for example in examples)
        ids, labels, mask = (
            torch.tensor([[*row, *[fill] * (pad - len(row))] for row in rows])
            for rows, fill in (
                ([e.ids for e in examples], 0),
                ([e.labels for e in examples], -100),
                ([[1] * len(e.ids) for e in examples], 0),
            )
        )
        result: torch.Tensor = model(input_ids=ids, labels=labels, attention_mask=mask).loss
        return result

    rows = [encode(row) for row in make_rows(0, ROWS)]
    held_out = [encode(row) for row in make_rows(ROWS, HELD_OUT)]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    plan = Plan((ROWS,), (1.0,), SEED, BATCH_SIZE)
    lines = []
    for step in range(1, STEPS + 1):
        loss = loss_of([rows[i] for i in plan.samples(step)])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rate = LEARNING_RATE * step / 2
        if step > 2:  # five steps from the peak, which was step 2, and 0 one step after the last
            rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        line = {"loss": loss.item(), "grad_norm": norm.item(), "lr": rate}
        if step in (3, 6, 7):
            with torch.no_grad():
                line["eval_loss"] = {"held_out": loss_of(held_out).item()}
        lines.append(line)
    return lines, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("overrides", "workers"),
    [
        (["deepspeed=zero3"], 2),
        (["train.packing=off", "train.tokens_per_micro_batch=1000", "deterministic=true"], 1),
    ],
    ids=["zero3 on 2 ranks, packed", "1 rank, padded, deterministic"],
)
def test_a_launched_run_is_the_textbook_loop(
    overrides: list[str],
    workers: int,
    recipe: dict[str, Any],
    textbook: tuple[list[dict[str, Any]], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    path = write(recipe, tmp_path / "run")
    code, out, err = run(path, *overrides, workers=workers)
    assert code == 0, out + err
    lines, weights = textbook
    computed = report.read_steps(tmp_path / "run" / "metrics.jsonl")
    for line, expected in zip(computed, lines, strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=TOLERANCE), (line["step"], key)
        assert ("eval_loss" in line) == ("eval_loss" in expected)
    assert all(a["loss"] > b["loss"] for a, b in pairwise(lines[::3])), "nothing was learned"
    assert min(x["grad_norm"] for x in lines) < CLIP < max(x["grad_norm"] for x in lines)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_new_embeddings_do_not_depend_on_the_layout(recipe: dict[str, Any], tmp_path: Path) -> None:
    """ChatML brings two control tokens that this model has never seen."""
    models = []
    for sharding, workers in (("null", 1), ("zero3", 2)):
        run_dir = tmp_path / sharding
        path = write({**recipe, "train": {"steps": 1}}, run_dir)
        still = ["data.template=chatml", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]
        code, out, err = run(path, *still, f"deepspeed={sharding}", workers=workers)
        assert code == 0, out + err
        assert "the tokenizer knows 2 more tokens than the model" in out
        models.append(load_file(run_dir / "model" / "model.safetensors"))
        generation = json.loads((run_dir / "model" / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [len(pad_is_eos()) + 1]  # <|im_end|>, not EOS
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert models[0]["model.embed_tokens.weight"][-2:].any()
