"""The KV cache's sizes and content."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.config import KvCacheSettings
from hotgraph_server.engine.kv_cache import CPU_SIZE_BYTES, KvCache, block_bytes, default_size_bytes
from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.interface import LayerKv
from tests.server.engine.conftest import tiny_settings
from tests.server.engine.tiny_model import TinyModel

CPU = torch.device("cpu")


def test_kv_cache_is_of_the_layout() -> None:
    """Tensors have the layout's shapes and hold zeros; probe blocks, behind the others, hold anything else."""
    model = TinyModel()
    settings = tiny_settings(num_blocks=7).kv_cache
    cache = KvCache(model.kv_layout, settings, dtype=torch.float32, device=model.device, num_probe_blocks=2)
    assert cache.num_blocks == 5
    assert cache.block_bytes == 4 * 256
    assert cache.size_bytes <= 7 * 4 * 256
    assert all(tensor.shape == (7, 4, 2, 8) for tensor in (*cache.tensors.keys, *cache.tensors.values))
    for tensor in (*cache.tensors.keys, *cache.tensors.values):
        assert not tensor[: cache.num_blocks].any()
        assert tensor[list(cache.probe_blocks)].all()


def test_least_size_is_enough_and_one_byte_less_is_not() -> None:
    """Three blocks are the least; the refusal says how many bytes are needed."""
    layout = [LayerKv(2, 8, 4), LayerKv(1, 16, 16)]
    assert block_bytes(layout, 16, torch.float16) == (2 * 12 + 32) * 16 * 2
    least = 3 * block_bytes(layout, 16, torch.float32)
    cache = KvCache(layout, KvCacheSettings(size_bytes=least), dtype=torch.float32, device=CPU)
    assert (cache.num_blocks, cache.size_bytes) == (3, least)
    assert cache.context_length(1000) == 32
    assert cache.context_length(20) == 20
    with pytest.raises(ModelLoadError, match=str(least)):
        KvCache(layout, KvCacheSettings(size_bytes=least - 1), dtype=torch.float32, device=CPU)


def test_default_on_the_cpu_is_one_gib() -> None:
    """Without a setting the CPU gets 1 GiB."""
    assert default_size_bytes(CPU) == CPU_SIZE_BYTES == 1 << 30


def test_no_more_blocks_than_all_slots_can_hold_unless_asked_for() -> None:
    """A model with a tiny cache gets as many blocks as its slots can use; a size that is set is kept."""
    layout = [LayerKv(1, 1, 1)]
    cache = KvCache(layout, KvCacheSettings(), dtype=torch.float32, device=CPU, max_blocks=10)
    assert cache.num_blocks == 11
    asked = KvCache(layout, KvCacheSettings(size_bytes=1 << 20), dtype=torch.float32, device=CPU, max_blocks=10)
    assert asked.num_blocks == (1 << 20) // block_bytes(layout, 16, torch.float32)
