"""Whose slots are taken back when all are taken and callers wait that run nothing. It knows whose each is, and moves none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hotgraph_server.scheduler.waiting import WaiterT


def who_yields(running: Sequence[WaiterT], num_wanted: int) -> list[WaiterT]:
    """At most so many of `running`, which is in the order of their coming: each time the newest, which has least to compute
    again, of the caller who keeps most; among equals of the one who came first. Everyone keeps at least one, so that slots
    do not go round and round, and whatever came first of a caller is let finish.
    """
    kept: defaultdict[str, list[WaiterT]] = defaultdict(list)
    for each in running:
        kept[each.ticket.request.client].append(each)
    leaving: list[WaiterT] = []
    while len(leaving) < num_wanted:
        most = max(kept.values(), key=len, default=[])
        if len(most) < 2:
            break
        leaving.append(most.pop())
    return leaving
