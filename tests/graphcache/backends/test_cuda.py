"""Tests of backends/cuda.py on a fake runtime: the order of things, spares, and what is left after a failure."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from graphcache import (
    CacheSettings,
    CaptureError,
    DeviceLostError,
    FakeClock,
    GraphCache,
    GraphState,
    GraphStateError,
    NoTurns,
)
from graphcache.backends import cuda
from graphcache.backends.cuda import CudaBackend
from graphcache.backends.cuda_captured import CudaCaptured
from graphcache.backends.cuda_runtime import CudaCallError
from tests.graphcache.backends.cuda_fakes import BROKEN, LOST, NO_MEMORY, FakeRuntime, FakeTorch, OutOfMemoryError
from tests.graphcache.turns import GivenTurns

MIB = 1 << 20


class Rig:
    """A started backend on fakes, and work for it."""

    def __init__(self, num_spare_execs: int = 8, library_warm_up: Callable[[], None] | None = None) -> None:
        self.runtime = FakeRuntime()
        self.torch = FakeTorch(self.runtime)
        self.backend = CudaBackend(
            num_spare_execs=num_spare_execs,
            library_warm_up=library_warm_up,
            runtime=self.runtime,
            torch_device=self.torch,
        )
        self.ran: list[str] = []

    def start(self) -> Rig:
        self.backend.start(GivenTurns(lambda: self.runtime.calls.append("wait"), host=0.0))
        self.runtime.calls.clear()
        return self

    def work(self, name: str, *kinds: str) -> Callable[[], None]:
        """Runs one kernel of each kind, which write down `name` and their kind."""

        def work() -> None:
            for kind in kinds or ("k",):
                self.runtime.launch(kind, lambda kind=kind: self.ran.append(f"{name} {kind}"))  # type: ignore[misc]  # bound now

        return work

    def capture(self, name: str, *kinds: str) -> CudaCaptured:
        return self.backend.capture(name, self.work(name, *kinds))

    def check_clean(self) -> None:
        """Nothing captures, no template is left, torch's pool is off, and the next capture gives what it should."""
        assert not any(stream.recorded is not None for stream in self.runtime.streams.values() if not stream.is_stuck)
        assert self.runtime.graphs == {}
        assert self.runtime.calls.count("pool on") == self.runtime.calls.count("pool off")
        self.ran.clear()
        captured = self.capture("after", "m", "n")
        captured.replay()
        assert self.ran == ["after m", "after n"]
        captured.destroy()


@pytest.fixture
def rig() -> Rig:
    return Rig().start()


def test_a_start_warms_the_capture_stream_and_waits_for_it_alone() -> None:
    """Libraries are warmed on the capture stream, ours and the caller's, outside any capture, and it is waited for."""
    warmed: list[int] = []
    made = Rig(library_warm_up=lambda: warmed.append(made.runtime.current))
    made.backend.start(NoTurns())
    assert warmed == made.torch.warm_streams
    stream = warmed[0]
    assert made.runtime.calls == [
        "open",
        "make_event",
        "make_event",
        "take_stream",
        "take_stream",
        "warm_libraries",
        f"synchronize_stream {stream}",
    ]
    assert "not started" not in repr(made.backend)


def test_a_capture_runs_nothing_and_goes_through_its_phases_in_order(rig: Rig) -> None:
    """The pool is on before the capture begins and until after it ended; it waits for its turn between the phases; the template
    is destroyed at once; nothing runs before the replay."""
    captured = rig.capture("a", "x", "y")
    assert rig.ran == []
    stream = rig.torch.warm_streams[0]
    executable = next(iter(rig.runtime.executables))
    assert [call for call in rig.runtime.calls if call != "free_bytes"] == [
        "pool on",
        f"begin_capture {stream}",
        f"end_capture {stream}",
        "pool off",
        "wait",
        "instantiate",
        "wait",
        f"upload {executable}",
        f"synchronize_stream {stream}",
        "destroy_graph",
    ]
    captured.replay()
    captured.replay()
    assert rig.ran == ["a x", "a y"] * 2
    assert captured.record_seconds > 0
    assert captured.instantiate_seconds > 0
    assert (captured.num_nodes, captured.is_update) == (2, False)


def test_a_spare_of_the_same_topology_is_updated(rig: Rig) -> None:
    """A destroyed graph's executable serves the next capture that it can be made to, keeps its size, and does its work."""
    rig.runtime.executable_bytes = 64 * MIB
    first, other = rig.capture("a", *"x" * 300), rig.capture("b", *"y" * 300)
    assert first.size_bytes == 64 * MIB
    first.destroy()
    other.destroy()
    assert rig.backend.stats().num_spares == 2
    assert rig.backend.stats().spare_bytes == 128 * MIB
    again = rig.capture("c", *"x" * 300)
    assert again.is_update
    assert again.size_bytes == 64 * MIB
    again.replay()
    assert set(rig.ran) == {"c x"}
    stats = rig.backend.stats()
    assert (stats.num_updates, stats.num_instantiates, stats.num_spares) == (1, 2, 1)
    assert len(rig.runtime.executables) == 2


def test_a_capture_counts_its_edges_by_type(rig: Rig) -> None:
    """Nodes, edges and programmatic edges are those recorded, whether instantiated or a spare that was updated."""
    first = rig.capture("first", "k", "early k", "k", "early k", "early k")
    assert (first.num_nodes, first.num_edges, first.num_programmatic_edges) == (5, 4, 3)
    first.destroy()
    second = rig.capture("second", "k", "early k", "k", "early k", "early k")
    assert second.is_update
    assert (second.num_edges, second.num_programmatic_edges) == (4, 3)
    assert rig.capture("lone", "k").num_edges == 0


def test_a_spare_with_edges_of_another_type_is_not_tried(rig: Rig) -> None:
    """A driver may take a chain that waits for one that does not: whether kernels start early must be the graph's own."""
    rig.capture("a", "x", "early x").destroy()
    rig.runtime.calls.clear()
    assert not rig.capture("b", "x", "x").is_update
    assert not any(call.startswith("update") for call in rig.runtime.calls)
    assert rig.capture("c", "x", "early x").is_update


def test_a_refused_update_falls_back_to_an_instantiate(rig: Rig) -> None:
    """Spares that cannot be updated stay spare, and one of another size is not even tried."""
    rig.capture("a", "x", "x").destroy()
    rig.capture("b", "y").destroy()
    rig.runtime.calls.clear()
    captured = rig.capture("c", "x", "z")
    assert not captured.is_update
    assert sum(call.startswith("update") for call in rig.runtime.calls) == 1
    assert rig.backend.stats().num_spares == 2
    captured.replay()
    assert rig.ran == ["c x", "c z"]


def test_spares_are_bounded_and_the_oldest_goes_first() -> None:
    """No more spares than allowed are kept; without any allowed, a destroy destroys."""
    rig = Rig(num_spare_execs=2).start()
    captures = [rig.capture(str(index), *"k" * index) for index in range(1, 5)]
    handles = list(rig.runtime.executables)
    for captured in captures:
        captured.destroy()
    assert list(rig.runtime.executables) == handles[2:]
    rig = Rig(num_spare_execs=0).start()
    rig.capture("a").destroy()
    assert rig.runtime.executables == {}
    with pytest.raises(ValueError, match="num_spare_execs"):
        CudaBackend(num_spare_execs=-1, runtime=rig.runtime, torch_device=rig.torch)


def test_random_captures_and_destroys_replay_what_they_recorded() -> None:
    """Whatever is captured and destroyed in whatever order, every live graph replays its own work, and nothing leaks."""
    rig = Rig(num_spare_execs=3).start()
    chance = random.Random(3)
    live: dict[str, tuple[CudaCaptured, list[str]]] = {}
    for number in range(300):
        if live and chance.random() < 0.5:
            live.pop(chance.choice(sorted(live)))[0].destroy()
        else:
            kinds = chance.choices("ab", k=chance.randint(1, 3))
            live[f"g{number}"] = (rig.capture(f"g{number}", *kinds), kinds)
        for name, (captured, kinds) in live.items():
            rig.ran.clear()
            captured.replay()
            assert rig.ran == [f"{name} {kind}" for kind in kinds]
    stats = rig.backend.stats()
    assert stats.num_updates > 30
    assert len(rig.runtime.executables) == len(live) + stats.num_spares
    assert rig.runtime.graphs == {}


def test_work_that_raises_leaves_nothing(rig: Rig) -> None:
    """An exception of the work is a CaptureError that names its type, ends the capture, and clears torch's last error."""

    def work() -> None:
        rig.work("a", "x")()
        raise KeyError("secret")

    with pytest.raises(CaptureError, match="recording raised KeyError") as caught:
        rig.backend.capture("a", work)
    assert "secret" not in str(caught.value)
    assert rig.torch.num_cleared == 1
    assert rig.runtime.executables == {}
    assert rig.backend.stats().num_failures == 1
    rig.check_clean()


def test_work_that_breaks_its_capture_leaves_nothing(rig: Rig) -> None:
    """Work that waits, whether it hides that or not, fails the capture and no more."""

    def waits() -> None:
        rig.runtime.wait()

    def hides_it() -> None:
        with pytest.raises(RuntimeError):
            rig.runtime.wait()

    with pytest.raises(CaptureError, match="RuntimeError"):
        rig.backend.capture("a", waits)
    rig.check_clean()
    with pytest.raises(CaptureError, match="cudaErrorStreamCaptureInvalidated"):
        rig.backend.capture("a", hides_it)
    rig.check_clean()


def test_interrupts_end_the_capture_and_pass(rig: Rig) -> None:
    """What is no Exception goes through as it is, and leaves no capture behind."""

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rig.backend.capture("a", work)
    rig.check_clean()


def test_work_that_does_nothing_on_the_stream_is_refused(rig: Rig) -> None:
    """An empty graph would replay nothing, so it is no graph."""
    with pytest.raises(CaptureError, match="nothing on the capture stream"):
        rig.backend.capture("a", lambda: None)
    rig.check_clean()


def test_memory_that_runs_out_is_told_as_that(rig: Rig) -> None:
    """Torch's out-of-memory in the work, and the runtime's while instantiating, have one text."""

    def work() -> None:
        raise OutOfMemoryError

    with pytest.raises(CaptureError, match=r"^out of device memory$"):
        rig.backend.capture("a", work)
    rig.check_clean()
    rig.runtime.failures["instantiate"] = [NO_MEMORY]
    with pytest.raises(CaptureError, match=r"^out of device memory$"):
        rig.capture("a", "other", "kinds", "here")
    rig.check_clean()


@pytest.mark.parametrize("method", ["begin_capture", "end_capture", "instantiate", "upload", "free_bytes"])
def test_a_failing_call_leaves_nothing(rig: Rig, method: str) -> None:
    """Whichever call fails, the capture fails with its name, and no graph, executable or capture is left."""
    rig.runtime.failures[method] = [CudaCallError(method, 1, "cudaErrorInvalidValue")]
    with pytest.raises(CaptureError, match=f"{method}: cudaErrorInvalidValue"):
        rig.capture("a")
    assert rig.runtime.executables == {}
    rig.check_clean()


def test_a_spare_that_failed_after_its_update_is_not_kept(rig: Rig) -> None:
    """An upload that fails costs the executable, spare or not."""
    rig.capture("a").destroy()
    rig.runtime.failures["upload"] = [CudaCallError("upload", 1, "cudaErrorInvalidValue")]
    with pytest.raises(CaptureError):
        rig.capture("b")
    assert rig.runtime.executables == {}
    assert rig.backend.stats().num_spares == 0


def test_a_wait_that_raises_leaves_nothing(rig: Rig) -> None:
    """Also what others do between the phases leaves nothing behind when it fails."""
    failures = [RuntimeError("stop")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    rig.backend.start(GivenTurns(fail, host=0.0))
    with pytest.raises(CaptureError, match="instantiating raised RuntimeError"):
        rig.capture("a")
    assert rig.runtime.executables == {}
    rig.check_clean()


def test_a_stream_that_goes_on_capturing_is_replaced(rig: Rig) -> None:
    """A capture stream that cannot be brought back is left; the next capture warms another and records there."""
    stuck = rig.torch.warm_streams[0]

    def work() -> None:
        rig.runtime.streams[stuck].is_stuck = True
        raise ValueError

    with pytest.raises(CaptureError):
        rig.backend.capture("a", work)
    rig.check_clean()
    assert len(rig.torch.warm_streams) == 2
    assert rig.torch.warm_streams[1] != stuck
    assert f"begin_capture {rig.torch.warm_streams[1]}" in rig.runtime.calls


def test_a_lost_device_is_told_apart(rig: Rig) -> None:
    """When the device answers everything with an error, that is no failed capture, and the pool is never given back."""

    def work() -> None:
        rig.runtime.is_lost = True
        raise RuntimeError("illegal memory access")

    with pytest.raises(DeviceLostError, match="cudaErrorIllegalAddress"):
        rig.backend.capture("a", work)
    assert rig.torch.is_kept
    with pytest.raises(DeviceLostError):
        rig.capture("b")
    with pytest.raises(DeviceLostError):
        rig.backend.warm_up(work)
    rig.backend.close()  # logs what it has to leave behind


def test_an_error_of_an_earlier_call_is_not_a_lost_device(rig: Rig) -> None:
    """Words that sound like the end are not believed: a device that still answers is not lost."""
    rig.runtime.failures["end_capture"] = [LOST]
    with pytest.raises(CaptureError):
        rig.capture("a")
    assert not rig.torch.is_kept
    rig.check_clean()


def test_warm_up_runs_on_the_other_stream_and_waits_for_it(rig: Rig) -> None:
    """Eager work never runs on the capture stream; a CaptureError of it passes, other errors become one."""
    streams: list[int] = []
    rig.backend.warm_up(lambda: streams.append(rig.runtime.current))
    assert streams[0] not in rig.torch.warm_streams
    assert rig.runtime.calls == ["wait", f"synchronize_stream {streams[0]}"]

    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(CaptureError, match="no such shape") as caught:
        rig.backend.warm_up(lambda: fails(CaptureError("no such shape")))
    assert caught.value.__cause__ is None
    with pytest.raises(CaptureError, match="warming up raised ZeroDivisionError"):
        rig.backend.warm_up(lambda: fails(ZeroDivisionError()))
    rig.check_clean()


def test_sizes_count_the_executable_and_the_growth_of_the_pool(rig: Rig) -> None:
    """A graph counts what the driver took for it, not what torch took meanwhile, and what the pool grew by for it."""
    rig.runtime.executable_bytes = 32 * MIB

    def work() -> None:
        rig.torch.allocate(6 * MIB)
        rig.work("a", *"k" * 200)()

    captured = rig.backend.capture("a", work)
    assert captured.size_bytes == 38 * MIB
    assert rig.backend.stats().pool_bytes == rig.backend.pool_bytes == 6 * MIB
    assert rig.capture("b", *"l" * 200).size_bytes == 32 * MIB
    captured.destroy()
    rig.capture("c", *"l" * 200)
    assert rig.backend.pool_bytes == 6 * MIB
    rig.backend.close()
    assert rig.backend.pool_bytes == 0


def test_a_failed_start_leaves_nothing_and_can_be_tried_again() -> None:
    """Streams and pool of a start that failed are given back; the next start makes them anew."""
    rig = Rig()
    rig.runtime.failures["synchronize_stream"] = [CudaCallError("synchronize_stream", 1, "cudaErrorInvalidValue")]
    before = set(rig.runtime.streams)
    with pytest.raises(CaptureError, match="cudaErrorInvalidValue"):
        rig.backend.start(NoTurns())
    assert set(rig.runtime.streams) == before
    assert rig.runtime.calls[-1] == "close"
    with pytest.raises(GraphStateError, match="not started"):
        rig.capture("a")
    rig.start()
    rig.check_clean()


def test_a_warm_up_gives_way_between_its_parts(rig: Rig) -> None:
    """A part is over on the device before others have their turn; elsewhere giving way does nothing."""

    def work() -> None:
        rig.work("a")()
        rig.runtime.calls.append("a part")
        rig.backend.give_way()
        rig.work("b")()

    rig.backend.warm_up(work)
    stream = int(rig.runtime.calls[-1].split()[1])
    synchronize = f"synchronize_stream {stream}"
    assert rig.runtime.calls == ["wait", "a part", synchronize, "wait", synchronize]
    assert rig.ran == ["a k", "b k"]
    assert stream not in rig.torch.warm_streams
    rig.runtime.calls.clear()
    rig.backend.give_way()
    assert rig.runtime.calls == []
    rig.backend.capture("c", work).replay()
    assert rig.runtime.calls.count("wait") == 3  # where it gives way, and between its phases


@pytest.mark.parametrize("is_rehearsal", [False, True])
def test_parts_go_between_steps(is_rehearsal: bool) -> None:
    """Beside steps each part goes behind the step that is launched meanwhile, and the next step behind the part."""
    rig = Rig()
    serving = rig.runtime.current

    def step() -> None:
        before, rig.runtime.current = rig.runtime.current, serving
        rig.backend.before_step()
        rig.runtime.calls.append("step")
        rig.backend.after_step()
        rig.runtime.current = before

    def work() -> None:
        rig.work("a")()
        rig.backend.give_way()
        rig.work("b")()

    rig.backend.start(GivenTurns(step))
    rig.runtime.calls.clear()
    (rig.backend.rehearse if is_rehearsal else rig.backend.warm_up)(work)
    assert rig.ran == ["a k", "b k"]
    told = [call for call in rig.runtime.calls if call.split()[0] in ("step", "wait_event", "record_event")]
    stream = int(told[2].split()[-1])
    part = ["step", f"record_event {serving}", f"wait_event of {serving} {stream}", f"record_event {stream}"]
    assert told == part + part
    rig.backend.close()
    assert rig.runtime.events == {}


def test_recording_stands_still_now_and_then(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the interpreter is wanted, recording waits for its turn where the work gives way; that time does not count."""
    now = 0.0
    monkeypatch.setattr(cuda, "perf_counter", lambda: now)

    def wait() -> None:
        nonlocal now
        now += 100.0
        rig.runtime.calls.append("wait")
        turns.host = 1.0

    turns = GivenTurns(wait, host=1.0)

    def work() -> None:
        nonlocal now
        for _ in range(6):
            rig.work("a")()
            now += 0.6
            turns.host -= 0.6
            rig.backend.give_way(1e-6)

    rig.backend.close()
    rig.backend.start(turns)
    rig.runtime.calls.clear()
    captured = rig.backend.capture("a", work)
    recording = rig.runtime.calls[
        : next(i for i, call in enumerate(rig.runtime.calls) if call.startswith("end_capture"))
    ]
    assert recording.count("wait") == 3
    assert captured.record_seconds == pytest.approx(6 * 0.6)
    rig.runtime.calls.clear()
    now += 1.0
    rig.backend.give_way()  # nothing is being recorded
    assert not rig.runtime.calls


def test_parts_that_take_little_are_one(rig: Rig) -> None:
    """Work is cut where with as much again it would take more than a turn's time, as that is then."""
    turns = GivenTurns(lambda: rig.runtime.calls.append("wait"), device=0.5)
    rig.backend.close()
    rig.backend.start(turns)
    rig.runtime.calls.clear()
    cuts: list[int] = []

    def work() -> None:
        for index in range(12):
            if index == 6:
                turns.device = 0.25
            rig.work("a")()
            before = rig.runtime.calls.count("wait")
            rig.backend.give_way(0.125)
            if rig.runtime.calls.count("wait") > before:
                cuts.append(index)

    for run_apart in (rig.backend.warm_up, rig.backend.rehearse):
        turns.device = 0.5
        cuts.clear()
        run_apart(work)
        assert cuts == [3, 6, 8, 10]
    rig.check_clean()


def test_a_rehearsal_replays_what_it_records_part_by_part(rig: Rig) -> None:
    """Each part is recorded, made launchable, run and thrown away, apart from the graphs' stream and from their pool."""
    seen: list[list[str]] = []

    def work() -> None:
        for name in ("a", "b"):
            rig.work(name, "x", "y")()
            rig.torch.allocate(100)
            seen.append(list(rig.ran))
            rig.backend.give_way()
        rig.work("c")()

    live = rig.capture("live")
    pool_bytes = rig.torch.pool_bytes()
    rig.runtime.calls.clear()
    rig.backend.rehearse(work)
    assert seen == [[], ["a x", "a y"]]
    assert rig.ran == ["a x", "a y", "b x", "b y", "c k"]
    begun = [call for call in rig.runtime.calls if call.startswith("begin_capture")]
    assert len(begun) == 3
    assert len(set(begun)) == 1
    assert int(begun[0].split()[1]) not in rig.torch.warm_streams
    assert rig.runtime.calls.count("wait") == 3  # before each part
    assert rig.runtime.calls[:2] == ["wait", "rehearsal pool on"]
    assert rig.runtime.calls[-1] == "rehearsal pool off"
    assert rig.torch.pool_bytes() == pool_bytes
    assert len(rig.runtime.executables) == 1
    live.replay()
    assert rig.ran[-1] == "live k"
    rig.check_clean()


def test_a_rehearsal_with_nothing_in_a_part_is_none_the_worse(rig: Rig) -> None:
    """A part that puts nothing on the stream is passed over."""

    def work() -> None:
        rig.backend.give_way()
        rig.work("a")()
        rig.backend.give_way()

    rig.backend.rehearse(work)
    assert rig.ran == ["a k"]
    rig.check_clean()


def test_a_rehearsal_that_breaks_leaves_nothing(rig: Rig) -> None:
    """Work that waits in any part, or raises, is a failed capture; the stream serves the next one, or is replaced."""

    def work(breaks: Callable[[], None]) -> Callable[[], None]:
        def broken() -> None:
            rig.work("a")()
            rig.backend.give_way()
            breaks()

        return broken

    def raises() -> None:
        raise ZeroDivisionError

    for breaks in (rig.runtime.wait, raises):
        with pytest.raises(CaptureError):
            rig.backend.rehearse(work(breaks))
        rig.check_clean()

    def stick() -> None:
        rig.runtime.streams[rig.runtime.current].is_stuck = True
        raise ZeroDivisionError

    num_streams = len(rig.runtime.streams)
    with pytest.raises(CaptureError):
        rig.backend.rehearse(work(stick))
    rig.ran.clear()
    rig.backend.rehearse(rig.work("b"))
    assert rig.ran == ["b k"]
    assert len(rig.runtime.streams) == num_streams + 1
    rig.check_clean()


def test_close_keeps_the_pool_of_a_device_that_is_lost(rig: Rig) -> None:
    """When the device was lost and no capture noticed, closing finds out before it would give memory back."""
    rig.capture("a")
    rig.runtime.is_lost = True
    rig.backend.close()  # logs what it has to leave behind
    assert rig.torch.is_kept
    assert rig.runtime.calls[-1] == "close"


def test_close_gives_everything_back(rig: Rig) -> None:
    """After close there is no executable, no stream of ours and no pool, whatever fails on the way."""
    for index in range(3):
        rig.capture(str(index), *"k" * (index + 1))
    for captured in [rig.capture("a", "x"), rig.capture("b", "y", "y")]:
        captured.destroy()
    num_live = 3
    rig.runtime.failures["destroy_executable"] = [BROKEN]
    rig.backend.close()
    assert len(rig.runtime.executables) == num_live + 1  # those never destroyed, and the one that failed
    assert len(rig.runtime.streams) == 1
    assert rig.runtime.calls[-1] == "close"


def test_other_threads_and_second_destroys_are_refused(rig: Rig) -> None:
    """Captures, warm-ups and destroys are for the thread that started; a graph is destroyed once and then not replayed."""
    captured = rig.capture("a")
    refused: list[str] = []

    def elsewhere() -> None:
        for call in (captured.destroy, lambda: rig.capture("b"), lambda: rig.backend.warm_up(lambda: None)):
            try:
                call()
            except GraphStateError as error:
                refused.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(30)
    assert len(refused) == 3
    other = rig.capture("c")
    other.destroy()
    with pytest.raises(GraphStateError, match="destroyed before"):
        other.destroy()
    with pytest.raises(GraphStateError, match="replayed"):
        other.replay()


class FakeKernels:
    """A program whose key is the kinds of its kernels. Those in `wrong` find themselves wrong."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.wrong: set[str] = set()

    def bind(self, key: str) -> Callable[[], None]:
        self.rig.backend.warm_up(self.rig.work(key, *key))
        if key == "lost":
            self.rig.runtime.is_lost = True
        return self.rig.work(key, *key)

    def verify(self, key: str, replay: Callable[[], None]) -> bool:
        self.rig.ran.clear()
        replay()
        return self.rig.ran == [f"{key} {kind}" for kind in key] and key not in self.wrong


def test_behind_a_cache() -> None:
    """Graphs are captured, verified, published, evicted and captured again through the cache; the wrong are quarantined,
    and a lost device ends capturing where the owner sees it."""
    rig = Rig()
    program = FakeKernels(rig)
    program.wrong.add("zz")
    cache: GraphCache[str] = GraphCache(
        program, rig.backend, CacheSettings(max_graphs=4, policy="lru"), clock=FakeClock(), thread=False
    )
    cache.start()
    chance = random.Random(7)
    keys = ["ab", "abc", "ba", "b", "aa", "bb", "zz"]
    for _ in range(200):
        key = chance.choice(keys)
        graph = cache.acquire(key)
        if graph is None:
            cache.record_miss(key, 0.01)
            cache.run_pending()
        else:
            rig.ran.clear()
            graph.replay()
            assert rig.ran == [f"{key} {kind}" for kind in key]
            graph.release()
            cache.record_hit(graph, 0.001)
            if chance.random() < 0.3:
                cache.evict(key)
    assert cache.get("zz").state is GraphState.QUARANTINED
    assert rig.backend.stats().num_updates > 10
    cache.request("lost")
    cache.run_pending()
    assert isinstance(cache.lost, DeviceLostError)
    with pytest.raises(DeviceLostError):
        cache.request("ab")
    cache.close()
