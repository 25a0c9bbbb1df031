"""`hotgraph chat`: a conversation in the terminal, or of the lines of a pipe. It keeps the turns; the model's own template
makes a prompt of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hotgraph_server.cli.connection import ConnectionOptions, JsonFlag
from hotgraph_server.cli.failures import report
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import note, print_json_line
from hotgraph_server.cli.request_options import SamplingOptions

if TYPE_CHECKING:
    from hotgraph_client import Client
    from hotgraph_client.types import GenerateOptions
    from hotgraph_server.cli.answer import Answer

HELP = """\
/reset          forget the conversation, keep the system message
/system [TEXT]  set the system message, or remove it, and start again
/stats          show timings and receipt after each answer, or no more
/help           this
/exit           end, as Ctrl-D does; Ctrl-C ends a running answer only"""


@with_groups
def chat(
    *,
    system: Annotated[str | None, typer.Option("--system", help="System message.", rich_help_panel="Prompt")] = None,
    stats: Annotated[
        bool, typer.Option("--stats", "-s", help="Timings and receipt after each answer.", rich_help_panel="Output")
    ] = False,
    as_json: JsonFlag = False,
    sampling: SamplingOptions,
    connection: ConnectionOptions,
) -> None:
    """Talk with the model; it sees the whole conversation each time.

    Ctrl-C cancels the answer that runs, Ctrl-D ends. /help lists what else can be typed. From a pipe every line is one
    turn, and an error ends the program. With --json every event of every answer is a line, as with generate.
    """
    arguments = sampling.arguments()
    with connection.client() as client:
        conversation = Conversation(client, arguments, system=system, has_statistics=stats, is_json=as_json)
        if sys.stdin.isatty():
            _run_interactive(conversation)
        else:
            for line in sys.stdin:
                conversation.take(line.rstrip("\r\n"))
                if conversation.is_over:
                    return


def _run_interactive(conversation: Conversation) -> None:
    from prompt_toolkit import PromptSession

    lines: PromptSession[str] = PromptSession()
    note("Ctrl-C cancels an answer, Ctrl-D ends, /help tells more.")
    while not conversation.is_over:
        try:
            line = lines.prompt("> ")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:  # nothing runs: only the line is given up
            note("")
            continue
        try:
            conversation.take(line)
        except Exception as error:  # an error ends this turn, not the conversation
            report(error)


class Conversation:
    """The turns so far. A turn whose answer failed is not kept; of a cancelled answer the part that came is."""

    def __init__(
        self, client: Client, arguments: GenerateOptions, *, system: str | None, has_statistics: bool, is_json: bool
    ) -> None:
        self.is_over = False
        self._client = client
        self._arguments = arguments
        self._system = system
        self._has_statistics = has_statistics
        self._is_json = is_json
        self._turns: list[tuple[str, str]] = []

    @property
    def messages(self) -> list[tuple[str, str]]:
        """What the model sees: (role, content), oldest first."""
        return ([("system", self._system)] if self._system else []) + self._turns

    def take(self, line: str) -> None:
        """One line that was typed: a command, a turn, or nothing. Raises the client's errors."""
        if not line.strip():
            return
        if line.startswith("/"):
            self._command(line)
            return
        self._turns.append(("user", line))
        try:
            answer = self._ask()
        except BaseException:
            self._turns.pop()
            raise
        self._turns.append(("assistant", answer))

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        match name:
            case "reset":
                self._turns.clear()
                note("forgotten")
            case "system":
                self._system = rest.strip() or None
                self._turns.clear()
                note("system message set" if self._system else "system message removed")
            case "stats":
                self._has_statistics = not self._has_statistics
                note("statistics on" if self._has_statistics else "statistics off")
            case "help":
                note(HELP)
            case "exit" | "quit":
                self.is_over = True
            case _:
                note(f"/{name} is no command; /help lists them")

    def _ask(self) -> str:
        """The answer to the turns. Ctrl-C cancels it; what came until then is the answer."""
        from hotgraph_server.cli.answer import Answer, event_json, print_statistics

        answer = Answer()
        with self._client.generate(self.messages, **self._arguments) as generation:
            try:
                for event in generation:
                    answer.add(event)
                    if self._is_json:
                        print_json_line(event_json(event))
                    else:
                        answer.write_new()
            except KeyboardInterrupt:
                generation.cancel()
                self._end(answer)
                note("(cancelled)")
                return answer.text
        self._end(answer)
        if self._has_statistics and answer.finished is not None:
            print_statistics(answer.finished, answer.started)
        return answer.text

    def _end(self, answer: Answer) -> None:
        if not self._is_json:
            answer.end()
