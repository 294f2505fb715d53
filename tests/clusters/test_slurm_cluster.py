"""The cluster of `slurm_cluster` behaves as real ones do, and nothing is left of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from slurm_cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

# Once more after USR1, as by the launcher's script; the shell is in `wait`, so that its trap runs.
REQUEUES_ITSELF = """#!/bin/bash
echo "run ${SLURM_RESTART_COUNT:-0}"
[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0
trap 'echo USR1; scontrol requeue "$SLURM_JOB_ID"' USR1
sleep 600 &
echo ready
wait
wait
"""

RUNS_UNTIL_REQUEUED = """#!/bin/bash
echo "run ${SLURM_RESTART_COUNT:-0} on $(hostname)"
[ -n "${SLURM_RESTART_COUNT:-}" ] || sleep 612
"""

TALKS = """
import os, socket, time
first = os.environ["HEAD"]
if socket.gethostname() == first:
    with socket.create_server(("", 29500)) as server:
        connection, address = server.accept()
        print("from", address[0], connection.recv(100).decode())
else:
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((first, 29500), 5)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    connection.sendall(socket.gethostname().encode())
"""

# One process leaves its job, as daemons do. Prints the network namespaces of the machines.
HOLDS_A_CLUSTER = """
import sys
from pathlib import Path
from slurm_cluster import slurm_cluster

with slurm_cluster(Path(sys.argv[1]), nodes=2) as cluster:
    cluster.run("srun", "--nodes=2", "sh", "-c", "setsid sleep 613 >/dev/null 2>&1 &")
    job = cluster.submit("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 614")
    cluster.wait_for(job, "RUNNING")
    print(*[cluster.run("readlink", "/proc/1/ns/net", on=name).stdout.strip()
            for name in ("ctl", "n1", "n2")], flush=True)
    sys.stdin.read()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(text)
    return path


def wait_for_line(log: Path, line: str) -> None:
    deadline = time.monotonic() + 20
    while not log.exists() or line not in log.read_text().splitlines():
        assert time.monotonic() < deadline, f"no {line} in {log}"
        time.sleep(0.05)


def test_tasks_run_on_distinct_hosts(slurm: Cluster) -> None:
    names = slurm.run("srun", "--nodes=4", "hostname").stdout.split()
    assert sorted(names) == ["n1", "n2", "n3", "n4"]


def test_nodes_reach_each_other_by_name(slurm: Cluster) -> None:
    said = slurm.run(
        "srun", "--nodes=2", "--nodelist=n3,n4", sys.executable, "-c", TALKS, env={"HEAD": "n3"}
    )
    assert said.stdout == f"from {slurm.addresses['n4']} n4\n"


def test_a_job_requeues_itself_after_usr1(slurm: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = slurm.submit(f"--output={log}", "--open-mode=append", script(tmp_path, REQUEUES_ITSELF))
    wait_for_line(log, "ready")
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.wait_for(job, "COMPLETED", seconds=30)
    assert slurm.show(job)["Restarts"] == "1"
    assert [line for line in log.read_text().splitlines() if line.startswith(("run", "USR1"))] == [
        *("run 0", "USR1", "run 1")
    ]


def test_a_job_of_another_user(slurm: Cluster, everyones_folder: Path) -> None:
    """It sees the project's Python wherever that is."""
    log = everyones_folder / "log"
    prints = "import getpass, numpy, socket; print(getpass.getuser(), socket.gethostname())"
    text = f"#!/bin/bash\nexec srun --nodes=1 --nodelist=n2 {sys.executable} -c '{prints}'\n"
    arguments = (f"--output={log}", "--nodelist=n2", script(everyones_folder, text))
    job = slurm.submit(*arguments, user="nobody", cwd=everyones_folder)
    slurm.wait_for(job, "COMPLETED", seconds=30)
    assert slurm.show(job)["UserId"].startswith("nobody(")
    assert log.read_text() == "nobody n2\n"


def test_a_higher_partition_preempts(slurm: Cluster, tmp_path: Path) -> None:
    """With a signal of its choice at once, and its place in the queue."""
    log = tmp_path / "log"
    arguments = ("--partition=low", "--nodes=4", "--exclusive", "--signal=B:USR1@60")
    path = script(tmp_path, REQUEUES_ITSELF)
    low = slurm.submit(*arguments, f"--output={log}", "--open-mode=append", path)
    wait_for_line(log, "ready")
    high = ("--partition=high", "--nodes=4", "--output=/dev/null")
    slurm.wait_for(slurm.submit(*high, "--wrap=true"), "COMPLETED", seconds=40)
    slurm.wait_for(low, "COMPLETED", seconds=40)
    assert "USR1" in log.read_text().splitlines()


def test_jobs_of_dead_nodes_go_elsewhere(slurm: Cluster, tmp_path: Path) -> None:
    """However a node dies; where it keeps its power, what the job started runs on."""
    deaths: dict[str, Literal["power", "slurmd", "net"]]
    deaths = {"n1": "power", "n2": "slurmd", "n3": "net"}
    path, jobs = script(tmp_path, RUNS_UNTIL_REQUEUED), {}
    slurm.run("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=spare")
    for name in deaths:
        others = ",".join(deaths.keys() - {name})
        log = f"--output={tmp_path}/{name}"
        jobs[name] = slurm.submit(f"--exclude={others}", log, "--open-mode=append", path)
        wait_for_line(tmp_path / name, f"run 0 on {name}")
    slurm.run("scontrol", "update", "NodeName=n4", "State=RESUME")
    for name, how in deaths.items():
        slurm.kill_node(name, how)
    for name, job in jobs.items():
        slurm.wait_for(job, "COMPLETED")
        assert (tmp_path / name).read_text().splitlines() == [f"run 0 on {name}", "run 1 on n4"]
    assert ["sleep 612" in processes_on(slurm, name) for name in ("n2", "n3")] == [True, True]
    for name in deaths:
        slurm.bring_up(name)
    slurm.run("srun", "--nodes=4", "true")
    slurm.reset()
    assert not any("sleep 612" in processes_on(slurm, name) for name in slurm.addresses)


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_nothing_is_left(end: str, everyones_folder: Path, shared_slurm: Cluster) -> None:
    """Beside another cluster, when the one who holds the context leaves it or is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_CLUSTER, str(everyones_folder)],
        cwd=Path(__file__).parent, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdin is not None
        assert holder.stdout is not None
        networks = set(holder.stdout.readline().split())
        assert len(networks) == 3
        assert len(processes_in(networks)) > 10
        if end == "leaves":
            holder.stdin.close()
        else:
            os.kill(holder.pid, signal.SIGKILL)
        holder.wait(20)
        if end == "leaves":
            assert processes_in(networks) == []
    deadline = time.monotonic() + 5
    while left := processes_in(networks):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert str(everyones_folder) not in Path("/proc/self/mountinfo").read_text()
    assert shared_slurm.run("srun", "--nodes=4", "hostname").returncode == 0


def processes_on(slurm: Cluster, name: str) -> str:
    return slurm.run("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '", on=name).stdout


def processes_in(networks: set[str]) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/net") in networks:
                found.append((process / "cmdline").read_text())
        except OSError:  # it ended, or is a zombie that nobody has waited for yet
            continue
    return found
