"""Write the same state as pieces in safetensors, and by torch's distributed checkpoint (DCP).

    python benchmarks/checkpoint_format.py SCRATCH [--parameters 134515008] [--rounds 3]

One process; float32 master weights and two moments. Both are flushed to disk; DCP hashes nothing,
so the time to hash its files is told, too.
"""

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp

from dist_sft.checkpoint import _write_state
from dist_sft.digests import sha256
from dist_sft.shards import Fragment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--parameters", type=int, default=134_515_008)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # DCP says that it runs in a single process
    keys, tensors = ("fp32", "exp_avg", "exp_avg_sq"), 200
    n = options.parameters // tensors
    fragments = [
        Fragment(f"p{i}", 0, {key: torch.randn(n) for key in keys}) for i in range(tensors)
    ]
    state = {f"{f.name}|{key}": f.tensors[key] for f in fragments for key in keys}
    seconds: dict[str, list[float]] = {"safetensors, hashed": [], "DCP": [], "hashing DCP's": []}
    for _ in range(options.rounds):
        shutil.rmtree(options.scratch, ignore_errors=True)
        options.scratch.mkdir(parents=True)
        began = time.perf_counter()
        _write_state(options.scratch / "rank-00000.safetensors", fragments, 0o600)
        seconds["safetensors, hashed"].append(time.perf_counter() - began)
        began = time.perf_counter()
        writer = dcp.FileSystemWriter(options.scratch / "dcp", sync_files=True)
        dcp.save(state, storage_writer=writer, no_dist=True)
        seconds["DCP"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for path in (options.scratch / "dcp").iterdir():
            sha256(path)
        seconds["hashing DCP's"].append(time.perf_counter() - began)
    shutil.rmtree(options.scratch)
    gigabytes = options.parameters * 12 / 1e9
    medians = {name: round(median(values), 2) for name, values in seconds.items()}
    print(json.dumps({"GB": gigabytes, "median seconds": medians, "all": seconds}, indent=1))


if __name__ == "__main__":
    main()
