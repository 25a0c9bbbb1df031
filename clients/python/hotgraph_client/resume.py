"""One generation over as many connections as it takes: what came so far, and what to do when a connection ends.

It knows messages and time but no channel: `stream.py` opens the calls and reads them, blocking or not.

A stream that ended without Finished, and that the caller did not cancel, is a lost server, whatever the status: what stands
between client and server changes the code. The exceptions are the daemon's own refusals, errors of the request and
deadlines. Before the server's headers gRPC's own retries apply (`channel.service_config`), after them these rules: the same
request goes out again with the seed that Started told and, for each choice that has not ended, the tokens that came. The server
goes on from them and sends only what is new, so that ids and texts join without a seam. A call whose connection breaks between
the headers and the first event gRPC does not try again; nothing came of it, so the request goes out as it was.
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc

from hotgraph.v1 import generation_pb2, inference_service_pb2
from hotgraph_client import decode
from hotgraph_client.errors import (
    CancelledRequestError,
    DeadlineError,
    HotgraphError,
    RequestError,
    RetryableError,
    StreamLostError,
)
from hotgraph_client.requests import GenerationSpec, duration
from hotgraph_client.types import (
    Choice,
    ChoiceFinish,
    Completion,
    Event,
    Finished,
    Receipt,
    Started,
    Timings,
    TokenLogprobs,
    Tokens,
    Usage,
)

MAX_REQUEST_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """How far to go after a lost server. Waits double from the first to the longest, each times 0.5 to 1.5 at random.

    max_losses: servers lost in the middle of one generation, or before its first event; bounds what a request that kills
    servers can do.
    max_attempts: tries in a row to reach a server again, each of them with gRPC's own retries.
    idle_seconds: a stream whose tokens pause for longer counts as lost; for paths on which keepalive does not reach the
    server itself (a proxy answers it). None: never.
    """

    max_losses: int = 3
    max_attempts: int = 8
    first_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 5.0
    idle_seconds: float | None = None


class StreamState(enum.Enum):
    """Where a generation stands."""

    NEW = "new"
    OPEN = "open"  # a connection is there, or under way
    LOST = "lost"  # waits before the next connection
    ENDED = "ended"  # finished, failed or cancelled


TRANSITIONS: dict[StreamState, frozenset[StreamState]] = {
    StreamState.NEW: frozenset({StreamState.OPEN, StreamState.ENDED}),
    StreamState.OPEN: frozenset({StreamState.LOST, StreamState.ENDED}),
    StreamState.LOST: frozenset({StreamState.OPEN, StreamState.ENDED}),
    StreamState.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """What to send on the next connection."""

    request: inference_service_pb2.GenerateRequest
    timeout_seconds: float | None


@dataclass(slots=True)
class _ChoiceRecord:
    """What came of one choice. Times are on the generation's clock."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: ChoiceFinish | None = None
    first_token_time: float = 0.0
    last_token_time: float = 0.0

    def add(self, tokens: Tokens, now: float) -> None:
        if tokens.token_ids:
            self.first_token_time = self.first_token_time if self.token_ids else now
            self.last_token_time = now
        self.token_ids += tokens.token_ids
        self.texts.append(tokens.text)
        self.logprobs += tokens.logprobs
        self.finish = tokens.finish or self.finish


# How gRPC's own message begins when no connection could be made: no request left, and gRPC has tried as often as it may. Were
# the words others one day, a server that is not there would be told of later, by max_losses rounds of tries; no more.
_NOT_REACHED = ("failed to connect to all addresses", "DNS resolution failed")


def is_loss(error: HotgraphError, *, is_reached: bool) -> bool:
    """Whether a stream that ended with this error lost its server. `is_reached`: a server was lost before, or told an event."""
    if isinstance(error, CancelledRequestError):
        return True  # not by us: something between us and the server let go
    if error.reason:
        return is_reached and isinstance(error, RetryableError)
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return is_reached or is_dropped(error)
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return is_reached  # before an answer gRPC has tried again already
    return not isinstance(error, RequestError | DeadlineError)


def is_dropped(error: HotgraphError | None) -> bool:
    """Whether a connection that was there broke, as far as its error tells.

    gRPC tells the same of a connection that broke before the server's headers, when it has tried again already, and of one that
    broke after them, when it has not; so both count, and max_losses bounds them.
    """
    is_bare = error is not None and not error.reason and error.code is grpc.StatusCode.UNAVAILABLE
    return is_bare and error is not None and not error.message.startswith(_NOT_REACHED)


class GenerationProgress:
    """The record of one generation. Not thread-safe."""

    def __init__(
        self,
        spec: GenerationSpec,
        policy: ResumePolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.policy = policy or ResumePolicy()
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.error: HotgraphError | None = None  # what it failed with
        self.num_resumes = 0
        self._spec = spec
        self._clock = clock
        self._uniform = uniform
        self._state = StreamState.NEW
        self._start_time = clock()
        self._deadline = None if spec.timeout_seconds is None else self._start_time + spec.timeout_seconds
        num_choices = spec.request.num_choices if spec.request.HasField("num_choices") else 1
        self._records = {index: _ChoiceRecord() for index in range(num_choices)}
        self._num_connections = 0
        self._num_losses = 0
        self._num_failed_attempts = 0  # in a row, without an event
        self._is_connection_answered = False
        self._has_connection_tokens = False
        self._ended_before = frozenset[int]()  # choices that were whole when this connection began

    @property
    def state(self) -> StreamState:
        return self._state

    def describe(self) -> str:
        """A few words for the reprs of the streams."""
        name = "" if self.started is None else f"{self.started.request_id} "
        num_tokens = sum(len(record.token_ids) for record in self._records.values())
        return f"{name}{self._state.value}, {num_tokens} tokens"

    @property
    def is_ended(self) -> bool:
        return self._state is StreamState.ENDED

    @property
    def is_idle_bounded(self) -> bool:
        """Whether the next event must come within policy.idle_seconds: tokens have begun to flow on this connection."""
        return self.policy.idle_seconds is not None and self._has_connection_tokens

    @property
    def text(self) -> str:
        """The text of the first choice so far."""
        return "".join(self._records[0].texts) if 0 in self._records else ""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices as far as they came."""
        return tuple(
            Choice(index, "".join(r.texts), tuple(r.token_ids), tuple(r.logprobs), r.finish)
            for index, r in sorted(self._records.items())
        )

    def completion(self) -> Completion:
        """The whole answer. Only once `finished` is set."""
        if self.started is None or self.finished is None:
            raise RuntimeError("the generation has not finished")
        return Completion(
            request_id=self.started.request_id,
            model=self.started.model,
            seed=self.started.seed,
            choices=self.choices,
            usage=self.finished.usage,
            timings=self.finished.timings,
            receipt=self.finished.receipt,
            num_resumes=self.finished.num_resumes,
        )

    def open(self) -> Attempt:
        """What the next connection sends. NEW or LOST to OPEN. Raises DeadlineError when the time is over."""
        timeout_seconds = None if self._deadline is None else self._deadline - self._clock()
        if timeout_seconds is not None and timeout_seconds <= 0:
            raise self._fail(DeadlineError("the deadline passed"))
        self._move(StreamState.OPEN)
        self._is_connection_answered = False
        self._has_connection_tokens = False
        self._num_connections += 1
        self._ended_before = frozenset(index for index, record in self._records.items() if record.finish)
        request = self._spec.request if self._num_connections == 1 else self._again(timeout_seconds)
        return Attempt(request, timeout_seconds)

    def _again(self, timeout_seconds: float | None) -> inference_service_pb2.GenerateRequest:
        """The request for a connection after the first."""
        request = inference_service_pb2.GenerateRequest()
        request.CopyFrom(self._spec.request)
        if timeout_seconds is not None:
            request.timeout.CopyFrom(duration(timeout_seconds))
        base = request.request_id if self.started is None else self.started.request_id
        if base:
            # The id itself may still be in flight on a server that is only half dead.
            suffix = f"/resume-{self._num_connections - 1}"
            request.request_id = base[: MAX_REQUEST_ID_LENGTH - len(suffix)] + suffix
        if self.started is not None:
            request.model = self.started.model
            request.sampling.seed = self.started.seed
        if any(record.token_ids for record in self._records.values()):
            for index, record in sorted(self._records.items()):
                if record.finish is None:
                    request.resume.append(generation_pb2.ResumedChoice(index=index, token_ids=record.token_ids))
        return request

    def receive(self, message: inference_service_pb2.GenerateResponse) -> Event | None:
        """Takes in what the connection sent. The event for the caller, or None when there is none in it.

        Raises StreamLostError when the server that goes on would not give the same tokens.
        """
        event = decode.event(message)
        match event:
            case Started():
                self._is_connection_answered = True
                self._num_failed_attempts = 0
                return self._take_started(event)
            case Tokens():
                self._has_connection_tokens = True
                self._records.setdefault(event.choice_index, _ChoiceRecord()).add(event, self._clock())
            case Finished():
                return self._finish(self._merge(event))
        return event

    def _take_started(self, started: Started) -> Started | None:
        if self.started is None:
            self.started = started
            return started
        before = (self.started.model, self.started.prompt_tokens, self.started.seed)
        if before != (started.model, started.prompt_tokens, started.seed):
            raise self._fail(self._lost("the server that answered again has another model, prompt or seed", None))
        self.num_resumes += 1
        return None

    def lose(self, error: HotgraphError | None) -> Finished | float:
        """The connection ended before Finished, with this error or with OK. OPEN to LOST, or to ENDED.

        Returns the seconds to wait before `open`, or the last event when nothing but it was missing. Raises when the
        generation cannot go on: the daemon's own error as it is, any other loss after the first event as StreamLostError.
        """
        is_answered = self.started is not None
        if error is not None and not is_loss(error, is_reached=is_answered or self._num_connections > 1):
            raise self._fail(error)
        if is_answered and all(record.finish for record in self._records.values()):
            return self._finish(self._finished_alone())
        is_own_word = error is not None and error.reason and isinstance(error, RetryableError)
        if error is None or (is_answered and not is_own_word):
            loss: HotgraphError = self._lost("the server was lost in the middle of an answer", error)
        else:
            loss = error
        if self._is_connection_answered or (not is_answered and is_dropped(error)):
            self._num_losses += 1
        else:
            self._num_failed_attempts += 1
        delay_seconds = self._delay_seconds(error)
        is_in_time = self._deadline is None or self._clock() + delay_seconds < self._deadline
        if not (self._may_resume() and is_in_time):
            raise self._fail(loss)
        self._move(StreamState.LOST)
        return delay_seconds

    def cancel(self) -> bool:
        """Ends it because the caller wants no more. False when it had ended."""
        if self.is_ended:
            return False
        self._fail(CancelledRequestError("the caller cancelled"))
        return True

    def _may_resume(self) -> bool:
        if self._num_losses > self.policy.max_losses or self._num_failed_attempts >= self.policy.max_attempts:
            return False
        if self._spec.resume is not None:
            return self._spec.resume
        # Before any token there is nothing that a second try could contradict.
        return self._spec.is_repeatable or not any(record.token_ids for record in self._records.values())

    def _delay_seconds(self, error: HotgraphError | None) -> float:
        policy = self.policy
        backoff = min(policy.first_backoff_seconds * 2.0**self._num_failed_attempts, policy.max_backoff_seconds)
        told = 0.0 if error is None or error.retry_after_seconds is None else error.retry_after_seconds
        # Never before the time told, and not all clients of one server at once.
        return max(backoff * self._uniform(0.5, 1.5), told * self._uniform(1.0, 1.25))

    def _lost(self, message: str, error: HotgraphError | None) -> StreamLostError:
        code = None if error is None else error.code
        lost = StreamLostError(message if error is None else f"{message}: {error.message}", code=code)
        lost.__cause__ = error
        lost.started, lost.choices = self.started, self.choices
        lost.request_id = "" if self.started is None else self.started.request_id
        return lost

    def _merge(self, finished: Finished) -> Finished:
        """Finished as one unbroken call would have told it: choices and tokens of earlier connections count."""
        finishes = {index: record.finish for index, record in self._records.items() if record.finish}
        finishes |= {finish.choice_index: finish for finish in finished.choices}
        for index, finish in finishes.items():
            self._records.setdefault(index, _ChoiceRecord()).finish = finish
        num_earlier = sum(len(self._records[index].token_ids) for index in self._ended_before)
        usage = replace(finished.usage, completion_tokens=finished.usage.completion_tokens + num_earlier)
        choices = tuple(finish for _, finish in sorted(finishes.items()))
        return replace(finished, choices=choices, usage=usage, num_resumes=self.num_resumes)

    def _finished_alone(self) -> Finished:
        """Finished when every choice is whole and only that event was lost."""
        records = sorted(self._records.items())
        num_tokens = sum(len(record.token_ids) for _, record in records)
        return Finished(
            choices=tuple(record.finish for _, record in records if record.finish),
            usage=Usage(0 if self.started is None else self.started.prompt_tokens, num_tokens, 0),
            timings=self._measured_timings(),
            receipt=Receipt(),
            num_resumes=self.num_resumes,
        )

    def _measured_timings(self) -> Timings:
        longest = max(self._records.values(), key=lambda record: len(record.token_ids))
        first = min((r.first_token_time for r in self._records.values() if r.token_ids), default=self._start_time)
        last = max((r.last_token_time for r in self._records.values() if r.token_ids), default=first)
        num_gaps = len(longest.token_ids) - 1
        return Timings(
            queue_seconds=0.0,
            prefill_seconds=first - self._start_time,
            decode_seconds=last - first,
            time_to_first_token_seconds=first - self._start_time,
            time_per_output_token_seconds=(
                (longest.last_token_time - longest.first_token_time) / num_gaps if num_gaps > 0 else None
            ),
            total_seconds=self._clock() - self._start_time,
            is_measured_by_client=True,
        )

    def _finish(self, finished: Finished) -> Finished:
        self.finished = finished
        self._move(StreamState.ENDED)
        return finished

    def _fail(self, error: HotgraphError) -> HotgraphError:
        self.error = error
        self._move(StreamState.ENDED)
        return error

    def _move(self, state: StreamState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a generation cannot go from {self._state.name} to {state.name}")
        self._state = state
