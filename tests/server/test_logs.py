"""How log lines look, that they hold no text of users, and that a stuck reader stops nobody."""

from __future__ import annotations

import io
import json
import logging
import queue
import warnings

import pytest
import structlog

from hotgraph_server.config import LoggingSettings
from hotgraph_server.logs import BoundedQueueHandler, logging_to

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
