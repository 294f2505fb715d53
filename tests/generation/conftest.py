"""A tiny generation run, and what it gives when nobody disturbs it."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_generation
import torch
from generating import work
from tiny_generation import output_of, write

from dist_sft import runs


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_generation.make(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="session")
def greedy(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return what nobody disturbed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = write(recipe, tmp_path_factory.mktemp("greedy") / "run")
    with pytest.MonkeyPatch.context() as patch:
        assert work(path, patch).code == runs.FINISHED
    torch.set_num_threads(before)
    return output_of(path.with_suffix("")).read_bytes()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute as workers do: their number of threads is among what answers depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_signals_left() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
