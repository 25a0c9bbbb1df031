"""The options of one request: what to continue, how tokens are chosen, what ends it. They become the client's arguments.

Ranges are the daemon's to check: what is written here is sent as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hotgraph_server.cli.connection import seconds
from hotgraph_server.cli.failures import CommandError, ExitStatus

if TYPE_CHECKING:
    from hotgraph_client.types import GenerateOptions, GraphPolicy, MessageLike, Prompt

_PROMPT = "Prompt"
_SAMPLING = "Sampling"
_LENGTH = "Length and stops"
_REQUEST = "Request"


@dataclass(frozen=True)
class PromptOptions:
    """What to continue or answer."""

    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Absent or -: read from standard input.", show_default=False)
    ] = None
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.", rich_help_panel=_PROMPT)
    ] = None
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", "-c", help="Ask it as a user's turn in the model's chat template.", rich_help_panel=_PROMPT
        ),
    ] = False
    system: Annotated[
        str | None, typer.Option("--system", help="System message; implies --chat.", rich_help_panel=_PROMPT)
    ] = None
    ids: Annotated[
        bool, typer.Option("--ids", help="The prompt is token ids, such as 12,7,300.", rich_help_panel=_PROMPT)
    ] = False

    def read(self) -> Prompt:
        """The prompt as the client takes it. Raises typer.BadParameter or CommandError when there is none."""
        if not self.ids:
            return self.read_words()
        if self.chat or self.system is not None:
            raise typer.BadParameter("--ids does not go with --chat and --system")
        return parse_ids(self.text())

    def read_words(self) -> str | list[MessageLike]:
        """The same, for what takes no token ids."""
        if self.ids:
            raise typer.BadParameter("--ids does not go with this command")
        text = self.text()
        if self.system is not None:
            return [("system", self.system), ("user", text)]
        return [("user", text)] if self.chat else text

    def text(self) -> str:
        """The prompt's text, from where it stands. A file's or pipe's last line break is no part of it."""
        if self.prompt is not None and self.file is not None:
            raise typer.BadParameter("give a prompt or --file, not both")
        if self.file is not None:
            try:
                return _decode(self.file.read_bytes(), str(self.file))
            except OSError as error:
                raise CommandError(f"{self.file} cannot be read: {error.strerror}", ExitStatus.USAGE) from None
        if self.prompt is not None and self.prompt != "-":
            return self.prompt
        if self.prompt is None and sys.stdin.isatty():
            raise typer.BadParameter("no prompt: write it after the command, or use --file or a pipe")
        return _decode(sys.stdin.buffer.read(), "standard input")


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{where} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    return text.removesuffix("\n").removesuffix("\r")


def parse_ids(text: str) -> list[int]:
    """Token ids written with commas or spaces between. Raises typer.BadParameter."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"no list of token ids: {text!r}") from None


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, what ends a choice, and how the request runs. Absent means the daemon's default."""

    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", help="Completion tokens, at most.", rich_help_panel=_LENGTH)
    ] = None
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", help="No stop of any kind before.", rich_help_panel=_LENGTH)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text. Repeatable.", rich_help_panel=_LENGTH),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option("--stop-token-id", metavar="ID", help="End at this token. Repeatable.", rich_help_panel=_LENGTH),
    ] = None
    include_stop: Annotated[
        bool, typer.Option("--include-stop", help="Print what stopped it, too.", rich_help_panel=_LENGTH)
    ] = False
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end of text.", rich_help_panel=_LENGTH)
    ] = False
    greedy: Annotated[
        bool,
        typer.Option("--greedy", "-g", help="Always the likeliest token: temperature 0.", rich_help_panel=_SAMPLING),
    ] = False
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-T", help="0 is greedy; else 0.01 to 2.", rich_help_panel=_SAMPLING),
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.", rich_help_panel=_SAMPLING)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Keep the smallest set that reaches this probability.", rich_help_panel=_SAMPLING),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Drop tokens below this share of the likeliest.", rich_help_panel=_SAMPLING),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", help="Against tokens seen anywhere; 1 is none.", rich_help_panel=_SAMPLING
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option("--presence-penalty", help="Against tokens of the completion, once.", rich_help_panel=_SAMPLING),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option("--frequency-penalty", help="Against them, each time they occurred.", rich_help_panel=_SAMPLING),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias", metavar="ID=BIAS", help="Added to one token's logit. Repeatable.", rich_help_panel=_SAMPLING
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same answer.", rich_help_panel=_SAMPLING)] = (
        None
    )
    choices: Annotated[
        int | None, typer.Option("--choices", help="Completions of the same prompt.", rich_help_panel=_REQUEST)
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs", help="Log-probabilities of the chosen and the N likeliest tokens.", rich_help_panel=_REQUEST
        ),
    ] = None
    graphs: Annotated[
        str | None,
        typer.Option(
            "--graphs",
            metavar="prefer|require|eager-only|TIME",
            help="How its steps run; a time waits that long for graphs.",
            rich_help_panel=_REQUEST,
        ),
    ] = None
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Default: the served one.", show_default=False, rich_help_panel=_REQUEST),
    ] = ""
    request_id: Annotated[
        str, typer.Option("--request-id", help="Its name in logs.", show_default=False, rich_help_panel=_REQUEST)
    ] = ""
    session_key: Annotated[
        str,
        typer.Option("--session-key", help="For balancers that hash it.", show_default=False, rich_help_panel=_REQUEST),
    ] = ""
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on when the daemon is lost. Default: when greedy or seeded.",
            rich_help_panel=_REQUEST,
        ),
    ] = None

    def arguments(self) -> GenerateOptions:
        """The client's keyword arguments: only what was asked for. Raises typer.BadParameter."""
        if self.greedy and self.temperature not in (None, 0.0):
            raise typer.BadParameter("--greedy is temperature 0: it does not go with --temperature")
        given: GenerateOptions = {
            "model": self.model,
            "request_id": self.request_id,
            "session_key": self.session_key,
            "temperature": 0.0 if self.greedy else self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_id or ()),
            "num_choices": self.choices,
            "logprobs": self.logprobs,
            "resume": self.resume,
        }
        if self.include_stop:
            given["include_stop"] = True
        if self.ignore_eos:
            given["ignore_eos"] = True
        if self.logit_bias:
            given["logit_bias"] = parse_bias(self.logit_bias)
        if self.graphs is not None:
            given["graph_policy"] = parse_policy(self.graphs)
        return given


def parse_bias(texts: list[str]) -> Mapping[int, float]:
    """{token id: bias} of ID=BIAS texts. Raises typer.BadParameter."""
    biases: dict[int, float] = {}
    for text in texts:
        token_id, separator, bias = text.partition("=")
        try:
            if not separator or int(token_id) in biases:
                raise ValueError
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise typer.BadParameter(f"--logit-bias wants ID=BIAS, each id once, not {text!r}") from None
    return biases


def parse_policy(text: str) -> GraphPolicy:
    """A policy of its name, or of the time to wait for graphs. Raises typer.BadParameter."""
    from hotgraph_client.types import GraphMode, GraphPolicy

    name = text.replace("-", "_")
    if name in (GraphMode.PREFER, GraphMode.REQUIRE, GraphMode.EAGER_ONLY):
        return GraphPolicy(GraphMode(name))
    if not text[:1].isdigit():
        raise typer.BadParameter(f"--graphs is prefer, require, eager-only or a time such as 2s, not {text!r}")
    return GraphPolicy(GraphMode.WAIT_UP_TO, max_wait_seconds=seconds(text))
