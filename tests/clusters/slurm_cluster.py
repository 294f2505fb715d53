"""A real SLURM cluster of several nodes on this machine, to be used in tests.

    ctl, the login node   10.77.0.254   munged, slurmctld [, mariadbd, slurmdbd]
    n1                    10.77.0.1     slurmd
    n2                    10.77.0.2     slurmd
    ...

Several clusters can run side by side: see `machines` for why they share nothing but files.
"""

import os
import pwd
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import machines
import slurm_conf
from machines import Machine

TOOLS = ("munged", "sbatch", "slurmctld", "slurmd", "srun")
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}
SLURMD_PORT, SLURMDBD_PORT = 6818, 6819  # SLURM's defaults
UP = {"allocated", "completing", "idle", "mixed"}
TAIL_LINES = 15

# Python or the checkout may lie in a folder that only its owner may pass, such as root's home, but
# jobs of other users need them: show that folder to all, and of what is in it nothing else.
PASSABLE = """
private=$1 behind=$2
mkdir "$behind"
mount --bind "$private" "$behind"
mount -t tmpfs -o mode=755 tmpfs "$private"
for needed in "${@:3}"; do
    mkdir "$private/$needed"
    mount --rbind "$behind/$needed" "$private/$needed"
done
"""


class ClusterFailed(AssertionError):
    """Report that the cluster, or a command in it, did not do what it had to."""


@contextmanager
def slurm_cluster(
    state: Path,
    nodes: int = 4,
    *,
    accounting: bool = False,
    gpus: int = 0,
    preempt_signal: bool = True,
    extra_conf: str = "",
) -> Iterator["Cluster"]:
    """Run a cluster of nodes n1, n2, ... for as long as the context lasts.

    `state` is a folder for its configuration, sockets and logs, which stay; all users must be able
    to pass it, and it must be short, since a socket's path ends at 108 characters. `accounting`
    adds slurmdbd, for sacct. `gpus` are devices each node claims to have; no CUDA sees them.
    `preempt_signal`: a job that is preempted gets the signal of its --signal, otherwise its tasks
    get TERM. `extra_conf` is put at the end of slurm.conf.
    """
    cluster = Cluster(state, nodes)
    try:
        cluster.start(accounting, gpus, preempt_signal, extra_conf)
        yield cluster
    finally:
        cluster.stop()


def unavailable(*, accounting: bool = False) -> str | None:
    """Say why no cluster can be had here, None if one can."""
    database = ("mariadbd", "slurmdbd") if accounting else ()
    if missing := machines.missing(*TOOLS, *database, *machines.TOOLS):
        return f"not installed: {', '.join(missing)}"
    return machines.refusal()


class Cluster:
    """The machines, and what a user does on the login node."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder.resolve()
        self.addresses = slurm_conf.addresses(nodes)
        self._machines: dict[str, Machine] = {}
        self._harmed: set[str] = set()

    def run(
        self,
        *command: str | Path,
        user: str | None = None,
        check: bool = True,
        cwd: Path = Path("/tmp"),
        env: Mapping[str, str] | None = None,
        on: str = "ctl",
        seconds: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node or another; `env` is added to the tests' environment."""
        done = subprocess.run(
            self._machines[on].command(*map(str, command), user=user, cwd=cwd),
            env=_environment(user) | dict(env or {}),
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            timeout=seconds,
        )
        if check and done.returncode:
            problem = f"{command}: exit code {done.returncode}"
            raise ClusterFailed(f"{problem}\n{done.stdout}{done.stderr}")
        return done

    def submit(
        self,
        *arguments: str | Path,
        user: str | None = None,
        cwd: Path = Path("/tmp"),
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a batch job by sbatch's arguments; return its number."""
        done = self.run("sbatch", "--parsable", *arguments, user=user, cwd=cwd, env=env)
        return int(done.stdout.split(";")[0])

    def show(self, job: int | str) -> dict[str, str]:
        """Return what `scontrol show job` says; values end at a space."""
        done = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    def state(self, job: int) -> str:
        return self.show(job)["JobState"]

    def wait_for(self, job: int, *states: str, seconds: float = 60) -> None:
        """Wait until the job is in one of these states; fail at once where it ended in another."""

        def is_there() -> bool:
            state = self.state(job)
            if state in ENDED.difference(states):
                raise ClusterFailed(f"job {job} is not {' or '.join(states)}: {self.show(job)}")
            return state in states

        self._until(is_there, f"job {job} is {' or '.join(states)}", seconds, pause=0.5)

    def kill_node(self, name: str, how: Literal["power", "slurmd", "net"] = "power") -> None:
        """Power a node off, or kill its slurmd but not its jobs, or cut its network.

        SLURM notices after 17 s: the node is down and its jobs are requeued, to start again 6 s
        later. Where the node comes back earlier, SLURM takes a lost job to be running for long.
        """
        node = self._machines[name]
        self._harmed.add(name)
        match how:
            case "power":
                node.power_off()
            case "slurmd":
                node.kill("slurmd")
            case "net":
                node.plug("down")

    def bring_up(self, name: str) -> None:
        """Undo what was done to a node, and wait until SLURM would use it.

        What ran on a node that was not without power runs on, for half a minute or so: SLURM does
        not look at once, and not for what became of a job that ended in the last 5 s.
        """
        node = self._machines[name]
        if not node.is_on():
            self._boot(name)
        elif not node.runs("slurmd"):
            node.start("slurmd", "-D")
        self._machines[name].plug("up")
        self._until(lambda: self._listens(name, SLURMD_PORT), f"slurmd of {name} listens")
        # Without this, half a minute passes here, too. It is an error where the node is neither
        # down nor drained.
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        self._until(lambda: self._node_states()[name] in UP, f"{name} is up")

    def reset(self) -> None:
        """End all jobs and bring up all nodes, those that were harmed without what ran on them."""
        self._is_idle_without_jobs()
        for name in self._harmed:
            self._machines[name].power_off()
        self._harmed.clear()
        for name in self.addresses:
            self.bring_up(name)
        self._until(self._is_idle_without_jobs, "the cluster is idle")

    def start(self, accounting: bool, gpus: int, preempt_signal: bool, extra_conf: str) -> None:
        """Start the machines and wait until the nodes are idle."""
        nodes = len(self.addresses)
        slurm_conf.write(self.folder, nodes, accounting, gpus, preempt_signal, extra_conf)
        ctl = self._machines["ctl"] = Machine("ctl", slurm_conf.CTL, self.folder / "log")
        # The nodes' mounts begin as copies of these.
        for number, (private, needed) in enumerate(_private_folders().items()):
            behind = str(self.folder / f"behind-{number}")
            ctl.run("bash", "-ec", PASSABLE, "passable", str(private), behind, *needed)
        ctl.run("mount", "--bind", f"{self.folder}/etc/hosts", "/etc/hosts")
        ctl.run("mount", "--bind", f"{self.folder}/etc", "/etc/slurm")
        munge = self.folder / "munge"
        # One is enough for all: its socket is a file, which network namespaces don't part.
        ctl.start(
            *("munged", "--foreground", "--force", f"--key-file={munge}/key"),
            *(f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
            *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._until((munge / "socket").is_socket, "munged listens")
        if accounting:
            self._start_accounting(ctl)
        ctl.start("slurmctld", "-D")
        for name in self.addresses:
            self._boot(name)
        self._until(lambda: set(self._node_states().values()) == {"idle"}, "all nodes are idle")

    def stop(self) -> None:
        """End everything."""
        if "ctl" in self._machines:
            self._machines["ctl"].power_off()  # and the kernel ends all others
        for machine in self._machines.values():
            machine.wait()

    def _boot(self, name: str) -> None:
        address, log_dir = self.addresses[name], self.folder / "log"
        self._machines[name] = Machine(name, address, log_dir, within=self._machines["ctl"])
        self._machines[name].start("slurmd", "-D")

    def _start_accounting(self, ctl: Machine) -> None:
        # In memory: quick, and gone with the cluster.
        database, socket = self.folder / "database", f"--socket={self.folder}/run/mysql"
        ctl.run("mkdir", str(database))
        ctl.run("mount", "-t", "tmpfs", "tmpfs", str(database))
        options = ("--no-defaults", "--user=root", f"--datadir={database}",
                   "--innodb-log-file-size=16M", "--innodb-use-native-aio=0")  # fmt: skip
        ctl.run("mariadb-install-db", *options, "--auth-root-authentication-method=normal")
        ctl.start(
            *("mariadbd", *options, "--bind-address=127.0.0.1", "--port=3306", socket),
            *(f"--pid-file={self.folder}/run/mariadbd.pid", "--innodb-buffer-pool-size=64M"),
            *("--innodb-lock-wait-timeout=900", "--performance-schema=OFF"),
        )
        sql = ("mariadb", "--no-defaults", "--user=root", socket, "-e")
        self._until(lambda: self._succeeds(*sql, "create database slurm"), "mariadbd listens")
        for host in ("localhost", "127.0.0.1"):
            self.run(*sql, f"grant all on slurm.* to slurm@{host} identified by 'slurm'")
        ctl.start("slurmdbd", "-D")
        self._until(lambda: self._listens("ctl", SLURMDBD_PORT), "slurmdbd listens")

    def _node_states(self) -> dict[str, str]:
        done = self.run(
            "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def _is_idle_without_jobs(self) -> bool:
        jobs = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            self.run("scancel", *jobs, check=False)
        return not jobs and set(self._node_states().values()) == {"idle"}

    def _listens(self, host: str, port: int) -> bool:
        return self._succeeds("bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}")

    def _succeeds(self, *command: str) -> bool:
        return self.run(*command, check=False).returncode == 0

    def _until(
        self, happened: Callable[[], bool], what: str, seconds: float = 60, pause: float = 0.1
    ) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise ClusterFailed(f"not after {seconds:.0f} s: {what}\n{self._tails()}")
            time.sleep(pause)

    def _tails(self) -> str:
        return "\n".join(
            "\n".join(
                [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-TAIL_LINES:]]
            )
            for path in sorted((self.folder / "log").iterdir())
        )


def _private_folders() -> dict[Path, list[str]]:
    """Map the folders that only their owners may pass to what is needed of those in them."""
    needed: dict[Path, set[str]] = {}
    for way in (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2]):
        for folder in (way, *way.parents[:-1]):
            if not folder.parent.stat().st_mode & stat.S_IXOTH:
                needed.setdefault(folder.parent, set()).add(folder.name)
    return {folder: sorted(needed[folder]) for folder in sorted(needed)}


def _environment(user: str | None) -> dict[str, str]:
    """Return the environment of the tests, as it is where they aren't a job, for a user."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    if user is not None:
        environment |= {"HOME": pwd.getpwnam(user).pw_dir, "USER": user, "LOGNAME": user}
    return environment
