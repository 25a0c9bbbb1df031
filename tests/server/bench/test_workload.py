"""Tests of bench/workload.py."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.bench.workload import WARMUP_STREAM, Lengths, RandomWorkload, TextWorkload


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", Lengths((128,))),
        ("16,64,256", Lengths((16, 64, 256))),
        ("10-500", Lengths((10, 500), is_range=True)),
        ("7-7", Lengths((7, 7), is_range=True)),
    ],
)
def test_lengths_are_read(text: str, expected: Lengths) -> None:
    """One length, a list and a range are told apart, and print as they were written."""
    assert Lengths.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "0", "-5", "5-", "9-3", "a", "1,,2", "1-2-3", "1.5", "99999999"])
def test_bad_lengths_are_refused(text: str) -> None:
    """What is no length is an error that quotes it."""
    with pytest.raises(ValueError, match=r"length|range"):
        Lengths.parse(text)


@given(seed=st.integers(0, 2**32), index=st.integers(0, 10_000))
def test_a_request_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    """The same request comes out however often and in whatever order it is asked for, within its bounds."""
    workload = RandomWorkload(seed, Lengths((3, 40), is_range=True), Lengths((2, 9)), 50, frozenset({0, 7}))
    work = workload.work(index)
    workload.work(index + 1)
    assert work == workload.work(index)
    assert 3 <= len(work.prompt) <= 40
    assert work.num_prompt_tokens == len(work.prompt)
    assert work.max_tokens == (2, 9)[index % 2]
    assert not isinstance(work.prompt, str)
    assert set(work.prompt) <= set(range(50)) - {0, 7}
    assert 0 <= work.seed < 2**63


def test_prompts_differ() -> None:
    """No two requests, measured or warm-up, share a prompt: none finds its prefix in the cache."""
    workload = RandomWorkload(1, Lengths((16,)), Lengths((4,)), 1000)
    prompts = {workload.work(index).prompt for index in range(100)}
    prompts |= {workload.work(index, WARMUP_STREAM).prompt for index in range(100)}
    prompts |= {RandomWorkload(2, Lengths((16,)), Lengths((4,)), 1000).work(index).prompt for index in range(100)}
    assert len(prompts) == 300


def test_a_range_reaches_both_ends() -> None:
    """Every length of a range comes up."""
    workload = RandomWorkload(1, Lengths((2, 5), is_range=True), Lengths((1,)), 9)
    assert {len(workload.work(index).prompt) for index in range(200)} == {2, 3, 4, 5}


def test_a_vocabulary_of_excluded_tokens_is_refused() -> None:
    """Drawing until a token fits would never end; it is an error at once."""
    with pytest.raises(ValueError, match="no token"):
        RandomWorkload(1, Lengths((1,)), Lengths((1,)), 2, frozenset({0, 1}))


def test_lines_of_a_text(tmp_path: Path) -> None:
    """Each turn gives every line that is not blank once, in an order of its own, and the seed fixes it."""
    path = tmp_path / "prompts.txt"
    path.write_text("eins\n\n  \nzwei\ndrei\nvier\nfünf\n", encoding="utf-8")
    workload = TextWorkload.read(path, seed=3, output_lengths=Lengths((5,)))
    first, second = ([workload.work(turn * 5 + place).prompt for place in range(5)] for turn in range(2))
    assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(["eins", "zwei", "drei", "vier", "fünf"])
    orders = {tuple(workload.work(turn * 5 + place).prompt for place in range(5)) for turn in range(20)}
    assert len(orders) > 1
    again = TextWorkload.read(path, seed=3, output_lengths=Lengths((5,)))
    assert [again.work(place) for place in range(5)] == [workload.work(place) for place in range(5)]
    assert workload.work(0).num_prompt_tokens == 0


def test_a_text_without_a_line_is_refused(tmp_path: Path) -> None:
    """A file of blank lines has nothing to send."""
    path = tmp_path / "blank.txt"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="blank"):
        TextWorkload.read(path, seed=0, output_lengths=Lengths((5,)))
