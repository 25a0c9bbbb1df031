"""Engine, scheduler and the cores that they keep awake: brought up in order, and ended in time.

It knows nothing of callers, and not why it is ended.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from typing import Final

from graphcache import CAPTURE_THREAD_NAME, Clock
from hotgraph_server.awake_cores import AwakeCores, choose_cores
from hotgraph_server.config import Settings
from hotgraph_server.daemon.parts import BuildParts
from hotgraph_server.engine.interface import Engine
from hotgraph_server.errors import HotgraphError
from hotgraph_server.graph_profile import export_profile, import_profile
from hotgraph_server.rpc import ServedModel
from hotgraph_server.scheduler import Scheduler, open_quarantine, self_test

logger = logging.getLogger("hotgraph.daemon")

CLOSE_SECONDS: Final = 10.0  # for a step in flight; an engine that takes longer hangs
CAPTURE_CLOSE_SECONDS: Final = 2.0  # for a capture under way: it may take a minute, and nobody needs it any more


class ModelHost:
    """One model: loaded once, closed once. Event loop's thread only."""

    def __init__(
        self, settings: Callable[[], Settings], clock: Clock, on_failure: Callable[[HotgraphError], None]
    ) -> None:
        """`settings` gives those in force: a reload may come while the model loads. `on_failure` is called when the engine is
        beyond use."""
        self.scheduler: Scheduler | None = None
        self.doing = ""  # while it loads, for people
        self._settings = settings
        self._clock = clock
        self._on_failure = on_failure
        self._engine: Engine | None = None
        self._served: ServedModel | None = None
        self._cores: AwakeCores | None = None
        self._core_watch: asyncio.Task[None] | None = None

    @property
    def engine_moved_at(self) -> float | None:
        """When the engine last took or gave back a step, on the clock; None when it has nothing to do."""
        return None if self.scheduler is None else self.scheduler.engine_moved_at

    async def load(self, build: BuildParts, *, tests_itself: bool) -> ServedModel:
        """Builds, starts and tries the model. Raises ModelLoadError, NotPossibleError, SettingsError or EngineFailedError."""
        self.doing = f"loading {self._settings().model.source}"
        parts = await build(self._settings(), self._clock)
        self._engine = parts.engine
        self.doing = f"starting the engine for {parts.model_id}"
        await parts.engine.start()
        scheduler = Scheduler(parts.engine, parts.tokenizer, self._settings().scheduler, clock=self._clock)
        scheduler.on_failure = self._on_failure
        await scheduler.start()
        self.scheduler = scheduler
        self._keep_awake(scheduler, parts.engine.info.gpu_address)
        if tests_itself:
            self.doing = f"testing {parts.model_id}"
            await self_test(scheduler, parts.tokenizer)
        # After the self-test, which is a request like others: a daemon that refused its own would never start.
        scheduler.quarantine = open_quarantine(self._settings().scheduler.crash_record, self._clock)
        self._served = ServedModel(parts.model_id, parts.engine, parts.tokenizer, scheduler)
        import_profile(self._settings().graphs.profile, self._served)
        gc.freeze()  # model and libraries are here to stay: no collection has to walk through them
        return self._served

    async def end_requests(self, error: HotgraphError) -> None:
        """Ends what runs and waits, with this error; no core is kept awake by what comes after."""
        if self._core_watch is not None:
            self._core_watch.cancel()
            await asyncio.wait([self._core_watch])
        if self.scheduler is not None:
            self.scheduler.end_all(error)

    async def close(self) -> None:
        """Ends scheduler and engine, exports the profile, and lets the cores sleep."""
        await self._close_engine()
        if self._cores is not None:
            self._cores.close()

    async def _close_engine(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self.scheduler is not None:
                    await self.scheduler.close()
                    if self.scheduler.quarantine is not None:
                        self.scheduler.quarantine.close()
        except TimeoutError:
            logger.error("the engine did not end within %.0f s", CLOSE_SECONDS)
            return
        if self._engine is None:
            return
        if self._served is not None:
            export_profile(self._settings().graphs.profile, self._served)
        try:
            async with asyncio.timeout(CAPTURE_CLOSE_SECONDS):
                await self._engine.close()
        except TimeoutError:
            logger.warning(
                "what the engine still does, such as a capture, is abandoned after %.0f s", CAPTURE_CLOSE_SECONDS
            )

    def _keep_awake(self, scheduler: Scheduler, gpu_address: str | None) -> None:
        settings = self._settings().server
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
