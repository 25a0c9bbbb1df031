"""Tests of again.py: a later launch of a variant is what Triton would launch, and nothing is kept alive for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from hotgraph_server.kernels import again
from hotgraph_server.kernels.activation import _gated_activation_kernel as activation_kernel
from hotgraph_server.kernels.activation import gated_activation_triton
from hotgraph_server.kernels.attention_decode import decode_kernel
from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_tiles import tile_kernel
from hotgraph_server.kernels.attention_triton import triton_attention
from hotgraph_server.kernels.few_rows_dots import dots_kernel
from hotgraph_server.kernels.few_rows_norm import norm_kernel
from hotgraph_server.kernels.few_rows_sums import sums_kernel
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton, normed_triton
from hotgraph_server.kernels.norm import _rms_norm_kernel as rms_norm_kernel
from hotgraph_server.kernels.norm import add_rms_norm_triton
from hotgraph_server.kernels.prepare import StepSource, prepare_step_triton
from hotgraph_server.kernels.prepare import _prepare_kernel as prepare_kernel
from hotgraph_server.kernels.prepare_stage import StageLayout
from hotgraph_server.kernels.ring import _write_ring_kernel as ring_kernel
from hotgraph_server.kernels.ring import write_ring_triton
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import _rope_kv_kernel as rope_kernel
from hotgraph_server.kernels.rope_kv import rope_and_write_kv_triton
from hotgraph_server.kernels.sample_triton import BlockResults, PlainSampling, sample_plain_triton
from hotgraph_server.kernels.sample_triton import _blocks_kernel as blocks_kernel
from hotgraph_server.kernels.sample_triton import _finish_kernel as finish_kernel
from hotgraph_server.kernels.tile_rows_kernel import tiles_kernel
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton, tile_rows_qkv_triton
from tests.server.kernels.recording_driver import STREAM, RecordingDriver, recording

HIDDEN, HEADS, HEAD_DIM, BLOCK_SIZE, VOCABULARY = 256, 2, 64, 16, 2048
KERNELS = (
    tiles_kernel,
    norm_kernel,
    sums_kernel,
    dots_kernel,
    tile_kernel,
    decode_kernel,
    activation_kernel,
    rms_norm_kernel,
    prepare_kernel,
    ring_kernel,
    rope_kernel,
    blocks_kernel,
    finish_kernel,
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDriver]:
    monkeypatch.setattr(again, "_kept", {})
    with recording(*KERNELS) as recorder:
        yield recorder


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


class Places:
    """The tensors that a step of so many tokens of so many rows is launched with."""

    def __init__(self, num_tokens: int, num_rows: int = 1) -> None:
        self.x, self.out, self.normed = (half(num_tokens, HIDDEN) for _ in range(3))
        self.weight, self.norm = half(HIDDEN, HIDDEN), half(HIDDEN)
        self.qkv = half(3 * HEADS * HEAD_DIM, HIDDEN)
        self.query = half(num_tokens, HEADS, HEAD_DIM)
        self.attended = half(num_tokens, HEADS, HEAD_DIM)
        self.keys, self.values = (half(8, BLOCK_SIZE, HEADS, HEAD_DIM) for _ in range(2))
        self.kv_indices = torch.arange(num_tokens)
        self.rope = RopePlan(torch.randn(64, HEAD_DIM), torch.arange(num_tokens), None)
        self.rows = DeviceRows(
            block_tables=torch.zeros(num_rows, 4, dtype=torch.int32),
            context_lens=torch.ones(num_rows, dtype=torch.int32),
            query_starts=torch.arange(num_rows + 1, dtype=torch.int32),
            num_tokens=num_tokens,
            block_size=BLOCK_SIZE,
        )
        self.gate_up = half(num_tokens, 2 * HIDDEN)
        self.fused = half(num_tokens, 3 * HEADS * HEAD_DIM)
        self.logits = half(num_rows, VOCABULARY)
        self.ring_ids, self.ring_values = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 2, 8)
        self.counter = torch.zeros(1, dtype=torch.int64)
        self.ids, self.row_slots, self.last_tokens = (torch.zeros(8, dtype=torch.int64) for _ in range(3))
        self.chances, self.is_sampled = torch.zeros(2, 8), torch.ones(8, dtype=torch.int64)
        self.temperature, self.seeds = torch.zeros(8), torch.zeros(8, 2, dtype=torch.int32)
        self.positions, self.starts = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(9, dtype=torch.int32)
        layout = StageLayout(8, 64, 4, 8)
        self.source = StepSource(
            layout,
            torch.zeros(2, layout.num_words, dtype=torch.int32),
            self.counter,
            self.last_tokens,
            torch.zeros(9, 4, dtype=torch.int32),
            torch.zeros(9, 8, dtype=torch.int32),
        )
        self.blocks = BlockResults.allocate(8, VOCABULARY, torch.device("cpu"))


def tiles(at: Places, *, pdl: bool = True) -> None:
    tile_rows_linear_triton(
        at.x,
        at.weight,
        at.out,
        norm=at.norm,
        epsilon=1e-5,
        normed=at.normed,
        residual=at.out,
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


def rms_norm(at: Places) -> None:
    add_rms_norm_triton(at.x, at.normed, at.norm, 1e-5, at.out, scale=0.5)


def activation(at: Places) -> None:
    gated_activation_triton(at.gate_up, "silu", at.out)


def rope(at: Places) -> None:
    rope_and_write_kv_triton(at.fused, at.rope, at.kv_indices, at.keys, at.values, out=at.query)


def ring(at: Places) -> None:
    write_ring_triton(at.ring_ids, at.ring_values, at.counter, at.ids, at.chances)


def prepare(at: Places) -> None:
    prepare_step_triton(
        at.source,
        block_size=BLOCK_SIZE,
        row_slots=at.row_slots,
        is_sampled=at.is_sampled,
        token_ids=at.positions,
        positions=at.positions,
        kv_indices=at.positions,
        block_tables=at.rows.block_tables,
        context_lens=at.rows.context_lens,
        query_starts=at.starts,
        last_indices=at.ids,
    )


def sample(at: Places, *, is_greedy: bool) -> None:
    step = PlainSampling(
        row_slots=at.row_slots,
        context_lens=at.rows.context_lens,
        is_sampled=at.is_sampled,
        temperature=at.temperature,
        seeds=at.seeds,
        last_tokens=at.last_tokens,
        values=at.chances,
        ring_ids=at.ring_ids,
        ring_values=at.ring_values,
        counter=at.counter,
    )
    sample_plain_triton(at.logits, step, at.blocks, is_greedy=is_greedy)


def greedy(at: Places) -> None:
    sample(at, is_greedy=True)


def drawn(at: Places) -> None:
    sample(at, is_greedy=False)


STEPS: list[tuple[Callable[[Places], None], int, int]] = [
    (tiles, 20, 1),
    (tiles_qkv, 20, 1),
    (few, 1, 1),
    (few, 5, 1),
    (few_qkv, 2, 1),
    (few_qkv, 5, 1),
    (norm, 3, 1),
    (attention, 20, 1),
    (attention, 4, 4),
    (attention, 20, 4),
    (rms_norm, 20, 1),
    (activation, 20, 1),
    (rope, 20, 1),
    (ring, 1, 1),
    (prepare, 20, 3),
    (greedy, 3, 3),
    (drawn, 3, 3),
]
"""What is launched, and the tokens and rows of a step."""


@pytest.mark.parametrize(
    ("launches", "num_tokens", "num_rows"), STEPS, ids=lambda value: getattr(value, "__name__", value)
)
def test_later_launches_are_tritons(
    driver: RecordingDriver,
    monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[Places], None],
    num_tokens: int,
    num_rows: int,
) -> None:
    """A step of the same shape, be it of the same places or of others, launches what Triton would, without asking it."""
    first, other = Places(num_tokens, num_rows), Places(num_tokens, num_rows)
    launches(first)
    launches(other)
    kept, again._kept = again._kept, {}
    driver.launches.clear()
    launches(first)
    launches(other)
    by_triton = list(driver.launches)
    assert by_triton
    assert by_triton[: len(by_triton) // 2] != by_triton[len(by_triton) // 2 :]  # they do lie elsewhere
    assert all(launch[3] == STREAM for launch in by_triton)

    driver.launches.clear()
    monkeypatch.setattr(again, "_kept", kept)
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "run", None)
    launches(first)
    launches(other)
    assert driver.launches == by_triton


def test_what_differs_is_a_variant_of_its_own(driver: RecordingDriver) -> None:
    """Other types, sizes, numbers, options and alignments are launched as Triton would, and kept beside each other."""
    at = Places(20)
    tiles(at)
    assert len(again._kept) == 2  # the norm's and the product's
    at.x, at.out, at.normed = at.x[:9], at.out[:9], at.normed[:9]
    tiles(at)
    assert len(again._kept) == 4
    tiles(at, pdl=False)
    assert len(again._kept) == 6
    variants = len(again._kept)
    normed_triton(at.x, at.norm, 1e-6, at.normed, pdl=True)
    assert len(again._kept) == variants + 1
    shifted = half(9 * HIDDEN + 1)[1:].view(9, HIDDEN)
    assert shifted.data_ptr() % again.ALIGNMENT
    normed_triton(shifted, at.norm, 1e-6, at.normed, pdl=True)
    assert len(again._kept) == variants + 2
    normed_triton(at.x.bfloat16(), at.norm.bfloat16(), 1e-6, at.normed.bfloat16(), pdl=True)
    assert len(again._kept) == variants + 3
    few_rows_linear_triton(half(1, HIDDEN), at.weight, half(1, HIDDEN))
    few_rows_linear_triton(half(1, HIDDEN), at.weight, half(1, HIDDEN), residual=half(1, HIDDEN))
    assert len(again._kept) == variants + 5


def test_no_tensor_is_kept_alive(driver: RecordingDriver) -> None:
    """What is kept of a launch holds none of its tensors: they go with their last user."""
    at = Places(20, 4)
    tiles(at)
    attention(at)
    gone = [weakref.ref(tensor) for tensor in (at.x, at.weight, at.out, at.keys)]
    assert len(again._kept) == 4
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
