"""A rank that hangs is noticed, named and ended, long before a collective times out."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_sft import node, process, runs
from dist_sft.stopping import Relay
from dist_sft.watchdog import DUMP_SIGNAL, FOLDER, Heart, Watchdog

Start = Callable[[int], subprocess.Popen[str]]

# Beats for every line it reads, writes its stacks when asked.
RANK = f"""
import faulthandler, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from dist_sft.watchdog import DUMP_SIGNAL, Heart
faulthandler.register(DUMP_SIGNAL, file=sys.stderr)
heart = Heart()
for line in sys.stdin:
    phase, step = line.split()
    heart.step = int(step)
    heart.beat(phase)
    print("beat", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def rank(number: int) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK], text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=os.environ | {FOLDER: str(tmp_path), "RANK": str(number)},
            )
        )  # fmt: skip
        return started[-1]

    yield rank
    for child in started:
        child.kill()
        child.communicate()


def beat(process: subprocess.Popen[str], phase: str, step: int = 0) -> None:
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{phase} {step}\n")
    assert process.stdout.readline() == "beat\n"


def test_nobody_watching_costs_nothing() -> None:
    Heart({}).beat("forward")


def test_progress_is_seen_and_a_standstill_named(tmp_path: Path, start: Start) -> None:
    watchdog = Watchdog(tmp_path, 1.0, 100.0)
    lively, stuck = start(0), start(1)
    beat(stuck, "backward", 7)
    for _ in range(8):
        beat(lively, "forward", 7)  # another beat in the same place is progress, too
        assert watchdog.look() is None
        time.sleep(0.1)
    time.sleep(0.6)
    beat(lively, "forward", 7)
    found = watchdog.look()
    assert found is not None
    assert str(found).startswith("rank 1 has made no progress for 1 s (backward, step 7): every ")
    beat(stuck, "optimizer", 7)
    assert watchdog.look() is None


def test_phases_have_their_own_limits(tmp_path: Path, start: Start) -> None:
    watchdog = Watchdog(tmp_path, 0.1, 0.6)
    loading, preparing = start(0), start(1)
    beat(loading, "loading")
    beat(preparing, "preparing")
    assert watchdog.look() is None
    time.sleep(0.3)
    assert watchdog.look() is None
    time.sleep(0.5)
    found = watchdog.look()
    assert found is not None
    assert (found.rank, found.phase) == (0, "loading")
    assert Watchdog(tmp_path, None, None).look() is None


def test_a_stopped_process_is_found_in_every_phase(tmp_path: Path, start: Start) -> None:
    watchdog = Watchdog(tmp_path, 0.3, 100.0)
    for number, phase in enumerate(("saving", "preparing")):
        rank = start(number)
        beat(rank, phase)
        assert watchdog.look() is None
        time.sleep(0.5)
        assert watchdog.look() is None, "its phase may take longer"
        rank.send_signal(signal.SIGSTOP)
        assert watchdog.look() is None, "it ran a moment ago: somebody may look at it"
        time.sleep(0.5)
        found = watchdog.look()
        assert found is not None
        assert (found.rank, found.phase, found.stopped) == (number, phase, True)
        rank.send_signal(signal.SIGCONT)


def test_a_rank_that_ended_is_not_stuck(tmp_path: Path, start: Start) -> None:
    watchdog = Watchdog(tmp_path, 0.1, 0.1)
    rank = start(0)
    beat(rank, "exporting", 9)
    assert watchdog.look() is None
    rank.kill()
    time.sleep(0.3)
    assert watchdog.look() is None


def test_the_one_that_others_wait_for_is_blamed_and_all_are_ended(
    tmp_path: Path, start: Start
) -> None:
    watchdog = Watchdog(tmp_path, 0.3, 0.3)
    waiting, stopped = start(0), start(1)
    beat(waiting, "waiting", 4)
    beat(stopped, "forward", 4)
    assert watchdog.look() is None
    os.kill(stopped.pid, signal.SIGSTOP)
    time.sleep(0.5)
    found = watchdog.look()
    assert found is not None
    assert (found.rank, found.phase, found.step) == (1, "forward", 4)
    assert str(found).endswith("its process is stopped")
    watchdog.dump()
    process.kill(watchdog.living())
    assert "most recent call first" in waiting.communicate()[1]
    assert [p.wait(timeout=10) for p in (waiting, stopped)] == [-signal.SIGKILL] * 2


def test_a_node_writes_down_who_hung(tmp_path: Path) -> None:
    (tmp_path / "logs/attempt-0").mkdir(parents=True)
    hearts = tmp_path / "hearts"
    hearts.mkdir()
    env = os.environ | {FOLDER: str(hearts), "RANK": "3"}
    program = RANK.replace("for line in sys.stdin:", "for line in ['forward 5', 'data 6']:")
    torchrun = subprocess.Popen(
        [sys.executable, "-c", program + "\nimport time; time.sleep(60)"],
        env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    node.watch(torchrun, Watchdog(hearts, 0.5, None), Relay(), tmp_path, 0, ranks=1)
    assert torchrun.returncode == -signal.SIGKILL
    failure = runs.first_failure(tmp_path, 0)
    assert failure is not None
    assert failure[0] == 3
    assert "no progress" in failure[1].reason
    assert "data, step 6" in failure[1].reason


def test_the_dump_signal_is_none_that_stops_a_run() -> None:
    assert DUMP_SIGNAL not in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
