"""Logging of the daemon: structlog and the standard library's logging, one line an event, pretty or JSON.

It knows how lines look and that they never hold what users wrote; what is worth a line is known where it happens. Lines
leave through a bounded queue and a thread of their own, so a slow reader of the log never holds up the event loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

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


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Hands formatted lines to a bounded queue and never waits: what does not fit is counted in `num_dropped`."""

    def __init__(self, lines: queue.Queue[Any]) -> None:
        super().__init__(lines)
        self.num_dropped = 0
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
        self._queue_handler = queue_handler
        self._is_json = is_json

    def emit(self, record: logging.LogRecord) -> None:
        num_dropped = self._queue_handler.take_dropped()
        try:
            if num_dropped:
                notice = {"event": "log lines dropped", "level": "warning", "num_dropped": num_dropped}
                self._stream.write(
                    (json.dumps(notice) if self._is_json else f"log lines dropped: {num_dropped}") + "\n"
                )
            self._stream.write(record.getMessage() + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # The reader of the log is gone. There is nobody left to tell, and serving goes on.
            self._queue_handler.count_dropped()


def _shared_processors() -> list[Processor]:
    """What every line goes through, ours and those of libraries."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
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

    The end writes all that is queued and puts back what was set up before. One at a time in a process.
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
    listener = logging.handlers.QueueListener(lines, _Writer(stream, handler, is_json))

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
        listener.stop()
        root.handlers[:], level_before, library_levels = before
        root.setLevel(level_before)
        for name, level in library_levels.items():
            logging.getLogger(name).setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()
