"""Which parameters `model.freeze` stops training, what is said about it, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from dist_sft import checkpoint, config, manifest, shards
from dist_sft.errors import UserError
from dist_sft.metrics import FlopCounter
from dist_sft.model import freeze
from dist_sft.optim import parameter_groups

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                    num_attention_heads=2, tie_word_embeddings=tied)
    )  # fmt: skip


def frozen_by(*patterns: str, tied: bool = False) -> tuple[set[str], list[str]]:
    model, said = llama(tied=tied), []
    freeze(model, patterns, said.append)
    return {name for name, p in model.named_parameters() if not p.requires_grad}, said


def refusal_of(*patterns: str) -> str:
    with pytest.raises(UserError) as refusal:
        frozen_by(*patterns)
    return str(refusal.value)


def test_patterns_name_what_is_frozen() -> None:
    layer = {name for name, _ in llama().named_parameters() if ".layers.0." in name}
    assert len(layer) == 9
    assert frozen_by("model.embed_tokens.*", "model.layers.[0-0].*") == (
        {EMBEDDING, *layer},
        [f"frozen: 10 of 21 parameters, {160 + 656:,} of {2 * 160 + 2 * 656 + 8:,} weights"],
    )
    assert frozen_by() == (set(), [])


def test_a_tied_weight_is_frozen_by_either_name() -> None:
    both = "is the same weight as"
    assert frozen_by(HEAD, tied=True)[0] == {EMBEDDING}
    assert frozen_by(HEAD, tied=True)[1][0] == (
        f"model.freeze: {HEAD} {both} {EMBEDDING}, frozen there, too"
    )
    assert frozen_by(EMBEDDING, tied=True)[1][0] == (
        f"model.freeze: {EMBEDDING} {both} {HEAD}, frozen there, too"
    )
    assert len(frozen_by(EMBEDDING, HEAD, tied=True)[1]) == 1  # nothing that was not asked for
    assert frozen_by(HEAD)[0] == {HEAD}


def test_a_pattern_without_a_match_is_refused() -> None:
    assert refusal_of(HEAD, "model.embed_token.*") == (
        "model.freeze: 'model.embed_token.*' matches no parameter of the model; near names: "
        f"{EMBEDDING}, model.norm.weight, model.layers.1.self_attn.v_proj.weight"
    )


def test_nothing_left_to_train_is_refused() -> None:
    assert refusal_of("model.*", "lm_head.*") == (
        "model.freeze: model.*, lm_head.* leaves nothing to train: all 21 parameters are frozen"
    )


def test_what_the_model_itself_froze_stays_frozen() -> None:
    model, said = llama(), []
    model.lm_head.weight.requires_grad_(False)
    freeze(model, [], said.append)
    assert said == [
        f"the model's own code keeps 1 parameters frozen, such as {HEAD}",
        "frozen: 1 of 21 parameters, 160 of 1,640 weights",
    ]
    trained = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(trained) == 20
    assert all(p is not model.lm_head.weight for p in trained)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (HEAD, f"model.freeze: got '{HEAD}'; allowed: a list, such as [...]"),
        ([3], "model.freeze: got 3; allowed: text (put it in quotes)"),
    ],
)
def test_the_recipe_wants_a_list_of_patterns(given: Any, message: str) -> None:
    tree = {
        "run_dir": "r",
        "model": {"path": "m", "freeze": given},
        "data": {"train": [{"path": "d"}]},
    }
    with pytest.raises(UserError) as refusal:
        config.check(tree, "here")
    assert message in str(refusal.value)


def test_what_is_frozen_decides_what_is_learned() -> None:
    tree = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    old = config.check(tree, "here")
    new = config.check(tree | {"model": {"path": "m", "freeze": [HEAD]}}, "here")
    assert config.difference(old, new) == {"model.freeze.0": f'(not set) -> "{HEAD}"'}
    assert not config.may_change("model.freeze.0", old, new)
    assert old.fingerprint() != new.fingerprint()


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    model, lengths, targets = llama(), np.array([10, 30]), 7
    layer = 4 * 8 * 8 + 3 * 8 * 16
    attention = 6 * 2 * 8 * (10**2 + 30**2)
    assert FlopCounter(model)(lengths, targets) == 6 * (2 * layer * 40 + 160 * 7) + attention
    freeze(model, ["model.layers.1.*", EMBEDDING])
    expected = (6 + 4) * layer * 40 + 6 * 160 * 7 + attention
    assert FlopCounter(model)(lengths, targets) == expected
    freeze(model, [HEAD])
    assert FlopCounter(model)(lengths, targets) == expected - 2 * 160 * 7


def test_weights_frozen_when_saved_are_not_trained_on(tmp_path: Path) -> None:
    engine = SimpleNamespace(module=llama())
    content = {"format": manifest.FORMAT, "step": 3, "shapes": shards.parameter_shapes(engine)}
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    manifest.write(folder, content | {"files": {}, "frozen": [HEAD, EMBEDDING]})
    freeze(engine.module, [EMBEDDING])
    with pytest.raises(UserError) as refusal:
        checkpoint.restore(folder, engine)
    assert str(refusal.value) == (
        f"model.freeze: {HEAD} was frozen when {folder} was written, so AdamW knows nothing of "
        "it. Freeze it again, or train on in another run_dir from this run's model"
    )
