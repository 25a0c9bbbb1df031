"""One life of a daemon: it listens, loads, serves, drains, stops, in the stated order.

Nothing else in the process starts or ends any of it. It logs through `logging`; how that looks is the command line's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from graphcache import Clock, SystemClock
from hotgraph_server.config import Settings
from hotgraph_server.daemon.exit_status import ExitStatus
from hotgraph_server.daemon.model_host import CAPTURE_CLOSE_SECONDS, CLOSE_SECONDS, ModelHost
from hotgraph_server.daemon.parts import BuildParts, build_parts
from hotgraph_server.errors import DrainingError, HotgraphError, SettingsError
from hotgraph_server.observability import Observability
from hotgraph_server.reloading import reload_settings
from hotgraph_server.rpc import DaemonState, Lifecycle, RpcServer, ServedModel
from hotgraph_server.rpc.watch import EventHub
from hotgraph_server.supervision import Supervision
from hotgraph_server.systemd import Notifier
from hotgraph_server.threads import in_daemon_thread

logger = logging.getLogger("hotgraph.daemon")

RETRY_SECONDS: Final = 1.0
LAST_WORDS_SECONDS: Final = 1.0  # for statuses on their way to callers once everything ended
CONNECTION_GRACE_SECONDS: Final = 0.5  # for what else is open then
EXIT_SECONDS: Final = 5.0  # from the end of the daemon to that of the process
# After the grace.
END_SECONDS: Final = (
    LAST_WORDS_SECONDS + CONNECTION_GRACE_SECONDS + CLOSE_SECONDS + CAPTURE_CLOSE_SECONDS + EXIT_SECONDS
)

LoadSettings = Callable[[], Settings]


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
        self._host = ModelHost(lambda: self.settings, self._clock, self._on_failure)
        self._remark = ""  # of the last reload, when there is something to do about it
        self._reloads = asyncio.Lock()
        self._supervision = Supervision(
            notifier or Notifier(),
            self.lifecycle,
            clock=self._clock,
            describe=self.describe,
            engine_moved_at=lambda: self._host.engine_moved_at,
        )
        self._rpc = RpcServer(settings, self.lifecycle, clock=self._clock, drain=self.drain)
        self._rpc.on_failure = self._on_failure
        self.observability = Observability(settings, self.lifecycle, self._rpc)
        self._warmth: asyncio.Task[None] | None = None
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
        served = await self._host.load(self._build, tests_itself=self._tests_itself)
        self.observability.watch(served)
        self.lifecycle.serve(served)
        hub = self._rpc.open(served)
        self._warmth = asyncio.get_running_loop().create_task(self._watch_warmth(served, hub), name="warmth")
        self._supervision.ready()
        logger.info("serving %s after %.1f s", served.model_id, self._clock.monotonic() - begin_seconds)

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
            if self._host.scheduler is not None:
                self._host.scheduler.drain()
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
        if self._host.scheduler is not None:
            self._host.scheduler.apply(reload.settings.scheduler)
        logger.info("reloaded: %s", ", ".join((*reload.changed, *changed)) or "nothing has changed")
        self._remark = f"a restart would change {', '.join(reload.waiting)}" if reload.waiting else ""
        if self._remark:
            logger.warning("%s", self._remark)

    def describe(self) -> str:
        """What it does now, in one line for people."""
        lifecycle, scheduler = self.lifecycle, self._host.scheduler
        if lifecycle.failure is not None:
            return f"failed: {lifecycle.failure.message}"
        if lifecycle.state is DaemonState.STARTING:
            return self._host.doing or "starting"
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
        if self._warmth is not None:
            self._warmth.cancel()
            await asyncio.wait([self._warmth])
        await self._host.end_requests(DrainingError("the server is stopping", retry_after_seconds=RETRY_SECONDS))
        self._rpc.end_watchers()
        with contextlib.suppress(TimeoutError):  # a caller that does not read its last words is cut off below
            await asyncio.wait_for(self._rpc.wait_idle(), LAST_WORDS_SECONDS)
        await self._rpc.stop(CONNECTION_GRACE_SECONDS)
        await self._host.close()
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
        scheduler = self._host.scheduler
        if scheduler is None or self.lifecycle.failure is not None:
            return
        try:
            async with asyncio.timeout_at(self._grace_end) as self._grace:
                await scheduler.wait_idle()
        except TimeoutError:
            logger.warning("the grace is over: %d requests are ended", scheduler.num_requests)
        finally:
            self._grace = None

    def _on_failure(self, error: HotgraphError) -> None:
        """The engine is beyond use. The scheduler ends its requests; the process ends with a status that restarts it."""
        logger.critical("the engine failed: %s", error.message)
        self.lifecycle.fail(error)
        self._supervision.stopping(END_SECONDS)
        self._rpc.set_not_serving()
        self._told.set()

    async def _watch_warmth(self, served: ServedModel, hub: EventHub) -> None:
        """Health says warm once no capture waits for the first time."""
        with contextlib.suppress(DrainingError):
            while served.engine.graphs.stats().num_pending:
                await hub.news()
            if self.lifecycle.state is DaemonState.SERVING and self.lifecycle.failure is None:
                self._rpc.set_warm()
