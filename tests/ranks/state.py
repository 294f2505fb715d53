"""One rank of `test_checkpoint.py`: save runs, or load what others saved, in one process group.

python state.py JOB.json OUT.json: see `cells.py` for the job. Each of its `tasks` has a `cell`, the
`folder` of a run, the `model` to begin with and whether to `save`. Saving trains to step SAVED,
saves while it goes on, and exports; loading starts at the checkpoint and goes on. Rank 0 writes the
losses of the steps after SAVED, and the whole state through the libraries' own functions, as it was
saved or loaded.
"""

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from cells import Run, own_state, write_model
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from dist_sft import checkpoint, manifest, shards
from dist_sft.engine import Engine, ZeroEngine
from dist_sft.export import export

SAVED, LAST = 3, 5
TOO_HIGH = 2.0**18  # a loss scale that overflows twice before the checkpoint


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Gather master weights and moments without any of the code under test."""
    state = {"steps": torch.tensor(shards.optimizer_steps(engine))}
    if hasattr(scaler := getattr(engine.optimizer, "loss_scaler", None), "cur_hysteresis"):
        numbers = {k: float(x) for k, x in vars(scaler).items() if isinstance(x, int | float)}
        state |= {f"scaler|{key}": torch.tensor(numbers[key]) for key in sorted(numbers)}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # ZeRO 1 and 2 do this after the first group's step, too early for others
        engine.optimizer._hp_optimizer_states_linked = False
        link()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
                whole = {"fp32": parameter.data.float()}
        elif isinstance(engine, ZeroEngine):
            whole = {k: safe_get_full_optimizer_state(parameter, k) for k in shards.MOMENTS}
            whole["fp32"] = safe_get_full_fp32_param(parameter)
        else:
            moments = engine.optimizer.optimizer.state[parameter]
            whole = {key: moments[key] for key in shards.MOMENTS} | {"fp32": parameter.data}
        state |= {f"{name}|{key}": tensor.clone() for key, tensor in whole.items()}
    return state


def perform(job: SimpleNamespace, task: SimpleNamespace) -> list[float]:
    cell, run_dir = SimpleNamespace(**task.cell), Path(task.folder)
    job.models[cell.model] = task.model
    run = Run(job, cell)
    folder = manifest.folder_of(run_dir, SAVED)
    if task.save:
        if run.recipe.model.dtype == "float16":
            run.engine.optimizer.loss_scaler.cur_scale = TOO_HIGH
        for number in range(1, SAVED + 1):
            run.gradient(number)
            run.update(number)
        saving = checkpoint.Saving(
            run_dir,
            SAVED,
            run.engine,
            {},
            write_model(run.engine),
            snapshot=checkpoint.Snapshot(run.engine),
        )
    else:
        checkpoint.restore(folder, run.engine)
    state = whole_state(run.engine)
    losses = []
    for number in range(SAVED + 1, LAST + 1):  # while the checkpoint is written
        losses.append(run.gradient(number)[0])
        run.update(number)
    if task.save:
        saving.finish()
    if dist.get_rank() == 0:
        save_file(state, task.state)
        if task.save:
            export(folder, run_dir / "model", torch.float32)
            export(folder, run_dir / "model-in-shards", torch.float32, shard_bytes=20_000)
    run.engine.close()
    alive = [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
    assert not alive, "it would free the process group, and could wait for ever"
    return losses


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    losses = []
    for task in job.tasks:
        with own_state():
            losses.append(perform(job, SimpleNamespace(**task)))
        print(task, losses[-1], flush=True)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
