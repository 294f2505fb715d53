"""Prepacked weights: the same numbers but for rounding, and no copy in memory beside them."""

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from dist_sft.decode import Decoder, Request
from dist_sft.prepack import PrepackedLinear, can_prepack, prepack
from dist_sft.sampling import Sampling
from dist_sft.weights import load

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
PROMPTS = [[3 + (7 * row + column) % (VOCAB - 3) for column in range(row)] for row in (1, 5, 17)]


@pytest.fixture(params=["llama", "qwen2", "gpt2", "bloom", "mixtral", "gemma3_text"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_but_for_rounding(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert can_prepack(dtype, CPU), "of the pinned torch"
    tiny_model(kind).to(dtype).save_pretrained(tmp_path)
    plain, packed = (load(tmp_path, dtype, CPU, prepacked=packed) for packed in (False, True))
    assert not any(isinstance(layer, PrepackedLinear) for layer in plain.modules())
    assert isinstance(packed.lm_head, PrepackedLinear)
    linear = [layer for layer in packed.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(isinstance(layer, PrepackedLinear) for layer in linear)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for rows, columns in ((1, 1), (7, 1), (3, 40), (1, 60)):
        ids = torch.arange(rows * columns).reshape(rows, columns) % VOCAB
        with torch.no_grad():
            theirs, ours = (model(input_ids=ids).logits for model in (plain, packed))
        assert (theirs - ours).abs().max() <= tolerance * theirs.abs().max()
        with torch.no_grad():
            assert torch.equal(packed(input_ids=ids).logits, ours)
    for name, weight in plain.named_parameters():
        assert torch.equal(packed.get_parameter(name), weight), name


@needs_onednn
def test_greedy_answers_are_the_same(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    answers = []
    for packed in (False, True):
        decoder = Decoder(
            load(tmp_path, torch.float32, CPU, prepacked=packed), [2], Sampling(12), str
        )
        answers.append(decoder.answer([Request(prompt) for prompt in PROMPTS], 300))
    assert answers[0] == answers[1]


def resident(weight: torch.Tensor) -> int:
    """Return how many bytes around a weight are in this process's memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, end = (int(number, 16) for number in words[0].split("-"))
            inside = first <= weight.data_ptr() < end
        elif inside and words[0] == "Rss:":
            return int(words[1]) * 1024
    raise AssertionError("the weight is nowhere")


@needs_onednn
@pytest.mark.parametrize("where", ["in a file", "changed since", "in memory"])
def test_what_a_file_has_is_let_go_and_nothing_else(where: str, tmp_path: Path) -> None:
    layer = torch.nn.Linear(1024, 1024, bias=False).requires_grad_(False)
    before = layer.weight.clone()
    if where != "in memory":
        before.numpy().tofile(tmp_path / "weight")
        stored = torch.from_file(str(tmp_path / "weight"), shared=False, size=before.numel())
        layer.weight = torch.nn.Parameter(stored.view(1024, 1024), requires_grad=False)
    if where == "changed since":
        layer.weight[7] = before[7] = 0.5
    assert layer.weight.sum() == before.sum()
    assert resident(layer.weight) >= before.nbytes
    prepack(layer)
    assert (resident(layer.weight) < before.nbytes / 4) == (where == "in a file")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    assert not can_prepack(dtype, CPU)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=dtype))
    prepack(model)
    assert type(model[0]) is torch.nn.Linear


def test_a_gpu_has_its_own_library() -> None:
    assert not can_prepack(torch.float32, torch.device("cuda"))


def test_a_torch_without_these_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_sft.prepack._onednn", object)
    assert not can_prepack(torch.float32, CPU)
    assert not can_prepack(torch.bfloat16, CPU)
