"""Deadlines from 1 ms to 10 s while twice as much comes as can be done: what the daemon does for a request after its time.

The daemon runs in this process, so that each step it plans is seen with the requests in it. Half of the callers give the time
as `timeout` in the request and wait as long as it takes: only the daemon can end those.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_server.engine import FakeEngine
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.scheduler.planner import Plan
from tests.integration.harness import Serving, eventually, letters, serving

NUM_SLOTS: Final = 8
STEP_SECONDS: Final = 0.02
NUM_TOKENS: Final = 20
CAPACITY: Final = NUM_SLOTS / (NUM_TOKENS * STEP_SECONDS)  # requests a second, at most
LATE_SECONDS: Final = 0.25  # for the event loop, which callers and daemon share, to come round to a timer


@dataclass
class Work:
    """What the daemon did after requests' deadlines. Times in seconds."""

    num_sent: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    num_started_late: int = 0  # whose first step was planned when their time was over
    num_late_steps: Counter[str] = field(default_factory=Counter)  # planned after the deadline, by request
    overruns: list[float] = field(default_factory=list)  # from a deadline to the end of the last step that was for it
    late_answers: list[float] = field(default_factory=list)  # from a deadline to the status

    def __str__(self) -> str:
        steps = max(self.num_late_steps.values(), default=0)
        return (
            f"{self.num_sent} sent, {dict(self.codes)}; {self.num_started_late} started late, at most {steps} steps begun"
            f" after a deadline, overrun at most {1000 * max(self.overruns, default=0):.0f} ms of {len(self.overruns)},"
            f" told at most {1000 * max(self.late_answers, default=0):.0f} ms late"
        )


def watch(served: Serving, monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    """Notes each step that is planned, and for whom."""
    planner = served.scheduler._planner
    plan = planner.plan
    started: set[str] = set()

    def noted_plan() -> Plan | None:
        now = time.monotonic()
        found = plan()
        for request in {id(s.ticket): s.ticket.request for s in found.sequences}.values() if found else ():
            assert request.deadline is not None
            if request.request_id not in started:
                started.add(request.request_id)
                work.num_started_late += now > request.deadline
            if now > request.deadline:
                work.num_late_steps[request.request_id] += 1
        return found

    retire = Scheduler._retire

    def noted_retire(self: Scheduler, step: Any) -> None:
        retire(self, step)
        now = time.monotonic()
        for request in {id(s.ticket): s.ticket.request for s in step.plan.sequences}.values():
            if now > request.deadline:
                work.overruns.append(now - request.deadline)

    monkeypatch.setattr(planner, "plan", noted_plan)
    monkeypatch.setattr(Scheduler, "_retire", noted_retire)


async def late_load(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Work:
    """Offers twice the capacity for so long, each request with a deadline of its own, spread evenly by its logarithm."""
    work = Work()
    chance = random.Random(15)
    engine = FakeEngine(rule=letters, step_seconds=STEP_SECONDS, num_slots=NUM_SLOTS)
    async with serving(engine=engine, scheduler={"num_slots": NUM_SLOTS, "max_waiting": 100_000}) as served:
        await served.check_alive()
        watch(served, monkeypatch, work)

        async def one(number: int) -> None:
            allowed = 10 ** chance.uniform(-3, 1)
            request = CompleteRequest(text=f"late {number}", max_tokens=NUM_TOKENS)
            timeout = None
            if number % 2:
                timeout = allowed
            else:
                request.timeout.CopyFrom(Duration(nanos=int(allowed % 1 * 1e9), seconds=int(allowed)))
            due = time.monotonic() + allowed
            try:
                await served.inference.Complete(request, timeout=timeout)
                work.codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                work.codes[error.code().name] += 1
                work.late_answers.append(time.monotonic() - due)

        tasks = []
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < seconds:
            while work.num_sent < 2 * CAPACITY * now:
                tasks.append(asyncio.create_task(one(work.num_sent)))
                work.num_sent += 1
            await asyncio.sleep(0.002)
        await asyncio.wait(tasks)
        for task in tasks:
            task.result()
        await eventually(served.is_all_free)
        await served.check_alive()
    print(work)
    return work


def check(work: Work, seconds: float) -> None:
    assert work.num_sent >= 1.8 * CAPACITY * seconds, "too few to mean anything"
    assert work.codes["DEADLINE_EXCEEDED"] >= work.num_sent / 4
    assert work.codes["OK"] >= work.num_sent / 8
    assert set(work.codes) == {"OK", "DEADLINE_EXCEEDED"}
    assert work.num_started_late == 0
    assert max(work.num_late_steps.values(), default=0) <= 1
    assert max(work.overruns) <= STEP_SECONDS + LATE_SECONDS


async def test_nothing_is_done_after_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """At twice the capacity no request starts after its deadline, and the step that runs then is its last."""
    check(await late_load(monkeypatch, 4.0), 4.0)


@pytest.mark.soak
async def test_nothing_is_done_after_a_deadline_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a minute."""
    check(await late_load(monkeypatch, 60.0), 60.0)


@pytest.mark.soak
async def test_work_after_deadlines_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where the daemon's timers are gone, requests whose time is over run on, and the test of it fails."""
    monkeypatch.setattr(Scheduler, "_set_deadline", lambda self, ticket: None)
    monkeypatch.setattr(Scheduler, "_may_start", lambda self, sequence: True)
    work = await late_load(monkeypatch, 2.0)
    assert work.num_started_late > 0
    assert max(work.num_late_steps.values()) > 1
    assert max(work.overruns) > STEP_SECONDS + LATE_SECONDS
