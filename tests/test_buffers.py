"""Buffers that belong to the weights come back with them; a model may change them as it trains."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import tiny_model

from dist_sft import checkpoint, manifest
from dist_sft.engine import DataParallelEngine
from dist_sft.export import persistent_buffers
from dist_sft.pieces import BUFFERS


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """Make this process a world of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_buffers_are_restored(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", vocab_size=64)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    accelerator: Any = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    engine = DataParallelEngine(accelerator, model, optimizer, None)
    buffers = [
        module.e_score_correction_bias
        for module in model.modules()
        if hasattr(module, "e_score_correction_bias")
    ]
    assert buffers
    model.model.norm.register_buffer("shared", buffers[0])  # two names, one tensor
    for buffer in buffers:
        buffer.fill_(0.25)

    def write_model(folder: Path) -> None:
        folder.mkdir()
        save_file(persistent_buffers(model), folder / BUFFERS)

    checkpoint.Saving(tmp_path, 1, engine, {}, write_model).finish()
    for buffer in buffers:
        buffer.fill_(0.5)
    checkpoint.restore(manifest.folder_of(tmp_path, 1), engine)
    assert all((buffer == 0.25).all() for buffer in buffers)
