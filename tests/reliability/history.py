"""What clients saw of their requests, and whether it could be: one end each, every token once, in order, and the right ones.

It knows the client's events and the fake engine's rule; it reads what was logged and trusts no count of the daemon's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hotgraph_client import Completion, Event, Finished, HotgraphError, Started, Tokens
from hotgraph_server.engine.token_rules import History, hash_rule
from hotgraph_server.request import SamplingParams


@dataclass
class Record:
    """One request: what was asked for, and every event in the order in which its caller had them."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int | None  # None: greedy
    events: list[Event] = field(default_factory=list)
    errors: list[HotgraphError] = field(default_factory=list)


def reference(record: Record, num_tokens: int | None = None) -> tuple[int, ...]:
    """The tokens that the request must have, all or the first so many, made one by one from the rule alone."""
    rule = hash_rule()
    sampling = (
        SamplingParams(temperature=0.0) if record.seed is None else SamplingParams(temperature=1.0, seed=record.seed)
    )
    token_ids: tuple[int, ...] = ()
    for _ in range(record.max_tokens if num_tokens is None else min(num_tokens, record.max_tokens)):
        token_ids += (rule(History(record.prompt_token_ids, token_ids, sampling, record.seed or 0)),)
    return token_ids


def violations(record: Record) -> list[str]:
    """What cannot be, in words; none for a request that was served wholly."""
    found = [f"failed: {error}" for error in record.errors]
    kinds = [type(event) for event in record.events]
    if not kinds or kinds[0] is not Started or kinds.count(Started) != 1:
        found.append("does not begin with its one Started")
    if not kinds or kinds[-1] is not Finished or kinds.count(Finished) != 1:
        found.append("does not end with its one Finished")
    tokens = [event for event in record.events if isinstance(event, Tokens)]
    token_ids = tuple(token_id for event in tokens for token_id in event.token_ids)
    expected = reference(record)
    if token_ids != expected:
        common = next((n for n, pair in enumerate(zip(token_ids, expected, strict=False)) if pair[0] != pair[1]), None)
        found.append(f"{len(token_ids)} tokens of {len(expected)}, the first wrong one at {common}")
    if "".join(event.text for event in tokens) != bytes(expected).decode():
        found.append("its text is not that of its tokens")
    if sum(event.finish is not None for event in tokens) != 1 or not tokens or tokens[-1].finish is None:
        found.append("does not have its one finish at its last tokens")
    finished = record.events[-1] if record.events else None
    if isinstance(finished, Finished) and finished.usage.completion_tokens != len(expected):
        found.append(f"says that it has {finished.usage.completion_tokens} tokens")
    return found


def violations_of_a_part(record: Record) -> list[str]:
    """What cannot be of a request that its caller left, or that failed, before its last event."""
    found = []
    kinds = [type(event) for event in record.events]
    if kinds and (kinds[0] is not Started or kinds.count(Started) != 1):
        found.append("does not begin with its one Started")
    if Finished in kinds[:-1]:
        found.append("goes on after its Finished")
    tokens = [event for event in record.events if isinstance(event, Tokens)]
    token_ids = tuple(token_id for event in tokens for token_id in event.token_ids)
    expected = reference(record, len(token_ids))
    if token_ids != expected:
        found.append("its tokens are not the first of the right ones")
    if not bytes(expected).decode().startswith("".join(event.text for event in tokens)):  # text may lag behind
        found.append("its text is not that of its tokens")
    return found


def violations_of_an_answer(record: Record, answer: Completion) -> list[str]:
    """What cannot be of a request that was answered as a whole, in one message."""
    (choice,) = answer.choices
    assert choice.finish is not None
    events: list[Event] = [
        Started(answer.request_id, answer.model, answer.usage.prompt_tokens, answer.seed),
        Tokens(0, choice.token_ids, choice.text, finish=choice.finish),
        Finished((choice.finish,), answer.usage, answer.timings, answer.receipt),
    ]
    return violations(replace(record, events=events))
