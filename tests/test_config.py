"""A recipe says what it means, or is refused with every mistake in it and what to write instead."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from dist_sft import zero
from dist_sft.config import (
    LENGTH,
    MAY_CHANGE,
    Recipe,
    Section,
    Source,
    check,
    difference,
    may_change,
    read_config_json,
    read_recipe,
)
from dist_sft.errors import UserError
from dist_sft.recipe_errors import FOREIGN, LONGEST_SHOWN
from dist_sft.recipe_yaml import apply_override, read_tree

ROOT = Path(__file__).parents[1]
SHARDING = {"zero_optimization": {"stage": 2}}


def tree(**settings: Any) -> dict[str, Any]:
    """Return a complete small recipe; `a__b=1` sets a.b."""
    result: dict[str, Any] = {
        "run_dir": "runs/x",
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.json"}]},
    }
    for key, value in settings.items():
        *parents, last = key.split("__")
        node = result
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return result


def mistakes(recipe: dict[str, Any]) -> list[str]:
    """Return the lines of the refusal, without the headline."""
    with pytest.raises(UserError) as refusal:
        check(recipe, "recipe.yaml")
    headline, *lines = str(refusal.value).split("\n  ")
    noun = "mistake" if len(lines) == 1 else "mistakes"
    assert headline == f"{len(lines)} {noun} in recipe.yaml:"
    return lines


def mistake(**settings: Any) -> str:
    (line,) = mistakes(tree(**settings))
    return line


def recipe(**settings: Any) -> Recipe:
    return check(tree(**settings), "recipe.yaml")


# ---- what was given, what is allowed ---------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed: got -1; allowed: 0 or more"),
        ({"seed": 2**63}, f"seed: got {2**63}; allowed: less than {2**63}"),
        ({"seed": "one"}, "seed: got 'one'; allowed: a whole number"),
        ({"run_dir": 3}, "run_dir: got 3; allowed: text (put it in quotes)"),
        ({"run_dir": None}, "run_dir: got null; allowed: text (put it in quotes)"),
        (
            {"optimizer__schedule": "const"},
            "optimizer.schedule: got 'const'; allowed: 'constant', 'linear' or 'cosine' "
            "(did you mean 'constant'?)",
        ),
        (
            {"job": "trian"},
            "job: got 'trian'; allowed: 'train' or 'generate' (did you mean 'train'?)",
        ),
        ({"deterministic": "maybe"}, "deterministic: got 'maybe'; allowed: true or false"),
        ({"deterministic": []}, "deterministic: got []; allowed: true or false"),
        ({"threads_per_worker": 0}, "threads_per_worker: got 0; allowed: 'auto' or 1 or more"),
        (
            {"threads_per_worker": "many"},
            "threads_per_worker: got 'many'; allowed: 'auto' or a whole number",
        ),
        ({"train__batch_size": True}, "train.batch_size: got true; allowed: a whole number"),
        ({"train__steps": 1.5}, "train.steps: got 1.5; allowed: a whole number"),
        ({"train__epochs": 0}, "train.epochs: got 0; allowed: more than 0.0"),
        ({"train__epochs": "2"}, "train.epochs: got '2'; allowed: a number"),
        (
            {"train__packing": "onn"},
            "train.packing: got 'onn'; allowed: 'auto', 'on' or 'off' (did you mean 'on'?)",
        ),
        ({"train": None}, "train: got null; allowed: settings of its own, such as "
                          "{batch_size: ...}"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr: got inf; allowed: a finite number"),
        ({"optimizer__beta1": 1.0}, "optimizer.beta1: got 1.0; allowed: less than 1.0"),
        ({"optimizer__min_lr_ratio": 2.0}, "optimizer.min_lr_ratio: got 2.0; allowed: 1.0 or less"),
        ({"data__train": []}, "data.train: got []; allowed: at least one item"),
        ({"data__train": "a.json"}, "data.train: got 'a.json'; allowed: a list, such as [...]"),
        (
            {"data__train": ["a.json"]},
            "data.train.0: got 'a.json'; allowed: settings of its own, such as {path: ...}",
        ),
        ({"data__train": [{"name": "a"}]}, "data.train.0.path: missing; it has no default"),
        (
            {"data__train": [{"path": "a", "weight": 0.0}]},
            "data.train.0.weight: got 0.0; allowed: more than 0.0",
        ),
        (
            {"trackers": ["tensorbord"]},
            "trackers: got 'tensorbord'; allowed: 'tensorboard', 'wandb', 'mlflow', 'comet_ml', "
            "'aim', 'clearml', 'dvclive', 'swanlab' or 'trackio' (did you mean 'tensorboard'?)",
        ),
        ({"model__config": 5}, "model.config: got 5; Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_says_what_was_given_and_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    assert mistake(**settings) == message


def test_shows_only_the_beginning_of_a_long_value() -> None:
    given = repr("x" * 1000)[:LONGEST_SHOWN]
    assert mistake(seed="x" * 1000) == f"seed: got {given}...; allowed: a whole number"


def test_refuses_a_key_that_is_no_word() -> None:
    assert mistakes(tree() | {7: 1}) == ["7: got 7; allowed: keys that are words"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {}},
            "model: set exactly one of path (a model) and config (random weights)",
        ),
        (
            {"model": {"path": "m", "config": {"model_type": "llama"}}},
            "model: set exactly one of path (a model) and config (random weights)",
        ),
        (
            {"model": {"config": {"model_type": "llama"}}},
            "model: a model made from config needs tokenizer: a folder or hub name",
        ),
        (
            {"model": {"config": {}, "tokenizer": "t"}},
            "model: config needs model_type, for example 'llama'",
        ),
        (
            {"data__eval": [{"path": "e"}], "data__eval_fraction": 0.1},
            "data: set eval or eval_fraction, not both",
        ),
        (
            {"data__eval": [{"path": "e", "weight": 2.0}]},
            "data: weight has no meaning in eval: every row counts once",
        ),
        (
            {"data__eval": [{"path": "a/e.json"}, {"path": "b/e.json"}]},
            "data: eval sources need different names, got ['e', 'e']: set eval.N.name",
        ),
        (
            {"train__epochs": 1, "train__steps": 1},
            "train: set epochs or steps, not both (the other one: null)",
        ),
        (
            {"optimizer__warmup_ratio": 0.1, "optimizer__warmup_steps": 5},
            "optimizer: set warmup_ratio or warmup_steps, not both",
        ),
        (
            {"eval__every": 10},
            "recipe: eval.every is set but there is nothing to evaluate: "
            "set data.eval, data.eval_fraction or eval.prompts",
        ),
        (
            {"eval__max_new_tokens": 10},
            "recipe: eval.max_new_tokens has no effect without eval.prompts",
        ),
        (
            {"model__dtype": "float16"},
            "recipe: model.dtype float16 needs loss scaling, which comes with DeepSpeed: "
            "set deepspeed: zero1, zero2 or zero3, or model.dtype: bfloat16",
        ),
        (
            {"optimizer__schedule": "constant", "optimizer__min_lr_ratio": 0.1},
            "recipe: optimizer.min_lr_ratio has no effect with schedule: constant; leave it out, "
            "or set schedule: linear or cosine",
        ),
        (
            {"model": {"config": {"model_type": "llama"}, "tokenizer": "t", "revision": "main"}},
            "recipe: model.revision is for a model.path on the hub, and there is none",
        ),
        (
            {"model__dtype": "float16", "deepspeed": "zero2-offload"},
            "recipe: model.dtype float16 with an offloaded optimizer needs ZeRO stage 3: below, "
            "DeepSpeed 0.19 skips every step after the first overflow. Set deepspeed: "
            "zero3-offload, or model.dtype: bfloat16",
        ),
    ],
)
def test_refuses_settings_that_contradict_each_other(
    settings: dict[str, Any], message: str
) -> None:
    assert mistake(**settings) == message


def test_reports_every_mistake_at_once() -> None:
    lines = mistakes(
        {
            "sed": 1,
            "model": {"path": "m", "dtype": "fp8"},
            "data": {"train": [{"path": "a"}, {"pth": "b"}]},
            "optimizer": {"lr": -1.0},
        }
    )
    assert [line.partition(":")[0] for line in lines] == [
        "run_dir",
        "model.dtype",
        "data.train.1.path",
        "data.train.1.pth",
        "optimizer.lr",
        "sed",
    ]


# ---- unknown keys ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser": {}}, "optimiser: unknown key (did you mean 'optimizer'?)"),
        ({"evaluation": {"every": 2}}, "evaluation: unknown key (did you mean 'eval'?)"),
        ({"data__evaluation": []}, "data.evaluation: unknown key (did you mean 'eval'?)"),
        (
            {"data__eval_fractions": 0.1},
            "data.eval_fractions: unknown key (did you mean 'eval_fraction'?)",
        ),
        (
            {"optimizer__warmup": 0.1},
            "optimizer.warmup: unknown key (did you mean 'warmup_ratio'?)",
        ),
        ({"train__batchsize": 1}, "train.batchsize: unknown key (did you mean 'batch_size'?)"),
        ({"train__clip": 1.0}, "train.clip: unknown key (did you mean 'optimizer.clip'?)"),
        (
            {"checkpoint__xyz": 1},
            "checkpoint.xyz: unknown key; allowed: every, minutes, keep, keep_every, asynchronous, "
            "on_stop, mode, verify",
        ),
        (
            {"learning_rate": 1e-4},
            "learning_rate: unknown key; in dist_sft this is optimizer.lr: 0.0001",
        ),
        (
            {"train__lr_scheduler_type": "linear"},
            "train.lr_scheduler_type: unknown key; in dist_sft this is optimizer.schedule: linear",
        ),
        (
            {"dataset": "rows.json"},
            "dataset: unknown key; in dist_sft this is data.train: [{path: rows.json}]",
        ),
        (
            {"datasets": [{"path": "rows.json"}]},
            "datasets: unknown key; in dist_sft this is data.train: [{path: ...}]",
        ),
        (
            {"model__trust_remote": True, "gradient_checkpointing": True},
            "gradient_checkpointing: unknown key; in dist_sft this is "
            "model.gradient_checkpointing: true",
        ),
        (
            {"resume_from_checkpoint": True},
            "resume_from_checkpoint: unknown key; in dist_sft this is nothing: the same command "
            "again continues the run",
        ),
    ],
)
def test_says_what_an_unknown_key_is_called(settings: dict[str, Any], message: str) -> None:
    assert message in mistakes(tree(**settings))


@pytest.mark.parametrize(
    ("settings", "product"),
    [
        ({"per_device_train_batch_size": 4}, "4 x number of workers, so 8 on two"),
        ({"gradient_accumulation_steps": 8}, "per-device size x 8 x number of workers"),
        (
            {"train__micro_batch_size": 4, "train__gradient_accumulation_steps": 8},
            "4 x 8 x number of workers, so 64 on two",
        ),
        ({"per_device_train_batch_size": "auto"}, "per-device size x number of workers"),
    ],
)
def test_works_out_the_batch_size_of_other_programs(settings: dict[str, Any], product: str) -> None:
    lines = mistakes(tree(**settings))
    assert len(lines) == len(settings)
    for line in lines:
        assert f": unknown key; set train.batch_size: {product} (examples per" in line


def settings_of(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every setting by its dotted path, sections and list items included."""
    found = {}
    for name, field in section.model_fields.items():
        found[f"{prefix}{name}"] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= settings_of(field.annotation, f"{prefix}{name}.")
    return found


def test_foreign_names_lead_to_keys_that_exist() -> None:
    known = settings_of(Recipe)
    for target in FOREIGN.values():
        assert target.startswith("nothing: ") or target.partition(":")[0] in known, target


def test_what_may_change_are_settings_that_exist() -> None:
    assert settings_of(Recipe).keys() >= MAY_CHANGE | LENGTH


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"deepspeed": None}, True),
        ({"deepspeed": "zero3-offload"}, True),
        ({"deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": True}}}, True),
        ({"trackers": ["wandb", "mlflow"]}, True),
        ({"data__cache_dir": "/scratch"}, True),
        ({"eval__prompts": "prompts.jsonl", "eval__max_new_tokens": 5}, True),
        ({"train__tokens_per_micro_batch": 1}, True),
        ({"train__batch_size": 1}, False),
        ({"data__max_length": 1}, False),
        ({"deterministic": True}, False),
    ],
)
def test_what_may_change_includes_all_that_is_below(changes: dict[str, Any], allowed: bool) -> None:
    before = {"deepspeed": "zero2", "trackers": ["tensorboard"]}
    old, new = recipe(**before), recipe(**before | changes)
    keys = difference(old, new)
    assert keys
    assert all(may_change(key, old, new) for key in keys) == allowed


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ({"steps": 4}, {"steps": 5}, True),
        ({"steps": 4}, {"steps": 3}, False),
        ({"epochs": 1.0}, {"epochs": 1.5}, True),
        ({"epochs": 2}, {"epochs": 1}, False),
        ({}, {"epochs": 2}, True),
        ({"epochs": 2}, {}, False),
        ({"epochs": 1}, {"steps": 1000}, False),
        ({"steps": 1}, {"epochs": 1000}, False),
        ({}, {"steps": 1000}, False),
    ],
)
def test_a_run_may_become_longer_where_no_step_depends_on_its_end(
    before: dict[str, Any], after: dict[str, Any], allowed: bool
) -> None:
    def permitted(optimizer: dict[str, Any], changes: dict[str, Any]) -> bool:
        old = recipe(train=before, optimizer=optimizer)
        new = recipe(train=after, optimizer=optimizer | changes)
        return all(may_change(key, old, new) for key in difference(old, new))

    assert permitted({"schedule": "constant"}, {}) == allowed
    assert permitted({"schedule": "constant", "warmup_steps": 3}, {}) == allowed
    assert not permitted({"schedule": "constant", "warmup_ratio": 0.1}, {})
    assert not permitted({"schedule": "constant"}, {"schedule": "linear"})
    assert not permitted({"schedule": "constant"}, {"warmup_steps": 3})
    assert not permitted({"schedule": "cosine"}, {})
    assert not permitted({"schedule": "cosine"}, {"schedule": "constant"})


# ---- DeepSpeed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "deepspeed.zero_optimization: missing; it has no default"),
        ([1], "deepspeed: got [1]; allowed: settings of its own, such as "
              "{zero_optimization: ...}"),
        (
            SHARDING | {"train_batch_size": 32, "gradient_clipping": 1.0},
            "deepspeed: only zero_optimization is allowed here: gradient_clipping belongs in the "
            "recipe as optimizer.clip; train_batch_size belongs in the recipe as train.batch_size",
        ),
        (
            {"zero_optimisation": {"stage": 2}},
            "deepspeed: only zero_optimization is allowed here: unknown key zero_optimisation "
            "(did you mean 'zero_optimization'?)",
        ),
        (
            SHARDING | {"x": 1, 2: 3},
            "deepspeed: only zero_optimization is allowed here: unknown key 2; unknown key x",
        ),
        (
            {"zero_optimization": {"stage": 4}},
            "deepspeed.zero_optimization.stage: got 4; allowed: 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            "deepspeed.zero_optimization: stage 0 is no sharding: write deepspeed: null in the "
            "recipe",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "deepspeed.zero_optimization: reduce_bucket_size: 'auto' becomes hidden_size squared, "
            "which means hundreds of tiny messages for a small model; give a number (50000000 to "
            "500000000)",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_buckt_size": 1}},
            "deepspeed.zero_optimization.reduce_buckt_size: unknown key "
            "(did you mean 'reduce_bucket_size'?)",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "deepspeed.zero_optimization.offload_param: offload to nvme is not supported; allowed: "
            "cpu, none",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "deepspeed.zero_optimization: offload_param needs stage 3, got stage 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "deepspeed.zero_optimization: round_robin_gradients: true is not supported, as "
            "DeepSpeed 0.19 then gives its master weights to the wrong parameters whenever they "
            "are read, and checkpoints and models would be scrambled; allowed: false",
        ),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": 501}},
            "deepspeed.zero_optimization: allgather_bucket_size: got 501; allowed: even numbers",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_file", [False, True])
def test_refuses_a_deepspeed_file_that_says_too_much(
    content: Any, message: str, as_file: bool, tmp_path: Path
) -> None:
    given = content
    if as_file:
        given = str(tmp_path / "ds.json")
        Path(given).write_text(json.dumps(content))
        # Keys at its top have a place elsewhere: which file they have to leave is a part of that.
        message = message.replace(": only zero", f": {given!r}: only zero")
    assert mistake(deepspeed=given) == message


def test_refuses_a_deepspeed_file_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert mistake(deepspeed=str(broken)).startswith(
        f"deepspeed: {str(broken)!r}: the file is not valid JSON: "
    )
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    assert "the file is not valid JSON" in mistake(deepspeed=str(binary))
    long = "x" * 300
    assert mistake(deepspeed=long) == f"deepspeed: {long!r}: cannot be read: File name too long"


@pytest.mark.parametrize("missing", ["zero4", "."])
def test_names_the_strategies_that_exist(missing: str) -> None:
    line = mistake(deepspeed=missing)
    assert line.startswith(f"deepspeed: {missing!r}: no file of this name; allowed: a JSON file")
    assert all(name in line for name in ("null", "zero1", "zero2", "zero3", "zero3-offload"))
    assert ("did you mean" in line) == (missing == "zero4")


def test_every_key_that_deepspeed_would_read_has_a_place_in_the_recipe() -> None:
    for key, place in zero.BELONGS_TO_RECIPE.items():
        line = mistake(deepspeed=SHARDING | {key: 1})
        head = "deepspeed: only zero_optimization is allowed here: "
        if place.startswith("nothing: "):
            assert line == f"{head}{key} can go, {place.removeprefix('nothing: ')}"
        else:
            assert line == f"{head}{key} belongs in the recipe as {place}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deepspeed_configs").iterdir()), ids=lambda p: p.stem
)
def test_shipped_sharding_strategies_are_found_by_file_and_by_name(path: Path) -> None:
    by_file = recipe(deepspeed=str(path))
    assert by_file.deepspeed is not None
    assert by_file == recipe(deepspeed=path.stem)
    assert f"zero{by_file.deepspeed.zero_optimization.stage}" in path.stem
    assert by_file.deepspeed.zero_optimization.offloads_optimizer == ("offload" in path.stem)


def test_the_wheel_carries_the_sharding_strategies() -> None:
    """`zero.shipped` looks inside the package first: the wheel must put the folder there."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert wheel["packages"] == ["dist_sft"]
    assert wheel["force-include"] == {
        "deepspeed_configs": "dist_sft/deepspeed_configs",
        "slurm": "dist_sft/slurm_files",
    }


def test_a_package_without_a_checkout_finds_its_sharding_strategies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "dist_sft"
    (package / "deepspeed_configs").mkdir(parents=True)
    (package / "deepspeed_configs" / "zero2.json").write_text("{}")
    monkeypatch.setattr(zero, "__file__", str(package / "zero.py"))
    assert zero.shipped() == {"zero2": package / "deepspeed_configs" / "zero2.json"}


# ---- YAML and overrides ----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert read_recipe(path).run_dir.startswith("runs/")


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_scalars_as_people_mean_them(tmp_path: Path) -> None:
    path = written(tmp_path, "a: off\nb: 1e-4\nc: true\nd: 1.5E+3\ne: null\nf: 12\ng: yes\nh: -2e2")
    assert read_tree(path) == {
        "a": "off", "b": 1e-4, "c": True, "d": 1500.0, "e": None, "f": 12, "g": "yes", "h": -200.0,
    }  # fmt: skip


def test_packing_takes_the_words_it_documents() -> None:
    for word in ("auto", "on", "off"):
        settings = tree()
        apply_override(settings, f"train.packing={word}")
        assert check(settings, "x").train.packing == word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping of settings, got NoneType"),
        ("- a", "must hold a mapping of settings, got list"),
        ("a: [", "is not valid YAML: "),
        ("train: {steps: 1}\nseed: 0\ntrain: {epochs: 1}",
         "the key 'train' is here a second time"),
        ("? [a]\n: 1", "is not valid YAML: "),
    ],
)  # fmt: skip
def test_refuses_text_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=r"recipe\.yaml") as refusal:
        read_recipe(path)
    assert message in str(refusal.value)


def test_refuses_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"
    with pytest.raises(UserError, match=f"^no recipe at {missing}: give the path of a YAML file$"):
        read_recipe(missing)
    with pytest.raises(UserError, match=f"^cannot read the recipe {tmp_path}: "):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    with pytest.raises(UserError, match=r"^cannot read the recipe .*latin\.yaml: "):
        read_recipe(tmp_path / "latin.yaml")


def test_overrides_reach_any_setting(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(tree(optimizer=None)))
    overridden = read_recipe(
        path,
        [
            "optimizer.lr=1e-4",
            "optimizer.clip=null",
            "data.train.0.path=b=c.json",
            "data.train.0.weight=0.5",
            "data.eval=[{path: e.json}, {path: f.json, name: other}]",
            "data.eval.0.name=first",
            "trackers=[tensorboard]",
            "model.config=null",
            "deterministic=true",
            "train.steps=3",
            "train.steps=4",
        ],
    )
    assert overridden.optimizer.lr == 1e-4
    assert overridden.optimizer.clip is None
    assert overridden.data.train[0].path == "b=c.json"
    assert overridden.data.train[0].weight == 0.5
    assert [source.label for source in overridden.data.eval] == ["first", "other"]
    assert overridden.trackers == ("tensorboard",)
    assert overridden.deterministic
    assert overridden.train.steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--lr", "is not of the form dotted.key=value, for example optimizer.lr=1e-4"),
        ("=3", "is not of the form dotted.key=value, for example optimizer.lr=1e-4"),
        ("train..steps=3", "is not of the form dotted.key=value, for example optimizer.lr=1e-4"),
        ("seed=[", "is not valid YAML"),
        ("data.train.1.path=x", "data.train has no item '1', allowed: 0 to 0"),
        ("data.train.-1.path=x", "data.train has no item '-1', allowed: 0 to 0"),
        ("data.train.1={path: x}", "data.train has no item '1', allowed: 0 to 0"),
        ("trackers.0=wandb", "trackers has no item '0', allowed: none, the list is empty"),
        ("run_dir.x=1", "run_dir is 'runs/x' and has no settings in it"),
        ("run_dir.x.y=1", "run_dir is 'runs/x' and has no settings in it"),
    ],
)
def test_refuses_overrides_that_have_no_place(override: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        apply_override(tree(trackers=[]), override)
    assert repr(override) in str(refusal.value)
    assert message in str(refusal.value)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text(json.dumps(SHARDING))
    expanded = recipe(
        run_dir="~/run",
        model__path="~/m",
        model__tokenizer="~",
        data__train=[{"path": "~/a.json"}, {"path": "a~/b.json"}],
        data__template="~/t.jinja",
        data__cache_dir="~/cache",
        deepspeed="~/ds.json",
    )
    assert expanded.run_dir == f"{tmp_path}/run"
    assert (expanded.model.path, expanded.model.tokenizer) == (f"{tmp_path}/m", str(tmp_path))
    assert [part.path for part in expanded.data.train] == [f"{tmp_path}/a.json", "a~/b.json"]
    assert expanded.data.template == f"{tmp_path}/t.jinja"
    assert expanded.data.cache_dir == f"{tmp_path}/cache"
    assert expanded.deepspeed == recipe(deepspeed=SHARDING).deepspeed


def test_an_unknown_override_is_an_unknown_key(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(tree()))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: unknown key; in dist_sft this"):
        read_recipe(path, ["optimizer.learning_rate=1e-4"])


# ---- config.json -----------------------------------------------------------------------------

RECIPES = st.builds(
    recipe,
    seed=st.integers(0, 2**63 - 1),
    optimizer__lr=st.floats(0, exclude_min=True, allow_infinity=False),
    optimizer__clip=st.none() | st.floats(1e-9, 1e9),
    data__template=st.text(st.characters(exclude_categories=["Cs"])),
    threads_per_worker=st.just("auto") | st.integers(1, 99),
    deepspeed=st.sampled_from([None, "zero1", "zero2", "zero3-offload", SHARDING]),
    trackers=st.lists(st.sampled_from(["tensorboard", "wandb"])),
)


@given(RECIPES)
def test_config_json_gives_back_the_same_recipe(original: Recipe) -> None:
    again = check(json.loads(original.to_json()), "config.json")
    assert again == original
    assert again.fingerprint() == original.fingerprint()
    assert difference(original, again) == {}


def test_config_json_stands_alone(tmp_path: Path) -> None:
    sharding = tmp_path / "mine.json"
    sharding.write_text(json.dumps(SHARDING))
    original = recipe(deepspeed=str(sharding))
    (tmp_path / "config.json").write_text(original.to_json())
    sharding.unlink()
    assert read_config_json(tmp_path) == original


def test_refuses_a_folder_without_a_sound_config_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.json"):
        read_config_json(tmp_path)
    (tmp_path / "config.json").write_text('{"run_dir": ')
    with pytest.raises(UserError, match=r"config\.json is damaged: "):
        read_config_json(tmp_path)
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.json"):
        read_config_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"recipe: got \[\]; allowed: settings of its own"):
        read_config_json(tmp_path)


def test_the_place_of_the_run_is_no_setting() -> None:
    here, there = recipe(run_dir="here"), recipe(run_dir="there")
    assert here.fingerprint() == there.fingerprint()
    assert difference(here, there) == {}
    assert here.fingerprint() != recipe(seed=1).fingerprint()


def test_lists_what_differs() -> None:
    old = recipe(optimizer__lr=1.0, optimizer__clip=None, data__eval=[{"path": "e.json"}])
    new = recipe(
        optimizer__lr=2.0,
        optimizer__clip=1.0,
        data__train=[{"path": "中.json"}, {"path": "b.json"}],
        data__eval_fraction=0.5,
    )
    changes = difference(old, new)
    assert list(changes) == [
        "data.train.0.path",
        "data.train.1",
        "data.eval.0",
        "data.eval_fraction",
        "optimizer.lr",
        "optimizer.clip",
    ]
    assert changes["data.train.0.path"] == '"a.json" -> "中.json"'
    assert changes["data.train.1"].startswith('(not set) -> {"path": "b.json"')
    assert changes["data.eval.0"].endswith("} -> (not set)")
    assert changes["optimizer.lr"] == "1.0 -> 2.0"
    assert changes["optimizer.clip"] == "null -> 1.0"


def test_a_changed_sharding_strategy_is_one_difference() -> None:
    assert list(difference(recipe(), recipe(deepspeed="zero2"))) == ["deepspeed"]
    assert list(difference(recipe(deepspeed="zero1"), recipe(deepspeed="zero2"))) == [
        "deepspeed.zero_optimization.stage"
    ]


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().seed = 1  # type: ignore[misc]


def test_every_setting_is_documented() -> None:
    settings = settings_of(Recipe) | settings_of(Source, "data.train.0.")
    assert [name for name, field in settings.items() if not field.description] == []


def test_the_end_may_move_back_but_not_before_what_was_done() -> None:
    constant = {"schedule": "constant"}
    old, new = (recipe(train={"steps": n}, optimizer=constant) for n in (40, 30))
    assert not may_change("train.steps", old, new)
    assert may_change("train.steps", old, new, taken=30)
    assert not may_change("train.steps", old, new, taken=31)
    falling = recipe(train={"steps": 30}, optimizer={"schedule": "cosine"})
    assert not may_change("train.steps", old, falling, taken=30)
