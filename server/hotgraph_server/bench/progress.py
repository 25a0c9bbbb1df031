"""The progress bar of a run, on standard error, so that results can be piped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from hotgraph_server.bench.sample import Sample


class RunProgress:
    """Counts samples as they end. Does nothing to a terminal that is none."""

    def __init__(self, progress: Progress, task: TaskID, *, num_requests: int | None, seconds: float | None) -> None:
        self._progress = progress
        self._task = task
        self._num_requests = num_requests
        self._seconds = seconds
        self.begin("connecting")

    def begin(self, phase: str) -> None:
        """A new phase, counted from nothing."""
        self._started = time.monotonic()
        self._num_done = self._num_failed = self._num_tokens = 0
        is_measuring = phase == "measuring"
        total = self._num_requests or self._seconds if is_measuring else None
        self._progress.update(self._task, description=phase, total=total, completed=0, rate="", failed="")

    def report(self, sample: Sample) -> None:
        """A request ended."""
        self._num_done += 1
        self._num_failed += not sample.is_ok
        self._num_tokens += sample.num_output_tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._progress.update(
            self._task,
            completed=self._num_done if self._num_requests else seconds,
            rate=f"{self._num_done:,} requests, {self._num_tokens / seconds:,.1f} tokens/s",
            failed=f"{self._num_failed:,} failed" if self._num_failed else "",
        )


@contextlib.contextmanager
def run_progress(console: Console, *, num_requests: int | None, seconds: float | None) -> Iterator[RunProgress]:
    """Shows the bar until left. With both limits the number of requests is what it shows."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("[red]{task.fields[failed]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, rate="", failed="")
        yield RunProgress(progress, task, num_requests=num_requests, seconds=seconds)
