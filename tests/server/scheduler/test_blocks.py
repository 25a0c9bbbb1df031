"""Tests of scheduler/blocks.py."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hotgraph_server.scheduler.blocks import SCRATCH_BLOCK, BlockManager, BlockTable, block_hash


def test_open_takes_the_blocks_a_sequence_needs() -> None:
    """A table has just as many blocks as its positions need, none of them the scratch block, none twice."""
    manager = BlockManager(10, 4)
    table = manager.open(9)
    assert len(table) == 3
    assert SCRATCH_BLOCK not in table.blocks
    assert len(set(table.blocks)) == 3
    assert (manager.num_free, manager.num_cached, manager.num_used) == (6, 0, 3)


def test_open_without_room_is_our_own_mistake() -> None:
    """Opening more than is available raises instead of handing out a block twice."""
    manager = BlockManager(3, 4)
    assert manager.num_missing(12, []) == 3
    with pytest.raises(RuntimeError, match="num_missing"):
        manager.open(12)


def test_extend_without_room_is_our_own_mistake() -> None:
    """A table cannot grow past the pool."""
    manager = BlockManager(3, 4)
    table = manager.open(8)
    assert not manager.can_extend(table, 9)
    with pytest.raises(RuntimeError, match="can_extend"):
        manager.extend(table, 9)


def test_a_pool_without_a_usable_block_is_refused() -> None:
    """One block is the scratch block, so a pool needs two."""
    with pytest.raises(ValueError, match="hold no sequence"):
        BlockManager(1, 16)


def test_committed_blocks_are_found_by_a_sequence_with_the_same_prefix() -> None:
    """A second sequence with the same tokens shares the full blocks, and computes at least its last token."""
    manager = BlockManager(10, 4)
    tokens = list(range(12))
    first = manager.open(12)
    manager.commit(first, tokens, 12)
    assert manager.find_prefix(tokens) == first.blocks[:2]  # the third would leave nothing to compute
    assert manager.find_prefix([*tokens, 99]) == first.blocks[:3]
    second = manager.open(13, manager.find_prefix([*tokens, 99]))
    assert second.blocks[:3] == first.blocks
    assert manager.num_used == 4


def test_a_difference_in_an_early_block_hides_all_later_ones() -> None:
    """A block's name depends on every token before it."""
    manager = BlockManager(10, 2)
    table = manager.open(6)
    manager.commit(table, [1, 2, 3, 4, 5, 6], 6)
    assert manager.find_prefix([9, 2, 3, 4, 5, 6, 7]) == []
    assert manager.find_prefix([1, 2, 9, 4, 5, 6, 7]) == table.blocks[:1]


def test_only_computed_positions_are_committed() -> None:
    """A block that is full of tokens but not of keys and values cannot be found."""
    manager = BlockManager(10, 4)
    table = manager.open(8)
    manager.commit(table, list(range(8)), 7)
    assert manager.find_prefix(list(range(9))) == table.blocks[:1]


def test_closed_blocks_stay_findable_until_needed_and_the_oldest_goes_first() -> None:
    """Contents outlive their sequence, and are given up in the order of release, the end of a prefix before its start."""
    manager = BlockManager(5, 2)
    old, new = manager.open(4), manager.open(4)
    manager.commit(old, [1, 2, 3, 4], 4)
    manager.commit(new, [5, 6, 7, 8], 4)
    old_blocks = list(old.blocks)
    manager.close(old)
    manager.close(new)
    assert (manager.num_free, manager.num_cached) == (0, 4)
    taken = manager.open(2)
    assert taken.blocks == [old_blocks[1]]
    assert manager.find_prefix([1, 2, 3, 4, 5]) == old_blocks[:1]
    assert len(manager.find_prefix([5, 6, 7, 8, 9])) == 2


def test_equal_contents_are_kept_findable_once() -> None:
    """Two sequences that computed the same block keep both; after both end only one of them is remembered."""
    manager = BlockManager(5, 2)
    first, second = manager.open(2), manager.open(2)
    manager.commit(first, [1, 2], 2)
    manager.commit(second, [1, 2], 2)
    manager.close(first)
    manager.close(second)
    assert (manager.num_free, manager.num_cached) == (3, 1)


def test_without_prefix_caching_nothing_is_shared() -> None:
    """Switched off, commit and find_prefix do nothing and closed blocks are free."""
    manager = BlockManager(5, 2, prefix_caching=False)
    table = manager.open(4)
    manager.commit(table, [1, 2, 3, 4], 4)
    assert manager.find_prefix([1, 2, 3, 4, 5]) == []
    manager.close(table)
    assert (manager.num_free, manager.num_cached) == (4, 0)


def test_hashes_worked_out_ahead_are_not_findable_before_the_commit() -> None:
    """Working out shares nothing yet, and after it a commit needs no hash of its own."""
    manager = BlockManager(10, 4)
    tokens = list(range(13))
    table = manager.open(13)
    manager.work_out(table, tokens, 9)
    assert [len(table.hashes), table.num_committed] == [2, 0]
    assert manager.find_prefix(tokens) == []
    with mock.patch("hotgraph_server.scheduler.blocks.block_hash", side_effect=AssertionError):
        manager.commit(table, tokens, 9)
    assert manager.find_prefix(tokens) == table.blocks[:2]
    manager.commit(table, tokens, 13)
    assert manager.find_prefix(tokens) == table.blocks[:3]


def test_block_hash_tells_order_and_parent_apart() -> None:
    """The name of a block depends on its tokens, their order and the block before."""
    names = {block_hash(b"", [1, 2]), block_hash(b"", [2, 1]), block_hash(block_hash(b"", [1, 2]), [1, 2])}
    assert len(names) == 3


class BlockMachine(RuleBasedStateMachine):
    """Sequences open, grow, compute and close in any order; a plain model says what must hold."""

    SIZE = 2

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(9, self.SIZE)
        self.tables: list[tuple[BlockTable, list[int], int]] = []  # table, tokens, computed
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end, for computed full blocks

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def open(self, tokens: list[int]) -> None:
        prefix = self.manager.find_prefix(tokens)
        for index, block in enumerate(prefix):
            assert self.contents[block] == tuple(tokens[: (index + 1) * self.SIZE])
        assert len(prefix) * self.SIZE < len(tokens)
        if self.manager.num_missing(len(tokens), prefix) > self.manager.num_available:
            return
        table = self.manager.open(len(tokens), prefix)
        assert table.blocks[: len(prefix)] == prefix
        self._write(table, len(prefix))
        self.tables.append((table, tokens, len(prefix) * self.SIZE))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table, tokens, computed = self.tables[index]
        if self.manager.can_extend(table, len(tokens) + 1):
            before = len(table)
            self.manager.extend(table, len(tokens) + 1)
            self._write(table, before)
            self.tables[index] = (table, [*tokens, token], computed)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table, tokens, computed = self.tables[index]
        now = data.draw(st.integers(computed, len(tokens)))
        for block in range(computed // self.SIZE, now // self.SIZE):
            self.contents[table.blocks[block]] = tuple(tokens[: (block + 1) * self.SIZE])
        self.manager.commit(table, tokens, now)
        self.tables[index] = (table, tokens, now)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def work_out(self, data: st.DataObject) -> None:
        table, tokens, computed = data.draw(st.sampled_from(self.tables))
        self.manager.work_out(table, tokens, data.draw(st.integers(computed, len(tokens))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        table, _, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.manager.close(table)
        assert table.blocks == []

    def _write(self, table: BlockTable, start: int) -> None:
        """Fresh blocks of a table are written by it alone."""
        for block in table.blocks[start:]:
            assert all(block not in other.blocks for other, _, _ in self.tables if other is not table)
            self.contents.pop(block, None)

    @invariant()
    def counts_add_up(self) -> None:
        manager = self.manager
        assert manager.num_free + manager.num_cached + manager.num_used == manager.num_blocks - 1
        assert manager.num_used == len({block for table, _, _ in self.tables for block in table.blocks})
        assert SCRATCH_BLOCK not in {block for table, _, _ in self.tables for block in table.blocks}


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
