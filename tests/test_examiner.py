"""Prompts that are answered in the middle of training: the right answers, and no trace of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import VOCABULARY, Cell, make_job, make_model
from processes import run_ranks
from tiny_models import tiny_model
from tiny_tokenizers import pad_is_eos
from transformers import AutoModelForCausalLM

from dist_sft.asking import ask, check_room, is_exact, read_prompts
from dist_sft.chat import Encoder, load_template
from dist_sft.decode import Answer
from dist_sft.errors import UserError
from dist_sft.examiner import Examiner

PROGRAM = Path(__file__).parent / "ranks" / "examined.py"
PROMPTS = [[5, 6, 7], [9, 11, 13, 15, 17], [40], [1, 4, 7, 10], [60, 61]]
HOW = {"stop_ids": [3], "max_new_tokens": 9, "batch_tokens": 40}  # not all of them at once

FULL = (
    Cell(),
    Cell("zero1", model="untied"),
    Cell("zero2"),
    Cell("zero3", checkpointing=True),
    Cell("odd-zero3", model="untied"),
    Cell(packed=False, model="gpt2"),  # which has dropout
    Cell("zero3", packed=False, model="gpt2"),
)
HALF = (
    Cell(dtype="bfloat16", checkpointing=True),
    Cell("zero2", dtype="bfloat16"),
    Cell("zero3", dtype="bfloat16"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: make_model(folder / name, tied=name == "tied") for name in ("tied", "untied")}
    tiny_model("gpt2", vocab_size=VOCABULARY).save_pretrained(folder / "gpt2")
    return made | {"gpt2": folder / "gpt2"}


@pytest.fixture(scope="module")
def results(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Cell, list[dict[str, Any]]]:
    """Train every cell on two ranks: without questions, and with them."""
    folder = tmp_path_factory.mktemp("examined")
    cells = FULL + HALF
    job = make_job(folder, models, cells, prompts=PROMPTS, **HOW)
    job["optimizer"] |= {"lr": 0.03, "warmup_steps": 0}  # other answers after four steps
    (folder / "job.json").write_text(json.dumps(job))
    files = (folder / "job.json", folder / "out.json")
    run_ranks(PROGRAM, *files, world=2, log_dir=folder, seconds=600)
    return dict(zip(cells, json.loads((folder / "out.json").read_text()), strict=True))


def answers_of(folder: Path, dtype: torch.dtype) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    answers = ask(model, PROMPTS, HOW["stop_ids"], str, HOW["max_new_tokens"], HOW["batch_tokens"])
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("cell", FULL + HALF, ids=str)
def test_training_is_the_same_bit_by_bit(cell: Cell, results: dict[Cell, Any]) -> None:
    without, asked = results[cell]
    assert len(without["losses"]) == 9
    assert without["losses"] == asked["losses"]


@pytest.mark.parametrize("cell", FULL + HALF, ids=str)
def test_answers_are_those_of_the_model_alone(
    cell: Cell, results: dict[Cell, Any], models: dict[str, Path]
) -> None:
    _, asked = results[cell]
    *before, last = asked["answers"]
    assert [answers is None for answers in before] == [False, True] * 4, "every second is stopped"
    if cell.dtype == "float32" or cell.deepspeed:  # autocast rounds at other places
        dtype = getattr(torch, cell.dtype)
        assert before[0] == answers_of(models[cell.model], dtype)
    assert last != before[0], "it has learned meanwhile"


def encoder_of(template: str = "human-assistant") -> Encoder:
    tokenizer = pad_is_eos()
    return Encoder(load_template(template, tokenizer), tokenizer, max_length=9, learn="last")


def test_rows_of_any_format_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": " So long. ", "weight": 0},
    ]
    rows = [{"instruction": "Name it.", "input": "It", "output": "Paris"}, {"messages": messages}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(str(file), encoder_of())
    assert [pad_is_eos().decode(ids) for ids in prompts.ids] == [
        "Human: Name it.\nIt\n\nAssistant: ",
        "Human: Hi\n\nAssistant: Hello.<|endoftext|>\n\nHuman: Bye\n\nAssistant: ",
    ]
    assert prompts.expected == ["Paris", " So long. "]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 1: "),
        ('{"instruction": "x", "output": ""}', "row 1: the row with columns instruction, output"),
        ('{"prompt": "x"}', "row 1: the row with columns prompt"),
    ],
)
def test_a_broken_row_is_named(row: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"instruction": "x", "output": "y"}\n' + row + "\n")
    with pytest.raises(UserError) as refused:
        read_prompts(str(file), encoder_of())
    assert str(refused.value).startswith(f"eval.prompts={file}: {message}")


def test_prompts_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"instruction": "x", "output": "y"}]))
    prompts = read_prompts(str(file), encoder_of())
    model = tiny_model("llama", max_position_embeddings=30)
    check_room(prompts, 30 - len(prompts.ids[0]), model)
    with pytest.raises(UserError) as refused:
        check_room(prompts, 31 - len(prompts.ids[0]), model)
    assert str(refused.value).startswith("eval.max_new_tokens: got ")
    assert str(refused.value).endswith(f"allowed: up to {30 - len(prompts.ids[0])}")
    check_room(prompts, 1000, tiny_model("bloom"))


def test_what_is_exact() -> None:
    assert is_exact(" Paris\n", "Paris")
    assert not is_exact("paris", "Paris")


def test_samples_are_written_to_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    rows = [{"instruction": name, "output": "好"} for name in ("x", "y")]
    file.write_text(json.dumps(rows))
    examiner = Examiner(
        read_prompts(str(file), encoder_of()), encoder_of(), pad_is_eos().decode, "sdpa", 9, 99
    )
    answers = [Answer("好 ", [1], "eos"), Answer("hm", [2], "length")]
    assert examiner.score(answers) == 0.5
    examiner.write(tmp_path, 7, answers)
    lines = (tmp_path / "samples" / "step-00000007.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "step": 7, "prompt": f"Human: {name}\n\nAssistant: ", "expected": "好",
            "generated": text, "finish_reason": reason, "exact": exact,
        }
        for name, text, reason, exact in (("x", "好 ", "eos", True), ("y", "hm", "length", False))
    ]  # fmt: skip
