"""The contract checker lets right batches through and names each breach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hotgraph_server.batch import Batch, BlockAppend, Row, Sampler, SlotAssignment
from hotgraph_server.engine import FakeEngine
from hotgraph_server.engine.contract import ContractChecker
from hotgraph_server.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def make() -> ContractChecker:
    """Four slots, nine blocks of four, a context of 20, steps of 12."""
    return ContractChecker(
        FakeEngine(num_slots=4, num_blocks=9, block_size=4, context_length=20, max_step_tokens=12).info
    )


def assign(slot: int, prompt: bytes = b"abcde", sampling: SamplingParams = GREEDY) -> SlotAssignment:
    """A sequence of bytes."""
    return SlotAssignment(slot, sampling, 1, tuple(prompt), ())


FIRST = Batch(
    0,
    [Row(0, 0, 5, tuple(b"abcde"), True)],
    [assign(0)],
    [BlockAppend(0, 0, 3), BlockAppend(0, 1, 5)],
)
DECODE = Batch(1, [Row(0, 5, 1, None, True)])


def started() -> ContractChecker:
    """Slot 0 has its prompt computed and one token sampled."""
    checker = make()
    checker.check(FIRST)
    checker.add_sampled(0, ord("f"))
    return checker


def test_right_batches_pass() -> None:
    """Prefill in chunks, decode, a shared prefix, a new sequence in the same slot: nothing is raised."""
    checker = started()
    checker.check(DECODE)
    checker.add_sampled(0, ord("g"))
    # Slot 1 shares the first block of slot 0, computes the rest in two chunks.
    checker.check(
        Batch(
            2,
            [Row(1, 4, 1, (ord("e"),), False), Row(0, 6, 1, None, True)],
            [assign(1, b"abcdexyz")],
            [BlockAppend(1, 0, 3), BlockAppend(1, 1, 6)],
        )
    )
    checker.add_sampled(0, ord("h"))
    checker.check(Batch(3, [Row(1, 5, 3, tuple(b"xyz"), True)]))
    checker.add_sampled(1, 1)
    checker.check(Batch(4, [Row(0, 0, 2, tuple(b"zz"), True)], [assign(0, b"zz")], [BlockAppend(0, 0, 7)]))
    assert checker.history(1).completion_token_ids == (1,)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (replace(DECODE, step=2), "follows"),
        (replace(DECODE, rows=[]), "at least one row"),
        (replace(DECODE, rows=[*DECODE.rows, *DECODE.rows]), "two rows"),
        (replace(DECODE, rows=[Row(1, 0, 1, (1,), True)]), "not assigned"),
        (replace(DECODE, rows=[Row(0, 6, 1, None, True)]), "follows"),
        (replace(DECODE, rows=[Row(0, 5, 1, (ord("x"),), True)]), "not the sequence's"),
        (replace(DECODE, rows=[Row(0, 5, 2, None, True)]), "tokens to"),
        (replace(DECODE, block_appends=[BlockAppend(0, 2, 0)]), "no block"),
        (replace(DECODE, block_appends=[BlockAppend(0, 2, 9)]), "no block"),
        (replace(DECODE, block_appends=[BlockAppend(0, 3, 1)]), "index"),
        (replace(DECODE, block_appends=[BlockAppend(0, 2, 5)]), "twice"),
        (replace(DECODE, block_appends=[BlockAppend(2, 0, 1)]), "not assigned"),
        (replace(DECODE, assignments=[assign(0)]), "right after the assignment"),
        (replace(DECODE, assignments=[assign(4)]), "no slot"),
        (replace(DECODE, assignments=[assign(1), assign(1)]), "assigned twice"),
        (replace(DECODE, assignments=[assign(1, b"")]), "no prompt"),
        (replace(DECODE, num_logprobs=1), "filtered"),
        (replace(DECODE, num_logprobs=21, sampler=Sampler.FILTERED), "21"),
        (
            replace(DECODE, rows=[Row(1, 0, 13, tuple(range(13)), True)], assignments=[assign(1, bytes(range(13)))]),
            "13 tokens",
        ),
        (
            replace(DECODE, rows=[Row(1, 0, 2, tuple(b"ab"), True)], assignments=[assign(1)]),
            "middle of its tokens",
        ),
        (
            replace(DECODE, rows=[Row(1, 0, 5, tuple(b"abcde"), True)], assignments=[assign(1)]),
            "needs 2 blocks",
        ),
        (
            replace(
                DECODE,
                rows=[Row(1, 0, 2, tuple(b"ab"), True)],
                assignments=[assign(1, b"ab", SamplingParams(temperature=1.0))],
                block_appends=[BlockAppend(1, 0, 1)],
            ),
            "needs the gumbel sampler",
        ),
        (
            replace(
                DECODE,
                rows=[Row(1, 4, 1, tuple(b"e"), True)],
                assignments=[assign(1)],
                block_appends=[BlockAppend(1, 0, 1), BlockAppend(1, 1, 2)],
            ),
            "never written",
        ),
        (
            replace(
                DECODE,
                rows=[Row(1, 4, 1, tuple(b"e"), True)],
                assignments=[assign(1, b"xbcde")],
                block_appends=[BlockAppend(1, 0, 3), BlockAppend(1, 1, 2)],
            ),
            "does not hold its position",
        ),
        (
            replace(
                DECODE,
                rows=[Row(0, 5, 1, None, True), Row(1, 0, 1, tuple(b"a"), False)],
                assignments=[assign(1)],
                block_appends=[BlockAppend(1, 0, 5)],
            ),
            "both write",
        ),
    ],
)
def test_breach_is_named(batch: Batch, message: str) -> None:
    """Each breach raises AssertionError, and the message says which it was."""
    with pytest.raises(AssertionError, match=message):
        started().check(batch)


def test_context_ends_where_it_ends() -> None:
    """The position after the last of the context is refused."""
    checker = make()
    prompt = bytes(range(12))
    appends = [BlockAppend(0, index, index + 1) for index in range(5)]
    checker.check(Batch(0, [Row(0, 0, 12, tuple(prompt), True)], [assign(0, prompt)], appends))
    for position in range(12, 20):
        checker.add_sampled(0, 1)
        checker.check(Batch(position - 11, [Row(0, position, 1, None, True)]))
    checker.add_sampled(0, 1)
    with pytest.raises(AssertionError, match="context"):
        checker.check(Batch(9, [Row(0, 20, 1, None, True)]))


def test_block_that_another_sequence_overwrote_is_found() -> None:
    """When a block was given to a second sequence, the first one's next step is refused."""
    checker = started()
    checker.check(Batch(1, [Row(1, 0, 2, tuple(b"ab"), True)], [assign(1, b"ab")], [BlockAppend(1, 0, 5)]))
    checker.add_sampled(1, 1)
    with pytest.raises(AssertionError, match="does not hold its position"):
        checker.check(replace(DECODE, step=2))


def test_bans_and_history_are_told() -> None:
    """The history is what the sequence holds, and tokens are banned while it is short."""
    checker = make()
    check: Callable[[Batch], None] = checker.check
    banned = replace(assign(0), banned_until=(7, (9, 10)))
    check(replace(FIRST, assignments=[banned], sampler=Sampler.FILTERED))
    assert checker.banned(0) == (9, 10)
    checker.add_sampled(0, 1)
    checker.add_sampled(0, 2)
    assert checker.banned(0) == ()
    history = checker.history(0)
    assert history.prompt_token_ids == tuple(b"abcde")
    assert history.completion_token_ids == (1, 2)


def test_failed_row_may_be_stepped_over() -> None:
    """With steps ahead a row of a sequence that has just failed is allowed: its result is nobody's."""
    checker = make()
    checker.check(FIRST)
    checker.add_sampled(0, None)
    checker.check(DECODE)
    assert checker.has_failed(0)
