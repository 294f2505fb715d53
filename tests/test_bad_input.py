"""Bad input: exit code 2, words a person can act on and no traceback, nothing half-written.

What the launcher refuses, and one mistake of each phase that only a rank can notice, go through
`launch/local.py`. The other mistakes are put before the function that finds their words.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from tiny_tokenizers import pad_is_eos
from transformers import AutoConfig

from dist_sft import data
from dist_sft.config import Recipe, check
from dist_sft.errors import UserError
from dist_sft.model import (
    check_positions,
    fit_vocabulary,
    load_model,
    make_random_weights,
    resolve_dtype,
)
from dist_sft.paths import explain_missing, model_folder
from dist_sft.tokenizer import load_words

ROOT = Path(__file__).parents[1]
SECONDS = 240  # for a rank on a busy machine; alone it takes about ten
GOOD_ROW = {"instruction": "Say yes.", "output": "Yes."}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}


class Place(NamedTuple):
    """A tokenizer, a few good rows, and room for a run."""

    folder: Path

    @property
    def yaml(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def settings(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run_dir),
            "model": {"config": LLAMA, "tokenizer": str(self.folder / "tokenizer")},
            "data": {
                "train": [{"path": str(self.folder / "rows.jsonl")}],
                "cache_dir": str(self.cache),
            },
            "train": {"steps": 1},
        }

    def recipe(self, **sections: dict[str, Any]) -> Recipe:
        settings = self.settings()
        for name, section in sections.items():
            settings[name] |= section
        return check(settings, "recipe.yaml")

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


def make_place(folder: Path) -> Place:
    pad_is_eos().save_pretrained(folder / "tokenizer")
    place = Place(folder)
    place.file("rows.jsonl", json.dumps(GOOD_ROW) + "\n")
    place.file("recipe.yaml", yaml.safe_dump(place.settings()))
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a complete model folder, with its tokenizer."""
    place = make_place(tmp_path_factory.mktemp("model"))
    folder = place.folder / "weights"
    make_random_weights(place.recipe(), 400, folder)
    shutil.copytree(place.folder / "tokenizer", folder, dirs_exist_ok=True)
    return folder


# ---- what the launcher refuses ---------------------------------------------------------------


def start(place: Place, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/local.py", "train", "--workers=1", str(place.yaml), *overrides],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


NVME = "{zero_optimization: {stage: 3, offload_param: {device: nvme}}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed=batch.json"], "/batch.json': only zero_optimization is allowed here: "
                                   "train_batch_size belongs in the recipe as train.batch_size"),
        ([f"deepspeed={NVME}"], "offload to nvme is not supported; allowed: cpu, none"),
        (["eval.every=5"], "set data.eval, data.eval_fraction or eval.prompts"),
        (["eval.prompts=row.json"], "eval.prompts=row.json: no such file or folder; "),
        (["data.train.0.path=row.jsonl"], "data.train.0.path=row.jsonl: no such file or folder; "),
        (["trian.steps=3", "seed=x"], "2 mistakes in "),
    ],
)  # fmt: skip
def test_a_refused_recipe_leaves_no_run_folder(
    place: Place, overrides: list[str], message: str
) -> None:
    sharding = {"zero_optimization": {"stage": 2}, "train_batch_size": 32}
    batch = place.file("batch.json", json.dumps(sharding))
    overrides = [text.replace("batch.json", str(batch)) for text in overrides]
    before = sorted(place.folder.rglob("*"))
    code, out, err = finish(start(place, *overrides))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(place.folder.rglob("*")) == before


def test_the_run_folder_of_another_recipe(place: Place) -> None:
    assert finish(start(place, "--prepare"))[0] == 0
    (place.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {path: path.read_bytes() for path in place.run_dir.iterdir() if path.is_file()}
    code, out, err = finish(start(place, "seed=3"))
    assert (code, out) == (2, "")
    assert err == (
        f"run_dir: {place.run_dir} belongs to a run with other settings "
        "(that run's -> the new ones):\n"
        "  seed: 0 -> 3\n"
        "Give another run_dir, or the settings of that run to continue it. To go on with other "
        "mathematics on purpose, add --allow-change seed\n"
    )
    assert {p: p.read_bytes() for p in place.run_dir.iterdir() if p.is_file()} == before


# ---- what only a rank notices: data, model, attention ----------------------------------------


class Refused(NamedTuple):
    place: Place
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def launches(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refused]:
    """Start three launches at a time: most of a start is imports."""
    overrides: dict[str, list[str]] = {
        "data": [],
        "model": [f"model={{path: {model.with_name('no-weights')}}}"],
        "packing": [f"model.config={json.dumps(BLOOM)}", "train.packing=on", "deepspeed=zero3"],
    }
    shutil.copytree(model, model.with_name("no-weights"))
    (model.with_name("no-weights") / "model.safetensors").unlink()
    with ExitStack() as stack:
        started = {}
        for name, changes in overrides.items():
            place = make_place(tmp_path_factory.mktemp(name))
            if name == "data":
                place.file("rows.jsonl", json.dumps(GOOD_ROW) + '\n{"instruction": "a"\n')
            process = stack.enter_context(start(place, *changes))
            stack.callback(process.terminate)
            started[name] = (place, process)
        return {name: Refused(place, *finish(run)) for name, (place, run) in started.items()}


@pytest.mark.parametrize("phase", ["data", "model", "packing"])
def test_a_rank_is_refused(launches: dict[str, Refused], phase: str) -> None:
    place, code, out, err = launches[phase]
    words = {
        "data": f"data.train.0.path={place.folder / 'rows.jsonl'}: row 1 (from 0) is broken "
        "(broken_json): broken JSON at line 2, ",
        "model": "no-weights cannot be loaded: ",
        "packing": "train.packing: on, but ",
    }
    assert code == 2, out + err
    assert words[phase] in err
    assert "Traceback" not in out + err
    # Recorded, with the details in the log; nothing that looks like a result.
    attempt = place.run_dir / "logs" / "attempt-0"
    outcome = json.loads((attempt / "outcome.json").read_text())
    assert outcome == {"code": 2, "reason": err.removesuffix("\n"), "step": -1}
    assert "Traceback" in (attempt / "rank-0.log").read_text()
    assert not (place.run_dir / "model").exists()
    assert not list(place.run_dir.glob("checkpoints/*"))
    assert not list(place.folder.rglob("*.tmp"))
    if phase == "data":
        assert stores(place) == []


def test_after_a_mistake_the_same_folder_serves_the_repaired_recipe(
    launches: dict[str, Refused],
) -> None:
    place = launches["data"].place
    code, out, err = finish(start(place, "--prepare", "seed=1"))
    assert code == 0, err
    assert "has made nothing yet; its settings change:\n  seed: 0 -> 1\n" in out


def stores(place: Place) -> list[Path]:
    """List what is in the cache, but for lock files and remembered digests."""
    return [p for p in place.cache.glob("*") if p.suffix != ".lock" and p.name != "digests"]


# ---- data ------------------------------------------------------------------------------------


def line(**row: Any) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


GOOD = line(**GOOD_ROW)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "", "the file is empty, it holds no rows"),
        ("empty.jsonl", "", "the file is empty, it holds no rows"),
        ("rows.jsonl", GOOD + '{"instruction": \n',
         "row 1 (from 0) is broken (broken_json): broken JSON at line 2, "),
        ("rows.json", f'[{GOOD},\n{{"instruction" "x"}}]', "line 3"),
        ("rows.jsonl", GOOD + line(question="a", answer="b"),
         "row 1 (from 0) is broken (wrong_columns): "),
        ("rows.jsonl", line(messages=[{"role": "robot", "content": "a"}]),
         "row 0 (from 0) is broken (wrong_role): "),
        ("rows.jsonl", GOOD.encode() + b'{"instruction": "caf\xe9", "output": "x"}\n',
         "row 1 (from 0) is broken (not_utf8): not UTF-8 at line 2 "),
        ("rows.csv", "1,2\n3,4\n", "line 1 is not a header: '1', '2'"),
        ("rows.txt", "hello\n", "files of type .txt cannot be read; allowed: .json, .jsonl, .csv"),
        ("rows.parquet", "PAR1", "not a readable Parquet file"),
    ],
)  # fmt: skip
def test_broken_data(place: Place, name: str, content: str | bytes, message: str) -> None:
    path = place.file(name, content)
    recipe = place.recipe(data={"train": [{"path": str(path)}]})
    words = load_words(recipe.model, recipe.data.template)
    with pytest.raises(UserError) as refusal:
        data.prepare(recipe.data, words, say=lambda text: None)
    assert f"data.train.0.path={path}" in str(refusal.value)
    assert message in str(refusal.value)
    assert stores(place) == []


def test_a_broken_row_names_the_way_around_it(place: Place) -> None:
    place.file("rows.jsonl", GOOD + "{\n")
    recipe = place.recipe()
    words = load_words(recipe.model, recipe.data.template)
    with pytest.raises(UserError, match=r"Repair it, or set data\.on_bad_row=skip to leave such"):
        data.prepare(recipe.data, words, say=lambda text: None)
    said: list[str] = []
    skipping = place.recipe(data={"on_bad_row": "skip"})
    data.prepare(skipping.data, words, say=said.append)
    assert any(text.startswith("train rows: 1 of 2 rows; ") for text in said)
    assert any(text.endswith("left out: 1 broken_json") for text in said)


def test_missing_data_file_suggests_what_is_there(place: Place) -> None:
    missing = place.folder / "row.jsonl"
    recipe = place.recipe(data={"train": [{"path": str(missing)}]})
    words = load_words(recipe.model, recipe.data.template)
    with pytest.raises(UserError) as refusal:
        data.prepare(recipe.data, words, say=lambda text: None)
    found = place.folder / "rows.jsonl"
    assert str(refusal.value) == (
        f"data.train.0.path={missing}: no such file; did you mean {found}?"
    )
    assert not place.cache.exists()


def test_broken_evaluation_data_are_called_that(place: Place) -> None:
    recipe = place.recipe(data={"eval": [{"path": str(place.file("e.jsonl", ""))}]})
    words = load_words(recipe.model, recipe.data.template)
    with pytest.raises(UserError, match=r"data\.eval\.0\.path=.*e\.jsonl: the file is empty"):
        data.prepare(recipe.data, words, say=lambda text: None)


def test_no_row_is_left(place: Place) -> None:
    place.file("rows.jsonl", line(instruction="word " * 50, output="x") * 3)
    recipe = place.recipe(data={"max_length": 8, "overlong": "drop"})
    words = load_words(recipe.model, recipe.data.template)
    with pytest.raises(UserError) as refusal:
        data.prepare(recipe.data, words, say=lambda text: None)
    assert str(refusal.value) == (
        f"data.train.0.path={place.folder / 'rows.jsonl'}: no row is left to learn from: "
        "3 rows read, 3 dropped (overlong)"
    )
    assert stores(place) == []


# ---- tokenizer and template ------------------------------------------------------------------


def test_unknown_template(place: Place) -> None:
    recipe = place.recipe(data={"template": "alpacca"})
    with pytest.raises(UserError) as refusal:
        load_words(recipe.model, recipe.data.template)
    assert str(refusal.value) == (
        "data.template=alpacca: no such template or file (did you mean alpaca?); allowed: "
        "human-assistant, alpaca, chatml, tokenizer, or a Jinja file"
    )


def test_missing_tokenizer(place: Place) -> None:
    missing = place.folder / "tokeniser"
    recipe = place.recipe(model={"tokenizer": str(missing)})
    with pytest.raises(UserError) as refusal:
        load_words(recipe.model, recipe.data.template)
    assert str(refusal.value) == (
        f"model.tokenizer: no tokenizer at {missing}: there is no such folder\n"
        "Give a folder with tokenizer.json, or a hub name; model.tokenizer says where it is if not "
        "beside the model."
    )


@pytest.mark.parametrize("content", [None, "{}", "{"])
def test_folder_without_a_sound_tokenizer(place: Place, content: str | None) -> None:
    (place.folder / "tokenizer" / "tokenizer.json").unlink()
    if content is not None:
        place.file("tokenizer/tokenizer.json", content)
    recipe = place.recipe()
    with pytest.raises(UserError) as refusal:
        load_words(recipe.model, recipe.data.template)
    assert f"model.tokenizer: no tokenizer at {place.folder / 'tokenizer'}: " in str(refusal.value)
    assert "tokenizer_config.json)" in str(refusal.value), "says what is in the folder"


def test_says_in_one_line_why_nothing_was_found(tmp_path: Path) -> None:
    error = OSError("no network\nTry again.")
    assert explain_missing(str(tmp_path), error) == "no network (the folder holds nothing)"
    assert explain_missing("a/b/c", error) == "there is no such folder"
    assert explain_missing("./b", error) == "there is no such folder"
    assert explain_missing("org/name", error) == (
        "there is no such folder here, and the hub does not give it: no network"
    )
    assert explain_missing(str(tmp_path), OSError()) == "OSError (the folder holds nothing)"


def test_a_run_that_exported_nothing_is_no_model(place: Place) -> None:
    (place.run_dir / "checkpoints").mkdir(parents=True)
    assert model_folder(str(place.run_dir)) == str(place.run_dir), "not a run folder yet"
    (place.run_dir / "launch.json").touch()
    with pytest.raises(UserError, match="has exported no model yet"):
        model_folder(str(place.run_dir))
    (place.run_dir / "model").mkdir()
    assert model_folder(str(place.run_dir)) == str(place.run_dir / "model")


# ---- model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "lama"},
            "model.config.model_type: got 'lama' (did you mean 'llama'?); allowed: the causal "
            "language models of transformers, such as llama, qwen3 or gpt2",
        ),
        ({"model_type": 7}, "model.config.model_type: got 7; allowed: the causal"),
        (
            {"hiden_size": 64},
            "model.config.hiden_size: llama has no such setting (did you mean 'hidden_size'?)",
        ),
        ({"xyz": 64}, "model.config.xyz: llama has no such setting"),
        ({"hidden_size": 33}, "The hidden size (33) is not a multiple of the number of attention"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str (value: 'wide')"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "zelu"}, "KeyError: 'zelu'"),
    ],
)
def test_model_config_that_describes_no_model(
    place: Place, changes: dict[str, Any], message: str
) -> None:
    recipe = place.recipe(model={"config": LLAMA | changes})
    with pytest.raises(UserError) as refusal:
        make_random_weights(recipe, 400, place.folder / "initial")
    assert str(refusal.value).startswith("model.config")
    assert message in str(refusal.value)
    assert {path.name for path in place.folder.glob("initial*")} <= {"initial.lock"}


def refusal_of(folder: Path, place: Place) -> str:
    recipe = place.recipe(model={"config": None, "tokenizer": None, "path": str(folder)})
    with pytest.raises(UserError) as refusal:
        load_model(recipe.model, str(folder), torch.float32)
    return str(refusal.value)


def test_missing_model_folder(place: Place) -> None:
    missing = place.folder / "nowhere"
    assert refusal_of(missing, place) == (
        f"model.path: {missing} cannot be loaded: there is no such folder\n"
        "Give a folder with config.json and complete safetensors weights, or a hub name."
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "no file named model.safetensors"),
        (b"", "Error while deserializing header: header too small"),
        (b"too short", "Error while deserializing header"),
    ],
)
def test_model_folder_without_weights(
    model: Path, place: Place, weights: bytes | None, message: str
) -> None:
    folder = shutil.copytree(model, place.folder / "model")
    (folder / "model.safetensors").unlink()
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    refusal = refusal_of(folder, place)
    assert refusal.startswith(f"model.path: {folder} cannot be loaded: ")
    assert message in refusal
    assert "(the folder holds config.json, " in refusal


@pytest.mark.parametrize(
    ("changes", "count"), [({"num_hidden_layers": 3}, 9), ({"intermediate_size": 128}, 6)]
)
def test_weights_that_the_config_does_not_describe(
    model: Path, place: Place, changes: dict[str, int], count: int
) -> None:
    """Transformers would fill the gaps with random numbers and train."""
    folder = shutil.copytree(model, place.folder / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert refusal_of(folder, place).startswith(
        f"model.path: in {folder}, config.json and the weights do not belong together: {count} "
        "weights are missing or have other sizes, such as model.layers."
    )


def test_a_complete_model_folder_is_taken(model: Path, place: Place) -> None:
    recipe = place.recipe(model={"config": None, "tokenizer": None, "path": str(model)})
    loaded = load_model(recipe.model, str(model), torch.float32)
    assert fit_vocabulary(loaded, 400, seed=0) == 0
    assert fit_vocabulary(loaded, 405, seed=0) == 5
    assert loaded.get_input_embeddings().num_embeddings == 405


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_longer_than_the_model_are_refused(kind: str) -> None:
    taken, longer = (SimpleNamespace(lengths=np.array([3, n])) for n in (17, 18))
    config = AutoConfig.for_model(kind, max_position_embeddings=16)
    model = SimpleNamespace(config=config)
    check_positions(model, {"train": taken, "held_out": taken})  # the last token is only a target
    with pytest.raises(UserError) as raised:
        check_positions(model, {"train": taken, "held_out": longer})
    assert str(raised.value) == (
        "data.max_length: held_out has rows of up to 18 tokens, but the model takes 16 (its "
        "config's max_position_embeddings); set data.max_length: 16"
    )
    for other in (
        AutoConfig.for_model("bloom"),
        AutoConfig.for_model("falcon", alibi=True, max_position_embeddings=16),
        AutoConfig.for_model(
            "qwen2",
            max_position_embeddings=16,
            rope_parameters={
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            },
        ),
    ):  # fmt: skip
        check_positions(SimpleNamespace(config=other), {"train": longer})


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"^model\.dtype: float16 needs a GPU and this machine has"):
        resolve_dtype("float16", torch.device("cpu"))
    assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
