"""Machines made of Linux namespaces: network, UTS, mount, PID.

Each has a host name, an address, a loopback, a /dev/shm and a process tree of its own. The file
system is that of this machine, as a shared home would be on a cluster; /tmp is shared, too.

The first one, the login node, holds the others: their PID namespaces lie within its own, and the
bridge that joins them within its network namespace. So when its init ends, the kernel ends every
process of them all, what daemons left behind included, and drops the mounts and links; nothing is
ever added to this machine's own network. That init reads a pipe whose other end is here: it ends
when this process does, killed or not.
"""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SECONDS = 60
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")

# A machine's first process. Bash, because PID 1 must reap what others leave behind, and bash does
# while it waits. `read` returns at the end of its pipe.
INIT = """
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
echo up
read -r
"""


class MachineFailed(AssertionError):
    """Report that a machine did not start."""


class Machine:
    """The namespaces and what runs in them; `within` is the login node, None for itself."""

    def __init__(
        self, name: str, address: str, log_dir: Path, within: "Machine | None" = None
    ) -> None:
        self.name, self.address = name, address
        self._log_dir, self._within = log_dir, within
        self._daemons: dict[str, subprocess.Popen[str]] = {}
        init = [*UNSHARE, "bash", "-ec", INIT, "init", name]
        with self._log("init") as log:
            self._init = subprocess.Popen(
                within.command(*init) if within else init,
                env=bare_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C is for us
            )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "up\n":
            self.wait()
            raise MachineFailed(f"{name} does not start, see {self._log_dir}/{name}.init")
        self._pid = self._init.pid  # of init, as this process counts
        while children := _children(self._pid):
            self._pid = children[0]
        self._wire()

    def command(self, *command: str, user: str | None = None, cwd: Path = Path("/")) -> list[str]:
        """Return the command that runs another one in here; killing it kills that one."""
        as_user = []
        if user is not None:
            as_user = [f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--init-groups"]
        return [
            *("nsenter", f"--target={self._pid}", "--net", "--uts", "--mount", "--pid"),
            *(f"--wdns={cwd}", "setpriv", *as_user, "--pdeathsig=KILL", *command),
        ]

    def run(self, *command: str) -> None:
        """Run a command that sets something up."""
        _run(self.command(*command))

    def start(self, *command: str) -> None:
        """Start a daemon in the foreground."""
        name = command[0]
        with self._log(name) as log:
            self._daemons[name] = subprocess.Popen(
                self.command(*command),
                env=bare_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def is_on(self) -> bool:
        return self._init.poll() is None

    def runs(self, daemon: str) -> bool:
        return self._daemons[daemon].poll() is None

    def kill(self, daemon: str) -> None:
        """Kill a daemon, but nothing that it started."""
        process = self._daemons[daemon]
        if self.runs(daemon) and (children := _children(process.pid)):
            os.kill(children[0], signal.SIGKILL)
        process.wait(SECONDS)

    def power_off(self) -> None:
        """Kill everything in here."""
        if self.is_on():
            if self._within:
                # What loses power says no farewell: nobody sees its connections close.
                self.plug("down")
            os.kill(self._pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Wait for what ends with the machine, once it is off."""
        for process in (self._init, *self._daemons.values()):
            process.wait(SECONDS)
        for pipe in (self._init.stdin, self._init.stdout):
            assert pipe is not None
            pipe.close()

    def plug(self, how: Literal["up", "down"]) -> None:
        """Plug the network cable in or out, at the bridge."""
        assert self._within is not None
        self._within.run("ip", "link", "set", self._cable, how)

    @property
    def _cable(self) -> str:
        # Another name at each boot: the kernel drops that of a dead machine when it pleases.
        return f"{self.name}.{self._pid}"

    def _wire(self) -> None:
        if self._within is None:
            self.run("ip", "link", "add", "eth0", "type", "bridge")
        else:
            # In that network, but not in its PID namespace: it would know our number by another.
            enter = ["nsenter", f"--net=/proc/{self._within._pid}/ns/net"]
            end = ["type", "veth", "peer", "name", "eth0", "netns", str(self._pid)]
            _run([*enter, "ip", "link", "add", self._cable, *end])
            self._within.run("ip", "link", "set", self._cable, "master", "eth0", "up")
            # The same at each boot, as of a real card: others remember it for a while.
            mac = ":".join(f"{part:02x}" for part in (2, 0, *map(int, self.address.split("."))))
            self.run("ip", "link", "set", "eth0", "address", mac)
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def _log(self, name: str) -> IO[str]:
        return (self._log_dir / f"{self.name}.{name}").open("a")


def refusal() -> str | None:
    """Say why no machine can be made here, None if one can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    refused = subprocess.run([*UNSHARE, "true"], text=True, capture_output=True, timeout=SECONDS)
    return f"namespaces are refused: {refused.stderr.strip()}" if refused.returncode else None


def missing(*tools: str) -> list[str]:
    """Return the tools that are not installed."""
    return [tool for tool in tools if not shutil.which(tool, path=PATH)]


def bare_environment() -> Mapping[str, str]:
    """Return an environment without what the tests have in theirs."""
    return {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, env=bare_environment(), text=True, capture_output=True, timeout=SECONDS
    )
    if done.returncode:
        raise MachineFailed(f"{command}: exit code {done.returncode}\n{done.stderr}")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
