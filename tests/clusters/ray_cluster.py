"""Real Ray clusters on this machine: a head and nodes, each by `ray start`, with a token.

Every node has a session of its own, by which all of its processes are found and ended.
"""

import itertools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
from processes import free_port

SECONDS = 60
RAY = Path(sys.executable).with_name("ray")


class Node:
    """One `ray start`; `ended` when the test is done with it."""

    def __init__(
        self,
        ip: str,
        options: list[str],
        hides: Path | None,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        command = [str(RAY), "start", "--block", "--disable-usage-stats", *options]
        if hides is not None:
            mount = f"mount -t tmpfs none '{hides}' && exec \"$@\""
            command = ["unshare", "--mount", "bash", "-c", mount, "bash", *command]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.ip, self.log, self.metrics_port = ip, log, 0
        self.odd = hides is not None
        """Whether it must not be there for another test."""

    def is_up(self) -> bool:
        return self._process.poll() is None

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + SECONDS
        while "Ray runtime started" not in self.log.read_text():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Return its living processes, which may have been given to init."""
        found = []
        for process in psutil.process_iter():
            # It may end while it is looked at.
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                mine = os.getsid(process.pid) == self._process.pid
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End it as a power failure does."""
        deadline = time.monotonic() + SECONDS
        while living := self.processes():
            assert time.monotonic() < deadline, living
            for process in living:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            if self._process.poll() is None:
                self._process.wait(timeout=SECONDS)
            time.sleep(0.05)


class Cluster:
    """A head, and the nodes that were added to it, with addresses of their own from 127.0.0.2.

    It wants a token, but for one that is `open` to all.
    """

    def __init__(self, folder: Path, cpus: int, open: bool, variables: Mapping[str, str]) -> None:
        self.folder, self._variables = folder, variables
        self._numbers = itertools.count()
        self.environment = environment(folder)
        if open:
            self.environment["RAY_AUTH_MODE"] = "disabled"
        self.port, self.dashboard = free_port(), free_port()
        self.nodes: list[Node] = []
        self.address = f"127.0.0.2:{self.port}"
        self.http = f"http://127.0.0.1:{self.dashboard}"
        self.head = self._start(
            cpus, "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}",
        )  # fmt: skip

    def add(self, cpus: int = 1, hides: Path | None = None) -> Node:
        """Add a node; it `hides` a folder, as one does on which a file system is not mounted."""
        return self._start(cpus, f"--address={self.address}", hides=hides)

    def repair(self, nodes: int) -> None:
        """End nodes that are dead or odd, and add others until there are so many."""
        for node in [node for node in self.nodes if node.odd or not node.is_up()]:
            self.nodes.remove(node)
            node.kill()
        while len(self.nodes) < nodes:
            self.add()

    def drain(self, node: Node, seconds: int = 300) -> None:
        """Announce that a node will be taken away, as a cloud does before it takes one."""
        find = (
            f"import ray; ray.init(address='{self.address}'); "
            f"print(*[n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == '{node.ip}'])"
        )
        number = self._call(sys.executable, "-c", find).split()[-1]
        self._call(
            RAY, "drain-node", f"--address={self.address}", f"--node-id={number}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken",
            f"--deadline-remaining-seconds={seconds}",
        )  # fmt: skip
        node.odd = True

    def jobs(self) -> str:
        """Return all that Ray tells of the jobs that were submitted."""
        return self.dashboard_says("/api/jobs/")

    def dashboard_says(self, path: str) -> str:
        """Return what a page of the dashboard's interface says to who has the token."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = Request(self.http + path, headers={"Authorization": f"Bearer {token}"})
        with urlopen(request, timeout=SECONDS) as answer:
            return answer.read().decode()

    def metrics(self) -> str:
        """Return what the nodes' metrics are, as Prometheus reads them."""
        told = []
        for node in self.nodes:
            with urlopen(f"http://{node.ip}:{node.metrics_port}/metrics", timeout=SECONDS) as said:
                told.append(said.read().decode())
        return "\n".join(told)

    def _call(self, *command: str | Path) -> str:
        done = subprocess.run(
            command, env=self.environment, text=True, capture_output=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _start(self, cpus: int, *options: str, hides: Path | None = None) -> Node:
        number, metrics = next(self._numbers), free_port()
        ip = f"127.0.0.{2 + number}"
        command = [
            *node_options(ip, cpus), f"--metrics-export-port={metrics}",
            f"--temp-dir={self.folder}/{number}", *options,
        ]  # fmt: skip
        variables = {**self.environment, **self._variables}
        node = Node(ip, command, hides, variables, self.folder / f"node-{number}.log")
        node.metrics_port = metrics
        self.nodes.append(node)
        node.wait_until_up()
        return node

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()


def environment(folder: Path) -> dict[str, str]:
    """Return the tests' environment, with a token for a cluster."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (folder / "tmp").mkdir()
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


def node_options(ip: str, cpus: int) -> list[str]:
    """Return options of `ray start` for all nodes."""
    return [
        f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={2**27}",
        f"--node-ip-address={ip}", "--dashboard-agent-listen-port=0",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip


@contextmanager
def ray_cluster(
    folder: Path, cpus: int, open: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Start a head with so many CPUs; end every process of the cluster in the end.

    `variables` are the nodes' alone.
    """
    cluster = Cluster(folder, cpus, open, variables or {})
    try:
        yield cluster
    finally:
        cluster.close()
