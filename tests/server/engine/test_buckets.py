"""Every step within the limits has a bucket that holds it, and decode buckets are for decode only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.engine.buckets import SAMPLERS, Buckets


def make(num_slots: int = 64, max_step_tokens: int = 512, ratio: float = 2.0) -> Buckets:
    """The default ladders."""
    return Buckets(num_slots=num_slots, max_step_tokens=max_step_tokens, max_padding_ratio=ratio)


@given(st.integers(1, 200), st.integers(16, 3000), st.data())
def test_every_step_has_a_bucket_that_holds_it(num_slots: int, max_step_tokens: int, data: st.DataObject) -> None:
    """Whatever the limits, a step within them gets a key of a known shape that is large enough; one beyond gets none."""
    buckets = make(num_slots, max_step_tokens)
    num_rows = data.draw(st.integers(1, min(num_slots, max_step_tokens)))
    num_tokens = data.draw(st.integers(num_rows, max_step_tokens))
    key = buckets.key(num_tokens, num_rows, Sampler.GUMBEL)
    assert key is not None
    assert (key.tokens, key.rows) in buckets.shapes
    assert num_tokens <= key.tokens <= max_step_tokens
    assert num_rows <= key.rows <= num_slots
    assert (key.tokens == key.rows) == (num_tokens == num_rows)
    assert buckets.key(max_step_tokens + 1, num_rows, Sampler.GUMBEL) is None
    assert buckets.key(num_tokens + num_slots, num_slots + 1, Sampler.GUMBEL) is None


@given(st.integers(1, 64), st.integers(0, 448), st.sampled_from(SAMPLERS))
def test_larger_keys_can_do_the_work(num_rows: int, more: int, sampler: Sampler) -> None:
    """Larger keys hold the step, can do its sampling, keep to the ratio, come nearest first, and never repeat the key."""
    buckets = make()
    key = buckets.key(num_rows + more, num_rows, sampler)
    assert key is not None
    larger = buckets.larger(key)
    assert key not in larger
    assert len(set(larger)) == len(larger)
    assert [k.tokens for k in larger] == sorted(k.tokens for k in larger)
    for other in larger:
        assert key.tokens <= other.tokens <= 2 * key.tokens
        assert other.rows >= key.rows
        assert SAMPLERS.index(other.sampler) >= SAMPLERS.index(sampler)
        assert key.tokens == key.rows or other.tokens > other.rows


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "expected"),
    [
        (1, 1, (1, 1)),
        (9, 9, (10, 10)),
        (64, 64, (64, 64)),
        (2, 1, (8, 1)),
        (8, 7, (16, 8)),
        (33, 1, (48, 1)),
        (130, 3, (160, 4)),
        (400, 1, (400, 1)),
        (401, 1, (480, 1)),
        (512, 64, (512, 64)),
    ],
)
def test_ladder(num_tokens: int, num_rows: int, expected: tuple[int, int]) -> None:
    """A few steps and their buckets, as documented."""
    key = make().key(num_tokens, num_rows, Sampler.GREEDY)
    assert key == StepKey(*expected, Sampler.GREEDY)


def test_ladders_go_on_and_end_at_the_limits() -> None:
    """Beyond the written sizes the ladders grow in steps, and the last size is the limit itself."""
    buckets = make(num_slots=200, max_step_tokens=2000)
    decode = [tokens for tokens, rows in buckets.shapes if tokens == rows]
    assert decode[-5:] == [96, 112, 128, 160, 192, 200][-5:]
    assert max(tokens for tokens, _ in buckets.shapes) == 2000
    assert buckets.key(700, 1, Sampler.GREEDY) == StepKey(768, 1, Sampler.GREEDY)


def test_ratio_one_allows_no_other_size() -> None:
    """With a padding ratio of 1 only graphs with as many tokens are taken."""
    buckets = make(ratio=1.0)
    key = StepKey(8, 8, Sampler.GREEDY)
    assert {other.tokens for other in buckets.larger(key)} == {8}
