"""Tests of scheduler/sequence.py."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.errors import InvalidRequestError
from hotgraph_server.request import FinishReason, Request, StopParams, choice_seed
from hotgraph_server.scheduler.sequence import TRANSITIONS, Sequence, SequenceState
from hotgraph_server.scheduler.ticket import Ticket
from hotgraph_server.text import ByteTokenizer

EOS = 256


def make(**changes: object) -> Sequence:
    """A sequence of a request with prompt b"hi" and room for 100 tokens."""
    fields: dict[str, object] = {"request_id": "r", "prompt_token_ids": tuple(b"hi"), "max_tokens": 100}
    request = Request(**(fields | changes))  # type: ignore[arg-type]
    return Ticket(request, ByteTokenizer(), 0.0, lambda _: None).sequences[0]


def feed(sequence: Sequence, token_ids: list[int]) -> str:
    """Text of the tokens up to the sequence's end."""
    text = ""
    for token_id in token_ids:
        if sequence.finish is not None:
            break
        text += sequence.accept(token_id)
    return text


def test_every_transition_outside_the_table_is_an_error() -> None:
    """A sequence moves just as the table says."""
    for source, target in itertools.product(SequenceState, SequenceState):
        sequence = make()
        sequence.state = source
        if target in TRANSITIONS[source]:
            sequence.move(target)
            assert sequence.state is target
        else:
            with pytest.raises(RuntimeError, match="cannot go"):
                sequence.move(target)


def test_eos_ends_it_and_is_no_text() -> None:
    """The end-of-text token stops the choice, counts as a token and leaves no text."""
    sequence = make()
    assert feed(sequence, [*b"yes", EOS]) == "yes"
    assert sequence.finish is not None
    assert (sequence.finish.reason, sequence.finish.stop_token_id) == (FinishReason.STOP, EOS)
    assert sequence.num_completion_tokens == 4


def test_ignored_eos_is_passed_over() -> None:
    """With ignore_eos the choice goes on to max_tokens."""
    sequence = make(stop=StopParams(ignore_eos=True), max_tokens=3)
    assert feed(sequence, [*b"a", EOS, *b"b"]) == "ab"
    assert sequence.finish is not None
    assert sequence.finish.reason is FinishReason.LENGTH


def test_max_tokens_ends_it_with_all_its_text() -> None:
    """What was held back comes out at the end."""
    sequence = make(max_tokens=2, stop=StopParams(strings=("abc",)))
    assert feed(sequence, list(b"ab")) == "ab"
    assert sequence.finish is not None
    assert sequence.finish.reason is FinishReason.LENGTH


def test_a_stop_string_ends_it_before_its_text() -> None:
    """Text ends where the stop string begins; the match is told."""
    sequence = make(stop=StopParams(strings=("END",)))
    assert feed(sequence, list(b"go END on")) == "go "
    assert sequence.finish is not None
    assert sequence.finish.stop_string == "END"


def test_a_stop_string_in_the_last_token_wins_over_length() -> None:
    """A choice that ends with a stop string on its last token stopped; it was not cut."""
    sequence = make(stop=StopParams(strings=("c",)), max_tokens=3)
    assert feed(sequence, list(b"abc")) == "ab"
    assert sequence.finish is not None
    assert sequence.finish.reason is FinishReason.STOP


def test_a_stop_token_shows_only_when_asked() -> None:
    """include_in_text keeps the text of the stop token."""
    stop = StopParams(token_ids=frozenset({ord("x")}))
    assert feed(make(stop=stop), list(b"abx")) == "ab"
    kept = StopParams(token_ids=frozenset({ord("x")}), include_in_text=True)
    assert feed(make(stop=kept), list(b"abx")) == "abx"


def test_nothing_stops_before_min_tokens() -> None:
    """Stop tokens and stop strings act from min_tokens on, and the sampler is told which tokens are banned until then."""
    stop = StopParams(strings=("a",), token_ids=frozenset({ord("x")}), min_tokens=3)
    sequence = make(stop=stop)
    assert sequence.bans_stops
    assert feed(sequence, list(b"axb")) == "axb"
    assert sequence.finish is None
    assert not sequence.bans_stops
    sequence.slot = 0
    assert sequence.assignment().banned_until == (2 + 3, (ord("x"), EOS))
    assert feed(sequence, list(b"ca")) == "c"
    assert sequence.finish is not None


def test_omitted_text_is_still_searched_for_stops() -> None:
    """Without text in the answer, stop strings act all the same."""
    sequence = make(omit_text=True, stop=StopParams(strings=("b",)))
    assert feed(sequence, list(b"abc")) == ""
    assert sequence.finish is not None
    assert sequence.num_completion_tokens == 2


def test_tokens_after_the_end_cannot_be_resumed() -> None:
    """A resume that holds tokens past a stop is refused."""
    with pytest.raises(InvalidRequestError, match="ended after 2"):
        make(resume={0: (ord("a"), EOS, ord("b"))})


def test_choices_have_seeds_of_their_own() -> None:
    """Choice 0 keeps the request's seed, and every other index gets another."""
    assert choice_seed(7, 0) == 7
    seeds = {choice_seed(7, index) for index in range(16)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**64 for seed in seeds)


TEXT = st.text(alphabet="ab€", min_size=1, max_size=12)


@given(TEXT, st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2), st.data())
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(
    text: str, strings: list[str], data: st.DataObject
) -> None:
    """Cut anywhere, also inside a character or a stop string: the text before and after adds up to the unbroken one."""
    tokens = list(text.encode())
    stop = StopParams(strings=tuple(strings))
    whole = make(stop=stop, max_tokens=len(tokens))
    expected = feed(whole, tokens)
    cut = data.draw(st.integers(0, whole.num_completion_tokens - 1))
    first = make(stop=stop, max_tokens=len(tokens))
    before = feed(first, tokens[:cut])
    second = make(stop=stop, max_tokens=len(tokens), resume={0: tuple(tokens[:cut])})
    assert before + feed(second, tokens[cut:]) == expected
    assert second.finish == whole.finish
