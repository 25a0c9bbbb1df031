"""The benchmark programs are run as they are on a GPU, but small and on the CPU."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager

import pytest
import torch

from benchmarks.gpu import latency
from benchmarks.gpu.daemon_child import daemon_process
from benchmarks.gpu.models import Loaded, make_loaded
from benchmarks.gpu.service import Service, make_settings, serving
from graphcache import Backend

Serve = Callable[..., AbstractAsyncContextManager[Service]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, most of all where others use the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny() -> Loaded:
    """The smallest shape, in float32."""
    return make_loaded("tiny", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def serve(tiny: Loaded) -> Serve:
    """Serves the smallest shape in this process."""

    def make(backend: Backend | None = None) -> AbstractAsyncContextManager[Service]:
        return serving(tiny, make_settings(tiny, num_slots=4, kv_tokens=1024), run_ahead=1, backend=backend)

    return make


@pytest.fixture(scope="session")
def daemon_target() -> Iterator[str]:
    """The real daemon, in a process of its own: one for all tests, since a start is mostly imports."""
    arguments = argparse.Namespace(device="cpu", config="tiny", dtype=None, run_ahead=1)
    with daemon_process(arguments, num_slots=8, kv_tokens=4096) as target:
        yield target


@pytest.fixture
def shared_daemon(daemon_target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that would start a daemon find the tests' own."""
    monkeypatch.setattr(latency, "daemon_process", lambda *_, **__: contextlib.nullcontext(daemon_target))


@pytest.fixture
def small() -> Sequence[str]:
    """What every program is told here."""
    return ("--device", "cpu", "--config", "tiny", "--run-ahead", "1")
