"""What the scheduler's steps and requests add up to. Counts only: it decides nothing, and keeps nothing of a request.

The way of a token costs a comparison and an addition: all tokens of a decode step that came the same time after the ones before
are one observation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as AnySequence
from typing import Final

from hotgraph_server.batch import Phase, StepOutput
from hotgraph_server.errors import HotgraphError
from hotgraph_server.observability.catalogue import METRICS
from hotgraph_server.observability.distribution import Distribution
from hotgraph_server.request import FinishedEvent
from hotgraph_server.scheduler.sequence import Sequence
from hotgraph_server.scheduler.ticket import Ticket

ANONYMOUS: Final = "(anonymous)"  # said no name and proved none
OTHER: Final = "(other)"  # beyond the clients that are told apart
_PROVEN: Final = ("token/", "certificate/")


def distribution(name: str) -> Distribution:
    """An empty one of this metric of the catalogue."""
    return Distribution(METRICS[name].bounds)


class ClientCounts:
    """Counts by client, with a bounded number of names: the first that come have their own, for as long as the process lives.

    A name of its own has who declared an id or proved who they are; an address is nobody's name.
    """

    def __init__(self, max_clients: int) -> None:
        """0: nobody is told apart, and nothing is counted here."""
        self._max_clients = max_clients
        self._names: set[str] = set()
        self.num_requests: Counter[str] = Counter()
        self.num_prompt_tokens: Counter[str] = Counter()
        self.num_completion_tokens: Counter[str] = Counter()

    def add(self, identity: str, *, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        """One request of this caller, as `rpc.clients` names them, is over."""
        if not self._max_clients:
            return
        name = self._bounded(self._name(identity))
        self.num_requests[name] += 1
        self.num_prompt_tokens[name] += num_prompt_tokens
        self.num_completion_tokens[name] += num_completion_tokens

    @staticmethod
    def _name(identity: str) -> str:
        origin, _, declared_id = identity.rpartition("#") if "#" in identity else (identity, "", "")
        if origin.startswith(_PROVEN):
            return identity
        return declared_id or ANONYMOUS

    def _bounded(self, name: str) -> str:
        if name == ANONYMOUS or name in self._names:
            return name
        if len(self._names) >= self._max_clients:
            return OTHER
        self._names.add(name)
        return name


class RequestMetrics:
    """The scheduler's observer. Event loop's thread only."""

    def __init__(self, *, max_clients: int) -> None:
        self.time_to_first_token = distribution("hotgraph_time_to_first_token_seconds")
        self.inter_token_latency = distribution("hotgraph_inter_token_latency_seconds")
        self.time_per_output_token = distribution("hotgraph_time_per_output_token_seconds")
        self.queue = distribution("hotgraph_request_queue_seconds")
        self.prefill = distribution("hotgraph_request_prefill_seconds")
        self.decode = distribution("hotgraph_request_decode_seconds")
        self.duration = distribution("hotgraph_request_duration_seconds")
        self.prompt_tokens = distribution("hotgraph_request_prompt_tokens")
        self.generation_tokens = distribution("hotgraph_request_generation_tokens")
        self.num_ended: Counter[str] = Counter()
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self.steps: dict[tuple[Phase, bool], Distribution] = {}
        self.rows = distribution("hotgraph_step_rows")
        self.padding_ratio = distribution("hotgraph_step_padding_ratio")
        self.num_step_tokens = 0
        self.num_padding_tokens = 0
        self.clients = ClientCounts(max_clients)

    def step_done(self, sequences: AnySequence[Sequence], output: StepOutput, now: float) -> None:
        """See `scheduler.observer.Observer`."""
        receipt = output.receipt
        kind = (receipt.phase, bool(receipt.graph))
        step = self.steps.get(kind)
        if step is None:
            step = self.steps[kind] = distribution("hotgraph_step_duration_seconds")
        step.add(receipt.seconds)
        self.rows.add(receipt.num_rows)
        self.num_step_tokens += receipt.num_tokens
        if receipt.num_tokens:
            self.padding_ratio.add(max(receipt.tokens_bucket, receipt.num_tokens) / receipt.num_tokens)
            self.num_padding_tokens += max(0, receipt.tokens_bucket - receipt.num_tokens)
        before, num_alike = now, 0  # tokens whose sequences had their last one at the same time
        for sequence, token_id in zip(sequences, output.token_ids, strict=True):
            if token_id is None or sequence.finish is not None or sequence.ticket.is_ended:
                continue  # no token, or one that came after the end and is thrown away
            last = sequence.last_token_time
            if last == before:
                num_alike += 1
            elif last is None:
                self._first_token(sequence, now)
            else:
                if num_alike:
                    self.inter_token_latency.add(now - before, num_alike)
                before, num_alike = last, 1
        if num_alike:
            self.inter_token_latency.add(now - before, num_alike)

    def _first_token(self, sequence: Sequence, now: float) -> None:
        ticket = sequence.ticket
        self.num_query_tokens += sequence.num_prompt_tokens
        self.num_hit_tokens += sequence.num_cached_tokens or 0
        if sequence is not ticket.sequences[0]:
            return  # the request's first token is that of its first choice: the others wait for its prompt, or share it
        self.time_to_first_token.add(now - ticket.accept_time)
        if ticket.first_step_time is not None:
            self.prefill.add(now - ticket.first_step_time)

    def request_ended(self, ticket: Ticket, end: FinishedEvent | HotgraphError, now: float) -> None:
        """See `scheduler.observer.Observer`."""
        num_prompt_tokens = len(ticket.request.prompt_token_ids)
        num_completion_tokens = sum(sequence.num_completion_tokens for sequence in ticket.sequences)
        self.duration.add(now - ticket.accept_time)
        self.queue.add((now if ticket.first_step_time is None else ticket.first_step_time) - ticket.accept_time)
        self.prompt_tokens.add(num_prompt_tokens)
        self.generation_tokens.add(num_completion_tokens)
        if isinstance(end, FinishedEvent):
            self.num_ended[end.choices[0].reason.value] += 1
            self.decode.add(end.timings.decode)
            if end.timings.time_per_output_token is not None:
                self.time_per_output_token.add(end.timings.time_per_output_token)
        else:
            self.num_ended[end.reason.lower()] += 1
        self.clients.add(
            ticket.request.client, num_prompt_tokens=num_prompt_tokens, num_completion_tokens=num_completion_tokens
        )
