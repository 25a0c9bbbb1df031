"""Writing keys and values to slots of the paged cache."""

from __future__ import annotations

import torch

from hotgraph_server.kernels.kv_write import write_kv


def test_each_token_goes_to_its_slot_and_nothing_else_changes() -> None:
    """Slots are block * block_size + offset; keys and values may differ in size; sources may be strided."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.full((5, 4, 2, 3), -1.0), torch.full((5, 4, 2, 6), -1.0)
    key, value = torch.randn(3, 8, 3, generator=generator)[:, 2:4], torch.randn(3, 2, 6, generator=generator)
    slots = {13: 0, 4: 1, 19: 2}
    write_kv(key, value, keys, values, torch.tensor(list(slots)))
    for slot in range(20):
        stored = keys[slot // 4, slot % 4], values[slot // 4, slot % 4]
        if slot in slots:
            assert torch.equal(stored[0], key[slots[slot]])
            assert torch.equal(stored[1], value[slots[slot]])
        else:
            assert (stored[0] == -1).all()
            assert (stored[1] == -1).all()


def test_padding_tokens_may_share_a_slot() -> None:
    """Several tokens may name the scratch slot; the others are written all the same."""
    keys, values = torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2)
    key = torch.arange(8.0).view(4, 1, 2)
    write_kv(key, key, keys, values, torch.tensor([6, 0, 0, 0]))
    assert torch.equal(keys[1, 2], key[0])
    assert not keys[1, [0, 1, 3]].any()
