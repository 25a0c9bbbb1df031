"""`hotgraph graphs`: seeing and steering the graph cache. Graphs are named by their shape, such as t8-r8-greedy."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from hotgraph_server.cli.connection import ConnectionOptions, JsonFlag, seconds
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import clock_time, console, jsonable, note, print_json, print_json_line, table, titled
from hotgraph_server.cli.profiles import profiles
from hotgraph_server.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from hotgraph_client.graph_types import Budget, Graph, GraphEvent, GraphKey

graphs = typer.Typer(no_args_is_help=True, help="See and steer the graph cache.")
graphs.add_typer(profiles, name="profile")

Name = Annotated[str, typer.Argument(metavar="GRAPH", help="Its name, such as t8-r8-greedy.")]

# Values of hotgraph_client.graph_types.GraphState, which is not imported here: it would load gRPC. A test compares.
STATES = ("queued", "capturing", "ready", "evicted", "failed", "quarantined")


def resource_name(name: str) -> str:
    """graphs/{id} of a name with or without the folder."""
    return name if name.startswith("graphs/") else f"graphs/{name}"


def parse_key(text: str) -> GraphKey:
    """The client's key of a name such as t8-r8-greedy. Raises typer.BadParameter."""
    from hotgraph_client.graph_types import GraphKey, SamplerVariant
    from hotgraph_server.batch import StepKey

    try:
        key = StepKey.parse(text.removeprefix("graphs/"))
    except ValueError:
        raise typer.BadParameter(
            f"no shape: {text!r}; write t8-r8-greedy: tokens, rows, and greedy, gumbel or filtered"
        ) from None
    return GraphKey(key.tokens, key.rows, SamplerVariant(key.sampler.value))


def key_text(key: GraphKey) -> str:
    """The inverse of `parse_key`."""
    return f"t{key.tokens}-r{key.rows}-{key.sampler.value}"


@graphs.command("list", epilog="Example: [bold]hotgraph graphs list --state ready --json | jq .graphs[].name[/bold]")
@with_groups
def list_graphs(
    *,
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", metavar="|".join(STATES), help="Only these. Repeatable.")
    ] = None,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """List the graphs, those with most hits first.

    Keys of --json: graphs, a list of objects with name, key (tokens, rows, sampler), state, size_bytes, num_hits and more.
    """
    for name in state or ():
        if name not in STATES:
            raise typer.BadParameter(f"--state is one of {', '.join(STATES)}, not {name!r}")
    with connection.client() as client:
        found = client.list_graphs(state or ())
    if as_json:
        print_json({"graphs": found})
    else:
        console().print(graph_table(found))


def graph_table(found: Iterable[Graph]) -> RenderableType:
    """A rich table of graphs."""
    numbers = ["hits", "misses", "bytes", "eager step", "graph step"]
    rows = table(["graph", "state", *numbers, "published", "last hit", "remarks"], numbers=numbers)
    for graph in found:
        rows.add_row(
            key_text(graph.key),
            graph.state.value,
            f"{graph.num_hits:,}",
            f"{graph.num_misses:,}",
            format_bytes(graph.size_bytes),
            format_seconds(graph.eager_step_seconds),
            format_seconds(graph.graph_step_seconds),
            clock_time(graph.publish_time),
            clock_time(graph.last_hit_time),
            _remarks(graph),
        )
    return titled("Graphs", rows, "" if rows.row_count else "none")


def _remarks(graph: Graph) -> str:
    from rich.markup import escape

    remarks = []
    if graph.pin_expire_time is not None:
        remarks.append(f"pinned until {clock_time(graph.pin_expire_time)}")
    if graph.segment.value != "unspecified":
        remarks.append(graph.segment.value)
    if graph.failure:
        again = f", again at {clock_time(graph.retry_time)}" if graph.retry_time is not None else ""
        remarks.append(f"failed {graph.num_failures} times: {graph.failure}{again}")
    return escape("; ".join(remarks))


@graphs.command("get")
@with_groups
def get_graph(*, name: Name, as_json: JsonFlag = False, connection: ConnectionOptions) -> None:
    """Show all that is known of one graph. Keys of --json: those of one graph of list."""
    with connection.client() as client:
        graph = client.get_graph(resource_name(name))
    _show(graph, as_json)


def _show(graph: Graph, as_json: bool) -> None:
    if as_json:
        print_json(graph)
        return
    rows = table(["field", "value"])
    for field, value in jsonable(graph).items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        rows.add_row(field, "-" if value in (None, "") else str(value))
    console().print(titled(key_text(graph.key), rows))


@graphs.command("watch", epilog="Example: [bold]hotgraph graphs watch --json | jq -c '[.type, .graph.name]'[/bold]")
@with_groups
def watch_graphs(
    *,
    after: Annotated[
        int | None,
        typer.Option("--after", min=0, help="Events after this sequence number first; 0: all that are kept."),
    ] = None,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Print what happens to graphs, as it happens, until Ctrl-C.

    Each event is a line. Keys of --json: sequence, event_time, type, graph, detail.
    """
    with suppress(KeyboardInterrupt), connection.client() as client:  # Ctrl-C is how a watch ends
        for event in client.watch_graphs(after):
            if as_json:
                print_json_line(event)
            else:
                console().print(_event_line(event), soft_wrap=True)


def _event_line(event: GraphEvent) -> str:
    from rich.markup import escape

    name = "" if event.graph is None else key_text(event.graph.key)
    detail = f"  {event.detail}" if event.detail else ""
    if event.type.value == "statistics" and event.graph is not None:
        detail += f"  {event.graph.num_hits:,} hits, {event.graph.num_misses:,} misses"
    return escape(
        f"{event.sequence:>6}  {clock_time(event.event_time)}  {event.type.value:<16} {name:<22}{detail}".rstrip()
    )


@graphs.command("prewarm", epilog="Example: [bold]hotgraph graphs prewarm t1-r1-greedy t8-r8-gumbel --wait 10s[/bold]")
@with_groups
def prewarm_graphs(
    *,
    names: Annotated[list[str], typer.Argument(metavar="GRAPH...", help="Shapes, most wanted first.")],
    wait: Annotated[
        str | None, typer.Option("--wait", metavar="TIME", help="Return when all are captured, or after this.")
    ] = None,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Capture graphs before anybody needs them; each shape is raised to its bucket. Keys of --json: graphs."""
    keys = [parse_key(name) for name in names]
    with connection.client() as client:
        found = client.prewarm_graphs(keys, wait_seconds=seconds(wait))
    if as_json:
        print_json({"graphs": found})
    else:
        console().print(graph_table(found))


@graphs.command("pin")
@with_groups
def pin_graph(
    *,
    name: Name,
    lease: Annotated[
        str | None, typer.Option("--lease", metavar="TIME", help="How long, such as 1h. Default: 10min.")
    ] = None,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Keep a graph from eviction for a while; again renews it. Keys of --json: those of one graph of list."""
    with connection.client() as client:
        graph = client.pin_graph(resource_name(name), lease_seconds=seconds(lease))
    if as_json:
        print_json(graph)
    else:
        note(f"{key_text(graph.key)} is pinned until {clock_time(graph.pin_expire_time)}")


@graphs.command("unpin")
@with_groups
def unpin_graph(*, name: Name, as_json: JsonFlag = False, connection: ConnectionOptions) -> None:
    """Let a pinned graph be evicted again. Keys of --json: those of one graph of list."""
    with connection.client() as client:
        graph = client.unpin_graph(resource_name(name))
    if as_json:
        print_json(graph)
    else:
        note(f"{key_text(graph.key)} is not pinned")


@graphs.command("evict")
@with_groups
def evict_graph(*, name: Name, as_json: JsonFlag = False, connection: ConnectionOptions) -> None:
    """Throw a graph out once no step uses it. Keys of --json: those of one graph of list."""
    with connection.client() as client:
        graph = client.evict_graph(resource_name(name))
    if as_json:
        print_json(graph)
    else:
        note(f"{key_text(graph.key)} is {graph.state.value}")


@graphs.command("budget", epilog="Example: [bold]hotgraph graphs budget --limit 2GiB --stall 20ms[/bold]")
@with_groups
def budget(
    *,
    limit: Annotated[
        str | None, typer.Option("--limit", metavar="SIZE", help="Bytes graphs may hold together.")
    ] = None,
    stall: Annotated[
        str | None, typer.Option("--stall", metavar="TIME", help="Capture interference allowed a second of serving.")
    ] = None,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Show the graphs' budget, or change it and evict down to it.

    Keys of --json: budget (limit_bytes, used_bytes, pinned_bytes, kv_cache_bytes, num_graphs, stall_budget_seconds) and
    evicted_graphs.
    """
    try:
        limit_bytes = None if limit is None else parse_bytes(limit)
    except ValueError as error:
        raise typer.BadParameter(f"--limit: {error}") from None
    with connection.client() as client:
        if limit_bytes is None and stall is None:
            now: Budget = client.get_budget()
            evicted: tuple[str, ...] = ()
        else:
            update = client.update_budget(limit_bytes=limit_bytes, stall_budget_seconds=seconds(stall))
            now, evicted = update.budget, update.evicted_graphs
    if as_json:
        print_json({"budget": now, "evicted_graphs": evicted})
        return
    rows = table(["what", "value"], numbers=["value"])
    rows.add_row("limit", format_bytes(now.limit_bytes))
    rows.add_row("used", f"{format_bytes(now.used_bytes)} by {now.num_graphs} graphs")
    rows.add_row("pinned", format_bytes(now.pinned_bytes))
    rows.add_row("KV blocks beside them", format_bytes(now.kv_cache_bytes))
    rows.add_row("stall a second", format_seconds(now.stall_budget_seconds))
    console().print(titled("Budget", rows))
    for name in evicted:
        note(f"evicted {name.removeprefix('graphs/')}")
