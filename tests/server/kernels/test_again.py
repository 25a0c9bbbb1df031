"""Tests of again.py: the second launch of a key is the first one's, and nothing is kept alive for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from hotgraph_server.kernels import again
from hotgraph_server.kernels.attention_tiles import tile_kernel
from hotgraph_server.kernels.attention_triton import DeviceRows, triton_attention
from hotgraph_server.kernels.few_rows import few_rows_linear_triton, few_rows_qkv_triton, normed_triton
from hotgraph_server.kernels.few_rows_kernels import dots_kernel, norm_kernel, sums_kernel
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows import SplitRoom, tile_rows_linear_triton, tile_rows_qkv_triton
from hotgraph_server.kernels.tile_rows_kernels import tiles_kernel
from tests.server.kernels.recording_driver import STREAM, RecordingDriver, recording

HIDDEN, HEADS, HEAD_DIM, BLOCK_SIZE = 256, 2, 64, 16


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDriver]:
    monkeypatch.setattr(again, "_kept", {})
    with recording(tiles_kernel, norm_kernel, sums_kernel, dots_kernel, tile_kernel) as recorder:
        yield recorder


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


class Places:
    """The tensors that a step of so many tokens is launched with."""

    def __init__(self, num_tokens: int) -> None:
        self.x, self.out, self.normed = (half(num_tokens, HIDDEN) for _ in range(3))
        self.weight, self.norm = half(HIDDEN, HIDDEN), half(HIDDEN)
        self.qkv = half(3 * HEADS * HEAD_DIM, HIDDEN)
        self.query = half(num_tokens, HEADS, HEAD_DIM)
        self.attended = half(num_tokens, HEADS, HEAD_DIM)
        self.keys, self.values = (half(8, BLOCK_SIZE, HEADS, HEAD_DIM) for _ in range(2))
        self.kv_indices = torch.arange(num_tokens)
        self.rope = RopePlan(torch.randn(64, HEAD_DIM), torch.arange(num_tokens), None)
        self.room = SplitRoom.for_outputs(HIDDEN, torch.device("cpu"))
        self.rows = DeviceRows(
            block_tables=torch.zeros(1, 4, dtype=torch.int32),
            context_lens=torch.tensor([num_tokens], dtype=torch.int32),
            query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
            num_tokens=num_tokens,
            block_size=BLOCK_SIZE,
        )


def tiles(at: Places, *, pdl: bool = True) -> None:
    tile_rows_linear_triton(
        at.x,
        at.weight,
        at.out,
        norm=at.norm,
        epsilon=1e-5,
        normed=at.normed,
        residual=at.out,
        split_room=at.room,
        pdl=pdl,
    )


def tiles_qkv(at: Places) -> None:
    tile_rows_qkv_triton(at.x, at.qkv, at.rope, at.kv_indices, at.keys, at.values, at.query, pdl=True)


def few(at: Places) -> None:
    few_rows_linear_triton(
        at.x, at.weight, at.out, norm=at.norm, epsilon=1e-5, normed=at.normed, residual=at.out, pdl=True
    )


def few_qkv(at: Places) -> None:
    few_rows_qkv_triton(
        at.x, at.qkv, at.rope, at.kv_indices, at.keys, at.values, at.query, norm=at.norm, normed=at.normed, pdl=True
    )


def norm(at: Places) -> None:
    normed_triton(at.x, at.norm, 1e-5, at.normed, pdl=True)


def attention(at: Places) -> None:
    triton_attention(
        at.query,
        at.keys,
        at.values,
        at.rows,
        at.attended,
        scaling=0.1,
        window=None,
        softcap=None,
        sinks=None,
        pdl=True,
    )


@pytest.mark.parametrize(
    ("launches", "num_tokens"),
    [(tiles, 20), (tiles_qkv, 20), (few, 1), (few, 5), (few_qkv, 2), (norm, 3), (attention, 20)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_second_launch_is_the_first_ones(
    driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch, launches: Callable[[Places], None], num_tokens: int
) -> None:
    """A step that is launched again launches the same kernels with the same arguments, without asking Triton."""
    at = Places(num_tokens)
    launches(at)
    first = list(driver.launches)
    assert first
    assert all(launch[3] == STREAM for launch in first)
    driver.launches.clear()
    monkeypatch.setattr(again, "launch", None)
    for kernel in (tiles_kernel, norm_kernel, sums_kernel, dots_kernel, tile_kernel):
        monkeypatch.setattr(kernel, "run", None)
    launches(at)
    assert driver.launches == first


def test_what_differs_is_launched_as_it_is(driver: RecordingDriver) -> None:
    """Other places, sizes, numbers and options are launches of their own."""
    at = Places(20)
    tiles(at)
    seen = [tuple(driver.launches)]
    for name in ("weight", "norm", "out"):
        setattr(at, name, getattr(at, name).clone())
        driver.launches.clear()
        tiles(at)
        assert tuple(driver.launches) not in seen
        seen.append(tuple(driver.launches))
    at.x, at.out, at.normed = at.x[:9], at.out[:9], at.normed[:9]
    driver.launches.clear()
    tiles(at)
    assert tuple(driver.launches) not in seen
    num_kept = len(again._kept)
    tiles(at, pdl=False)
    assert len(again._kept) == num_kept + 2  # the norm's and the product's


def test_no_tensor_is_kept_alive(driver: RecordingDriver) -> None:
    """A launch that is kept holds addresses only: its tensors go with their last user."""
    at = Places(20)
    tiles(at)
    attention(at)
    gone = [weakref.ref(tensor) for tensor in (at.x, at.weight, at.room.partials, at.keys)]
    assert len(again._kept) == 3
    del at
    assert all(reference() is None for reference in gone)


def test_launches_that_are_kept_are_bounded(driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are too many all are forgotten, and made anew as they come."""
    monkeypatch.setattr(again, "MAX_KEPT", 3)
    places = [Places(num_tokens) for num_tokens in range(1, 9)]
    for at in [*places, *places]:
        norm(at)
        assert len(again._kept) <= 3
    assert len(driver.launches) == 16
    assert driver.launches[:8] == driver.launches[8:]
