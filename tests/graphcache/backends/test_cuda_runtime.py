"""Tests of backends/cuda_runtime.py: what needs no device. The rest is tests/gpu/test_cuda_backend.py."""

from __future__ import annotations

import inspect

import pytest
from cuda.bindings import runtime as cudart  # type: ignore[import-untyped]  # it ships no types

from graphcache.backends.cuda_runtime import MAX_STREAM_OBJECTS, CudaCallError, CudaRuntime, Runtime, _Streams, check
from tests.graphcache.backends.cuda_fakes import FakeRuntime


def test_codes_become_exceptions_with_their_names() -> None:
    """Success gives what came with it: nothing, one thing or several; anything else is an error with call and name."""
    success, failure = cudart.cudaError_t.cudaSuccess, cudart.cudaError_t.cudaErrorStreamCaptureInvalidated
    assert check("call", (success,)) == ()
    assert check("call", (success, 7)) == 7
    assert check("call", (success, 7, 8)) == (7, 8)
    with pytest.raises(CudaCallError, match=r"^call: cudaErrorStreamCaptureInvalidated$") as caught:
        check("call", (failure, None))
    assert caught.value.code == 901


def test_stream_objects_are_made_once_and_bounded() -> None:
    """A handle's object is kept, stands for that handle, and a program with ever new streams does not gather them."""
    streams = _Streams()
    assert streams[12] is streams[12]
    assert int(streams[12]) == 12
    for handle in range(1, 3 * MAX_STREAM_OBJECTS):
        assert int(streams[handle]) == handle
        assert len(streams) <= MAX_STREAM_OBJECTS


@pytest.mark.parametrize("runtime", [CudaRuntime, FakeRuntime])
def test_real_and_fake_have_the_same_calls(runtime: type) -> None:
    """What the tests put in place of the runtime has every method of it, with the same parameters."""
    for name, method in inspect.getmembers(Runtime, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(runtime, name)).parameters) == list(
                inspect.signature(method).parameters
            )


def test_a_launch_that_fails_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher launches its executable on the stream that is current at that moment, and raises its error code."""
    launched: list[tuple[int, int]] = []
    results = [cudart.cudaError_t.cudaSuccess, cudart.cudaError_t.cudaErrorInvalidValue]

    def launch(executable: object, stream: object) -> tuple[object]:
        launched.append((int(executable), int(stream)))  # type: ignore[call-overload]  # handles are integers inside
        return (results.pop(0),)

    monkeypatch.setattr(cudart, "cudaGraphLaunch", launch)
    current = [3]
    replay = CudaRuntime().launcher(77, lambda: current[0])
    replay()
    current[0] = 4
    with pytest.raises(CudaCallError, match="cudaGraphLaunch: cudaErrorInvalidValue"):
        replay()
    assert launched == [(77, 3), (77, 4)]
