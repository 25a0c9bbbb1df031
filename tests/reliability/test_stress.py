"""All kinds of calls at once against a daemon that is failed and killed again and again: nothing wrong, nothing hung, and
who calls while it is there is served. By default two minutes; days by the environment (CONTRIBUTING.md)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc.aio
import pytest

from hotgraph_client import HotgraphError
from tests.integration.harness import Caller, eventually, wire_error
from tests.reliability import fail_points
from tests.reliability.attackers import attacker
from tests.reliability.mix import Callers, FailedError, Kind, choose
from tests.reliability.supervisor import End, Supervisor
from tests.reliability.test_memory import FORGETFUL, Held
from tests.reliability.victims import Victim, is_free, program, settings

SECONDS: Final = float(os.environ.get("HOTGRAPH_STRESS_SECONDS", "120"))
PERIOD_SECONDS: Final = float(os.environ.get("HOTGRAPH_STRESS_PERIOD_SECONDS", "10"))
SEED: Final = int(os.environ.get("HOTGRAPH_STRESS_SEED", "38"))

NUM_CALLERS: Final = 24
MAX_PAUSE_SECONDS: Final = 0.1  # of a caller between two calls
HUNG_SECONDS: Final = 60.0  # no call here takes longer on a daemon that lives, lost ones that go on included
REACH_SECONDS: Final = 5.0  # in which a fail point is reached, or the fault is taken back
RELOAD_SECONDS: Final = 3.0  # between two SIGHUPs
KILL_CLIENT_SECONDS: Final = 5.0  # between two clients that are killed
TELL_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 0.2
MIN_AVAILABILITY: Final = 0.999
# Of a restart, on average: gRPC cancels what arrives in the moment in which it stops, and nobody can ask it not to.
MAX_CANCELLED: Final = 3
# What a daemon may hold more after the second half of the last part, in which nothing is injected.
MAX_CALL_BYTES: Final = 150.0
MAX_WARM_BYTES: Final = 8 << 20  # pages, and what still fills in a process that is a few seconds old
MAX_MORE: Final = 3  # files, threads, tasks

SIGKILL: Final = ("SIGKILL", "kill")
Fault = tuple[str, str]  # point and action
# Every point in each way, and as many kills as there are points.
FAULTS: Final[list[Fault]] = [
    *((point, action) for point in fail_points.POINTS for action in ("raise", "memory", "sleep")),
    *([SIGKILL] * len(fail_points.POINTS)),
]

# A setting that every reload changes, and the number of tasks on demand.
RELOADS_AND_TASKS: Final = """
import asyncio, itertools, signal
numbers = itertools.count(100)
own_load, own_run = load, daemon.Daemon.run

def load():
    settings = own_load()
    scheduler = settings.scheduler.model_copy(update={"default_max_tokens": next(numbers)})
    return settings.model_copy(update={"scheduler": scheduler})

async def run(self):
    tell = lambda: logging.info("tasks %d", len(asyncio.all_tasks()))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    return await own_run(self)

daemon.Daemon.run = run
"""


@dataclass(frozen=True)
class Failure:
    """A call that failed and need not have. Times are monotonic, in seconds."""

    kind: str
    begin_time: float
    end_time: float
    code: str
    message: str

    def is_within(self, end: End) -> bool:
        """Whether the daemon was being ended, away or starting at any time of it."""
        return self.end_time >= end.begin_time and (end.serving_time is None or self.begin_time <= end.serving_time)


@dataclass
class Outcome:
    """What callers saw, and what was done to the daemon."""

    seconds: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)  # by kind
    failures: list[Failure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)  # that were reached: whom they reach, and the action
    num_not_reached: int = 0
    num_clients_killed: int = 0
    num_hangups: int = 0
    num_reloads: int = 0
    num_resumes: int = 0
    ends: list[End] = field(default_factory=list)
    held: list[tuple[Held, int]] = field(default_factory=list)  # with the tasks, before and after the last calls
    num_last_calls: int = 0
    log: Counter[str] = field(default_factory=Counter)

    @property
    def inside(self) -> list[Failure]:
        """Failures of calls that met a restart which was asked for."""
        expected = [end for end in self.ends if end.is_expected]
        return [failure for failure in self.failures if any(failure.is_within(end) for end in expected)]

    @property
    def outside(self) -> list[Failure]:
        """Failures while the daemon was there all the time."""
        inside = set(self.inside)
        return [failure for failure in self.failures if failure not in inside]

    @property
    def num_injected(self) -> int:
        """Calls that a fault has failed, and no other: each may fail one, as INTERNAL."""
        num_faults = sum(self.faults[f"call {action}"] for action in ("raise", "memory"))
        return min(num_faults, sum(failure.code == "INTERNAL" for failure in self.outside))

    @property
    def availability(self) -> float:
        """The share that did not fail of the calls that no restart failed."""
        return 1 - (len(self.outside) - self.num_injected) / max(1, self.calls.total() - len(self.inside))

    def problems(self) -> Iterator[str]:
        """Everything that must not be."""
        if self.wrong:
            yield f"{len(self.wrong)} wrong answers: {self.wrong[:3]}"
        if self.hung:
            yield f"{len(self.hung)} hung calls: {Counter(self.hung)}"
        if self.availability < MIN_AVAILABILITY:
            yield f"availability {self.availability:.5f}: {self.outside[:3]}"
        codes = Counter(failure.code for failure in self.inside)
        is_odd = bool(codes.keys() - {"UNAVAILABLE", "INTERNAL", "CANCELLED"})
        if is_odd or codes["CANCELLED"] > MAX_CANCELLED * len(self.ends):
            yield f"calls of restarts ended with {dict(codes)}"
        if unexpected := [end for end in self.ends if not end.is_expected]:
            yield f"ended by itself: {unexpected}"
        if len(self.held) == 2:
            (before, num_tasks_before), (after, num_tasks_after) = self.held
            more_bytes = after.resident_bytes - before.resident_bytes
            if more_bytes > MAX_WARM_BYTES + MAX_CALL_BYTES * self.num_last_calls:
                yield f"memory: {more_bytes / 2**20:.1f} MiB more after {self.num_last_calls} calls"
            if after.num_files > before.num_files + MAX_MORE:
                yield f"files: {before.num_files} to {after.num_files}"
            if after.num_threads > before.num_threads + MAX_MORE:
                yield f"threads: {before.num_threads} to {after.num_threads}"
            if num_tasks_after > num_tasks_before + MAX_MORE:
                yield f"tasks: {num_tasks_before} to {num_tasks_after}"

    def __str__(self) -> str:
        away = sorted(end.serving_time - end.begin_time for end in self.ends if end.serving_time is not None) or [0.0]
        ending_seconds = max((end.ended_time - end.begin_time for end in self.ends), default=0.0)
        lines = [
            f"{self.calls.total()} calls in {self.seconds:.0f} s: {dict(self.calls.most_common())}",
            f"{self.faults.total()} faults: {dict(self.faults)}, {self.num_not_reached} not reached",
            f"{len(self.ends)} restarts, away p50 {away[len(away) // 2]:.2f} s, max {away[-1]:.2f} s, of which to the end"
            f" itself max {ending_seconds:.2f} s",
            f"{self.num_clients_killed} clients killed, {self.num_hangups} SIGHUP, {self.num_reloads} reloads,"
            f" {self.num_resumes} resumes",
            f"{len(self.wrong)} wrong, {len(self.hung)} hung, {len(self.failures)} failed, of them {len(self.outside)} while"
            f" it was there, {self.num_injected} by a fault of one call; availability {100 * self.availability:.3f} %",
            f"failures by code: {dict(Counter(failure.code for failure in self.failures))}, log lines {dict(self.log)}",
        ]
        for held, num_tasks in self.held:
            lines.append(
                f"holds {held.resident_bytes / 2**20:.1f} MiB, {held.num_files} files, {held.num_threads} threads,"
                f" {num_tasks} tasks"
            )
        return "\n".join([*lines, *(f"PROBLEM {problem}" for problem in self.problems())])


async def one(callers: Callers, kind: Kind, outcome: Outcome, hung_seconds: float) -> None:
    """One call, and what came of it."""
    name, begin = kind.__name__, time.monotonic()
    failed: tuple[str, str] | None = None
    try:
        async with asyncio.timeout(hung_seconds) as limit:
            outcome.wrong += [f"{name}: {words}" for words in await kind(callers)]
    except TimeoutError:
        if not limit.expired():
            raise
        outcome.hung.append(name)
    except HotgraphError as error:
        failed = (error.code.name if error.code else "", f"{error.reason} {error.message}")
    except FailedError as error:
        failed = (error.code, str(error))
    except grpc.aio.AioRpcError as error:
        found = wire_error(error)
        failed = (found.code.name, f"{found.reason} {found.message}")
    except AssertionError as error:
        outcome.wrong.append(f"{name}: {error}")
    outcome.calls[name] += 1
    if failed is not None:
        outcome.failures.append(Failure(name, begin, time.monotonic(), *failed))


async def call_on(callers: Callers, outcome: Outcome, is_over: asyncio.Event, hung_seconds: float) -> None:
    """One caller, call after call."""
    while not is_over.is_set():
        await one(callers, choose(callers.chance), outcome, hung_seconds)
        await asyncio.sleep(callers.chance.uniform(0, MAX_PAUSE_SECONDS))


async def hang_up(supervisor: Supervisor, outcome: Outcome) -> None:
    """Reloads, again and again. Who has only just begun to serve hears it too."""
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        victim = await supervisor.serving()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.process_id, signal.SIGHUP)  # asyncio's own way may take the exit status away from who waits
            outcome.num_hangups += 1


async def kill_clients(supervisor: Supervisor, outcome: Outcome, chance: random.Random) -> None:
    """A process with ten streams, killed in their middle, again and again."""
    while True:
        await asyncio.sleep(KILL_CLIENT_SECONDS)
        victim = await supervisor.serving()
        async with attacker("streams", victim.address, 10) as client:
            assert client.stdout is not None
            with contextlib.suppress(TimeoutError):  # the daemon may have gone before ten streams had begun
                if await asyncio.wait_for(client.stdout.readline(), REACH_SECONDS) != b"reading\n":
                    continue
                await asyncio.sleep(chance.uniform(0, 0.1))
                client.kill()
                outcome.num_clients_killed += 1


async def tell_on(outcome: Outcome, begin: float) -> None:
    """How it stands, for who watches a long run."""
    while True:
        await asyncio.sleep(TELL_SECONDS)
        outcome.seconds = time.monotonic() - begin
        print(outcome, flush=True)


async def inject(supervisor: Supervisor, folder: Path, fault: Fault, outcome: Outcome) -> None:
    """One fault, and what it must lead to: the process ends as stated and serves again, or goes on."""
    point, action = fault
    victim = await supervisor.serving()
    num_before = len(supervisor.ends)
    if fault == SIGKILL:
        reach, status = "all", -signal.SIGKILL
        begin = time.monotonic()
        victim.process.signal(signal.SIGKILL)
    else:
        reach, status = fail_points.POINTS[point][1], 70
        fail_points.arm(folder, point, action)
        begin = time.monotonic()
        limit = begin + REACH_SECONDS
        while fail_points.is_armed(folder, point) and time.monotonic() < limit:
            begin = time.monotonic()
            await asyncio.sleep(0.002)
        if fail_points.disarm(folder, point):
            outcome.num_not_reached += 1
            return
    outcome.faults[f"{reach} {action}"] += 1
    if reach == "all" and action != "sleep":
        end = await supervisor.next_end(num_before)
        end.begin_time, end.is_expected = begin, end.status == status


@dataclass
class Injector:
    """Fault after fault, one each period, as long as there are any. None is left half way."""

    supervisor: Supervisor
    folder: Path
    faults: Iterator[Fault]
    period_seconds: float

    async def run(self, outcome: Outcome, is_over: asyncio.Event) -> None:
        for fault in self.faults:
            begin = time.monotonic()
            await inject(self.supervisor, self.folder, fault, outcome)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), max(0.0, begin + self.period_seconds - time.monotonic()))
            if is_over.is_set():
                return


async def held(victim: Victim, caller: Caller) -> tuple[Held, int]:
    """What the daemon holds, and its tasks, when nobody wants anything of it."""
    await is_free(caller)
    await asyncio.sleep(1.0)  # for sockets that were closed to be let go of
    num_lines = len(victim.process.log)
    victim.process.signal(signal.SIGUSR1)
    line = await eventually(lambda: next((line for line in victim.process.log[num_lines:] if "tasks " in line), None))
    return Held.by(victim), int(line.rpartition(" ")[2])


async def stress(
    seconds: float,
    faults: Iterator[Fault],
    period_seconds: float,
    *,
    last_seconds: float,
    hung_seconds: float = HUNG_SECONDS,
    is_enough: Callable[[Outcome], bool] = lambda _: False,
    more: str = "",
) -> Outcome:
    """So long with faults, then a last part without: after its second half the daemon must hold no more than before it.

    `is_enough` ends the first part sooner."""
    outcome = Outcome()
    chance = random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="hg") as name:
        folder = Path(name)
        config = settings(name, is_tcp=False, scheduler={"num_slots": 32, "max_waiting": 1000})
        points = fail_points.program(folder)
        supervisor = Supervisor(config, program(more=FORGETFUL + RELOADS_AND_TASKS + points + more))
        outcome.ends, outcome.log = supervisor.ends, supervisor.log
        begin = time.monotonic()
        async with supervisor.running(), Callers(config.server.listen[0], chance) as callers:

            async def load(seconds: float, injector: Injector | None, *beside: asyncio.Task[None]) -> None:
                """All callers for so long, and the injector; what was begun is ended. What stands beside is stopped."""
                is_over = asyncio.Event()
                work = [call_on(callers, outcome, is_over, hung_seconds) for _ in range(NUM_CALLERS)]
                if injector is not None:
                    work.append(injector.run(outcome, is_over))
                tasks = [asyncio.create_task(each) for each in work]
                try:
                    end = time.monotonic() + seconds
                    while (left := end - time.monotonic()) > 0 and not is_enough(outcome):
                        done, _ = await asyncio.wait([*beside, *tasks], timeout=min(left, LOOK_SECONDS))
                        for task in done:
                            task.result()
                    is_over.set()
                    await asyncio.gather(*tasks)
                finally:
                    for task in (*beside, *tasks):
                        task.cancel()
                    await asyncio.gather(*beside, *tasks, return_exceptions=True)

            await load(
                seconds,
                Injector(supervisor, folder, faults, period_seconds),
                asyncio.create_task(hang_up(supervisor, outcome)),
                asyncio.create_task(kill_clients(supervisor, outcome, chance)),
                asyncio.create_task(tell_on(outcome, begin)),
            )
            for point in fail_points.POINTS:
                fail_points.disarm(folder, point)
            if last_seconds:
                victim = await supervisor.serving()
                await load(last_seconds / 2, None)  # it may be young, and caches and pools empty
                outcome.held.append(await held(victim, callers.plain))
                num_calls = outcome.calls.total()
                await load(last_seconds / 2, None)
                outcome.num_last_calls = outcome.calls.total() - num_calls
                outcome.held.append(await held(victim, callers.plain))
            outcome.num_resumes = callers.num_resumes
        outcome.num_reloads = supervisor.num_reloads
        outcome.seconds = time.monotonic() - begin
    return outcome


def shuffled(faults: Sequence[Fault], chance: random.Random) -> Iterator[Fault]:
    """All of them in some order, then all again in another, for ever."""
    while True:
        yield from chance.sample(faults, len(faults))


async def test_a_short_stress() -> None:
    """A daemon that fails, pauses and is killed under all kinds of calls answers nothing wrongly, and loses nothing else."""
    faults = [("send", "raise"), ("capture_end", "memory"), SIGKILL, ("step", "sleep")]
    outcome = await stress(60.0, iter(faults), 1.5, last_seconds=2.0, is_enough=lambda seen: seen.faults.total() == 4)
    print(outcome)
    assert list(outcome.problems()) == []
    assert outcome.faults.total() == 4
    assert len(outcome.ends) == 2
    assert outcome.num_resumes > 0


@pytest.mark.soak
@pytest.mark.timeout(int(SECONDS) + 600)
async def test_a_long_stress() -> None:
    """The same for HOTGRAPH_STRESS_SECONDS, with a fault each HOTGRAPH_STRESS_PERIOD_SECONDS; the last tenth without."""
    faults = shuffled(FAULTS, random.Random(SEED))
    outcome = await stress(0.9 * SECONDS, faults, PERIOD_SECONDS, last_seconds=0.1 * SECONDS)
    print(outcome)
    assert list(outcome.problems()) == []
    assert outcome.faults.total() >= 0.5 * 0.9 * SECONDS / PERIOD_SECONDS
    assert outcome.num_resumes > 0


# Now and then another token; a call without its answer; a request that leaves a lot behind; an end of its own.
WRONG_TOKEN: Final = """
def init(self, *args, **kwargs):
    own_init(self, *args, **kwargs)
    rule, numbers = self.rule, itertools.count()
    self.rule = lambda history: rule(history) if next(numbers) % 2000 else ord("!")

own_init, FakeEngine.__init__ = FakeEngine.__init__, init
"""
HANGS: Final = """
from hotgraph_server.rpc.inference import InferenceServicer
own_complete, completions = InferenceServicer.Complete, itertools.count(1)

async def complete(self, request, context):
    if next(completions) % 20 == 0:
        await asyncio.Event().wait()
    return await own_complete(self, request, context)

InferenceServicer.Complete = complete
"""
LEAKS: Final = """
from hotgraph_server.scheduler import Scheduler
own_end, kept = Scheduler._end, []

def end(self, ticket, *rest):
    kept.append(bytearray(1 << 19))
    own_end(self, ticket, *rest)

Scheduler._end = end
"""
ENDS: Final = """
from hotgraph_server.scheduler import Scheduler
own_submit, submits = Scheduler.submit, itertools.count(1)

def submit(self, *args, **kwargs):
    if next(submits) == 60:
        os._exit(1)
    return own_submit(self, *args, **kwargs)

Scheduler.submit = submit
"""


@pytest.mark.parametrize(
    ("more", "problem"),
    [(WRONG_TOKEN, "wrong answers"), (HANGS, "hung calls"), (LEAKS, "memory"), (ENDS, "ended by itself")],
    ids=["wrong token", "hangs", "leaks", "ends"],
)
async def test_what_must_not_be_is_noticed(more: str, problem: str) -> None:
    """The control: a daemon that does it now and then is found out."""

    def is_found(outcome: Outcome) -> bool:
        return any(problem in found for found in outcome.problems())

    first_seconds, last_seconds = (0.0, 2.0) if more is LEAKS else (30.0, 0.0)
    outcome = await stress(
        first_seconds, iter(()), 1.0, last_seconds=last_seconds, hung_seconds=3.0, is_enough=is_found, more=more
    )
    print(outcome)
    assert is_found(outcome)


def seen(**changes: object) -> Outcome:
    """A thousand calls, a restart from second 10 to 12 that was asked for, and nothing wrong; then the changes."""
    outcome = Outcome(calls=Counter(complete=1000), ends=[End(70, 11.0, 10.0, 12.0, is_expected=True)])
    outcome.held = [(Held(1 << 26, 27, 9), 7)] * 2
    for name, value in changes.items():
        setattr(outcome, name, value)
    return outcome


def failures(num: int, code: str, begin_time: float) -> list[Failure]:
    return [Failure("complete", begin_time, begin_time + 0.1, code, str(n)) for n in range(num)]


@pytest.mark.parametrize(
    "outcome",
    [
        seen(),
        seen(failures=failures(500, "UNAVAILABLE", 9.95)),  # met the end
        seen(failures=failures(500, "UNAVAILABLE", 11.95)),  # met the start
        seen(failures=failures(3, "CANCELLED", 11.0)),
        seen(failures=failures(1, "UNAVAILABLE", 5.0)),
        seen(failures=failures(5, "INTERNAL", 5.0), faults=Counter({"call raise": 3, "call memory": 2})),
    ],
)
def test_what_may_be_is_no_problem(outcome: Outcome) -> None:
    """Calls that met a restart may fail, as may one call in a thousand, and one for each fault that hits a single call."""
    assert list(outcome.problems()) == []


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (seen(failures=failures(2, "UNAVAILABLE", 5.0)), "availability"),
        (seen(failures=failures(2, "UNAVAILABLE", 12.1)), "availability"),
        (
            seen(failures=failures(2, "INTERNAL", 5.0), faults=Counter({"call sleep": 9, "none raise": 9})),
            "availability",
        ),
        (seen(failures=failures(4, "CANCELLED", 11.0)), "restarts"),
        (seen(failures=failures(1, "UNKNOWN", 11.0)), "restarts"),
        (seen(ends=[End(1, 11.0, 10.0, 12.0)]), "by itself"),
        (seen(held=[(Held(1 << 26, 27, 9), 7), (Held(1 << 27, 27, 9), 7)]), "memory"),
        (seen(held=[(Held(1 << 26, 27, 9), 7), (Held(1 << 26, 31, 9), 7)]), "files"),
        (seen(held=[(Held(1 << 26, 27, 9), 7), (Held(1 << 26, 27, 13), 7)]), "threads"),
        (seen(held=[(Held(1 << 26, 27, 9), 7), (Held(1 << 26, 27, 9), 11)]), "tasks"),
    ],
)
def test_what_may_not_be_is_a_problem(outcome: Outcome, problem: str) -> None:
    """Each thing that a run is judged by is found alone."""
    (found,) = outcome.problems()
    assert problem in found
