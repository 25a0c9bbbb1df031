"""A daemon that is started again whenever it ends, as the service manager would do it; when it ended, how, and when it served
again is written down."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from hotgraph_server.config import Settings
from tests.integration.harness import PATIENCE_SECONDS, eventually
from tests.integration.processes import process
from tests.reliability.victims import Victim

RESTART_SECONDS: Final = 0.1  # from an end to the next start


@dataclass
class End:
    """One end. Times are monotonic, in seconds."""

    status: int
    ended_time: float
    begin_time: float  # of what ended it; the end itself if nobody knows
    serving_time: float | None = None  # when a daemon served again
    is_expected: bool = False


class Supervisor:
    """Runs one daemon after the other, all with the same settings and program."""

    def __init__(self, config: Settings, program: str) -> None:
        self.ends: list[End] = []
        self.log: Counter[str] = Counter()  # lines of all lives, by level
        self.num_reloads = 0
        self._config = config
        self._program = program
        self._victim: Victim | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps a daemon running until the context ends. Raises what went wrong meanwhile, such as a start that failed."""
        task = asyncio.create_task(self._run())
        try:
            await self.serving()
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def serving(self) -> Victim:
        """The daemon that serves, as soon as one does."""
        return await eventually(lambda: self._victim)  # type: ignore[no-any-return]

    async def next_end(self, num_before: int) -> End:
        """The first end after so many, once a daemon serves again."""
        await eventually(
            lambda: len(self.ends) > num_before and self.ends[num_before].serving_time, 2 * PATIENCE_SECONDS
        )
        return self.ends[num_before]

    async def _run(self) -> None:
        while True:
            async with process(self._config, self._program) as running:
                try:
                    await running.logged("serving fake")
                    if self.ends:
                        self.ends[-1].serving_time = time.monotonic()
                    self._victim = Victim(self._config.server.listen[0], running)
                    status = await running.process.wait()
                    now = time.monotonic()
                    self.ends.append(End(status, now, now))
                finally:
                    self._victim = None
                    self.num_reloads += sum("reloaded: " in line for line in running.log)
                    self.log.update(line.partition(":")[0] for line in running.log if line.startswith(LEVELS))
            await asyncio.sleep(RESTART_SECONDS)


LEVELS: Final = ("WARNING:", "ERROR:", "CRITICAL:")
