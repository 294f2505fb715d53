"""Start Ray on this machine, or join a cluster: safely, and only one that is large enough."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from dist_sft.errors import UserError

CONNECT_SECONDS = 10.0
LOOK_SECONDS = 0.5
OBJECT_STORE_BYTES = 2**27  # no data goes through it; Ray would take 30 % of the memory
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DEDUP_LOGS": "0",  # or one rank's error would hide another's
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or what still asks after a stop would start another Ray
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # runs on the dashboard
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do by default, and warns of
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HIDDEN = ("node:", "object_store", "memory", "accelerator_type", "bundle_group")
"""Resources by which Ray names nodes and groups, or that are its own."""
Resources = Mapping[str, float]


@contextlib.contextmanager
def started(workers: int, per_worker: Resources) -> Iterator[None]:
    """Run Ray on this machine within a block, for this run alone.

    Only who has the token can use it, and its dashboard is reached from this machine only.
    """
    # Not where TMPDIR says: names of sockets must be short. What is Ray's own, Ray opens to all
    # users; so it is in a folder that others cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="dist_sft-ray-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    needed = {key: count * workers for key, count in per_worker.items()}
    cpus = max(os.cpu_count() or 1, math.ceil(needed.pop("CPU", 0)))
    needed.pop("GPU", None)  # Ray counts them itself
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        context = stack.enter_context(_ray()).init(
            address="local",
            num_cpus=cpus,
            resources=needed or None,
            object_store_memory=OBJECT_STORE_BYTES,
            dashboard_host="127.0.0.1",
            include_dashboard=True,
            _temp_dir=str(folder / "ray"),
        )
        hear_term_again()
        dashboard = f"http://{context.dashboard_url}"
        print(
            f"Ray runs on this machine; its dashboard, {dashboard}, asks for the token in {token}"
        )
        yield


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Be a driver of an existing cluster within a block. Raises UserError where that cannot be."""
    if address != "auto":
        try:  # Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise unreachable(address, error) from None
    with _ray() as ray:
        try:
            context = ray.init(address=address)
        except Exception as error:
            raise unreachable(address, error) from None
        hear_term_again()
        dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
        # Ray sets it, too, where it has found a token.
        warn(dashboard, shown_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token")
        yield


def unreachable(address: str, error: Exception) -> UserError:
    """Return what was given, and what is allowed."""
    return UserError(
        f"--address: got {address}, and it cannot be joined: {error}\nallowed: auto or HOST:PORT "
        "on a node of the cluster, with its token in RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN; "
        "http://HOST:PORT of its dashboard from anywhere; none to start Ray on this machine"
    )


@contextlib.contextmanager
def _ray() -> Iterator[Any]:
    os.environ.update(ENVIRONMENT)
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("Ray is not installed here: pip install 'dist-sft[ray]'") from None
    ray._private.utils.set_sigterm_handler = lambda _: None  # or TERM would end this process
    try:
        yield ray
    finally:
        ray.shutdown()


def hear_term_again() -> None:
    """Put this process's own handler of TERM back.

    Ray's, of its C++ part, calls it, but aborts the process three seconds later.
    """
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.alarm(0)  # if one came in between


def warn(dashboard: str | None, *, shown_token: bool = True) -> None:
    """Say what is unsafe about a cluster, and how to make it safe.

    One that was joined without having `shown_token` is open. Others are asked by their dashboard,
    which often is reached from its own machine only.
    """
    if shown_token and (dashboard is None or is_guarded(dashboard)):
        return
    host = urlsplit(dashboard or "").hostname
    public = f" Its dashboard listens on {host}." if host not in (None, *LOOPBACK) else ""
    print(
        "warning: this cluster has no token authentication: whoever reaches its ports can run "
        f"anything.{public} Start it with RAY_AUTH_MODE=token, after `ray get-auth-token "
        "--generate`, the same token on every node, and with --dashboard-host 127.0.0.1",
        file=sys.stderr,
        flush=True,
    )


def is_guarded(dashboard: str) -> bool:
    """Tell whether a cluster wants a token. What does not answer is not called open."""
    try:
        with urlopen(f"{dashboard}/api/authentication_mode", timeout=CONNECT_SECONDS) as answer:
            return bool(json.load(answer).get("authentication_mode") == "token")
    except (OSError, ValueError):
        return True


def nodes(ray: Any) -> list[tuple[str, Resources]]:
    """Return the name and the resources of every node that is alive."""
    return [
        (node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]


def threads_for(setting: int | str, per_worker: Resources) -> int:
    """Resolve `threads_per_worker`: auto is 1 on CPU, what Ray reserves for a worker beside a GPU.

    Not a share of the cores: Ray may place other numbers on other nodes, and others beside them.
    """
    if isinstance(setting, int):
        return setting
    return max(1, int(per_worker.get("CPU", 0))) if per_worker.get("GPU") else 1


def has_gpus() -> bool:
    """Tell whether the cluster has a GPU."""
    import ray

    return bool(ray.cluster_resources().get("GPU"))


def room(per_worker: Resources, found: Sequence[Resources]) -> int:
    """Count the workers for which nodes with these resources have room."""
    wanted = {key: count for key, count in per_worker.items() if count}
    if not wanted:
        return 2**30
    return sum(int(min(has.get(key, 0) // count for key, count in wanted.items())) for has in found)


def wait_for_room(
    workers: int, per_worker: Resources, seconds: float, stops: Callable[[], bool]
) -> bool:
    """Tell whether the cluster has so many workers' resources before somebody `stops` the wait.

    Raises UserError where it has not got them in time. What other jobs use counts: Ray queues.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    def is_large_enough() -> bool:
        return room(per_worker, [resources for _, resources in nodes(ray)]) >= workers

    if is_large_enough():
        return not stops()
    bundle = {key: count for key, count in per_worker.items() if count}
    wish = placement_group([bundle] * workers)  # for a cluster that can grow
    deadline = time.monotonic() + seconds
    try:
        while not is_large_enough():
            if stops():
                return False
            if time.monotonic() > deadline:
                raise too_small(workers, per_worker, nodes(ray))
            time.sleep(LOOK_SECONDS)
    finally:
        remove_placement_group(wish)
    return not stops()


def own_groups() -> list[dict[str, Any]]:
    """Return the placement groups of this job, whose number is the last part of theirs."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return [group for number, group in placement_group_table().items() if number.endswith(job)]


def free_room(per_worker: Resources) -> int:
    """Count the workers for which there is room, or which this job has."""
    from ray._private.state import available_resources_per_node

    left: dict[str, dict[str, float]] = available_resources_per_node()
    for group in own_groups():
        for number, bundle in group["bundles"].items():
            has = left.get(group["bundles_to_node_id"][number])
            if has is not None and group["state"] != "REMOVED":
                for key, count in bundle.items():
                    has[key] = has.get(key, 0) + count
    return room(per_worker, list(left.values()))


def too_busy(workers: int, per_worker: Resources) -> UserError:
    """Return what was asked and what is left, of a cluster that is large enough or was."""
    import ray

    if room(per_worker, [resources for _, resources in nodes(ray)]) < workers:
        return too_small(workers, per_worker, nodes(ray))
    return UserError(
        f"--workers: got {workers}, each with {told(per_worker)}; the cluster is large enough as "
        f"far as Ray knows, but in use: left are {told(ray.available_resources())}. Wait longer "
        "with --wait SECONDS, or ask for fewer"
    )


def too_small(
    workers: int, per_worker: Resources, found: Sequence[tuple[str, Resources]]
) -> UserError:
    """Return what was asked and what there is."""
    has = room(per_worker, [resources for _, resources in found])
    listed = "; ".join(f"{name}: {told(resources)}" for name, resources in found)
    return UserError(
        f"--workers: got {workers}, each with {told(per_worker)}; the cluster has room for {has} "
        f"({listed}). Ask for fewer, or for less with --resources-per-worker, or let nodes join"
    )


def told(resources: Resources) -> str:
    """Return resources for a person, without those that name a node."""
    shown = {key: count for key, count in sorted(resources.items()) if not key.startswith(HIDDEN)}
    return ", ".join(f"{key} {count:g}" for key, count in shown.items()) or "nothing"
