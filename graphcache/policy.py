"""What to evict. A policy ranks; `choose_victims` picks by its ranking. Neither knows states, locks or time's passing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graphcache.graph import Segment

MIN_SAVED_SECONDS = 1e-6  # a graph that saves nothing still ranks by its hits and bytes, below every graph that saves
ASSUMED_SAVED_SHARE = 0.5  # of an eager step, while no replay has been timed


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy may look at. `saved_seconds`: of one step, None when unknown. `expected_hits`: decayed count of uses.

    `num_uses` is never decayed; `last_use_monotonic` is 0 before the first use.
    """

    name: str
    segment: Segment
    size_bytes: int
    saved_seconds: float | None
    expected_hits: float
    num_uses: int
    last_use_monotonic: float


class EvictionPolicy(Protocol):
    """Ranks graphs: the lowest score goes first."""

    @property
    def name(self) -> str: ...

    @property
    def is_segmented(self) -> bool:
        """Whether graphs start on probation and a newcomer must be worth more than a protected one to displace it."""
        ...

    def score(self, candidate: Candidate) -> float: ...


class ValuePolicy:
    """Time saved x expected hits / bytes, with probation: a burst of odd shapes displaces only other newcomers."""

    name = "value"
    is_segmented = True

    def score(self, candidate: Candidate) -> float:
        saved_seconds = candidate.saved_seconds
        if saved_seconds is None or saved_seconds < MIN_SAVED_SECONDS:
            saved_seconds = MIN_SAVED_SECONDS
        return saved_seconds * candidate.expected_hits / max(1, candidate.size_bytes)


class LruPolicy:
    """Plain: the one not used for the longest time goes first."""

    name = "lru"
    is_segmented = False

    def score(self, candidate: Candidate) -> float:
        return candidate.last_use_monotonic


class LfuPolicy:
    """Plain: the one used least often goes first."""

    name = "lfu"
    is_segmented = False

    def score(self, candidate: Candidate) -> float:
        return float(candidate.num_uses)


POLICIES: dict[str, type[ValuePolicy] | type[LruPolicy] | type[LfuPolicy]] = {
    policy.name: policy for policy in (ValuePolicy, LruPolicy, LfuPolicy)
}


def make_policy(name: str) -> EvictionPolicy:
    """The policy of this name. Raises ValueError."""
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}: there are {', '.join(POLICIES)}")
    return POLICIES[name]()


def choose_victims(
    policy: EvictionPolicy,
    residents: Sequence[Candidate],
    *,
    excess_bytes: int,
    num_excess: int = 0,
    newcomer: Candidate | None = None,
) -> list[Candidate] | None:
    """Which of the (evictable) residents go, so that at least `excess_bytes` and `num_excess` graphs less remain.

    None when that cannot be, or when the newcomer for whom it is done is not worth a protected graph that would have to
    go. Without a newcomer the bytes must come down whatever it costs.
    """
    ranked = sorted(
        residents,
        key=lambda resident: (
            policy.is_segmented and resident.segment is Segment.PROTECTED,
            policy.score(resident),
            resident.name,
        ),
    )
    chosen: list[Candidate] = []
    freed_bytes = 0
    for resident in ranked:
        if freed_bytes >= excess_bytes and len(chosen) >= num_excess:
            break
        if resident.size_bytes == 0 and len(chosen) >= num_excess:
            continue  # would free nothing that is wanted
        chosen.append(resident)
        freed_bytes += resident.size_bytes
    if freed_bytes < excess_bytes or len(chosen) < num_excess:
        return None
    # Where a later, larger one alone would have done, the better ones chosen before it stay.
    for resident in reversed(tuple(chosen)):
        if freed_bytes - resident.size_bytes >= excess_bytes and len(chosen) - 1 >= num_excess:
            chosen.remove(resident)
            freed_bytes -= resident.size_bytes
    if newcomer is not None and policy.is_segmented:
        worth = policy.score(newcomer)
        if any(victim.segment is Segment.PROTECTED and policy.score(victim) >= worth for victim in chosen):
            return None
    return chosen
