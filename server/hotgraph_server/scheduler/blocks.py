"""Who holds which KV block: reference counts, free blocks, and prefixes shared by hash. Accounting only; no tensors here.

Only full blocks are shared, and a full block is never written again, so no copy is ever needed. A block nobody holds keeps
its contents, findable by hash, until the block is needed; the least recently released goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

SCRATCH_BLOCK = 0
"""The block padding tokens write to. Never handed out."""


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a block's contents: 16 bytes from those of the block before and the tokens. Collisions are out of reach."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class BlockTable:
    """The blocks of one sequence, in order, and the hashes of its full ones. Changed by the manager only."""

    __slots__ = ("blocks", "hashes", "num_committed")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # of the first blocks, as far as they are worked out
        self.num_committed = 0  # first blocks that are full and findable, or equal to a findable one

    def __len__(self) -> int:
        return len(self.blocks)


class BlockManager:
    """Hands out blocks 1 .. num_blocks - 1. Free, cached and used blocks always add up to num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} positions hold no sequence")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._free: deque[int] = deque(range(1, num_blocks))
        self._num_holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = (
            OrderedDict()
        )  # findable blocks nobody holds, least recently released first

    # Counts.

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds that can still be found by hash."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - 1 - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be had now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many positions need."""
        return -(-num_tokens // self.block_size)

    # Prefixes.

    def find_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Blocks that hold the longest known prefix of the tokens, leaving at least one token to compute."""
        if not self._prefix_caching:
            return []
        found: list[int] = []
        parent = b""
        size = self.block_size
        for start in range(0, len(token_ids) - size, size):
            parent = block_hash(parent, token_ids[start : start + size])
            block = self._block_of.get(parent)
            if block is None:
                break
            found.append(block)
        return found

    def num_missing(self, num_tokens: int, prefix: Sequence[int]) -> int:
        """Blocks that must be available to `open` a table of so many positions on this prefix."""
        revived = sum(self._num_holders[block] == 0 for block in prefix)
        return self.blocks_for(num_tokens) - len(prefix) + revived

    def open(self, num_tokens: int, prefix: Sequence[int] = ()) -> BlockTable:
        """A table with room for so many positions; the blocks of `prefix` come first. Ask `num_missing` before."""
        if self.num_missing(num_tokens, prefix) > self.num_available:
            raise RuntimeError("not enough blocks: ask num_missing before open")
        table = BlockTable()
        for block in prefix:
            self._hold(block)
            table.blocks.append(block)
            table.hashes.append(self._hash_of[block])
        table.num_committed = len(prefix)
        self.extend(table, num_tokens)
        return table

    # Growth and end.

    def can_extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether the table can have room for so many positions in all."""
        return self.blocks_for(num_tokens) - len(table) <= self.num_available

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Makes room for so many positions in all. Ask `can_extend` before."""
        for _ in range(self.blocks_for(num_tokens) - len(table)):
            table.blocks.append(self._take())

    def work_out(self, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """Computes the hashes of the full blocks among the first `num_tokens` positions, which is most of a `commit`.

        For a time at which nobody waits: `commit` comes when a step's tokens are there.
        """
        if not self._prefix_caching:
            return
        size, num_done = self.block_size, len(table.hashes)
        num_blocks = min(num_tokens, len(token_ids)) // size
        parent = table.hashes[-1] if table.hashes else b""
        for index in range(num_done, min(num_blocks, len(table))):
            parent = block_hash(parent, token_ids[index * size : (index + 1) * size])
            table.hashes.append(parent)

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Makes the table's full blocks findable: the first `num_computed` positions hold keys and values of `token_ids`."""
        if not self._prefix_caching:
            return
        num_full = num_computed // self.block_size
        if num_full <= table.num_committed:
            return
        self.work_out(table, token_ids, num_computed)
        for index in range(table.num_committed, num_full):
            name = table.hashes[index]
            if name not in self._block_of:  # else an equal block is findable already; this one stays private
                block = table.blocks[index]
                self._block_of[name] = block
                self._hash_of[block] = name
        table.num_committed = num_full

    def close(self, table: BlockTable) -> None:
        """Gives the table's blocks back. Its last blocks will be reused first: a shorter prefix is worth more."""
        for block in reversed(table.blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        table.blocks.clear()
        table.hashes.clear()
        table.num_committed = 0

    def _hold(self, block: int) -> None:
        if self._num_holders[block] == 0:
            del self._cached[block]
        self._num_holders[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        else:
            raise RuntimeError("no block left: ask can_extend before extend")
        self._num_holders[block] = 1
        return block
