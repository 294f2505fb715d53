"""Generation by vLLM, which no test machine has: what goes through the seam, and back."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from generating import rows_in, work
from tiny_generation import BROKEN, ROWS, output_of, write

from dist_sft import runs
from dist_sft.errors import UserError


class FakeLLM:
    """Answer as vLLM's `LLM` does, in an order of its own, with words that say what was asked."""

    made: dict[str, Any]
    asked: list[tuple[list[int], Any]]

    def __init__(self, **settings: Any) -> None:
        FakeLLM.made, FakeLLM.asked = settings, []

    def generate(
        self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool
    ) -> list[SimpleNamespace]:
        assert not use_tqdm
        said = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            FakeLLM.asked.append((prompt["prompt_token_ids"], one))
            reason, stop_reason, ids = [
                ("stop", one.stop_token_ids[0], [5, 6, one.stop_token_ids[0]]),
                ("stop", "END", [5, 6, 7]),
                ("length", None, [5] * one.max_tokens),
            ][number % 3]
            text = f"seed {one.seed}"
            completion = SimpleNamespace(
                text=text, token_ids=ids, finish_reason=reason, stop_reason=stop_reason
            )
            said.append(SimpleNamespace(outputs=[completion]))
        return said


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = ModuleType("vllm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return FakeLLM


GENERATE = {
    "engine": "vllm", "temperature": 0.7, "top_p": 0.9, "num_samples": 2, "stop": ["END"],
    "max_new_tokens": 9, "repetition_penalty": 1.1,
}  # fmt: skip


def test_what_vllm_is_asked_and_what_becomes_of_its_answers(
    recipe: dict[str, Any], vllm: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(recipe, tmp_path / "run", generate=GENERATE, seed=2**62)
    assert work(path, monkeypatch).code == runs.FINISHED
    made = vllm.made
    assert (made["model"], made["dtype"]) == (recipe["model"]["path"], "float32")
    asked = ROWS - len(BROKEN)
    assert len(vllm.asked) == 2 * asked
    for _, one in vllm.asked:
        assert (one.max_tokens, one.temperature, one.top_p, one.top_k) == (9, 0.7, 0.9, -1)
        assert (one.repetition_penalty, one.stop, one.ignore_eos) == (1.1, ["END"], True)
        assert 0 <= one.seed < 2**31
    assert len({one.seed for _, one in vllm.asked}) == 2 * asked, "every sample has its own noise"
    rows = [row for row in rows_in(output_of(tmp_path / "run").read_bytes()) if "error" not in row]
    assert [row["generated"] for row in rows] == [f"seed {one.seed}" for _, one in vllm.asked]
    assert {(row["finish_reason"], row["generated_tokens"]) for row in rows} == {
        ("eos", 2), ("stop", 3), ("length", 9),
    }  # fmt: skip
    assert [row["prompt_tokens"] for row in rows] == [len(ids) for ids, _ in vllm.asked]


def test_the_noise_of_a_row_is_the_same_in_another_part(
    recipe: dict[str, Any], vllm: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for part_rows in (8, 50):
        run_dir = tmp_path / f"run-{part_rows}"
        path = write(recipe, run_dir, generate=GENERATE | {"part_rows": part_rows})
        assert work(path, monkeypatch).code == runs.FINISHED
        texts.append([row["generated"] for row in rows_in(output_of(run_dir).read_bytes())])
    assert texts[0] == texts[1]


def test_without_vllm_the_recipe_is_refused(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    path = write(recipe, tmp_path / "run", generate={"engine": "vllm"})
    with pytest.raises(UserError, match=r"generate\.engine: vllm cannot be imported .* hf"):
        work(path, monkeypatch)
    assert not output_of(tmp_path / "run").exists()
