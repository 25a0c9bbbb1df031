"""`hotgraph demo`: the whole of hotgraph once, in the small. Fetches the model, runs a real daemon, asks it one question."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory, mkstemp
from typing import TYPE_CHECKING, Annotated

import typer

from hotgraph_server.cli.extras import require_server
from hotgraph_server.cli.models import DEFAULT_MODEL, progress_bar
from hotgraph_server.cli.output import console, note

if TYPE_CHECKING:
    from hotgraph_client import Client
    from hotgraph_server.cli.answer import Answer

DEFAULT_PROMPT = "What is the capital of France?"


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")] = DEFAULT_PROMPT,
    model: Annotated[
        str, typer.Option("--model", "-m", help="An embedded model's name, a folder, a GGUF file or a hub id.")
    ] = DEFAULT_MODEL,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Completion tokens, at most.")] = 64,
    start_timeout: Annotated[
        str, typer.Option("--start-timeout", metavar="TIME", help="How long loading may take.")
    ] = "5min",
    log_file: Annotated[
        Path | None, typer.Option("--log-file", help="Keep the daemon's log here.", show_default=False)
    ] = None,
) -> None:
    """Fetch the model if need be, start a daemon, ask it a question, stop it. Needs nothing but this command.

    The answer is streamed as it is made; then come its timings, its receipt and the graphs that the daemon now has.
    """
    require_server("hotgraph demo")
    from hotgraph_client import Client
    from hotgraph_server.cli.child import ChildDaemon, ended_by_signals
    from hotgraph_server.cli.connection import seconds

    _ensure_model(model)
    # A socket's path is short and private: the folder is made for this run and only its owner may enter it.
    with ended_by_signals(), TemporaryDirectory(prefix="hotgraph-") as folder:
        socket = Path(folder) / "hotgraph.sock"
        target = f"unix:{socket}"
        log = log_file or _temporary_log()
        with ChildDaemon(socket, ["--model", model, "--device", device], log) as daemon, Client(target) as client:
            load_seconds = daemon.wait_until_serving(client, seconds(start_timeout) or 0.0, console(stderr=True))
            note(f"The daemon serves {model} after {load_seconds:.1f} s, on {target}\n")
            _show(client, prompt, max_tokens)
        note("The daemon drained and stopped; its exit status is 0.")
        if log_file is None:  # kept when something failed
            log.unlink()


def _temporary_log() -> Path:
    handle, path = mkstemp(prefix="hotgraph-demo-", suffix=".log")
    os.close(handle)
    return Path(path)


def _ensure_model(model: str) -> None:
    """Fetches an embedded model that is not here yet; any other is the daemon's to find."""
    from hotgraph_server.models import registry

    if model in registry.EMBEDDED and not registry.info(model).is_pulled:
        note(f"Fetching the model {model}, once:")
        with progress_bar(console(stderr=True)) as progress:
            registry.pull(model, progress=progress)


def _show(client: Client, prompt: str, max_tokens: int) -> None:
    from hotgraph_server.cli.answer import print_statistics
    from hotgraph_server.cli.graphs import graph_table

    answer = _ask(client, prompt, max_tokens)
    tables = console()
    if answer.finished is not None:
        tables.print()
        print_statistics(answer.finished, answer.started, to=tables)
    tables.print(graph_table(client.list_graphs()))


def _ask(client: Client, prompt: str, max_tokens: int) -> Answer:
    from hotgraph_server.cli.answer import print_text

    output = console()
    output.print("[bold]You:[/bold] ", end="")
    output.print(prompt, markup=False, soft_wrap=True)
    output.print("[bold]Model:[/bold] ", end="")
    with client.generate([("user", prompt)], temperature=0.0, max_tokens=max_tokens) as generation:
        return print_text(generation)
