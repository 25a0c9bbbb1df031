"""`hotgraph chat`: turns, commands, cancelling, pipes and terminals."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, cast

import pytest

from hotgraph_client import Client
from hotgraph_client.errors import QueueFullError
from hotgraph_client.types import ChoiceFinish, Event, FinishReason, Started, Tokens
from hotgraph_server.cli.chat import Conversation
from tests.server.cli.conftest import COMMAND, FakeDaemon, Run, clean_environment


class FakeGeneration:
    """Gives events, then maybe raises."""

    def __init__(self, events: list[Event], error: BaseException | None) -> None:
        self._events = events
        self._error = error
        self.is_cancelled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[Event]:
        yield from self._events
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeClient:
    """Answers every conversation with "yes", and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.error: BaseException | None = None
        self.last: FakeGeneration | None = None

    def generate(self, messages: list[tuple[str, str]], **options: Any) -> FakeGeneration:
        self.asked.append(list(messages))
        events: list[Event] = [Started("r", "m", 1, 0), Tokens(0, (1,), "ye")]
        if self.error is None:
            events.append(Tokens(0, (2,), "s", (), ChoiceFinish(0, FinishReason.STOP)))
        self.last = FakeGeneration(events, self.error)
        return self.last


def conversation(client: FakeClient, *, system: str | None = None) -> Conversation:
    return Conversation(cast(Client, client), {}, system=system, has_statistics=False, is_json=False)


def test_turns_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Each question is asked with all turns before it, the answers included."""
    client = FakeClient()
    talk = conversation(client, system="be brief")
    talk.take("one")
    talk.take("   ")
    talk.take("two")
    first = [("system", "be brief"), ("user", "one")]
    assert client.asked == [first, [*first, ("assistant", "yes"), ("user", "two")]]
    assert capsys.readouterr().out == "yes\nyes\n"


def test_interrupt_cancels_the_answer_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends the running answer; what came of it stays a turn and the conversation goes on."""
    client = FakeClient()
    talk = conversation(client)
    client.error = KeyboardInterrupt()
    talk.take("one")
    assert client.last is not None
    assert client.last.is_cancelled
    client.error = None
    talk.take("two")
    assert client.asked[-1] == [("user", "one"), ("assistant", "ye"), ("user", "two")]
    captured = capsys.readouterr()
    assert captured.out == "ye\nyes\n"
    assert captured.err == "(cancelled)\n"


def test_a_failed_turn_is_not_kept() -> None:
    """After an error the conversation is as it was before the question."""
    client = FakeClient()
    talk = conversation(client)
    client.error = QueueFullError("full")
    with pytest.raises(QueueFullError):
        talk.take("one")
    assert talk.messages == []


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """/reset forgets turns, /system sets and removes the system message, /exit ends, unknown ones are told."""
    talk = conversation(FakeClient(), system="a")
    talk.take("one")
    talk.take("/reset")
    assert talk.messages == [("system", "a")]
    talk.take("one")
    talk.take("/system b c")
    assert talk.messages == [("system", "b c")]
    talk.take("/system")
    assert talk.messages == []
    for line in ("/stats", "/stats", "/help", "/nonsense"):
        talk.take(line)
    assert not talk.is_over
    talk.take("/exit")
    assert talk.is_over
    told = capsys.readouterr().err
    for words in ("forgotten", "statistics on", "statistics off", "/reset", "/nonsense is no command"):
        assert words in told


def test_from_a_pipe(ask: Run) -> None:
    """Every line of a pipe is a turn; answers are lines; the end of the pipe ends the program."""
    ran = ask("chat", "-n", "8", "-g", stdin="one\n\ntwo\n")
    assert ran.status == 0, ran
    assert [len(line) for line in ran.stdout.splitlines()] == [8, 8]
    assert ran.stderr == ""


def test_json_from_a_pipe(ask: Run) -> None:
    """With --json the events of every answer are lines, and later prompts are longer."""
    ran = ask("chat", "-n", "4", "--json", stdin="one\ntwo\n/exit\nthree\n")
    started = [line for line in ran.json_lines if line["event"] == "started"]
    assert len(started) == 2
    assert started[1]["prompt_tokens"] > started[0]["prompt_tokens"]


def test_statistics(ask: Run) -> None:
    """--stats shows timings after each answer."""
    assert ask("chat", "-n", "4", "--stats", stdin="one\ntwo\n").stderr.count("Timings") == 2


def test_an_error_ends_a_pipe(ask: Run) -> None:
    """A refused turn of a pipe ends the program with the request's exit status."""
    ran = ask("chat", "-n", "0", stdin="one\ntwo\n")
    assert ran.status == 1
    assert ran.stderr == "hotgraph: max_tokens: must be at least 1 [INVALID_REQUEST]\n"


def test_in_a_terminal(daemon: FakeDaemon) -> None:
    """In a terminal there is a prompt; an error ends a turn only; Ctrl-C at the prompt is survived; Ctrl-D ends."""
    terminal, side = pty.openpty()
    command = [*COMMAND, "chat", "--max-tokens", "4", "--target", daemon.target]
    environment = clean_environment(TERM="dumb")
    child = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True, preexec_fn=_own_terminal
    )
    os.close(side)
    try:
        _read_until(terminal, "> ")
        os.write(terminal, b"hello\n")
        shown = _read_until(terminal, "> ")
        assert len(shown.replace("\r", "").split("\n")[-2]) == 4
        os.write(terminal, b"y" * 2000 + b"\n")
        assert "[CONTEXT_LENGTH]" in _read_until(terminal, "> ")
        os.write(terminal, b"half")
        _read_until(terminal, "half")
        os.write(terminal, b"\x03")
        _read_until(terminal, "> ")
        os.write(terminal, b"/help\n")
        assert "/system" in _read_until(terminal, "> ")
        _end(terminal, child)
        assert child.returncode == 0
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        os.close(terminal)


def _own_terminal() -> None:
    """In the child: makes the pseudo-terminal its own, so that Ctrl-C in it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _end(terminal: int, child: subprocess.Popen[bytes]) -> None:
    """Types Ctrl-D until the child ends: the terminal itself swallows one that comes before the line editor has taken over."""
    for _ in range(40):
        os.write(terminal, b"\x04")
        try:
            child.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
        return


def _read_until(terminal: int, end: str) -> str:
    """What the terminal shows until `end` stands at its end. Fails after a while."""
    shown = ""
    deadline = time.monotonic() + 30
    while not shown.endswith(end):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"the terminal shows only {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
