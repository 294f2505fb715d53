"""Pickles in places where training tools keep pickles: nobody may run what is in them."""

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Warm
from tiny_recipe import Finished, write

from dist_sft import manifest
from dist_sft.cli import main
from dist_sft.export import BUFFERS
from dist_sft.pieces import Reader

# What other tools write with pickle, under the names that their loaders look for.
IN_A_CHECKPOINT = (
    ".metadata", "data.pt", "latest", "mp_rank_00_model_states.pt", "optimizer.pt",
    "random_states_0.pkl", "scheduler.bin", "rank-00002.safetensors", "rank-00000.pt",
    "model/pytorch_model.bin", "model/training_args.bin", "model/model.safetensors.bin",
    f"model/{BUFFERS}",
)  # fmt: skip
IN_A_MODEL = (
    "pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.pkl",
    "special_tokens_map.pkl", "consolidated.00.pth", "adapter_model.bin", "model.ckpt.index",
)  # fmt: skip
pytestmark = pytest.mark.timeout(300)


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.marker),)


Plant = Callable[[Path], None]


@pytest.fixture(params=["pickle", "torch.save"])
def plant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Plant]:
    """Write files that run code when they are loaded; at the end, none of it has run."""
    marker, planted = tmp_path / "executed", []

    def write_pickle(path: Path) -> None:
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(Payload(marker)))
        else:
            buffer = io.BytesIO()
            torch.save({"weight": Payload(marker)}, buffer)
            path.write_bytes(buffer.getvalue())
        planted.append(path)

    yield write_pickle
    assert planted
    assert not marker.exists()
    # They would have run: that is what a loader does that trusts them.
    if request.param == "pickle":
        pickle.loads(planted[0].read_bytes())
    else:
        torch.load(io.BytesIO(planted[0].read_bytes()), weights_only=False)
    assert marker.is_dir()


@pytest.fixture
def run_dir(finished: Finished, tmp_path: Path) -> Path:
    """Return a copy of the finished run that is not finished any more."""
    copy = tmp_path / "run"
    shutil.copytree(finished.run_dir, copy)
    (copy / "logs/attempt-0/outcome.json").unlink()
    write(finished.recipe, copy, train={"steps": 10})
    config = json.loads((copy / "config.json").read_text()) | {"run_dir": str(copy)}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def make_consistent(folder: Path) -> None:
    """Make a manifest say that everything in the folder is what was written."""
    content = json.loads((folder / manifest.NAME).read_text())
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write(folder, content)


def test_beside_a_checkpoints_files(
    run_dir: Path, plant: Plant, warm: Warm, tmp_path: Path
) -> None:
    newest = manifest.folder_of(run_dir, 10)
    for name in IN_A_CHECKPOINT:
        plant(newest / name)
    assert main(["verify", str(run_dir)]) == 0
    main(["inspect", str(run_dir.with_suffix(".yaml"))])
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if is_pickle(path)], "none go along"
    group = warm.start(run_dir.with_suffix(".yaml"), 2)
    group.finish()
    assert "continuing after step 10" in (group.notes / "output").read_text()


@pytest.mark.parametrize("name", ["rank-00000.safetensors", f"model/{BUFFERS}"])
def test_in_place_of_a_file_with_a_manifest_that_agrees(
    name: str, run_dir: Path, plant: Plant, warm: Warm, tmp_path: Path
) -> None:
    """Somebody who may write the folder can make SHA-256 agree: safetensors is what protects."""
    newest = manifest.folder_of(run_dir, 10)
    content = json.loads((newest / manifest.NAME).read_text())
    content["files"].setdefault(name, {})
    (newest / manifest.NAME).write_text(json.dumps(content))
    plant(newest / name)
    make_consistent(newest)
    assert main(["verify", str(run_dir)]) == 0, "it must get past the checks to prove anything"
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        main(["export", str(run_dir), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    if name.startswith("rank"):
        reader = Reader(newest)
        with pytest.raises(Exception, match=r"(?i)header|safetensor"):
            list(map(reader.tensor, reader.manifest["shapes"]))
        group = warm.start(run_dir.with_suffix(".yaml"), 1)
        assert group.end() == [1]
        assert "not safetensors (" in (run_dir / "logs/attempt-1/failure-0.json").read_text()


@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "in their place"])
def test_in_a_models_folder(
    beside: bool, finished: Finished, plant: Plant, warm: Warm, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished.run_dir / "model", model)
    for name in IN_A_MODEL:
        plant(model / name)
    if not beside:
        (model / "model.safetensors").unlink()
    settings = {**finished.recipe, "model": {"path": str(model)}}
    path = write(settings, tmp_path / "new", train={"steps": 1})
    assert main(["inspect", str(path)]) == 0
    group = warm.start(path, 1)
    if beside:
        group.finish()
    else:
        assert group.end() == [2]
        assert "safetensors" in (group.run_dir / "logs/attempt-0/failure-0.json").read_text()


def is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    return zipfile.is_zipfile(path) or path.read_bytes()[:2] == pickle.dumps(None)[:2]
