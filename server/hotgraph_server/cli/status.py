"""`hotgraph status` and `hotgraph drain`: what the daemon does, and asking it to stop."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotgraph_server.cli.connection import ConnectionOptions, JsonFlag, seconds
from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import (
    age_seconds,
    clock_time,
    console,
    jsonable,
    note,
    print_json,
    print_json_line,
    safe,
    table,
    titled,
)
from hotgraph_server.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hotgraph_client import Client
    from hotgraph_client.admin_types import ClientInfo, ServerStatus

_STATE_STYLES = {"serving": "bold green", "starting": "bold yellow", "draining": "bold yellow", "stopped": "bold red"}


@with_groups
def status(
    *,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again and again.", rich_help_panel="Output")
    ] = False,
    interval: Annotated[
        str, typer.Option("--interval", metavar="TIME", help="How often, with --watch.", rich_help_panel="Output")
    ] = "1s",
    clients: Annotated[bool, typer.Option("--clients", "-c", help="Who calls, too.", rich_help_panel="Output")] = False,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Show what the daemon does and holds right now.

    Keys of --json: version, state, start_time, model, scheduler, kv_cache, graph_cache; with --clients also clients. With
    --watch every look is a line.
    """
    pause_seconds = seconds(interval) or 0.0
    if pause_seconds < 0.1:
        raise typer.BadParameter("--interval is at least 100ms")
    with connection.client() as client:
        if watch:
            with suppress(KeyboardInterrupt):  # Ctrl-C is how a watch ends
                (_watch_json if as_json else _watch)(client, clients, pause_seconds)
            return
        now, callers = _look(client, clients)
    if as_json:
        print_json(_as_json(now, callers))
    else:
        console().print(_dashboard(now, None, 0.0, callers))


def _look(client: Client, has_clients: bool) -> tuple[ServerStatus, list[ClientInfo] | None]:
    return client.get_status(), list(client.list_clients()) if has_clients else None


def _as_json(now: ServerStatus, callers: list[ClientInfo] | None) -> Any:
    result = jsonable(now)
    return result if callers is None else {**result, "clients": jsonable(callers)}


def _watch_json(client: Client, has_clients: bool, pause_seconds: float) -> None:
    while True:
        print_json_line(_as_json(*_look(client, has_clients)))
        time.sleep(pause_seconds)


def _watch(client: Client, has_clients: bool, pause_seconds: float) -> None:
    from rich.live import Live

    before: ServerStatus | None = None
    moment = time.monotonic()
    with Live(console=console(), auto_refresh=False, screen=False) as live:
        while True:
            now, callers = _look(client, has_clients)
            elapsed_seconds, moment = time.monotonic() - moment, time.monotonic()
            live.update(_dashboard(now, before, elapsed_seconds, callers), refresh=True)
            before = now
            time.sleep(pause_seconds)


def _dashboard(
    now: ServerStatus, before: ServerStatus | None, elapsed_seconds: float, callers: list[ClientInfo] | None
) -> RenderableType:
    """The whole status; rates per second since `before` when there is one, else since the start."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    head = Text.assemble(
        ("hotgraph ", "bold"),
        f"{now.version}  ",
        (now.state.value, _STATE_STYLES.get(now.state.value, "bold")),
        f"  {safe(now.model) or 'no model yet'}  up {format_seconds(age_seconds(now.start_time))}",
    )
    panels = [_scheduler(now, before, elapsed_seconds), _kv_cache(now), _graph_cache(now)]
    parts: list[RenderableType] = [head, Columns(panels, padding=(0, 2))]
    return Group(*parts, *([] if callers is None else [_clients(callers)]))


def _facts(title: str, rows: list[tuple[str, str]]) -> RenderableType:
    from rich import box
    from rich.panel import Panel
    from rich.table import Table

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column(justify="right")
    for name, value in rows:
        facts.add_row(name, value)
    return Panel(facts, title=title, title_align="left", box=box.ROUNDED, expand=False)


def _share(part: int, whole: int) -> str:
    return f"{part:,} / {whole:,}" + (f" ({part / whole:.0%})" if whole else "")


def _scheduler(now: ServerStatus, before: ServerStatus | None, elapsed_seconds: float) -> RenderableType:
    scheduler = now.scheduler
    since = f"in {format_seconds(elapsed_seconds)}"
    if before is None:
        since, elapsed_seconds = "since start", age_seconds(now.start_time) or 0.0
    num_tokens = scheduler.num_completion_tokens - (before.scheduler.num_completion_tokens if before else 0)
    num_steps = scheduler.num_steps - (before.scheduler.num_steps if before else 0)
    rate = f"{num_tokens / elapsed_seconds:.1f}/s" if elapsed_seconds else "-"
    step_rate = f"{num_steps / elapsed_seconds:.1f}/s" if elapsed_seconds else "-"
    return _facts(
        "requests",
        [
            ("running", _share(scheduler.num_running, scheduler.num_slots)),
            ("waiting", _share(scheduler.num_waiting, scheduler.max_waiting)),
            (f"tokens {since}", rate),
            (f"steps {since}", step_rate),
            ("prompt tokens", f"{scheduler.num_prompt_tokens:,}"),
            ("completion tokens", f"{scheduler.num_completion_tokens:,}"),
            ("accepted", f"{scheduler.num_requests:,}"),
            ("finished", f"{scheduler.num_finished:,}"),
            ("cancelled, expired", f"{scheduler.num_cancelled:,}, {scheduler.num_expired:,}"),
            ("failed, rejected", f"{scheduler.num_failed:,}, {scheduler.num_rejected:,}"),
            ("pre-emptions", f"{scheduler.num_preemptions:,}"),
        ],
    )


def _kv_cache(now: ServerStatus) -> RenderableType:
    kv_cache = now.kv_cache
    return _facts(
        "KV cache",
        [
            ("used", _share(kv_cache.num_used_blocks, kv_cache.num_blocks)),
            ("cached", _share(kv_cache.num_cached_blocks, kv_cache.num_blocks)),
            ("free", _share(kv_cache.num_free_blocks, kv_cache.num_blocks)),
            ("block", f"{kv_cache.block_size} tokens"),
            ("size", format_bytes(kv_cache.size_bytes)),
            ("prompt tokens found", f"{kv_cache.num_cached_tokens:,}"),
        ],
    )


def _graph_cache(now: ServerStatus) -> RenderableType:
    graphs = now.graph_cache
    return _facts(
        "graphs",
        [
            ("backend", graphs.backend or "-"),
            ("ready", f"{graphs.num_ready:,}"),
            ("pending", f"{graphs.num_pending:,}"),
            ("hits", _share(graphs.num_hits, graphs.num_hits + graphs.num_misses)),
            ("misses", f"{graphs.num_misses:,}"),
            ("captured", f"{graphs.num_captures:,}"),
            ("evicted, failed", f"{graphs.num_evictions:,}, {graphs.num_failures:,}"),
            ("bytes", f"{format_bytes(graphs.used_bytes)} / {format_bytes(graphs.limit_bytes)}"),
        ],
    )


def _clients(callers: list[ClientInfo]) -> RenderableType:
    from rich.markup import escape

    numbers = ["active", "requests", "prompt", "completion"]
    rows = table(["client", "proven", "peer", "user agent", *numbers, "last seen"], numbers=numbers)
    for caller in callers:
        rows.add_row(
            escape(safe(caller.name.removeprefix("clients/"))),
            escape(safe(caller.identity)),
            escape(safe(caller.peer)),
            escape(safe(caller.user_agent)),
            f"{caller.num_active_requests:,}",
            f"{caller.num_requests:,}",
            f"{caller.num_prompt_tokens:,}",
            f"{caller.num_completion_tokens:,}",
            clock_time(caller.last_seen_time),
        )
    return titled("Clients", rows)


@with_groups
def drain(
    *,
    grace: Annotated[
        str | None,
        typer.Option("--grace", metavar="TIME", help="End what still runs after this. Default: the daemon's."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the daemon is gone.")] = False,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Ask the daemon to finish what runs, admit no more, and stop.

    Keys of --json: state, num_requests, deadline.
    """
    with connection.client() as client:
        drained = client.drain(grace_seconds=seconds(grace))
        if as_json:
            print_json(drained)
        else:
            note(f"{drained.state.value}: {drained.num_requests} requests left, until {clock_time(drained.deadline)}")
        if wait:
            _wait_until_gone(client, age_limit_seconds=(seconds(connection.timeout) or 3600.0))


def _wait_until_gone(client: Client, *, age_limit_seconds: float) -> None:
    from hotgraph_client.errors import CancelledRequestError, UnavailableError

    deadline = time.monotonic() + age_limit_seconds
    while time.monotonic() < deadline:
        try:
            client.get_status()
        except UnavailableError:
            return
        except CancelledRequestError:  # it ended while it answered this; the next look tells
            continue
        time.sleep(0.2)
    raise CommandError("the daemon is still there", ExitStatus.TRY_LATER)
