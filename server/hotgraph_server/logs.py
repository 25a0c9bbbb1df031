"""Logging of the daemon: structlog and the standard library's logging, one line an event, pretty or JSON.

It knows how lines look and that they never hold what users wrote; what is worth a line is known where it happens. Lines
leave through a bounded queue and a thread of their own, so a slow reader of the log never holds up the event loop. Of equal
lines that come in a burst the first few are written, and then how many there were more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from hotgraph_server.config import LoggingSettings

# Fields that could hold what a user or the model wrote. Their values never reach the log, whoever puts them there.
TEXT_FIELDS = frozenset(
    {
        "authorization",
        "chat",
        "choices",
        "completion",
        "completion_token_ids",
        "content",
        "messages",
        "prompt",
        "prompt_token_ids",
        "prompts",
        "stop_strings",
        "text",
        "token",
        "token_ids",
    }
)

MAX_QUEUED_LINES = 10_000
BURST_LINES: Final = 20  # of one kind within BURST_SECONDS are written; what comes after is summed up
BURST_SECONDS: Final = 1.0
MAX_KINDS: Final = 512  # of lines that are told apart; when there are more, all are forgotten and counted anew
MAX_NAME_CHARACTERS: Final = 200
LAST_LINES_SECONDS: Final = 2.0  # for what is queued when logging ends; a reader that is later does not read

# What our own lines carry besides their text: facts about a call, never of its message.
EXTRA_FIELDS: Final = ("client", "code", "graph", "incident", "method", "reason", "request_id", "seconds")

# Libraries that tell more than an operator wants to know, below these levels.
_QUIET_LIBRARIES = {
    "asyncio": logging.WARNING,
    "filelock": logging.WARNING,
    "grpc": logging.WARNING,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "urllib3": logging.WARNING,
}


def hide_text(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A processor: replaces the values of TEXT_FIELDS by how long they are."""
    for name in TEXT_FIELDS & event.keys():
        value = event[name]
        event[name] = f"<hidden, {len(value)} long>" if hasattr(value, "__len__") else "<hidden>"
    return event


def _kind(record: logging.LogRecord) -> tuple[str, int, str, str]:
    """What makes two lines equal: logger, level, text before anything was put into it, and the reason of a failed call."""
    text = record.msg.get("event", "") if isinstance(record.msg, dict) else record.msg
    return record.name, record.levelno, str(text)[:MAX_NAME_CHARACTERS], str(getattr(record, "reason", ""))


class _Burst:
    """Lines of one kind within one span of time."""

    __slots__ = ("begin_time", "num_lines")

    def __init__(self, begin_time: float) -> None:
        self.begin_time = begin_time
        self.num_lines = 0


class BurstFilter(logging.Filter):
    """Lets the first lines of a burst through; the others are counted, before they cost any formatting, and summed up in one
    line when the burst's time is over. Lines from ERROR on, which are rare or else worth their price, all pass. Any thread.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.num_summed = 0  # lines that were counted only, of all times
        self._clock = clock
        self._bursts: dict[tuple[str, int, str, str], _Burst] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR or getattr(record, "is_sum", False):
            return True
        kind = _kind(record)
        now = self._clock()
        with self._lock:
            burst = self._bursts.get(kind)
            if burst is None or now - burst.begin_time >= BURST_SECONDS:
                sums = self._take_sums(now)
                if len(self._bursts) >= MAX_KINDS:
                    self._bursts.clear()
                burst = self._bursts[kind] = _Burst(now)
            else:
                sums = []
            burst.num_lines += 1
            is_written = burst.num_lines <= BURST_LINES
            if not is_written:
                self.num_summed += 1
                if self._timer is None:  # when nothing else comes, it tells
                    self._timer = threading.Timer(BURST_SECONDS, self.flush)
                    self._timer.daemon = True
                    self._timer.start()
        self._tell(sums)
        return is_written

    def flush(self, *, is_last: bool = False) -> None:
        """Sums up the bursts that are over; all of them when it is the last time."""
        with self._lock:
            timer, self._timer = self._timer, None
            sums = self._take_sums(float("inf") if is_last else self._clock())
            if not is_last and any(burst.num_lines > BURST_LINES for burst in self._bursts.values()):
                self._timer = threading.Timer(BURST_SECONDS, self.flush)
                self._timer.daemon = True
                self._timer.start()
        if timer is not None and is_last:
            timer.cancel()
        self._tell(sums)

    def _take_sums(self, now: float) -> list[tuple[tuple[str, int, str, str], int]]:
        """Forgets what is over; returns what of it was not written."""
        over = [kind for kind, burst in self._bursts.items() if now - burst.begin_time >= BURST_SECONDS]
        counts = [(kind, self._bursts.pop(kind).num_lines - BURST_LINES) for kind in over]
        return [(kind, num_lines) for kind, num_lines in counts if num_lines > 0]

    @staticmethod
    def _tell(sums: list[tuple[tuple[str, int, str, str], int]]) -> None:
        for (name, level, text, reason), num_lines in sums:
            extra: dict[str, Any] = {"is_sum": True, **({"reason": reason} if reason else {})}
            logging.getLogger(name).log(level, "%d more like %r", num_lines, text, extra=extra)


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Hands formatted lines to a bounded queue and never waits: what does not fit is counted in `num_dropped`, and in
    `num_lost`, which nobody takes back."""

    def __init__(self, lines: queue.Queue[Any]) -> None:
        super().__init__(lines)
        self.num_dropped = 0
        self.num_lost = 0
        self._lock_dropped = threading.Lock()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.count_dropped()

    def count_dropped(self) -> None:
        """One more line is lost."""
        with self._lock_dropped:
            self.num_dropped += 1
            self.num_lost += 1

    def take_dropped(self) -> int:
        """How many lines were dropped since the last call."""
        with self._lock_dropped:
            num_dropped, self.num_dropped = self.num_dropped, 0
        return num_dropped


class _Writer(logging.Handler):
    """Writes lines to the stream, on the queue's thread, and tells when lines before were dropped."""

    def __init__(self, stream: TextIO, queue_handler: BoundedQueueHandler, is_json: bool) -> None:
        super().__init__()
        self._stream = stream
        try:
            self._file: int | None = stream.fileno()
        except (OSError, ValueError):  # it is in memory, or closed
            self._file = None
        self._queue_handler = queue_handler
        self._is_json = is_json

    def createLock(self) -> None:  # noqa: N802  (the library's name)
        """None: one thread writes, and the interpreter's end would wait for it."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        num_dropped = self._queue_handler.take_dropped()
        try:
            if num_dropped:
                notice = {"event": "log lines dropped", "level": "warning", "num_dropped": num_dropped}
                self._write(json.dumps(notice) if self._is_json else f"log lines dropped: {num_dropped}")
            self._write(record.getMessage())
        except (OSError, ValueError):
            # The reader of the log is gone. There is nobody left to tell, and serving goes on.
            self._queue_handler.count_dropped()

    def _write(self, line: str) -> None:
        """Not through the stream where there is a file: stuck in a write it would hold a lock that the interpreter wants when
        it ends, and the process would be aborted for it."""
        if self._file is None:
            self._stream.write(line + "\n")
            self._stream.flush()
            return
        data = (line + "\n").encode(errors="replace")
        while data:
            data = data[os.write(self._file, data) :]


class _Listener(logging.handlers.QueueListener):
    """The queue's thread, which is left behind when it is stuck in a write."""

    def stop(self) -> None:
        """What is queued is written, if that takes no longer than LAST_LINES_SECONDS."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        end = time.monotonic() + LAST_LINES_SECONDS
        with contextlib.suppress(queue.Full):  # nobody reads
            self.queue.put(None, timeout=LAST_LINES_SECONDS)  # type: ignore[attr-defined]  # None ends it; ours can wait
        thread.join(max(0.0, end - time.monotonic()))


@dataclass(frozen=True, slots=True)
class LogCounts:
    """Lines since logging was set up: `num_lost` that nobody read in time, `num_summed` that came in a burst."""

    num_lost: int = 0
    num_summed: int = 0


def log_counts() -> LogCounts:
    """Of the set-up in force; zeros when there is none of ours."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, BoundedQueueHandler):
            num_summed = sum(item.num_summed for item in handler.filters if isinstance(item, BurstFilter))
            return LogCounts(handler.num_lost, num_summed)
    return LogCounts()


def _shared_processors() -> list[Processor]:
    """What every line goes through, ours and those of libraries."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(EXTRA_FIELDS),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        hide_text,
    ]


def _renderers(is_json: bool, has_colors: bool) -> list[Processor]:
    # Neither shows the locals of a traceback: they could hold a prompt.
    if is_json:
        exceptions = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        return [
            structlog.processors.ExceptionRenderer(exceptions),
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=has_colors, exception_formatter=plain, pad_event_to=0)]


def set_level(name: str) -> None:
    """The least level that is logged from now on, as the settings name it."""
    root = logging.getLogger()
    root.setLevel(name.upper())
    for library, level in _QUIET_LIBRARIES.items():
        logging.getLogger(library).setLevel(max(level, root.level))


@contextlib.contextmanager
def logging_to(settings: LoggingSettings, stream: TextIO | None = None) -> Iterator[None]:
    """Logging as `settings` say, to `stream` (default: standard error), until the context ends.

    The end writes what is queued, if somebody reads it, and puts back what was set up before. One at a time in a process.
    """
    stream = sys.stderr if stream is None else stream
    is_terminal = stream.isatty()
    is_json = settings.format == "json" or (settings.format == "auto" and not is_terminal)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_shared_processors(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(is_json, is_terminal)],
    )
    lines: queue.Queue[Any] = queue.Queue(MAX_QUEUED_LINES)
    handler = BoundedQueueHandler(lines)
    handler.setFormatter(formatter)
    bursts = BurstFilter()
    handler.addFilter(bursts)
    listener = _Listener(lines, _Writer(stream, handler, is_json))

    root = logging.getLogger()
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in _QUIET_LIBRARIES})
    root.handlers[:] = [handler]
    set_level(settings.level)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared_processors(),
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # loggers made before this point take the new set-up, too
    )
    listener.start()
    try:
        yield
    finally:
        bursts.flush(is_last=True)
        listener.stop()
        root.handlers[:], level_before, library_levels = before
        root.setLevel(level_before)
        for name, level in library_levels.items():
            logging.getLogger(name).setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()
