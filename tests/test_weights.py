"""A model to answer with: what `model.path` may be, and how much memory its weights take."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_LIKE, tiny_model
from tiny_tokenizers import TOKENIZERS, byte_level, pad_is_eos
from transformers import PreTrainedModel

from dist_sft import manifest
from dist_sft.chat import Encoder, add_new_tokens, load_template, parse
from dist_sft.digests import sha256
from dist_sft.errors import UserError
from dist_sft.export import export, persistent_buffers, write_model_files
from dist_sft.generate_recipe import GenerateModel
from dist_sft.tensor_file import Entry, write_tensors
from dist_sft.tokenizer import load_words
from dist_sft.weights import (
    Located,
    check_vocabulary,
    check_words,
    convert,
    load,
    locate,
    ready,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TEMPLATE = "human-assistant"
LOOP = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def write_checkpoint(
    run_dir: Path, step: int, model: PreTrainedModel, ranks: int = 2, **facts: Any
) -> Path:
    """Write a checkpoint as ranks would, with the weights alone: all frozen, without moments."""
    folder = manifest.folder_of(run_dir, step)
    (folder / "model").mkdir(parents=True)
    tokenizer = pad_is_eos()
    template = load_template(TEMPLATE, tokenizer)
    write_model_files(
        folder / "model",
        model,
        tokenizer,
        Encoder(template, tokenizer).stop_ids,
        template.chat_template,
        persistent_buffers(model),
    )
    files: dict[str, Any] = {}
    weights = dict(model.named_parameters())
    for rank in range(ranks):
        entries, pieces = {}, []
        for name, weight in weights.items():
            share = -(-weight.numel() // ranks)
            part = weight.detach().view(-1)[rank * share :][:share]
            if len(part):
                pieces.append([name, rank * share, len(part)])
                entries[f"{name}|fp32|{rank * share}"] = Entry(torch.float32, [len(part)], [part])
        file = f"rank-{rank:05d}.safetensors"
        size, digest = write_tensors(folder / file, entries, 0o600)
        files[file] = {"size": size, "sha256": digest, "pieces": pieces}
    for path in (p for p in (folder / "model").rglob("*") if p.is_file()):
        path.chmod(0o600)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    content = {"format": manifest.FORMAT, "step": step, "shapes": shapes, "frozen": list(weights)}
    manifest.write(folder, content | facts | {"files": files})
    for path in (folder.parent, folder, folder / "model"):
        path.chmod(0o700)
    return folder


def llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return tiny_model("llama", vocab_size=400)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Make a run with the checkpoints of steps 10 and 20."""
    run = tmp_path / "run"
    for step, loss in ((10, 1.0), (20, 2.0)):
        model = llama()
        torch.nn.init.constant_(model.model.norm.weight, step)
        write_checkpoint(run, step, model, eval_loss={"held_out": loss}, template=TEMPLATE)
    (run / "launch.json").write_text("{}")
    (run / "config.json").write_text(json.dumps({"job": "train", "data": {"template": "alpaca"}}))
    return run


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Located]:
    """Call `locate`; what it says is in the attribute `said`."""

    def find(path: Path | str, *arguments: Any, **options: Any) -> Located:
        find.said = []
        say = find.said.append
        return locate(str(path), *arguments, memo=tmp_path / "memo", say=say, **options)

    find.said = []
    return find


def refusal(find: Callable[..., Located], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        find(*arguments, **options)
    return str(refused.value)


# ---- what a path may be ----------------------------------------------------------------------


def test_a_run_stands_for_its_newest_checkpoint(run_dir: Path, find: Any) -> None:
    found = find(run_dir)
    assert (found.folder, found.checkpoint) == (manifest.folder_of(run_dir, 20), True)
    assert found.words == found.folder / "model"
    assert find.said == [f"model.path: the checkpoint of step 20 of {run_dir} is taken"]
    assert find(run_dir, 10).folder == find(run_dir, "best").folder != found.folder
    assert found.identity == sha256(found.folder / "manifest.json")
    assert found.identity == find(found.folder).identity != find(run_dir, 10).identity


def test_one_checkpoint_is_taken_wherever_it_is(run_dir: Path, find: Any, tmp_path: Path) -> None:
    folder = manifest.folder_of(run_dir, 10)
    assert find(folder).folder == folder
    assert find(folder).run == run_dir
    alone = shutil.copytree(folder, tmp_path / "alone" / folder.name)
    assert find(alone).checkpoint
    assert find(alone).run is None


@pytest.mark.parametrize("verify", ["sha256", "size"])
def test_a_damaged_checkpoint_is_passed_over(run_dir: Path, find: Any, verify: Any) -> None:
    newest = manifest.folder_of(run_dir, 20)
    file = newest / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if verify == "sha256" else content[:-1])
    assert find(run_dir, verify=verify).folder == manifest.folder_of(run_dir, 10)
    assert find.said[0].startswith("the checkpoint of step 20 is damaged and passed over: ")
    assert newest.exists(), "the run's folder stays as it is"
    for asked in ((run_dir, 20), (newest,)):
        said = refusal(find, *asked, verify=verify)
        assert said.startswith(f"the checkpoint of step 20 is damaged: {file}: ")
        assert f"`dist-sft verify {run_dir}`" in said
    (manifest.folder_of(run_dir, 10) / "manifest.json").unlink()
    assert refusal(find, run_dir, verify=verify) == (
        f"none of the 2 checkpoints in {run_dir}/checkpoints is what was written, see above. Put "
        "a good copy back, or give another model.path"
    )


def test_others_could_have_changed_it(run_dir: Path, find: Any) -> None:
    folder = manifest.folder_of(run_dir, 20)
    folder.chmod(0o777)
    for asked in ((run_dir,), (run_dir, 20), (folder,)):
        assert refusal(find, *asked).startswith(f"{folder} may be written by others")
        assert find(*asked, trusting=True).folder == folder


def test_a_finished_run_without_checkpoints_has_its_model(run_dir: Path, find: Any) -> None:
    export(manifest.folder_of(run_dir, 20), run_dir / "model", torch.float32)
    assert find(run_dir / "model").template == "alpaca"  # of the run's recipe
    shutil.rmtree(run_dir / "checkpoints")
    found = find(run_dir)
    assert (found.folder, found.checkpoint) == (run_dir / "model", False)
    assert find.said == [
        f"model.path: {run_dir} has no checkpoints any more; what it exported is taken"
    ]
    shutil.rmtree(run_dir / "model")
    assert refusal(find, run_dir) == f"model.path: the run {run_dir} has no checkpoint yet"


def test_a_model_folder_is_known_by_its_content(run_dir: Path, find: Any, tmp_path: Path) -> None:
    model = tmp_path / "m"
    export(manifest.folder_of(run_dir, 20), model, torch.float32)
    first = find(model)
    assert (first.folder, first.words, first.checkpoint, first.run) == (model, model, False, None)
    copy = shutil.copytree(model, tmp_path / "copy")
    assert find(copy).identity == first.identity
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert find(copy).identity != first.identity


def test_a_name_on_the_hub(run_dir: Path, find: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    export(manifest.folder_of(run_dir, 20), run_dir.parent / "snapshot", torch.float32)

    def snapshot(name: str, *, revision: str | None, **patterns: Any) -> str:
        assert (name, revision) == ("org/name", "v1")
        assert "*.safetensors" in patterns["allow_patterns"]
        return str(run_dir.parent / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find("org/name", revision="v1").folder == run_dir.parent / "snapshot"


def test_what_is_no_model_is_refused(run_dir: Path, find: Any, tmp_path: Path) -> None:
    give = (
        "give a folder with config.json and safetensors weights, a hub name, a training run, or "
        "one of its checkpoints (RUN/checkpoints/step-N)"
    )
    assert refusal(find, tmp_path / "rum") == (
        f"model.path={tmp_path}/rum: no such folder; {give}; did you mean {run_dir}?"
    )
    file = tmp_path / "model.bin"
    file.touch()
    assert refusal(find, file) == f"model.path: {file} is a file; {give}"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(find, empty, key="MODEL") == (
        f"MODEL: {empty} is no model: it has no config.json (the folder holds nothing); {give}"
    )
    (empty / "config.json").write_text("{}")
    (empty / "pytorch_model.bin").touch()
    assert refusal(find, empty) == (
        f"model.path: {empty} has no safetensors weights (the folder holds config.json, "
        f"pytorch_model.bin); {give}"
    )
    assert refusal(find, empty, 3) == (
        f"model.step: got 3, but {empty} is not a training run: leave it out"
    )
    assert refusal(find, empty, revision="v1").startswith("model.revision: got v1, but")


def test_parts_of_a_run_are_refused(run_dir: Path, find: Any) -> None:
    folder = manifest.folder_of(run_dir, 10)
    assert refusal(find, folder.parent) == (
        f"model.path: {folder.parent} is within a run's folder; give {run_dir}"
    )
    assert refusal(find, folder / "model") == (
        f"model.path: {folder}/model is a part of a checkpoint, without weights; give {folder}"
    )
    assert refusal(find, run_dir, 7) == (
        f"model.step: got 7; allowed: newest, best, or one of the checkpoints of {run_dir}: 10, 20"
    )
    assert refusal(find, folder, 10, step_key="--step").startswith("--step: got 10, but")
    (run_dir / "config.json").write_text(json.dumps({"job": "generate"}))
    assert refusal(find, run_dir).startswith(
        f"model.path: {run_dir} is a run of job: generate, which makes no model; give"
    )


def test_no_checkpoint_was_evaluated(tmp_path: Path, find: Any) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, 5, llama())
    (run / "launch.json").write_text("{}")
    (run / "config.json").write_text("{}")
    assert refusal(find, run, "best") == (
        f"model.step: best, but no checkpoint of {run} was evaluated; give a step"
    )


def test_a_checkpoint_that_cannot_be_read_now(
    run_dir: Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(file: Path) -> str:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(manifest, "sha256", unreachable)
    monkeypatch.setattr(manifest, "PAUSES", ())
    for asked in ((run_dir,), (run_dir, 10), (manifest.folder_of(run_dir, 10),)):
        with pytest.raises(RuntimeError, match=r"cannot be read: .*Stale file handle"):
            find(*asked)


# ---- the same words as in training -----------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["human-assistant", "alpaca", "chatml", "tokenizer", "file"])
def test_words_are_recognised_after_they_were_saved(name: str, kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = LOOP
    if name == "file":
        name = str(tmp_path / "mine.jinja")
        Path(name).write_text(LOOP + "\n")
    template = load_template(name, tokenizer)
    add_new_tokens(tokenizer, template)
    encoder = Encoder(template, tokenizer, max_length=99, learn="last")
    model = llama()
    folder = tmp_path / "model"
    folder.mkdir()
    write_model_files(folder, model, tokenizer, encoder.stop_ids, template.chat_template, {})
    if name.endswith("jinja"):
        Path(name).unlink()
        name = "tokenizer"  # which has kept it
    words = load_words(GenerateModel(path=str(folder)), name)
    assert words.new_tokens == 0
    again = Encoder(words.template, words.tokenizer)
    assert again.prompt_fingerprint == encoder.prompt_fingerprint
    row = {"instruction": "Sag 'Hallo'!", "input": " 今天 ", "output": "Ja."}
    assert again.prompt(parse(row)) == encoder.prompt(parse(row))


def encoder_of(kind: str, template: str) -> Encoder:
    tokenizer = TOKENIZERS[kind]()
    made = load_template(template, tokenizer)
    add_new_tokens(tokenizer, made)
    return Encoder(made, tokenizer)


def test_other_words_have_other_fingerprints() -> None:
    encoders = [encoder_of(k, t) for k in TOKENIZERS for t in ("human-assistant", "alpaca")]
    encoders.append(encoder_of("byte_level", "chatml"))
    assert len({encoder.prompt_fingerprint for encoder in encoders}) == len(encoders)
    shorter = Encoder(encoders[0].template, byte_level(), max_length=7)
    assert shorter.prompt_fingerprint == encoders[0].prompt_fingerprint


def test_other_words_than_in_training_are_refused(tmp_path: Path, find: Any) -> None:
    right, wrong = (encoder_of("pad_is_eos", name) for name in (TEMPLATE, "alpaca"))
    trained = {"prompt_words": right.prompt_fingerprint, "template": TEMPLATE}
    found = find(write_checkpoint(tmp_path / "run", 5, llama(), **trained))
    assert found.template == TEMPLATE
    find.said.clear()
    check_words(found, right, find.said.append, "template")
    assert find.said == []
    for other in (wrong, encoder_of("adds_bos", TEMPLATE)):
        with pytest.raises(UserError) as refused:
            check_words(found, other, find.said.append, "template")
        assert str(refused.value) == (
            f"template: prompts of the template {other.template.name} and this tokenizer are not "
            f"those that {found.folder} was trained with. Set template to human-assistant, "
            "with the checkpoint's own tokenizer"
        )
    older = find(write_checkpoint(tmp_path / "older", 5, llama()))
    check_words(older, wrong, find.said.append, "template")
    assert find.said[-1] == (
        f"{older.folder} was written before checkpoints knew their template: that prompts are "
        "worded as in training cannot be checked"
    )


def test_a_template_whose_file_is_gone_is_the_tokenizers(tmp_path: Path, find: Any) -> None:
    file = tmp_path / "mine.jinja"
    found = find(write_checkpoint(tmp_path / "other", 5, llama(), template="mine.jinja"))
    assert found.template == "tokenizer"
    found = find(write_checkpoint(tmp_path / "run", 5, llama(), template=str(file)))
    assert found.template == "tokenizer"
    file.touch()
    assert found.template == str(file)


def test_a_tokenizer_of_another_vocabulary_is_refused(run_dir: Path, find: Any) -> None:
    found = find(run_dir)
    check_vocabulary(found, 400, 0, TEMPLATE, "template")
    with pytest.raises(UserError, match=r"^template: the template chatml needs 2 tokens that the"):
        check_vocabulary(found, 402, 2, "chatml", "template")
    with pytest.raises(UserError) as refused:
        check_vocabulary(found, 402, 0, TEMPLATE, "template")
    assert str(refused.value) == (
        f"the tokenizer has 402 tokens, and the model in {found.words} embeddings for 400: it is "
        "that of another model. Leave model.tokenizer out, or give the right one"
    )


# ---- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_becomes_a_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(kind, vocab_size=400, tie_word_embeddings=kind == "llama")
    assert bool(persistent_buffers(model)) == (kind == "deepseek_v3")
    folder = write_checkpoint(tmp_path / "run", 5, model, ranks=3)
    convert(folder, tmp_path / "weights", dtype)
    loaded = load(tmp_path / "weights", dtype, CPU)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (kind == "llama")
    expected = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, expected.pop(name).to(weight.dtype)), name
        assert weight.dtype == dtype or kind == "deepseek_v3", name
    assert not expected
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():  # rotary frequencies, which no file has, too
        assert torch.equal(buffers[name], buffer), name


def test_it_is_converted_once(run_dir: Path, find: Any, tmp_path: Path) -> None:
    out, said = tmp_path / "weights", []
    found = find(run_dir)
    for _ in range(2):
        assert ready(found, out, torch.bfloat16, said.append) == out
    assert said == [f"converting {found.folder} to torch.bfloat16"]
    plain = find(out)
    assert ready(plain, tmp_path / "other", torch.bfloat16, said.append) == out


@pytest.mark.parametrize("file", ["rank-00001.safetensors", "manifest.json"])
def test_a_checkpoint_that_its_run_removes_meanwhile(
    file: str, run_dir: Path, find: Any, tmp_path: Path
) -> None:
    found, out = find(run_dir), tmp_path / "weights"
    (found.folder / file).unlink()
    with pytest.raises((OSError, manifest.DamagedCheckpoint)):
        ready(found, out, torch.float32, find.said.append)
    shutil.rmtree(found.folder)
    with pytest.raises(UserError) as refused:
        ready(found, out, torch.float32, find.said.append)
    assert str(refused.value).startswith(f"{found.folder} was removed while it was read: its run")
    assert [path.name for path in tmp_path.glob("weights*")] == ["weights.lock"]


def test_damage_that_only_sizes_were_checked_for(run_dir: Path, tmp_path: Path) -> None:
    folder = manifest.folder_of(run_dir, 10)
    file = folder / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(manifest.DamagedCheckpoint, match="not safetensors"):
        convert(folder, tmp_path / "weights", torch.float32)
    file.write_bytes(content.replace(b"model.norm.weight|fp32|0", b"model.form.weight|fp32|0"))
    with pytest.raises(manifest.DamagedCheckpoint, match=r"no whole tensor model\.norm\.weight"):
        convert(folder, tmp_path / "weights", torch.float32)
    assert not (tmp_path / "weights").exists()


MEMORY = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from dist_sft.weights import convert, load

folder, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
mine, prepacked = out.with_name(out.name + sys.argv[4]), sys.argv[5] == "prepacked"

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def growth(work):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status("VmRSS")
    result = work()
    return result, status("VmHWM") - before

def answer(model):
    return model(input_ids=torch.arange(model.config.vocab_size)[None, ::500], use_cache=False)

def loaded():
    model = load(out, dtype, torch.device("cpu"), prepacked=prepacked)
    answer(model)
    if not prepacked:
        touched = [weight.view(-1)[::512].float().sum() for weight in model.parameters()]
    return model

answer(LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
       num_attention_heads=1, vocab_size=16, dtype=dtype)))
_, converting = growth(lambda: convert(folder, mine, dtype))
print(converting, flush=True)
sys.stdin.readline()
model, loading = growth(loaded)
print(loading, flush=True)
sys.stdin.readline()
mapped = {"Rss": 0, "Pss": 0}
for line in Path("/proc/self/smaps").read_text().splitlines():
    key, _, value = line.partition(":")
    if "-" in key:
        inside = str(out) in line
    elif inside and key in mapped:
        mapped[key] += int(value.split()[0]) * 1024
print(json.dumps(mapped), flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["prepacked", "as they are"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_converting_and_loading(dtype: str, layout: str, tmp_path: Path) -> None:
    """Grow by at most 1.5 x the weights; two workers share the pages that are as they are."""
    config = LLAMA_LIKE | {"hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 4}
    config |= {"head_dim": 96, "num_attention_heads": 8}
    model = tiny_model("llama", **config | {"vocab_size": 32_000, "tie_word_embeddings": True})
    checkpoint = write_checkpoint(tmp_path / "run", 5, model)
    elements = sum(math.prod(weight.shape) for weight in model.parameters())
    size = elements * getattr(torch, dtype).itemsize
    assert size > 100e6
    del model
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", MEMORY, checkpoint, tmp_path / "weights", dtype,
             str(number), layout],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for number in range(2)
    ]  # fmt: skip

    def heard() -> list[Any]:
        return [json.loads(worker.stdout.readline()) for worker in workers if worker.stdout]

    def go_on() -> None:
        for worker in workers:
            print(file=worker.stdin, flush=True)

    try:
        converting = heard()
        (tmp_path / "weights0").rename(tmp_path / "weights")
        go_on()
        loading = heard()
        go_on()
        pages = heard()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    print(f"{size=:,} {converting=} {loading=} {pages=}")
    assert all(growth < 1.5 * size for growth in converting)
    assert all(0.95 * size < growth < 1.5 * size for growth in loading)
    if layout == "prepacked":  # what is left in the files' pages are the embeddings
        assert all(worker["Rss"] < 0.5 * size for worker in pages)
    else:
        assert all(worker["Rss"] > 0.95 * size for worker in pages)
        assert all(worker["Pss"] < 0.55 * size for worker in pages)
