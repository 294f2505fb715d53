"""One launcher at a time works on a run; what is left of another one can do no harm."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_sft import lease, process, runs
from dist_sft.errors import UserError
from dist_sft.lease import Lease, Owner


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def put(run_dir: Path, owner: Owner, attempt: int = 3, heartbeat: int = 7) -> None:
    content = asdict(Lease(owner, attempt, heartbeat))
    (run_dir / "lease.json").write_text(json.dumps(content))


def elsewhere() -> Owner:
    return replace(Owner.me(), host="another-host", here="another boot")


def waits(run_dir: Path) -> list[str]:
    """Wait until the run is free; return what was said meanwhile."""
    said: list[str] = []
    lease.wait_until_free(run_dir, said.append)
    return said


def test_a_lease_is_renewed_and_removed(tmp_path: Path) -> None:
    assert lease.read(tmp_path) is None
    with lease.hold(tmp_path, 4):
        first = lease.read(tmp_path)
        time.sleep(0.3)
        later = lease.read(tmp_path)
    assert first is not None
    assert later is not None
    assert first.owner == later.owner == Owner.me()
    assert first.attempt == later.attempt == 4
    assert later.heartbeat > first.heartbeat
    assert os.listdir(tmp_path) == []


def test_who_is_about_to_claim_is_seen(tmp_path: Path) -> None:
    """A process may claim for another one, which owns the run then."""
    with lease.announce(tmp_path, None) as mine:
        assert lease.read(tmp_path) == mine
        with pytest.raises(UserError, match="is in use by"), lease.announce(tmp_path, None):
            pass
        with pytest.raises(UserError, match="is in use by"):
            waits(tmp_path)  # it beats, for as long as it waits
    assert lease.read(tmp_path) is None
    with lease.announce(tmp_path, None) as mine:
        deadline = time.monotonic() + 30
        while lease.read(tmp_path) == mine:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        attempt = lease.claim(tmp_path, mine)
        put(tmp_path, elsewhere(), attempt)
    assert lease.read(tmp_path) == Lease(elsewhere(), 0, 7)


def test_a_live_run_is_refused(tmp_path: Path) -> None:
    with lease.hold(tmp_path, 4), pytest.raises(UserError) as refusal:
        waits(tmp_path)
    assert str(refusal.value) == (
        f"run_dir: {tmp_path} is in use by process {os.getpid()} on {Owner.me().host} (attempt 4). "
        f"Stop that run first (`dist-sft stop {tmp_path}`), or give another run_dir"
    )


def test_a_run_whose_heart_stopped_is_taken_over(tmp_path: Path) -> None:
    put(tmp_path, elsewhere())
    began = time.monotonic()
    assert "no sign of life: taking over" in waits(tmp_path)[-1]
    assert 1.0 <= time.monotonic() - began < 3.0


def test_a_run_that_ends_meanwhile_is_free(tmp_path: Path) -> None:
    put(tmp_path, elsewhere())
    threading.Timer(0.2, (tmp_path / "lease.json").unlink).start()
    assert len(waits(tmp_path)) == 1


@pytest.mark.parametrize("how", ["ended", "number used again"])
def test_a_process_of_this_host_that_is_gone_holds_nothing(tmp_path: Path, how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        gone = replace(Owner.me(), pid=child.pid, started="1")
    if how == "number used again":
        gone = replace(gone, pid=os.getpid())
    put(tmp_path, gone)
    assert waits(tmp_path) == []


def test_a_process_of_another_container_with_our_hosts_name_may_be_alive(tmp_path: Path) -> None:
    """The number of the process is nobody's here, which says nothing about there."""
    holds = (
        "import sys, time\nfrom pathlib import Path\nfrom dist_sft import lease\n"
        "lease.HEARTBEAT_SECONDS = 0.05\n"
        "with lease.hold(Path(sys.argv[1]), 0): time.sleep(60)"
    )
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*unshare, sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(command, env=environment) as holder:
        try:
            while not (tmp_path / "lease.json").exists():
                time.sleep(0.05)
            with pytest.raises(UserError, match=r"in use by process \d+"):
                waits(tmp_path)
        finally:
            holder.kill()


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = replace(Owner.me(), pid=child.pid, started=process.start_of(child.pid) or "")
    while process.start_of(child.pid):
        time.sleep(0.01)
    put(tmp_path, owner)
    assert waits(tmp_path) == []
    child.wait()


def test_a_requeued_job_takes_over_from_itself_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    put(tmp_path, elsewhere())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert waits(tmp_path) == []
    put(tmp_path, elsewhere())  # as another launch in the same job and restart
    assert len(waits(tmp_path)) == 2


def test_a_job_whose_nodes_have_yet_to_begin_has_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch script claimed it; a container may have to be unpacked before the first node."""
    monkeypatch.setattr(lease, "START_SECONDS", 3.0)
    claims = "import sys; from pathlib import Path; from dist_sft import lease; "
    claims += "lease.claim(Path(sys.argv[1]), None)"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    subprocess.run([sys.executable, "-c", claims, tmp_path], check=True)
    monkeypatch.setenv("SLURM_JOB_ID", "78")

    def begins() -> None:
        time.sleep(1)
        with lease.hold(tmp_path, 0):
            time.sleep(2)

    node = threading.Thread(target=begins)
    node.start()
    with pytest.raises(UserError, match=r"in use by process \d+ on .*, job 7"):
        waits(tmp_path)
    node.join()

    runs.attempt_dir(tmp_path, 0).rmdir()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    subprocess.run([sys.executable, "-c", claims, tmp_path], check=True)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert len(waits(tmp_path)) == 2, "it never began"


def test_who_lost_the_lease_knows_and_does_not_take_it_back(tmp_path: Path) -> None:
    with lease.hold(tmp_path, 4) as lost:
        assert not lost.wait(0.2)
        runs.attempt_dir(tmp_path, 5).mkdir(parents=True)
        put(tmp_path, elsewhere(), attempt=5)
        assert lost.wait(3)
        assert lease.read(tmp_path) == Lease(elsewhere(), 5, 7)
    assert lease.owns(tmp_path, 5)


def test_of_two_launchers_the_faster_one_has_the_run(tmp_path: Path) -> None:
    assert lease.wait_until_free(tmp_path) is lease.wait_until_free(tmp_path) is None
    assert lease.claim(tmp_path, None) == 0
    with pytest.raises(UserError, match=r"is in use by process \d+ on .* \(attempt 0\)"):
        lease.claim(tmp_path, None)
    assert runs.attempts(tmp_path) == [0], "a second one would fence the first one off"


def test_of_two_that_take_over_the_faster_one_has_the_run(tmp_path: Path) -> None:
    put(tmp_path, elsewhere(), attempt=0)
    runs.attempt_dir(tmp_path, 0).mkdir(parents=True)
    left = lease.read(tmp_path)
    assert lease.claim(tmp_path, left) == 1
    with pytest.raises(UserError, match="in use by"):
        lease.claim(tmp_path, left)
    assert runs.attempts(tmp_path) == [0, 1]


def test_of_two_in_the_same_instant_the_newer_attempt_stays(tmp_path: Path) -> None:
    for number in (0, 1):
        runs.attempt_dir(tmp_path, number).mkdir(parents=True)
    with lease.hold(tmp_path, 1) as lost, lease.hold(tmp_path, 0) as lost_too:
        assert lost_too.wait(3)
        time.sleep(0.2)
        assert lease.owns(tmp_path, 1)
        assert not lost.is_set()


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[[Path, str], None] = lease.write_atomically
    full = threading.Event()

    def sometimes(path: Path, text: str) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(lease, "write_atomically", sometimes)
    with lease.hold(tmp_path, 4):
        full.set()
        time.sleep(0.2)
        stale = lease.read(tmp_path)
        full.clear()
        time.sleep(0.2)
        assert lease.read(tmp_path) != stale


def test_a_damaged_lease_says_so(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("{")
    with pytest.raises(UserError, match="is damaged; remove it if no launcher works on this run"):
        waits(tmp_path)
