"""The daemon: builds the parts, listens, loads, serves, drains, stops. The only place that knows all of them.

Nothing else in the process starts or ends anything. It logs through `logging`; how that looks is the command line's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import gc
import logging
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from graphcache import CAPTURE_THREAD_NAME, CacheSettings, Clock, SystemClock
from hotgraph_server.awake_cores import AwakeCores, choose_cores
from hotgraph_server.config import Settings
from hotgraph_server.engine.interface import Engine
from hotgraph_server.errors import (
    AddressInUseError,
    DrainingError,
    EngineFailedError,
    HotgraphError,
    ModelLoadError,
    NotPossibleError,
    SettingsError,
)
from hotgraph_server.graph_profile import export_profile, import_profile
from hotgraph_server.observability import Observability
from hotgraph_server.reloading import reload_settings
from hotgraph_server.rpc import TRANSITIONS, DaemonState, Lifecycle, RpcServer, ServedModel
from hotgraph_server.rpc.watch import EventHub
from hotgraph_server.scheduler import Scheduler, open_quarantine, self_test
from hotgraph_server.supervision import Supervision
from hotgraph_server.systemd import Notifier
from hotgraph_server.text import ByteTokenizer, Tokenizer
from hotgraph_server.threads import in_daemon_thread, run_event_loop

__all__ = ["TRANSITIONS", "Daemon", "DaemonState", "ExitStatus", "Parts", "build_parts", "run", "serve"]

logger = logging.getLogger("hotgraph.daemon")

FAKE_SOURCE: Final = "fake"
FAKE_CONTEXT_LENGTH: Final = 1024
RETRY_SECONDS: Final = 1.0
LAST_WORDS_SECONDS: Final = 1.0  # for statuses on their way to callers once everything ended
CONNECTION_GRACE_SECONDS: Final = 0.5  # for what else is open then
CLOSE_SECONDS: Final = 10.0  # for a step in flight; an engine that takes longer hangs
CAPTURE_CLOSE_SECONDS: Final = 2.0  # for a capture under way: it may take a minute, and nobody needs it any more
EXIT_SECONDS: Final = 5.0  # from the end of the daemon to that of the process
# After the grace.
END_SECONDS: Final = (
    LAST_WORDS_SECONDS + CONNECTION_GRACE_SECONDS + CLOSE_SECONDS + CAPTURE_CLOSE_SECONDS + EXIT_SECONDS
)


class ExitStatus(enum.IntEnum):
    """What the process tells its supervisor; the numbers of sysexits.h."""

    OK = 0
    UNAVAILABLE = 69  # an address or a device is not to be had now: trying again may help
    FAILED = 70  # the engine failed: a fresh process serves again
    CONFIGURATION = 78  # settings or model are bad: trying again changes nothing


EXIT_STATUSES: Final[dict[type[HotgraphError], ExitStatus]] = {
    SettingsError: ExitStatus.CONFIGURATION,
    ModelLoadError: ExitStatus.CONFIGURATION,
    AddressInUseError: ExitStatus.UNAVAILABLE,
    NotPossibleError: ExitStatus.UNAVAILABLE,
    EngineFailedError: ExitStatus.FAILED,
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What serving needs and what is slow to make. The engine is not started yet."""

    engine: Engine
    tokenizer: Tokenizer
    model_id: str


BuildParts = Callable[[Settings, Clock], Awaitable[Parts]]
LoadSettings = Callable[[], Settings]


async def build_parts(settings: Settings, clock: Clock) -> Parts:
    """The parts that the settings name: source "fake" is the engine without a model, over bytes.

    Raises ModelLoadError or NotPossibleError.
    """
    if settings.model.source == FAKE_SOURCE:
        return _fake_parts(settings, clock)
    return await in_daemon_thread(lambda: _torch_parts(settings, clock), name="hotgraph-load")


def _fake_parts(settings: Settings, clock: Clock) -> Parts:
    from hotgraph_server.engine.fake import FakeEngine

    model_id = settings.model.id or FAKE_SOURCE
    context_length = settings.model.max_context or FAKE_CONTEXT_LENGTH
    block_size = settings.kv_cache.block_size
    blocks_per_slot = -(-context_length // block_size)
    engine = FakeEngine(
        clock=clock,
        cache_settings=CacheSettings(
            budget_bytes=settings.graphs.budget_bytes,
            policy=settings.graphs.policy,
            stall_budget_seconds=settings.graphs.stall_budget_seconds,
        ),
        num_slots=settings.scheduler.num_slots,
        num_blocks=1 + blocks_per_slot * settings.scheduler.num_slots,
        block_size=block_size,
        context_length=context_length,
        max_step_tokens=settings.scheduler.max_step_tokens,
        max_padding_ratio=settings.graphs.max_padding_ratio,
        model_id=model_id,
    )
    return Parts(engine, ByteTokenizer(), model_id)


def _torch_parts(settings: Settings, clock: Clock) -> Parts:
    """Imported here, because torch alone takes seconds and the daemon listens before."""
    from hotgraph_server.engine.engine import TorchEngine
    from hotgraph_server.models import load_model

    begin_seconds = clock.monotonic()
    loaded = load_model(settings.model)
    load_seconds = clock.monotonic() - begin_seconds
    engine = TorchEngine(loaded, settings, clock=clock, load_seconds=load_seconds)
    return Parts(engine, loaded.tokenizer, loaded.model_id)


class Daemon:
    """One life: STARTING, SERVING, DRAINING, STOPPED. Made on the event loop, which it keeps to.

    `run` is the whole life; `start`, `load`, `drain` and `stop` are its verbs, for whoever embeds it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        build: BuildParts = build_parts,
        clock: Clock | None = None,
        notifier: Notifier | None = None,
        tests_itself: bool = False,
    ) -> None:
        """`notifier`: the service manager, which is told of everything it should know; by default there is none.

        `tests_itself`: a few tokens are generated before anyone hears that the daemon serves.
        """
        self.settings = settings
        self.lifecycle = Lifecycle()
        self._build = build
        self._clock = clock or SystemClock()
        self._tests_itself = tests_itself
        self._doing = ""  # while it starts
        self._remark = ""  # of the last reload, when there is something to do about it
        self._reloads = asyncio.Lock()
        self._supervision = Supervision(
            notifier or Notifier(),
            self.lifecycle,
            clock=self._clock,
            describe=self.describe,
            engine_moved_at=lambda: None if self._scheduler is None else self._scheduler.engine_moved_at,
        )
        self._rpc = RpcServer(settings, self.lifecycle, clock=self._clock, drain=self.drain)
        self._rpc.on_failure = self._on_failure
        self.observability = Observability(settings, self.lifecycle, self._rpc)
        self._engine: Engine | None = None
        self._scheduler: Scheduler | None = None
        self._warmth: asyncio.Task[None] | None = None
        self._cores: AwakeCores | None = None
        self._core_watch: asyncio.Task[None] | None = None
        self._told = asyncio.Event()  # to end: by a drain, or by a failure
        self._grace_end = 0.0  # of the drain, on the event loop's clock
        self._grace: asyncio.Timeout | None = None
        self._num_signals = 0
        self._is_torn_down = False

    def __repr__(self) -> str:
        return f"<Daemon {self.lifecycle.state.value} on {', '.join(self.addresses) or 'nothing'}>"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, with the ports that were chosen; empty before `start`."""
        return self._rpc.addresses

    async def start(self) -> None:
        """Listens; everything but status and health is refused until the model is loaded.

        Raises AddressInUseError or SettingsError.
        """
        self._supervision.start()
        await self._rpc.start()
        await self.observability.start()
        logger.info("listening on %s", ", ".join(self.addresses))

    async def load(self) -> None:
        """Loads the model and serves it. Raises ModelLoadError, NotPossibleError, SettingsError or EngineFailedError."""
        begin_seconds = self._clock.monotonic()
        self._doing = f"loading {self.settings.model.source}"
        parts = await self._build(self.settings, self._clock)
        self._engine = parts.engine
        self._doing = f"starting the engine for {parts.model_id}"
        await parts.engine.start()
        scheduler = Scheduler(parts.engine, parts.tokenizer, self.settings.scheduler, clock=self._clock)
        scheduler.on_failure = self._on_failure
        await scheduler.start()
        self._scheduler = scheduler
        self._keep_awake(scheduler, parts.engine.info.gpu_address)
        if self._tests_itself:
            self._doing = f"testing {parts.model_id}"
            await self_test(scheduler, parts.tokenizer)
        # After the self-test, which is a request like others: a daemon that refused its own would never start.
        scheduler.quarantine = open_quarantine(self.settings.scheduler.crash_record, self._clock)
        served = ServedModel(parts.model_id, parts.engine, parts.tokenizer, scheduler)
        import_profile(self.settings.graphs.profile, served)
        gc.freeze()  # model and libraries are here to stay: no collection has to walk through them
        self.observability.watch(served)
        self.lifecycle.serve(served)
        hub = self._rpc.open(served)
        self._warmth = asyncio.get_running_loop().create_task(self._watch_warmth(served, hub), name="warmth")
        self._supervision.ready()
        logger.info("serving %s after %.1f s", parts.model_id, self._clock.monotonic() - begin_seconds)

    async def run(self) -> ExitStatus:
        """Start, load, serve until told to end, finish, stop. Raises what `start` and `load` raise, with nothing left open."""
        try:
            await self.start()
            await self._load_unless_told()
            await self._told.wait()
            await self._finish()
        finally:
            await self.stop()
        return ExitStatus.OK if self.lifecycle.failure is None else ExitStatus.FAILED

    def drain(self, grace_seconds: float | None = None) -> float:
        """Admits no more, and ends what still runs after the grace: at most the settings' own, which is the default.

        Returns the seconds that are left of it. Called again it may only shorten the grace.
        """
        limit_seconds = self.settings.server.drain_grace_seconds
        grace_seconds = limit_seconds if grace_seconds is None else min(max(grace_seconds, 0.0), limit_seconds)
        now = asyncio.get_running_loop().time()
        state = self.lifecycle.state
        if state is DaemonState.STOPPED:
            return 0.0
        if state is DaemonState.DRAINING:
            self._grace_end = min(self._grace_end, now + grace_seconds)
        else:
            self._grace_end = now + grace_seconds
            self._rpc.set_not_serving()  # first, so that balancers look elsewhere
            self.lifecycle.move(DaemonState.DRAINING)
            if self._scheduler is not None:
                self._scheduler.drain()
            self._supervision.stopping(grace_seconds + END_SECONDS)
            logger.info("draining, for %.1f s at most", grace_seconds)
        if self._grace is not None:
            self._grace.reschedule(self._grace_end)
        self._told.set()
        return max(0.0, self._grace_end - now)

    def on_signal(self) -> None:
        """SIGTERM or SIGINT came: the first drains, the second ends what runs at once."""
        self._num_signals += 1
        self.drain(None if self._num_signals == 1 else 0.0)

    async def reload(self, load: LoadSettings) -> None:
        """Takes over certificates, tokens, and what may change of the settings that `load` reads, on a thread of its own.

        What `load` raises as SettingsError is logged, and everything stays as it was. Without effect once it drains.
        """
        async with self._reloads:
            was_serving = self.lifecycle.state is DaemonState.SERVING
            if was_serving:
                self._supervision.reloading()
            try:
                # Credentials first: reading settings may already change the log.
                credentials, wanted = await in_daemon_thread(
                    lambda: (self._rpc.load_credentials(), load()), name="hotgraph-reload"
                )
                await self.observability.reload()
                changed = self._rpc.set_credentials(credentials)
                self._apply(wanted, changed)
            except SettingsError as error:
                logger.error("reload refused, nothing has changed: %s", error.message)
                self._remark = f"reload refused: {error.message}"
            finally:
                if was_serving and self.lifecycle.state is DaemonState.SERVING:
                    self._supervision.ready()

    def _apply(self, wanted: Settings, changed: tuple[str, ...]) -> None:
        """`changed`: what else the reload has changed, for the log."""
        reload = reload_settings(self.settings, wanted)
        self.settings = reload.settings
        self._rpc.apply(reload.settings)
        if self._scheduler is not None:
            self._scheduler.apply(reload.settings.scheduler)
        logger.info("reloaded: %s", ", ".join((*reload.changed, *changed)) or "nothing has changed")
        self._remark = f"a restart would change {', '.join(reload.waiting)}" if reload.waiting else ""
        if self._remark:
            logger.warning("%s", self._remark)

    def describe(self) -> str:
        """What it does now, in one line for people."""
        lifecycle, scheduler = self.lifecycle, self._scheduler
        if lifecycle.failure is not None:
            return f"failed: {lifecycle.failure.message}"
        if lifecycle.state is DaemonState.STARTING:
            return self._doing or "starting"
        if lifecycle.state is DaemonState.DRAINING:
            return f"draining: {0 if scheduler is None else scheduler.num_requests} requests to finish"
        if lifecycle.state is DaemonState.STOPPED or lifecycle.served is None or scheduler is None:
            return "stopped"
        status = scheduler.status()
        text = f"serving {lifecycle.served.model_id}: {status.num_running} running, {status.num_waiting} waiting"
        return f"{text}; {self._remark}" if self._remark else text

    async def stop(self) -> None:
        """Ends everything that is left, in order, and exports the profile. May be called in any state, and again."""
        if self._is_torn_down:
            return
        self._is_torn_down = True
        self._told.set()
        if self.lifecycle.state is not DaemonState.STOPPED:
            self.lifecycle.move(DaemonState.STOPPED)
        self._rpc.set_not_serving()
        if tasks := [task for task in (self._warmth, self._core_watch) if task is not None]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if self._scheduler is not None:
            self._scheduler.end_all(DrainingError("the server is stopping", retry_after_seconds=RETRY_SECONDS))
        self._rpc.end_watchers()
        with contextlib.suppress(TimeoutError):  # a caller that does not read its last words is cut off below
            await asyncio.wait_for(self._rpc.wait_idle(), LAST_WORDS_SECONDS)
        await self._rpc.stop(CONNECTION_GRACE_SECONDS)
        await self._close_engine()
        if self._cores is not None:
            self._cores.close()
        await self.observability.stop()
        await self._supervision.stop()
        logger.info("stopped")

    # The parts of a life.

    async def _load_unless_told(self) -> None:
        """Loads, unless a drain comes first: then the load is abandoned."""
        load = asyncio.ensure_future(self.load())
        told = asyncio.ensure_future(self._told.wait())
        try:
            await asyncio.wait({load, told}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (load, told):
                if not task.done():
                    task.cancel()
            await asyncio.wait({load, told})
        if not load.cancelled():
            load.result()

    async def _finish(self) -> None:
        """Waits for what runs, until the grace is over, and ends the rest."""
        if self._scheduler is None or self.lifecycle.failure is not None:
            return
        try:
            async with asyncio.timeout_at(self._grace_end) as self._grace:
                await self._scheduler.wait_idle()
        except TimeoutError:
            logger.warning("the grace is over: %d requests are ended", self._scheduler.num_requests)
        finally:
            self._grace = None

    def _on_failure(self, error: HotgraphError) -> None:
        """The engine is beyond use. The scheduler ends its requests; the process ends with a status that restarts it."""
        logger.critical("the engine failed: %s", error.message)
        self.lifecycle.fail(error)
        self._supervision.stopping(END_SECONDS)
        self._rpc.set_not_serving()
        self._told.set()

    async def _close_engine(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._scheduler is not None:
                    await self._scheduler.close()
                    if self._scheduler.quarantine is not None:
                        self._scheduler.quarantine.close()
        except TimeoutError:
            logger.error("the engine did not end within %.0f s", CLOSE_SECONDS)
            return
        if self._engine is None:
            return
        if self.lifecycle.served is not None:
            export_profile(self.settings.graphs.profile, self.lifecycle.served)
        try:
            async with asyncio.timeout(CAPTURE_CLOSE_SECONDS):
                await self._engine.close()
        except TimeoutError:
            logger.warning(
                "what the engine still does, such as a capture, is abandoned after %.0f s", CAPTURE_CLOSE_SECONDS
            )

    def _keep_awake(self, scheduler: Scheduler, gpu_address: str | None) -> None:
        settings = self.settings.server
        self._cores = AwakeCores(
            choose_cores(settings.awake_cores, gpu_address=gpu_address),
            quiet_seconds=settings.awake_seconds,
            clock=self._clock,
            is_busy=lambda: scheduler.num_requests > 0,
            spares=[CAPTURE_THREAD_NAME],  # captures compile and record: they take what is free
        )
        self._cores.start()
        self._core_watch = asyncio.get_running_loop().create_task(self._cores.watch(), name="awake-cores")
        scheduler.on_submit = self._cores.touch

    async def _watch_warmth(self, served: ServedModel, hub: EventHub) -> None:
        """Health says warm once no capture waits for the first time."""
        with contextlib.suppress(DrainingError):
            while served.engine.graphs.stats().num_pending:
                await hub.news()
            if self.lifecycle.state is DaemonState.SERVING and self.lifecycle.failure is None:
                self._rpc.set_warm()


async def serve(
    settings: Settings,
    *,
    build: BuildParts = build_parts,
    load: LoadSettings | None = None,
    notifier: Notifier | None = None,
) -> int:
    """Runs a daemon until it is told to end; SIGTERM and SIGINT drain it. Returns the exit status of the process.

    `load` reads the settings again, for SIGHUP; it may raise SettingsError. `notifier` is by default what the environment
    says.
    """
    loop = asyncio.get_running_loop()
    notifier = Notifier.from_environment() if notifier is None else notifier
    daemon = Daemon(settings, build=build, notifier=notifier, tests_itself=True)
    reloads: set[asyncio.Task[None]] = set()  # or they could be collected half way

    def on_hangup() -> None:
        if load is None:
            logger.warning("SIGHUP: there are no settings to read again")
            return
        reloads.add(task := loop.create_task(daemon.reload(load), name="reload"))
        task.add_done_callback(reloads.discard)

    handlers = {signal.SIGTERM: daemon.on_signal, signal.SIGINT: daemon.on_signal, signal.SIGHUP: on_hangup}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        return await daemon.run()
    except tuple(EXIT_STATUSES) as error:
        logger.error("%s", error.message)
        notifier.failed(error.message, errno.EADDRINUSE if isinstance(error, AddressInUseError) else None)
        return next(status for kind, status in EXIT_STATUSES.items() if isinstance(error, kind))
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
        notifier.close()


def run(settings: Settings, *, load: LoadSettings | None = None) -> int:
    """`serve` on an event loop of its own, which is the only one of the process that uses gRPC."""
    return run_event_loop(serve(settings, load=load))
