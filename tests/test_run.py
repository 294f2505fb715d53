"""The real launcher, real ranks, a tiny model: from a recipe to a model, and on after a stop."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import (
    ROOT,
    SECONDS,
    ranks_of,
    read,
    run,
    start,
    wait_for_step,
    wait_until,
    write,
)
from safetensors.torch import load_file
from tiny_models import POISON, write_poisoned_model
from tiny_recipe import LLAMA
from tiny_tokenizers import pad_is_eos
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_sft import manifest, report, runs, verify_resume, weights
from dist_sft.chat import Encoder
from dist_sft.cli import main
from dist_sft.generate_recipe import GenerateModel
from dist_sft.pieces import Reader
from dist_sft.rollback import read_rollbacks
from dist_sft.tokenizer import load_words, vocabulary_size
from dist_sft.watchdog import FOLDER


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    pad_is_eos().save_pretrained(folder / "tokenizer")
    rows = [
        {
            "instruction": f"Add {a} and {b}.",
            "input": "加" * (a % 7),
            "output": str(a + b) * (b % 4),
        }
        for a in range(8)
        for b in range(1, 8)
        if b % 4
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return {
        "run_dir": str(folder / "run"),
        "model": {
            "config": {**LLAMA, "attention_dropout": 0.1},
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {
            "train": [{"path": str(folder / "rows.json")}],
            "eval_fraction": 0.1,
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"batch_size": 8, "steps": 7, "tokens_per_micro_batch": 100},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "deepspeed": "zero2",
        "checkpoint": {"every": 2, "keep": 2},
        "eval": {"every": 4},
    }


@pytest.fixture(scope="module")
def finished(
    recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """Run once, undisturbed: (recipe, run folder, what it printed)."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    path = write(recipe, run_dir)
    code, out, err = run(path)
    assert code == 0, out + err
    return path, run_dir, out


def test_metrics_have_every_step(finished: tuple[Path, Path, str]) -> None:
    steps = report.read_steps(finished[1] / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 8))
    for line in steps:
        assert line["attempt"] == 0
        assert line["examples"] == 8 or line["step"] == 6  # the epoch's last batch is smaller
        assert 0 < line["supervised_tokens"] < line["tokens"] <= line["computed_tokens"]
        assert line["seconds"] > 0
        assert 0 < line["share_of_peak"] < 1
        assert line["grad_norm"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["step"] for line in steps if "eval_loss" in line] == [4, 7]
    assert set(steps[-1]["eval_loss"]) == {"held_out"}


def test_the_run_folder_is_complete(finished: tuple[Path, Path, str]) -> None:
    _, run_dir, out = finished
    assert list(manifest.folders(run_dir)) == [6, 7]
    assert json.loads((run_dir / "logs/attempt-0/outcome.json").read_text()) == {
        "code": 0, "reason": "finished", "step": 7,
    }  # fmt: skip
    assert "step 7/7  loss" in (run_dir / "logs/attempt-0/rank-0.log").read_text()
    assert json.loads((run_dir / "launch.json").read_text())["workers_per_node"] == 2
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(run_dir) in out.splitlines()[-1]
    assert not [path for path in run_dir.rglob("*.tmp")]


def test_a_checkpoint_answers_as_what_was_exported_from_it(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, run_dir, _ = finished
    said: list[str] = []
    located = weights.locate(str(run_dir), memo=tmp_path, say=said.append)
    assert located.folder == manifest.folder_of(run_dir, 7)
    assert located.template == "human-assistant"
    place = GenerateModel(path=str(located.words))
    words = load_words(place, located.template)
    weights.check_words(located, Encoder(words.template, words.tokenizer), said.append, "template")
    weights.check_vocabulary(
        located, vocabulary_size(words.tokenizer), words.new_tokens, "", "template"
    )
    assert len(said) == 1, said
    folder = weights.ready(located, tmp_path / "weights", torch.float32, said.append)
    ours, exported = (load_file(x / "model.safetensors") for x in (folder, run_dir / "model"))
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[name], exported[name]) for name in ours)


def test_the_exported_model_is_the_trained_one(finished: tuple[Path, Path, str]) -> None:
    _, run_dir, _ = finished
    (tmp := run_dir.parent / "mode").touch()
    modes = {path.stat().st_mode for path in (run_dir / "model").iterdir()}
    assert modes == {tmp.stat().st_mode}, "as any new file, unlike a checkpoint's"
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    reader = Reader(manifest.folder_of(run_dir, 7))
    names = dict(model.named_parameters())
    assert names.keys() == reader.manifest["shapes"].keys()
    for name, parameter in names.items():
        assert torch.equal(parameter.data, reader.tensor(name)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    initial = load_file(run_dir / "initial" / "model.safetensors")
    assert not torch.equal(initial["model.embed_tokens.weight"], model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(run_dir / "model").eos_token == "<|endoftext|>"


def test_the_page_on_the_format_reads_a_tensor(finished: tuple[Path, Path, str]) -> None:
    page = (ROOT / "docs/checkpoint_format.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder = manifest.folder_of(finished[1], 7)
    program = program.replace("runs/my-run/checkpoints/step-00000200", str(folder))
    found: dict[str, Any] = {}
    exec(program, found)
    assert torch.equal(torch.from_numpy(found["tensor"]), Reader(folder).tensor(found["name"]))
    keys = set(re.findall(r"`(\w+)`", page.partition("| --- | --- |")[2].partition("There is")[0]))
    assert set(found["manifest"]) <= keys


def test_a_finished_run_is_not_run_again(finished: tuple[Path, Path, str]) -> None:
    path, run_dir, _ = finished
    code, out, _ = run(path)
    assert code == 0
    assert "finished already" in out
    assert not (run_dir / "logs" / "attempt-1").exists()


def test_a_finished_run_that_is_made_longer_is_as_one_that_always_was(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_steps": 3}, "eval": {}}
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    for path, steps in ((write({**recipe, **changes}, longer), 4),
                        (write({**recipe, **changes}, longer), 7),
                        (write({**recipe, **changes}, whole), 7)):  # fmt: skip
        code, out, err = run(path, f"train.steps={steps}")
        assert code == 0, out + err
        if path.stem == "longer" and steps == 7:
            assert "continues with other settings:\n  train.steps: 4 -> 7\n" in out
            assert "continuing after step 4" in out
            assert "step 7/7  loss" in out
    assert verify_resume.compare(whole, longer, 7).equal
    models = [load_file(folder / "model" / "model.safetensors") for folder in (whole, longer)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert runs.read_outcome(longer, 1) == runs.Outcome(0, "finished", 7)
    assert (longer / "loss.png").stat().st_mtime > (longer / "model").stat().st_ctime
    steps_evaluated = [
        line["step"] for line in report.read_steps(longer / "metrics.jsonl") if "eval_loss" in line
    ]
    assert steps_evaluated == [4, 7]


def test_the_folder_of_another_recipe_is_refused(finished: tuple[Path, Path, str]) -> None:
    path, run_dir, _ = finished
    before = (run_dir / "config.json").read_text()
    code, _, err = run(path, "optimizer.lr=0.5")
    assert code == 2
    assert "optimizer.lr: 0.01 -> 0.5" in err
    assert (run_dir / "config.json").read_text() == before


def unfinished(finished: tuple[Path, Path, str], run_dir: Path) -> None:
    """Copy the run as a kill after step 6 of 7 leaves it."""
    shutil.copytree(finished[1], run_dir)
    shutil.rmtree(manifest.folder_of(run_dir, 7))
    (run_dir / "logs/attempt-0/outcome.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        "optimizer.lr",
        "data",
        "model",
        "model.config",
    ],
)
def test_other_mathematics_is_refused_and_let_through_by_name(
    changed: str, recipe: dict[str, Any], finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    unfinished(finished, run_dir)
    rows, model = tmp_path / "rows.json", tmp_path / "model"
    rows.write_text(Path(recipe["data"]["train"][0]["path"]).read_text().replace("Add", "Sum"))
    shutil.copytree(finished[1] / "model", model)
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.5}
    (model / "config.json").write_text(json.dumps(config))
    overrides, difference = {
        "optimizer.lr": (["optimizer.lr=0.5"], "optimizer.lr: 0.01 -> 0.5"),
        "data": ([f"data.train.0.path={rows}"], f'-> "{rows}"'),
        "model": ([f"model.path={model}", "model.config=null"], f'model.path: null -> "{model}"'),
        "model.config": (
            ["model.config.attention_dropout=0.5"],
            "model.config.attention_dropout: 0.1 -> 0.5",
        ),
    }[changed]
    path, config_json = write(recipe, run_dir), (run_dir / "config.json").read_text()
    for allowed in ([], ["--allow-change=seed"]):
        code, _, err = run(path, *overrides, *allowed)
        assert code == 2, err
        assert difference in err
        assert "on purpose, add --allow-change " in err
    assert (run_dir / "config.json").read_text() == config_json
    assert not (run_dir / "changes.jsonl").exists()

    code, out, err = run(path, *overrides, f"--allow-change={changed}")
    assert code == 0, out + err
    assert difference in out
    assert "continuing after step 6" in out
    record, *hashes = map(json.loads, read(run_dir / "changes.jsonl").splitlines())
    origin = {changed.partition(".")[0]} & {"data", "model"}
    assert [f"{key} (hash)" in found for key, found in zip(origin, hashes, strict=True)] == (
        [True] * len(origin)
    )
    assert record["before_attempt"] == 1
    assert difference in "; ".join(f"{key}: {record[key]}" for key in record)
    before, after = (manifest.read(manifest.folder_of(run_dir, step)) for step in (6, 7))
    assert {key for key in ("data", "model") if before[key] != after[key]} == origin
    dropout = json.loads(read(run_dir / "model" / "config.json"))["attention_dropout"]
    assert dropout == (0.5 if changed.startswith("model") else 0.1)
    last, undisturbed = (report.read_steps(d / "metrics.jsonl")[-1] for d in (run_dir, finished[1]))
    assert (last["lr"] == undisturbed["lr"]) == (changed != "optimizer.lr")
    assert (last["loss"] == undisturbed["loss"]) == (changed == "optimizer.lr")


@pytest.mark.slow
def test_a_checkpoint_that_others_may_write_needs_a_word(
    recipe: dict[str, Any], finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    unfinished(finished, run_dir)
    path, folder = write(recipe, run_dir), manifest.folder_of(run_dir, 6)
    folder.chmod(0o777)
    code, out, err = run(path)
    assert code == 2, out + err
    assert f"{folder} may be written by others (drwxrwxrwx)" in err
    assert "launch with --trust-checkpoint" in err
    assert list(manifest.folders(run_dir)) == [6]
    assert "Traceback" not in err

    code, out, err = run(path, "--trust-checkpoint")
    assert code == 0, out + err
    assert "continuing after step 6 (checked by sha256; checkpoints found: " in out
    assert verify_resume.compare(finished[1], run_dir, 7).equal


def test_fewer_steps_than_were_taken_are_refused(
    finished: tuple[Path, Path, str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[1], run_dir)
    (run_dir / "logs/attempt-0/outcome.json").unlink()
    code, _, err = run(write(recipe, run_dir), "train.steps=3", "--allow-change=train.steps")
    assert code == 2
    assert "the newest checkpoint is of step 7, and the run would end at step 3" in err
    assert list(manifest.folders(run_dir)) == [6, 7]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("USR1", "signal SIGUSR1"),
        ("STOP file", "STOP file"),
        ("USR1 to every process, twice", "signal SIGUSR1"),  # as SLURM does in a job step
        ("TERM under nohup", "signal SIGTERM"),
        pytest.param("USR1 to rank 1", "another rank", marks=pytest.mark.slow),
        pytest.param("TERM to rank 1", "another rank", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_continued_is_bit_identical(
    how: str,
    told: str,
    recipe: dict[str, Any],
    finished: tuple[Path, Path, str],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    under_nohup = how == "TERM under nohup"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    process = start(path)
    signal.signal(signal.SIGHUP, before)
    wait_for_step(run_dir, 1, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert len(everyone) == 3, "torchrun and its ranks"
    targets: list[Any] = [process]
    if how == "STOP file":
        targets = []
        (run_dir / "STOP").touch()
    elif how.endswith("twice"):
        targets = [process, *everyone] * 2
    elif how.endswith("rank 1"):
        targets = [p for p in ranks_of(process) if p.environ()["RANK"] == "1"]
    for target in targets:
        target.send_signal(signal.Signals[f"SIG{how.split()[0]}"])
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, out + err
    outcome = json.loads((run_dir / "logs/attempt-0/outcome.json").read_text())
    stopped = outcome["step"]
    assert outcome["reason"] == f"stopped by {told} after step {stopped}, which is saved"
    assert 1 <= stopped < 7, "the stop came too late to prove anything"
    assert list(manifest.folders(run_dir))[-1] == stopped

    code, out, err = run(path)
    assert code == 0, out + err
    assert f"continuing after step {stopped}" in out
    undisturbed = load_file(finished[1] / "model" / "model.safetensors")
    continued = load_file(run_dir / "model" / "model.safetensors")
    assert undisturbed.keys() == continued.keys()
    assert all(torch.equal(undisturbed[name], continued[name]) for name in undisturbed)
    losses = [[line["loss"] for line in report.read_steps(folder / "metrics.jsonl")]
              for folder in (finished[1], run_dir)]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["eval_loss", "exact_match"])
def test_stopped_in_an_evaluation_and_continued(
    kind: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    with open(held_out, "w") as file:
        # Seconds of evaluation: in a dozen pieces, or token by token.
        for n in range(12_000 if kind == "eval_loss" else 20):
            file.write(json.dumps({"instruction": f"Say {n}.", "output": f"{n} " * 5}) + "\n")
    data: dict[str, Any] = {**recipe["data"], "eval_fraction": 0.0}
    evaluation: dict[str, Any] = {"every": 1}
    if kind == "eval_loss":
        data["eval"] = [{"path": str(held_out)}]
    else:
        evaluation |= {"prompts": str(held_out), "max_new_tokens": 60}
    run_dir = tmp_path / "run"
    changes = {"data": data, "train": {"batch_size": 8, "steps": 2}, "eval": evaluation}
    path = write({**recipe, **changes}, run_dir)
    process = start(path)
    wait_until(lambda: bool(ranks_of(process)), process)
    heartbeat = Path(ranks_of(process)[0].environ()[FOLDER]) / "0"
    wait_until(lambda: "evaluation" in read(heartbeat), process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, out + err
    (line,) = report.read_steps(run_dir / "metrics.jsonl")
    assert line["step"] == 1
    assert kind not in line, "the stop came too late to prove anything"
    assert list(manifest.folders(run_dir)) == [1]

    code, out, err = run(path)
    assert code == 0, out + err
    caught_up, last = report.read_steps(run_dir / "metrics.jsonl")
    assert caught_up["attempt"] == 1
    assert caught_up["loss"] == line["loss"]
    if kind == "eval_loss":
        assert caught_up[kind]["held_out"] > last[kind]["held_out"]
    else:
        assert caught_up[kind] == last[kind] == 0.0
        samples = sorted(path.name for path in (run_dir / "samples").iterdir())
        assert samples == ["step-00000001.jsonl", "step-00000002.jsonl"]


def test_prompts_are_answered_beside_training(
    recipe: dict[str, Any], finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.json"
    rows = json.loads((Path(recipe["run_dir"]).parent / "rows.json").read_text())[:3]
    prompts.write_text(json.dumps(rows))
    run_dir = tmp_path / "run"
    evaluation = {"every": 4, "prompts": str(prompts), "max_new_tokens": 5}
    path = write({**recipe, "eval": evaluation}, run_dir)
    code, out, err = run(path)
    assert code == 0, out + err
    lines, before = (report.read_steps(x / "metrics.jsonl") for x in (run_dir, finished[1]))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in before]
    ours, theirs = (load_file(x / "model" / "model.safetensors") for x in (run_dir, finished[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in lines if "exact_match" in line] == [4, 7]
    share = f"{lines[-1]['exact_match']:.1%}"
    assert re.search(rf"step 7/7 .* exact match {re.escape(share)}", out)

    samples = (run_dir / "samples" / "step-00000007.jsonl").read_text().splitlines()
    asked = [json.loads(sample) for sample in samples]
    assert [sample["expected"] for sample in asked] == [row["output"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    for sample in asked:
        ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        ended = answer[-1] == tokenizer.eos_token_id
        assert sample["generated"] == tokenizer.decode(answer[:-1] if ended else answer)
        assert sample["finish_reason"] == ("eos" if ended else "length")


def test_damaged_checkpoints_are_passed_over_and_never_begun_anew(
    recipe: dict[str, Any], finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[1], run_dir)
    shutil.rmtree(run_dir / "logs")
    path = write(recipe, run_dir)
    assert main(["verify", str(run_dir)]) == 0
    newest, older = manifest.folder_of(run_dir, 7), manifest.folder_of(run_dir, 6)
    flip(newest / "rank-00001.safetensors")
    assert main(["verify", str(run_dir)]) == 1
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["verify", str(run_dir), "--step", "6"]) == 0

    code, out, err = run(path)
    assert code == 0, out + err
    assert "the checkpoint of step 7 is damaged and passed over" in out
    assert "rank-00001.safetensors: its content is not what was written" in out
    assert "continuing after step 6 (checked by sha256; checkpoints found: " in out
    assert list(manifest.folders(run_dir)) == [6, 7], "the damaged one is out of the way"
    assert len(list((run_dir / "checkpoints").glob("step-00000007.damaged-*"))) == 1
    assert main(["verify", str(run_dir)]) == 0
    weights = [load_file(d / "model" / "model.safetensors") for d in (finished[1], run_dir)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    shutil.rmtree(run_dir / "logs")
    flip(newest / "manifest.json")
    (older / "model" / "config.json").unlink()
    code, out, err = run(path)
    assert code == 2, out + err
    assert "none of the 2 checkpoints" in err
    assert "model/config.json: No such file or directory" in out


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    path = write(recipe, run_dir)
    assert run(path, "--prepare")[0] == 0
    (run_dir / "checkpoints").mkdir()
    # In the way of a folder that has to be made.
    (run_dir / "checkpoints" / ".step-00000002.attempt-0.tmp").touch()
    code, out, err = run(path)
    assert code == 0, out + err
    assert "NOT SAVED: the checkpoint of step 2 cannot be saved: rank 0: " in out
    events = events_of(run_dir)
    assert [(x["event"], x["step"]) for x in events] == [
        ("checkpoint_failed", 2), ("checkpoint", 4), ("checkpoint", 6), ("checkpoint", 7),
    ]  # fmt: skip
    assert all(0 < x["blocked_seconds"] <= x["seconds"] for x in events[1:])
    assert "rank 1: " in events[0]["reason"]
    assert list(manifest.folders(run_dir)) == [6, 7]


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, read(run_dir / "metrics.jsonl").splitlines())
    return [line for line in lines if line.get("event", "begun") != "begun"]


def test_frozen_parameters_stay_as_they_are(recipe: dict[str, Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    model = {**recipe["model"], "freeze": ["model.embed_tokens.*", "model.layers.0.*"]}
    path = write({**recipe, "model": model, "deepspeed": "zero3"}, run_dir)
    code, out, err = run(path)
    assert code == 0, out + err
    assert "frozen: 10 of 20 parameters" in out
    assert "packing: isolated bit by bit" in out
    first, last = (
        load_file(run_dir / folder / "model.safetensors") for folder in ("initial", "model")
    )
    same = {name for name in first if torch.equal(first[name], last[name])}
    saved = manifest.read(manifest.folder_of(run_dir, 7))
    assert same == set(saved["frozen"]) == {n for n in first if "embed" in n or ".layers.0." in n}
    assert saved["loss_scale"] is None
    verdict = verify_resume.compare(run_dir, run_dir, 7)
    assert verdict == (True, "bit-identical: 7 losses, 40 tensors of the state")

    code, out, err = run(write({**recipe, "deepspeed": "zero3"}, run_dir))
    assert code == 2
    assert "model.freeze.0" in err


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_other_data_under_an_old_checkpoint_is_refused(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(Path(recipe["data"]["train"][0]["path"]).read_text())
    data = {**recipe["data"], "train": [{"path": str(rows)}]}
    run_dir = tmp_path / "run"
    path = write({**recipe, "data": data, "train": {"batch_size": 8, "steps": 60}}, run_dir)
    process = start(path, workers=1)
    wait_for_step(run_dir, 1, process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, out + err
    with open(run_dir / "metrics.jsonl", "a") as metrics:
        metrics.write('{"attempt": 0, "step": 9')  # as a kill in the middle of a line leaves it

    rows.write_text(rows.read_text().replace("Add 1", "Sum 1"))
    code, _, err = run(path, workers=1)
    assert code == 2
    assert "the encoded training data (a file of data.train, the template or the tokenizer)" in err

    rows.write_text(rows.read_text().replace("Sum 1", "Add 1"))
    code, out, err = run(path, workers=1)
    assert code == 0, out + err
    steps = report.read_steps(run_dir / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 61))


def test_a_lead_that_is_too_short_for_a_save_is_told(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The SLURM launcher leaves it in the run folder."""
    run_dir = tmp_path / "run"
    path = write({**recipe, "train": {"batch_size": 8, "steps": 3}, "eval": {}}, run_dir)
    assert run(path, "--prepare", workers=1)[0] == 0
    launch = json.loads((run_dir / "launch.json").read_text())
    launch["options"]["lead"] = 0.001
    (run_dir / "launch.json").write_text(json.dumps(launch))
    command = [sys.executable, "-m", "dist_sft.node", str(run_dir)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("30 are for other things: raise --lead") == 1


def test_a_live_run_is_refused_and_an_orphan_cannot_commit(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train, keeping = {"batch_size": 8, "steps": 30_000}, {"every": 50, "mode": "group"}
    path = write({**recipe, "train": train, "checkpoint": keeping, "eval": {}}, run_dir)
    orphaned = start(path, workers=1)
    wait_for_step(run_dir, 6, orphaned)

    code, _, err = run(path, workers=1)
    assert code == 2, err
    assert f"{run_dir} is in use by process {orphaned.pid}" in err
    assert main(["status", str(run_dir)]) == 0

    orphaned.send_signal(signal.SIGSTOP)  # the launcher only: its ranks go on
    successor = start(path, workers=1)
    orphan_log = run_dir / "logs/attempt-0/rank-0.log"
    wait_until(lambda: "a newer attempt works on" in read(orphan_log), successor)
    log = run_dir / "logs/attempt-1/rank-0.log"
    wait_until(lambda: "tokens/s" in read(log), successor)
    successor.send_signal(signal.SIGTERM)
    out, err = successor.communicate(timeout=SECONDS)
    assert successor.returncode == 75, out + err
    assert "continuing after step" in out
    orphaned.send_signal(signal.SIGCONT)
    out, err = orphaned.communicate(timeout=SECONDS)
    assert orphaned.returncode == 1, out + err
    assert not (run_dir / "lease.json").exists()
    folder = manifest.folder_of(run_dir, list(manifest.folders(run_dir))[-1])
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o640", "0o750"}
    assert oct(folder.stat().st_mode & 0o777) == "0o750"


def test_a_stopped_rank_is_found_and_the_run_started_again(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = {"train": {"batch_size": 8, "steps": 60}, "watchdog": {"seconds": 3}}
    path = write({**recipe, **changes}, run_dir)
    process = start(path, "--restarts=1")
    wait_for_step(run_dir, 5, process)
    ranks = ranks_of(process)
    stopped = next(p for p in ranks if p.environ()["RANK"] == "1")
    stopped.suspend()
    began = time.monotonic()
    outcome = run_dir / "logs/attempt-0/outcome.json"
    wait_until(outcome.exists, process)
    assert time.monotonic() - began < 30, "gloo alone would have waited for half an hour"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    assert re.search(r"rank 1 has made no progress for \d+ s \(.*, step \d+\): its proc", err)
    assert "(restarts without a newer one: 1 of 1)" in err
    assert "most recent call first" in read(run_dir / "logs/attempt-0/rank-0.log")
    assert runs.attempts(run_dir) == [0, 1]
    assert [x["step"] for x in report.read_steps(run_dir / "metrics.jsonl")] == list(range(1, 61))


@pytest.mark.parametrize("killed", ["torchrun", "launcher"])
def test_nobody_is_left_behind(killed: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Workers without a node would hold their GPUs, and be watched by nobody."""
    run_dir = tmp_path / "run"
    process = start(write({**recipe, "train": {"batch_size": 8, "steps": 5000}}, run_dir))
    wait_for_step(run_dir, 5, process)
    launcher = psutil.Process(process.pid)
    (torchrun,), everyone = launcher.children(), launcher.children(recursive=True)
    (torchrun if killed == "torchrun" else launcher).kill()
    out, err = process.communicate(timeout=30)
    _, alive = psutil.wait_procs(everyone, timeout=15)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    if killed == "torchrun":
        assert process.returncode == 1, out + err
        outcome = runs.read_outcome(run_dir, 0)
        assert outcome is not None
        assert outcome.code == runs.FAILED
        assert not (run_dir / "lease.json").exists()


def test_a_second_signal_leaves_at_once_and_nothing_is_torn(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A rank that is stopped by SIGSTOP keeps the others from the step's end, and from saving."""
    run_dir = tmp_path / "run"
    path = write({**recipe, "train": {"batch_size": 8, "steps": 60}, "eval": {}}, run_dir)
    process = start(path)
    wait_for_step(run_dir, 5, process)
    ranks = ranks_of(process)
    ranks[1].suspend()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # as a terminal and a shell may both send it
    time.sleep(2.5)
    assert process.poll() is None, "the first one waits for the step"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 75, out + err
    assert "SIGINT: stopping as soon as what is done is saved; once more to leave at once" in err
    assert "left at once, at a second signal: nothing was saved" in err
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    assert not (run_dir / "lease.json").exists()
    newest = list(manifest.folders(run_dir))[-1]
    assert main(["verify", str(run_dir)]) == 0

    code, out, err = run(path)
    assert code == 0, out + err
    assert f"continuing after step {newest}" in out
    assert main(["verify", str(run_dir)]) == 0
    assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]


def test_exact_resume_is_proved_on_a_recipe_of_ones_own(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(recipe, tmp_path / "run")
    arguments = ["verify-resume", str(path), "--workers", "2"]
    assert main([*arguments, "--steps", "3", "--kill-at", "3"]) == 2
    assert "--kill-at: got 3; allowed: 1 to 2" in capsys.readouterr().err
    assert main([*arguments, "--steps", "40", "--kill-at", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"killed, with a checkpoint of step \d+; going on", out)
    assert "bit-identical: 40 losses, " in out
    assert not (tmp_path / "run").exists()


def test_a_difference_is_no_exact_resume(
    finished: tuple[Path, Path, str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "run"
    code, out, err = run(write(recipe, other), "seed=1", "deepspeed=null", workers=1)
    assert code == 0, out + err
    assert verify_resume.compare(finished[1], finished[1], 7).equal
    verdict = verify_resume.compare(finished[1], other, 7)
    assert not verdict.equal
    assert verdict.told.startswith("NOT bit-identical: losses differ by up to ")


def test_best_by_clock_and_without_saving_on_a_stop(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints are asked for by minutes, their losses are known, a stop saves nothing."""
    run_dir = tmp_path / "run"
    keeping = {"minutes": 1e-6, "on_stop": False}
    train = {"batch_size": 8, "steps": 400}
    path = write({**recipe, "train": train, "checkpoint": keeping, "eval": {"every": 2}}, run_dir)
    process = start(path)
    wait_for_step(run_dir, 5, process)
    assert main(["stop", str(run_dir)]) == 0
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, out + err
    steps = report.read_steps(run_dir / "metrics.jsonl")
    found = list(manifest.folders(run_dir))
    assert set(range(len(steps) - 2, len(steps) + 1)) <= set(found), "one after every step"
    losses = {x["step"]: x["eval_loss"]["held_out"] for x in steps if "eval_loss" in x}
    best = min(losses, key=losses.__getitem__)
    assert manifest.best(run_dir) == best
    assert best in found
    content = manifest.read(manifest.folder_of(run_dir, found[-1]))
    assert content["zero_stage"] == 2
    assert content["words"]
    assert content["code"]


def test_divergence_names_step_and_rows(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write(recipe, tmp_path / "run")
    code, _, err = run(path, "optimizer.lr=1e38", "optimizer.clip=null")
    assert code == 1
    assert re.search(r"the loss is (inf|nan) in step 2", err)
    assert len(set(re.findall(r"rows row \d+", err))) == 8, "of both ranks"
    assert "lower optimizer.lr" in err
    assert list(manifest.folders(tmp_path / "run")) == []


@pytest.fixture(scope="module")
def poisoned(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a recipe of which one row has a token whose embedding is infinite."""
    folder = tmp_path_factory.mktemp("poisoned")
    write_poisoned_model(folder, recipe["model"]["config"])
    rows = [
        {"instruction": f"Count to {n}.", "output": "one, two" * (n % 3 + 1)} for n in range(40)
    ]
    rows[17]["instruction"] = POISON
    (folder / "rows.json").write_text(json.dumps(rows))
    return {
        **recipe,
        "model": {"path": str(folder)},
        "data": {**recipe["data"], "train": [{"path": str(folder / "rows.json")}]},
        "train": {"batch_size": 8, "steps": 10, "packing": "off"},
        "eval": {},
    }


def test_a_step_that_is_not_finite_is_left_out(poisoned: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for sharding in ("zero2", None):
        run_dir = tmp_path / f"run-{sharding}"
        path = write({**poisoned, "deepspeed": sharding}, run_dir)
        code, out, err = run(path, "train.on_divergence=skip")
        assert code == 0, out + err
        skipped = [x for x in events_of(run_dir) if x["event"] == "step_skipped"]
        assert len(skipped) == 2, "one in each epoch"
        assert all("rows row 17" in x["reason"] for x in skipped)
        steps = report.read_steps(run_dir / "metrics.jsonl")
        assert [x["step"] for x in steps] == sorted(
            set(range(1, 11)) - {x["step"] for x in skipped}
        )
        losses.append([x["loss"] for x in steps])
        content = manifest.read(manifest.folder_of(run_dir, 10))
        assert content["optimizer_steps"] == 8
        assert f"step {skipped[0]['step']} is not taken: the loss is nan" in out
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_going_back_is_recorded_and_repeated_by_later_attempts(
    poisoned: dict[str, Any], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = (
        "train.on_divergence=rollback", "train.max_skipped_steps=0", "checkpoint.every=1",
        "checkpoint.keep=9", "seed=4",
    )  # fmt: skip
    code, out, err = run(write(poisoned, whole), *settings)
    assert code == 0, out + err
    first, second = read_rollbacks(whole)
    for rollback in (first, second):
        assert rollback.checkpoint < rollback.step
        assert f"went back to step {rollback.checkpoint}; steps" in out
    steps = [x["step"] for x in report.read_steps(whole / "metrics.jsonl")]
    assert steps == [s for s in range(1, 11) if not first.covers(s) and not second.covers(s)]

    # As a kill right after going back leaves it: every later checkpoint is missing.
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "logs")
    for step in manifest.folders(whole):
        if step > first.checkpoint:
            shutil.rmtree(manifest.folder_of(stopped, step))
    code, out, err = run(write(poisoned, stopped), *settings)
    assert code == 0, out + err
    assert f"continuing after step {first.checkpoint}" in out
    assert read_rollbacks(stopped) == [first, second], "nothing was met a second time"
    assert verify_resume.compare(whole, stopped, 10).equal


def test_going_back_in_vain_ends_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = (
        "optimizer.lr=1e38", "optimizer.clip=null", "train.on_divergence=rollback",
        "train.max_skipped_steps=1",
    )  # fmt: skip
    code, out, err = run(write(recipe, tmp_path / "run"), *settings, "checkpoint.every=null")
    assert code == 1, out + err
    assert "there is no checkpoint to go back to" in err
    code, out, err = run(write(recipe, tmp_path / "other"), *settings, "checkpoint.every=1")
    assert code == 1, out + err
    assert "went back to step 1; steps 2 to 3 do not count" in out
    assert "there is no older checkpoint to go back to" in err
