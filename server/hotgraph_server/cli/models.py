"""`hotgraph model`: the models hotgraph can fetch by name, and, with --served, those that a daemon serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotgraph_server.cli.connection import ConnectionOptions, JsonFlag
from hotgraph_server.cli.extras import require_server
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import console, jsonable, note, print_json, print_json_line, table, titled
from hotgraph_server.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

models = typer.Typer(no_args_is_help=True, help="Fetch models, and see which are there.")

DEFAULT_MODEL = "smollm2-135m-instruct"

_STAGES = {
    "wait": "another process is at it",
    "download": "downloading",
    "unpack": "unpacking",
    "check": "checking",
    "convert": "converting",
    "publish": "finishing",
}

Served = Annotated[bool, typer.Option("--served", help="Ask the daemon instead: the models it serves.")]


@models.command("pull", epilog="Example: [bold]hotgraph model pull smollm2-135m-instruct[/bold]")
def pull(
    name: Annotated[str, typer.Argument(help="The model's name; hotgraph model list tells them.")] = DEFAULT_MODEL,
    as_json: JsonFlag = False,
) -> None:
    """Fetch a model, check it and convert it, once. Safe to repeat, and to interrupt.

    With --json each step of progress is a line (stage, done_bytes, total_bytes), the last one has name and path.
    """
    require_server("hotgraph model pull")
    from hotgraph_server.models import registry

    if as_json:
        path = registry.pull(name, progress=_progress_lines())
        print_json_line({"name": name, "path": path})
        return
    was_pulled = registry.info(name).is_pulled
    with progress_bar(console(stderr=True)) as progress:
        path = registry.pull(name, progress=progress)
    note(f"{name} {'was there already' if was_pulled else 'is ready'}:")
    console().print(str(path), markup=False, soft_wrap=True)


def _progress_lines() -> Callable[[str, int, int], None]:
    """Prints a line when the stage changes or another hundredth is done: a reader wants no million lines."""
    last: tuple[str, int] | None = None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        step = (stage, 100 * done // total if total else 0)
        if step != last:
            last = step
            print_json_line({"stage": stage, "done_bytes": done, "total_bytes": total})

    return report


@contextmanager
def progress_bar(to: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what `registry.pull` tells its progress; shows one bar a stage, or one line where there is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(binary_units=True)]
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=to, disable=not to.is_terminal)
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            if not to.is_terminal:
                to.print(f"{_STAGES.get(stage, stage)} ...")
            for task in tasks.values():  # a new stage: the ones before are done
                bar.update(task, completed=bar.tasks[task].total or 1)
            tasks[stage] = bar.add_task(_STAGES.get(stage, stage), total=total or None)
        bar.update(tasks[stage], completed=done, total=total or None)

    with bar:
        yield report


@models.command("list")
@with_groups
def list_models(*, served: Served = False, as_json: JsonFlag = False, connection: ConnectionOptions) -> None:
    """List the models that can be fetched by name, and which of them are here.

    Keys of --json: models, a list of objects with name, description, license, package, download_bytes, size_bytes, path
    and is_pulled; with --served the fields of the API's Model.
    """
    if served:
        with connection.client() as client:
            found = client.list_models()
        if as_json:
            print_json({"models": found})
            return
        rows = table(["id", "architecture", "context", "dtype", "device", "weights"], numbers=["context", "weights"])
        for model in found:
            weights = format_bytes(model.weights_bytes)
            rows.add_row(model.id, model.architecture, f"{model.context_length:,}", model.dtype, model.device, weights)
        console().print(titled("Served models", rows))
        return
    require_server("hotgraph model list")
    from hotgraph_server.models import registry

    known = registry.list_models()
    if as_json:
        print_json({"models": known})
        return
    rows = table(["name", "here", "download", "on disk", "license", "description"], numbers=["download", "on disk"])
    for info in known:
        here = "yes" if info.is_pulled else "no"
        sizes = (format_bytes(info.download_bytes), format_bytes(info.size_bytes))
        rows.add_row(info.name, here, *sizes, info.license, info.description)
    console().print(titled("Models", rows))


@models.command("show")
@with_groups
def show_model(
    *,
    name: Annotated[str, typer.Argument(help="The model's name.")] = "",
    served: Served = False,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Show all that is known of one model; with --served, of the one that the daemon serves.

    Keys of --json: as in list.
    """
    if served:
        with connection.client() as client:
            found: Any = client.get_model(name)
        title = found.id
    else:
        require_server("hotgraph model show")
        from hotgraph_server.models import registry

        found = registry.info(name or DEFAULT_MODEL)
        title = found.name
    if as_json:
        print_json(found)
        return
    rows = table(["field", "value"])
    for field, value in _flat(jsonable(found)):
        rows.add_row(field, value)
    console().print(titled(title, rows))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    from rich.markup import escape

    for field, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{field}.")
        elif field.endswith("_bytes") and isinstance(item, int):
            yield prefix + field, format_bytes(item)
        else:
            yield prefix + field, "-" if item in (None, "") else escape(str(item))
