"""The tree of commands. Importing it loads no gRPC, no settings and no torch: commands load what they need when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from hotgraph_server.cli.chat import chat
from hotgraph_server.cli.demo import demo
from hotgraph_server.cli.generate import generate, tokenize
from hotgraph_server.cli.graphs import graphs
from hotgraph_server.cli.lazy import RootGroup, lazy_command
from hotgraph_server.cli.models import models
from hotgraph_server.cli.status import drain, status
from hotgraph_server.cli.systemd import systemd
from hotgraph_server.cli.tune import tune
from hotgraph_server.cli.versions import print_version, version

_USE, _RUN, _CACHE, _MEASURE = "Ask the model", "Run the daemon", "Models and graphs", "Measure and inform"


class Commands(RootGroup):
    """The root group with the order of its commands in help."""

    order = (
        *("demo", "generate", "chat", "tokenize"),
        *("serve", "status", "drain", "systemd"),
        *("model", "graphs", "tune"),
        *("bench", "version"),
    )


app = typer.Typer(
    name="hotgraph",
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One language model, hot on one device, shared over gRPC.",
    epilog="Start with [bold]hotgraph demo[/bold]. Every command that prints data takes [bold]--json[/bold]. Exit status:"
    " 0 done, 1 request failed, 2 wrong usage, 69 unavailable, 75 try later, 78 wrong settings.",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Shared by all commands; its help is the application's."""


def _serve() -> None:
    """Run the daemon: load a model and answer until SIGTERM or SIGINT."""


def _bench() -> None:
    """Measure latency and throughput through gRPC, or compare with transformers."""


app.command(
    "demo",
    rich_help_panel=_USE,
    epilog='Example: [bold]hotgraph demo --prompt "Name three rivers."[/bold]',
)(demo)
app.command(
    "generate",
    rich_help_panel=_USE,
    epilog='Examples: [bold]hotgraph generate "Once upon a time" -n 50 --stats[/bold]   '
    "[bold]cat question.txt | hotgraph generate --chat --greedy --json[/bold]",
)(generate)
app.command(
    "chat", rich_help_panel=_USE, epilog='Example: [bold]hotgraph chat --system "Answer in one sentence." -T 0.7[/bold]'
)(chat)
app.command("tokenize", rich_help_panel=_USE, epilog='Example: [bold]hotgraph tokenize "Hello, world" --json[/bold]')(
    tokenize
)
app.command(
    "serve",
    cls=lazy_command("hotgraph_server.cli.serve:serve"),
    rich_help_panel=_RUN,
    epilog="Examples: [bold]hotgraph serve --listen unix:/run/hotgraph.sock --listen 127.0.0.1:50051[/bold]   "
    "[bold]HOTGRAPH_SCHEDULER__NUM_SLOTS=8 hotgraph serve --print-config[/bold]",
)(_serve)
app.command("status", rich_help_panel=_RUN, epilog="Example: [bold]hotgraph status --watch[/bold]")(status)
app.command("drain", rich_help_panel=_RUN, epilog="Example: [bold]hotgraph drain --grace 10s --wait[/bold]")(drain)
app.add_typer(systemd, name="systemd", rich_help_panel=_RUN)
app.add_typer(models, name="model", rich_help_panel=_CACHE)
app.add_typer(graphs, name="graphs", rich_help_panel=_CACHE)
app.command(
    "tune",
    rich_help_panel=_CACHE,
    epilog="Example: [bold]hotgraph tune --model ./my-llama --seconds 2min[/bold]",
)(tune)
app.command("bench", cls=lazy_command("hotgraph_server.bench.command:bench"), rich_help_panel=_MEASURE)(_bench)
app.command("version", rich_help_panel=_MEASURE)(version)


def run() -> None:
    """Runs the command line on sys.argv and ends the process with its exit status."""
    app(prog_name="hotgraph")
