"""All that watches one daemon, put together: counters where things happen, the page and its listener, traces.

Two things are always watched, for the log: how late the event loop comes round, and file descriptors. Nothing else is made
unless the settings ask for it, and then no library of it is imported either.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from hotgraph_server.config import Settings
from hotgraph_server.observability.descriptors import Descriptors
from hotgraph_server.observability.loop_lag import LoopLag
from hotgraph_server.observability.observers import CallObservers, Observers
from hotgraph_server.rpc import Lifecycle, RpcServer, ServedModel
from hotgraph_server.threads import in_daemon_thread

if TYPE_CHECKING:
    from hotgraph_server.observability.captures import CaptureMetrics
    from hotgraph_server.observability.listener import MetricsListener
    from hotgraph_server.observability.requests import RequestMetrics
    from hotgraph_server.observability.traces import Traces
    from hotgraph_server.rpc.call import CallObserver
    from hotgraph_server.scheduler.observer import Observer

logger = logging.getLogger("hotgraph.observability")

LAST_SPANS_SECONDS: Final = 3.0  # to hand over what is left of traces when the daemon ends


class Observability:
    """Made on the event loop, which it keeps to."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle, rpc: RpcServer) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._rpc = rpc
        self._requests: RequestMetrics | None = None
        self._captures: CaptureMetrics | None = None
        self._loop_lag: LoopLag | None = None
        self._descriptors: Descriptors | None = None
        self._listener: MetricsListener | None = None
        self._traces: Traces | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where metrics are served, with the ports that were chosen."""
        return () if self._listener is None else self._listener.addresses

    async def start(self) -> None:
        """Listens for scrapes, and makes traces, if that is asked for. Raises AddressInUseError or SettingsError."""
        # While the model loads nobody is held up.
        self._loop_lag = LoopLag(is_told=lambda: self._lifecycle.served is not None)
        self._descriptors = Descriptors()
        self._loop_lag.start()
        self._descriptors.start()
        observers: list[CallObserver] = []
        if self._settings.traces.endpoint is not None:
            from hotgraph_server.observability.traces import Traces

            self._traces = Traces(self._settings.traces)
            observers.append(self._traces)
        if self._settings.metrics.listen:
            observers.append(await self._start_metrics(self._loop_lag))
        if observers:
            self._rpc.observe(CallObservers(observers))

    async def _start_metrics(self, loop_lag: LoopLag) -> CallObserver:
        from hotgraph_server.observability.calls import CallMetrics
        from hotgraph_server.observability.captures import CaptureMetrics
        from hotgraph_server.observability.listener import MetricsListener
        from hotgraph_server.observability.page import Page, Sources
        from hotgraph_server.observability.requests import RequestMetrics

        calls = CallMetrics()
        self._requests = RequestMetrics(max_clients=self._settings.metrics.max_clients)
        self._captures = CaptureMetrics()
        page = Page(
            Sources(
                lifecycle=self._lifecycle,
                requests=self._requests,
                calls=calls,
                captures=self._captures,
                loop_lag=loop_lag,
                num_calls_in_flight=lambda: self._rpc.num_calls,
            )
        )
        self._listener = MetricsListener(self._settings, page.families)
        await self._listener.start()
        return calls

    def watch(self, served: ServedModel) -> None:
        """The model is loaded, and no request of anyone has run yet."""
        observers: list[Observer] = [item for item in (self._requests, self._traces) if item is not None]
        if observers:
            served.scheduler.observer = Observers(observers)
        if self._traces is not None:
            self._traces.model_id = served.model_id
        if self._captures is not None:
            served.engine.graphs.add_listener(self._captures.on_event)

    async def reload(self) -> None:
        """Reads certificates and tokens again. Raises SettingsError."""
        if self._listener is not None:
            await self._listener.reload()

    async def stop(self) -> None:
        """May be called again, and without a start."""
        for watch in (self._loop_lag, self._descriptors):
            if watch is not None:
                watch.stop()
        if self._listener is not None:
            await self._listener.stop()
        if self._traces is not None:
            traces, self._traces = self._traces, None
            try:
                async with asyncio.timeout(LAST_SPANS_SECONDS):
                    await in_daemon_thread(traces.stop, name="hotgraph-traces")
            except TimeoutError:
                logger.warning("the last spans were not taken within %.0f s", LAST_SPANS_SECONDS)
