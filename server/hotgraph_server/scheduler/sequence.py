"""One choice of a request on its way through the scheduler: its tokens, its place, its text. No decisions are made here."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from hotgraph_server.batch import SlotAssignment
from hotgraph_server.errors import InvalidRequestError, Violation
from hotgraph_server.request import ChoiceFinish, FinishReason, choice_seed
from hotgraph_server.scheduler.detokenizer import Detokenizer
from hotgraph_server.scheduler.stops import StopMatcher
from hotgraph_server.text import Tokenizer

if TYPE_CHECKING:
    from hotgraph_server.scheduler.blocks import BlockTable
    from hotgraph_server.scheduler.ticket import Ticket


class SequenceState(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # has no slot
    PREFILL = "prefill"  # has a slot; some of its known tokens are not scheduled yet
    DECODE = "decode"  # has a slot; only the token it samples next is missing
    FINISHED = "finished"


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.PREFILL, SequenceState.FINISHED}),
    SequenceState.PREFILL: frozenset({SequenceState.DECODE, SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.DECODE: frozenset({SequenceState.WAITING, SequenceState.FINISHED}),  # WAITING: preempted
    SequenceState.FINISHED: frozenset(),
}


class Sequence:
    """One choice. `token_ids` are the tokens the host knows: prompt, then completion.

    Raises InvalidRequestError when resumed tokens go on after what would have ended the choice.

    Three counts say how far it is: `num_scheduled` positions are computed or in flight, `num_computed` are computed, and
    `num_samples_in_flight` tokens are being sampled that the host has not read. Slot and blocks stay held while steps are
    in flight, even after the end.
    """

    def __init__(self, ticket: Ticket, choice_index: int, tokenizer: Tokenizer) -> None:
        request = ticket.request
        resumed = request.resume.get(choice_index, ())
        self.ticket = ticket
        self.choice_index = choice_index
        self.state = SequenceState.WAITING
        self.seed = choice_seed(request.sampling.seed, choice_index)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids: list[int] = [*request.prompt_token_ids]
        self.slot: int | None = None
        self.table: BlockTable | None = None
        self.num_told_blocks = 0  # blocks of the table that the engine knows of
        self.num_scheduled = 0
        self.num_computed = 0
        self.num_steps_in_flight = 0
        self.num_samples_in_flight = 0
        self.num_preemptions = 0
        self.num_cached_tokens: int | None = None  # of its first admission
        self.finish: ChoiceFinish | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self._num_counted_tokens = 0  # tokens timed in this call, resumed ones not among them
        stop = request.stop
        self._eos_ids = frozenset() if stop.ignore_eos else tokenizer.eos_token_ids
        self._detokenizer = (
            None
            if request.omit_text and not stop.strings
            else Detokenizer(tokenizer, skip_special_tokens=request.skip_special_tokens)
        )
        self._stops = StopMatcher(stop.strings, include_in_text=stop.include_in_text)
        # Resumed tokens run through the same machinery, so that held back text is held back alike; what comes out, the
        # caller has.
        for count, token_id in enumerate(resumed, start=1):
            self.accept(token_id)
            if self.finish is not None and count < len(resumed):
                raise InvalidRequestError(
                    [Violation("resume", f"choice {choice_index} ended after {count} of its tokens")]
                )

    def move(self, state: SequenceState) -> None:
        """The only way to change `state`."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a sequence cannot go from {self.state.value} to {state.value}")
        self.state = state

    # What is left to do.

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the completion that the host knows, resumed ones among them."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_unscheduled(self) -> int:
        """Positions whose token exists, on the host or on the device, and that no step has taken."""
        return len(self.token_ids) + self.num_samples_in_flight - self.num_scheduled

    @property
    def may_sample(self) -> bool:
        """Whether one more token may be sampled under max_tokens, those in flight counted."""
        return self.num_completion_tokens + self.num_samples_in_flight < self.ticket.request.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    def assignment(self) -> SlotAssignment:
        """What the engine must know when the sequence takes its slot."""
        assert self.slot is not None
        request = self.ticket.request
        stop = request.stop
        banned = tuple(sorted(self._eos_ids | stop.token_ids))
        return SlotAssignment(
            slot=self.slot,
            sampling=request.sampling,
            seed=self.seed,
            prompt_token_ids=request.prompt_token_ids,
            completion_token_ids=tuple(self.token_ids[self.num_prompt_tokens :]),
            banned_until=(self.num_prompt_tokens + stop.min_tokens, banned) if stop.min_tokens and banned else None,
        )

    @property
    def bans_stops(self) -> bool:
        """Whether min_tokens still holds for the next sampled token."""
        return self.num_completion_tokens + self.num_samples_in_flight < self.ticket.request.stop.min_tokens

    # Tokens come in.

    def accept(self, token_id: int) -> str:
        """Takes the next token; sets `finish` when it ends the choice. Returns the text that became certain."""
        request = self.ticket.request
        stop = request.stop
        self.token_ids.append(token_id)
        count = self.num_completion_tokens
        if count >= stop.min_tokens and (token_id in self._eos_ids or token_id in stop.token_ids):
            text = self._push(token_id, count) if stop.include_in_text else ""
            if self.finish is None:
                text += self._flush()
                self._end(FinishReason.STOP, stop_token_id=token_id)
        else:
            text = self._push(token_id, count)
            if self.finish is None and count >= request.max_tokens:
                text += self._flush()
                if self.finish is None:
                    self._end(FinishReason.LENGTH)
        return "" if request.omit_text else text

    def time_token(self, now: float) -> None:
        """Notes when a token of this call arrived."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now
        self._num_counted_tokens += 1

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds a token after the first, of the tokens of this call; None with fewer than two."""
        if self._num_counted_tokens < 2 or self.first_token_time is None or self.last_token_time is None:
            return None
        return (self.last_token_time - self.first_token_time) / (self._num_counted_tokens - 1)

    def _push(self, token_id: int, count: int) -> str:
        if self._detokenizer is None:
            return ""
        return self._match(self._detokenizer.push(token_id), count)

    def _flush(self) -> str:
        """The rest of the text, when the choice ends for another reason than a stop string; one may still show up in it."""
        if self._detokenizer is None:
            return ""
        text = self._match(self._detokenizer.flush(), self.num_completion_tokens)
        return text if self.finish else text + self._stops.flush()

    def _match(self, text: str, count: int) -> str:
        if not text:
            return ""
        if count < self.ticket.request.stop.min_tokens:
            return text  # no stop yet: stop strings are looked for in what comes after
        match = self._stops.push(text)
        if match.stop_string is not None:
            self._end(FinishReason.STOP, stop_string=match.stop_string)
        return match.text

    def _end(self, reason: FinishReason, *, stop_string: str | None = None, stop_token_id: int | None = None) -> None:
        self.finish = ChoiceFinish(self.choice_index, reason, stop_string, stop_token_id)
