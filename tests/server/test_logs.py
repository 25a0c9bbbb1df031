"""How log lines look, that they hold no text of users, and that a stuck reader stops nobody."""

from __future__ import annotations

import io
import json
import logging
import queue
import time
import warnings

import pytest
import structlog

from hotgraph_server.config import LoggingSettings
from hotgraph_server.logs import (
    BURST_LINES,
    BURST_SECONDS,
    MAX_KINDS,
    BoundedQueueHandler,
    BurstFilter,
    LogCounts,
    log_counts,
    logging_to,
)

LOG = structlog.get_logger("hotgraph_server.somewhere")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_json_lines_when_it_is_no_terminal() -> None:
    """Without a terminal every line is an object with event, level, logger, timestamp and the fields given."""
    stream = io.StringIO()
    with logging_to(LoggingSettings(), stream):
        LOG.info("request finished", request_id="r1", num_tokens=3)
        logging.getLogger("library").warning("careful: %s", 7)
    ours, theirs = (json.loads(line) for line in stream.getvalue().splitlines())
    assert {"event": "request finished", "level": "info", "request_id": "r1", "num_tokens": 3}.items() <= ours.items()
    assert ours["logger"] == "hotgraph_server.somewhere"
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("careful: 7", "warning", "library")


@pytest.mark.parametrize(("format_name", "stream"), [("auto", Terminal()), ("pretty", io.StringIO())])
def test_pretty_lines(format_name: str, stream: io.StringIO) -> None:
    """On a terminal, or when asked for, lines are for people."""
    with logging_to(LoggingSettings.model_validate({"format": format_name}), stream):
        LOG.warning("slow step", seconds=1.5)
    line = stream.getvalue()
    assert "slow step" in line
    assert "1.5" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


def test_colors_only_on_a_terminal() -> None:
    """Escape sequences go to terminals and nowhere else."""
    plain, colored = io.StringIO(), Terminal()
    for stream in (plain, colored):
        with logging_to(LoggingSettings(format="pretty"), stream):
            LOG.error("bad")
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in colored.getvalue()


@pytest.mark.parametrize("format_name", ["json", "pretty"])
def test_no_text_of_users(format_name: str) -> None:
    """Fields that could hold a prompt or an answer show their length only, from our loggers and from libraries."""
    stream = io.StringIO()
    with logging_to(LoggingSettings.model_validate({"format": format_name}), stream):
        LOG.info("request", prompt="my secret", text="my secret", token_ids=[1, 2], messages=("my secret",))
        with structlog.contextvars.bound_contextvars(prompt="my secret"):
            LOG.info("in a context")
        prompt = "my secret"
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            LOG.exception("failed")
            logging.getLogger("library").exception("failed, too")
        assert prompt
    assert "my secret" not in stream.getvalue()
    assert "<hidden, 9 long>" in stream.getvalue()
    assert stream.getvalue().count("RuntimeError") >= 2


@pytest.mark.parametrize(("level", "num_lines"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(level: str, num_lines: int) -> None:
    """Only lines of the level asked for and above are written."""
    stream = io.StringIO()
    with logging_to(LoggingSettings.model_validate({"level": level}), stream):
        for name in ("debug", "info", "warning", "error"):
            getattr(LOG, name)("x")
    assert len(stream.getvalue().splitlines()) == num_lines


def test_libraries_are_quiet() -> None:
    """What talkative libraries say below a warning is left out even at level debug."""
    stream = io.StringIO()
    with logging_to(LoggingSettings(level="debug"), stream):
        logging.getLogger("asyncio").debug("using selector")
        logging.getLogger("asyncio").error("task failed")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["task failed"]


def test_warnings_are_logged() -> None:
    """Python's warnings become log lines."""
    stream = io.StringIO()
    with logging_to(LoggingSettings(), stream), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old thing", UserWarning, stacklevel=1)
    assert "old thing" in stream.getvalue()


def test_everything_is_put_back() -> None:
    """After the end, logging is as it was before."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.getLogger("asyncio").level)
    with logging_to(LoggingSettings(level="debug"), io.StringIO()):
        assert root.handlers[:] != before[0]
    assert (root.handlers[:], root.level, logging.getLogger("asyncio").level) == before
    assert not structlog.is_configured()


def test_a_full_queue_drops_and_counts() -> None:
    """A reader that is stuck costs lines, never time, and the count is taken once."""
    handler = BoundedQueueHandler(queue.Queue(2))
    for number in range(5):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", (), None))
    assert handler.take_dropped() == 3
    assert handler.take_dropped() == 0


def test_a_reader_that_left_stops_nobody() -> None:
    """A closed stream is survived, and the lines it lost are told to the next that reads."""
    closed = io.StringIO()
    closed.close()
    stream = _Revived(closed)
    with logging_to(LoggingSettings(format="json"), stream):
        LOG.info("lost")
        LOG.info("found")
    notice, line = (json.loads(text) for text in stream.getvalue().splitlines())
    assert (notice["event"], notice["num_dropped"]) == ("log lines dropped", 1)
    assert line["event"] == "found"


class _Revived(io.StringIO):
    """Fails on the first write, as a pipe whose reader left, then works."""

    def __init__(self, closed: io.StringIO) -> None:
        super().__init__()
        self._closed: io.StringIO | None = closed

    def write(self, text: str) -> int:
        if self._closed is not None:
            closed, self._closed = self._closed, None
            return closed.write(text)
        return super().write(text)


def test_fields_of_calls() -> None:
    """What a library's logger is given besides its text stands in the line, where it is one of the fields that lines carry."""
    stream = io.StringIO()
    with logging_to(LoggingSettings(format="json"), stream):
        logging.getLogger("hotgraph.calls").info(
            "call ended", extra={"request_id": "r1", "reason": "R", "prompt": "secret"}
        )
    line = json.loads(stream.getvalue())
    assert (line["request_id"], line["reason"]) == ("r1", "R")
    assert "prompt" not in line


def test_a_burst_is_summed_up() -> None:
    """Of equal lines in a burst the first are written, then one that says how many more; others and errors are all written."""
    stream = io.StringIO()
    calls = logging.getLogger("hotgraph.calls")
    with logging_to(LoggingSettings(format="json"), stream):
        for number in range(100):
            calls.info("call %d ended", number, extra={"reason": "QUEUE_FULL"})
            calls.error("broken %d", number)
        calls.info("call %d ended", 100, extra={"reason": "INTERNAL"})
        LOG.info("something else")
        assert log_counts() == LogCounts(num_lost=0, num_summed=100 - BURST_LINES)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    written = [line for line in lines if line.get("reason") == "QUEUE_FULL"]
    assert [line["event"] for line in written[:BURST_LINES]] == [
        f"call {number} ended" for number in range(BURST_LINES)
    ]
    assert [line["event"] for line in written[BURST_LINES:]] == [f"{100 - BURST_LINES} more like 'call %d ended'"]
    assert sum(line["event"].startswith("broken") for line in lines) == 100
    assert {"call 100 ended", "something else"} <= {line["event"] for line in lines}
    assert log_counts() == LogCounts()


def test_a_burst_that_is_over_is_told_of() -> None:
    """Later lines of a kind are written again, after the sum of what was not; without any the timer tells."""
    now = 0.0
    bursts = BurstFilter(clock=lambda: now)
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logger = logging.getLogger("hotgraph.test_bursts")
    handler = Handler()
    handler.addFilter(bursts)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        for _ in range(BURST_LINES + 7):
            logger.warning("again")
        now = BURST_SECONDS
        logger.warning("again")
        assert told[-2:] == ["7 more like 'again'", "again"]
        for _ in range(BURST_LINES + 2):
            logger.warning("again")
        now = 3 * BURST_SECONDS
        bursts.flush()
        assert told[-1] == "3 more like 'again'"
    finally:
        bursts.flush(is_last=True)
        logger.removeHandler(handler)


def test_kinds_of_lines_are_bounded() -> None:
    """Texts without end, as only a mistake would make, do not fill the memory."""
    bursts = BurstFilter()
    for number in range(3 * MAX_KINDS):
        assert bursts.filter(logging.LogRecord("x", logging.INFO, "", 0, f"text {number}", (), None))
    assert len(bursts._bursts) <= MAX_KINDS


def test_a_flood_costs_little() -> None:
    """A line that is only counted costs no formatting: a few microseconds."""
    stream = io.StringIO()
    calls = logging.getLogger("hotgraph.calls")
    with logging_to(LoggingSettings(format="json"), stream):
        fastest = float("inf")
        for _ in range(10):
            begin = time.perf_counter()
            for number in range(500):
                calls.info("call %d ended", number)
            fastest = min(fastest, (time.perf_counter() - begin) / 500)
    print(f"{fastest * 1e6:.1f} us a line")
    assert fastest < 50e-6
