"""Run Ray on this node of a SLURM job, until the job step ends: what `slurm/ray.sbatch` starts."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from dist_sft.ray_cluster import OBJECT_STORE_BYTES


def ray_command(
    node: int, cpus: int, address: str, head: str, port: int, folder: Path
) -> list[str]:
    """Return the command line that starts Ray; node 0 is the head. It leaves no process behind.

    Ports are any that are free, but the one at which nodes meet; the dashboard is reached from its
    own machine only. `folder` has a short name, as sockets must have.
    """
    role = [f"--address={head}:{port}"]
    if node == 0:
        role = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", "--dashboard-port=0"]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role),
        f"--temp-dir={folder}",
        f"--node-ip-address={address}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]


def own_address(head: str, port: int) -> str:
    """Return the address from which this node reaches the head."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((head, port))  # sends nothing
        return str(way.getsockname()[0])


def main() -> int:
    """Run Ray on this node; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.ray_node", description=__doc__)
    parser.add_argument("head", help="host of the first node")
    parser.add_argument("port", type=int, help="where nodes meet")
    arguments = parser.parse_args()
    env = os.environ
    node, cpus = int(env["SLURM_NODEID"]), int(env["SLURM_CPUS_ON_NODE"])
    folder = Path(f"/tmp/ray-{env['SLURM_JOB_ID']}-{node}")
    shutil.rmtree(folder, ignore_errors=True)  # of this job before it was put back
    address = own_address(arguments.head, arguments.port)
    child = subprocess.Popen(
        ray_command(node, cpus, address, arguments.head, arguments.port, folder)
    )
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
