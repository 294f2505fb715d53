"""Run Ray on this node of a SLURM job, until the job step ends: what `slurm/ray.sbatch` starts."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from dist_sft import process
from dist_sft.ray_cluster import OBJECT_STORE_BYTES

NOTICE, OVER = "notice", "over"
"""Names of files in the job's own folder: SLURM has sent TERM; Ray shall end."""
AGAIN_SECONDS = 5


def ray_command(
    node: int, cpus: int, address: str, head: str, port: int, folder: Path
) -> list[str]:
    """Return the command line that starts Ray; node 0 is the head. It leaves no process behind.

    Ports are any that are free, but the one at which nodes meet, and another one that follows from
    it. The dashboard is reached from its own machine only. `folder` has a short name, as sockets
    must have.
    """
    role = [f"--address={head}:{port}"]
    if node == 0:
        role = [
            *("--head", f"--port={port}", "--dashboard-host=127.0.0.1", "--dashboard-port=0"),
            f"--ray-client-server-port={port - 10000}",  # by default the same for all heads
        ]
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
    """Run Ray on this node until the job's own folder says that it ends; return an exit code.

    Ray's processes do not hear TERM. SLURM sends it to every process of a job step, to give notice
    of a preemption, and the run must save before Ray goes: the batch script is told of it. A node's
    Ray that dies is started again, but for the head, with which the cluster ends.
    """
    parser = argparse.ArgumentParser(prog="python -m dist_sft.ray_node", description=main.__doc__)
    parser.add_argument("head", help="host of the first node")
    parser.add_argument("port", type=int, help="where nodes meet")
    parser.add_argument("job", type=Path, help="the job's own folder, which all nodes see")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: (arguments.job / NOTICE).touch())
    env, over = os.environ, arguments.job / OVER
    node, cpus = int(env["SLURM_NODEID"]), int(env["SLURM_CPUS_ON_NODE"])
    name = f"ray-{env['SLURM_JOB_ID']}-{node}-"
    for left in Path("/tmp").glob(f"{name}*"):  # of this job before it was put back
        if left.lstat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    # Ray opens its folder to all users: it is in one that others cannot enter, nor make before.
    folder = Path(tempfile.mkdtemp(prefix=name, dir="/tmp"))
    address = own_address(arguments.head, arguments.port)
    command = ray_command(node, cpus, address, arguments.head, arguments.port, folder / "ray")
    while True:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=block_term)
        while child.poll() is None and not over.exists():
            time.sleep(1)
        kill_session(child)
        shutil.rmtree(folder / "ray", ignore_errors=True)
        if over.exists() or node == 0:
            shutil.rmtree(folder, ignore_errors=True)
            return 0 if over.exists() else child.returncode or 1
        print(f"{socket.gethostname()}: Ray ended with {child.returncode}; starting it again")
        time.sleep(AGAIN_SECONDS)


def block_term() -> None:
    """Let this process and what it starts hear no TERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """End a process, and all that share its session, whoever their parents are by now."""
    while living := [pid for pid in psutil.pids() if session_of(pid) == leader.pid]:
        process.kill(living)
        leader.poll()


def session_of(pid: int) -> int | None:
    """Return the session that a living process is in."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) if process.state_of(pid) else None
    return None


if __name__ == "__main__":
    sys.exit(main())
