"""`hotgraph tune`: measures how this GPU runs a model's kernels fastest, and leaves a table that `hotgraph serve` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotgraph_server.cli.connection import JsonFlag, seconds
from hotgraph_server.cli.extras import require_server
from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.cli.output import console, note, print_json, safe, table, titled

if TYPE_CHECKING:
    from rich.console import Console

    from hotgraph_server.config import ModelSettings
    from hotgraph_server.kernels.tuner import ChainTimes, Tuned
    from hotgraph_server.models.tune import StoredTunings

ROW_CLASSES = (1, 2, 8, 16)


def _rows(text: str | None) -> str | None:
    try:
        if text is not None:
            _parse_rows(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _parse_rows(text: str) -> tuple[int, ...]:
    """Raises ValueError with words for people."""
    parts = [part.strip() for part in text.split(",")]
    known = {str(rows) for rows in ROW_CLASSES}
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"wants some of {', '.join(map(str, ROW_CLASSES))}, not {unknown[0]!r}")
    return tuple(sorted({int(part) for part in parts}))


def tune(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, file or name. Default: what the daemon would serve.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: the daemon's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 or bfloat16. Default: the daemon's.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE.toml", help="The daemon's settings, for those above.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            callback=_rows,
            metavar="LIST",
            help="Numbers of rows, of 1,2,8,16; 8 is for 3 to 8. Default: those the daemon takes these kernels for.",
        ),
    ] = None,
    time: Annotated[
        str, typer.Option("--seconds", metavar="TIME", help="About how long it may take, such as 60 or 5min.")
    ] = "60",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to. Default: where the daemon looks.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure how this GPU multiplies a model's matrices by few rows fastest, and keep it for hotgraph serve.

    Run it while nothing else uses the GPU. It reads the model's sizes, not its weights. The daemon reads the table when it
    starts; without one it takes tunings that are good on an H200.

    Keys of --json: path, machine (gpu and versions), products (name, rows, rule_seconds, seconds,
    bytes_per_second, rule, tuning), chains (rows, rule_seconds, seconds, num_tried, num_choices, is_whole, wrong).
    """
    require_server("hotgraph tune")
    limit = seconds(time)
    if limit is None or not 1 <= limit <= 86400:
        raise CommandError(f"--seconds wants 1 s to a day, not {time!r}", ExitStatus.USAGE)
    from hotgraph_server.settings import load_settings

    flags = {"model.source": model, "model.device": device, "model.dtype": dtype}
    settings = load_settings(flags=flags, file=config).settings.model
    stored = _tune(settings, rows, limit, output)
    if as_json:
        print_json(_document(stored))
    else:
        _show(stored)


def _tune(settings: ModelSettings, rows: str | None, limit_seconds: float, output: Path | None) -> StoredTunings:
    from hotgraph_server.errors import NotPossibleError
    from hotgraph_server.models import tune as tuning

    wanted = None if rows is None else _parse_rows(rows)
    try:
        with _progress(console(stderr=True)) as report:
            return tuning.tune(settings, rows=wanted, seconds=limit_seconds, output=output, report=report)
    except NotPossibleError as error:
        raise CommandError(error.message, ExitStatus.UNAVAILABLE) from None
    except OSError as error:
        raise CommandError(f"the table cannot be written: {error}") from None


@contextmanager
def _progress(to: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what a tuning run tells its progress; shows one bar for the stage, or nothing where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield report


def _show(stored: StoredTunings) -> None:
    machine = stored.machine
    rows = table(
        ["product", "rows", "us before", "us after", "TB/s", "tuning"],
        numbers=["rows", "us before", "us after", "TB/s"],
    )
    for times in stored.tuned.products:
        tuning = "as before" if times.tuning == times.rule else _text(times.tuning)
        before, after = f"{times.rule_seconds * 1e6:.2f}", f"{times.seconds * 1e6:.2f}"
        rows.add_row(times.name, str(times.rows), before, after, f"{times.bytes_per_second / 1e12:.2f}", tuning)
    title = f"{machine.gpu}, driver {machine.driver_version}, triton {machine.triton_version}"
    console().print(titled(title, rows, *map(_remark, stored.tuned.chains)))
    for line in _warnings(stored.tuned):
        note(f"hotgraph: {line}")
    note("stored; hotgraph serve reads it when it starts:")
    console().print(safe(str(stored.path)), markup=False, soft_wrap=True)


def _remark(chain: ChainTimes) -> str:
    """The chain is what decides; a product alone may even have become slower."""
    gain = 100 * (1 - chain.seconds / chain.rule_seconds)
    before, after = chain.rule_seconds * 1e3, chain.seconds * 1e3
    return (
        f"rows {chain.rows}: the whole chain {before:.3f} ms before, {after:.3f} ms after ({gain:.1f} % less),"
        f" {chain.num_tried} of {chain.num_choices} tried"
    )


def _warnings(tuned: Tuned) -> Iterator[str]:
    if not all(chain.is_whole for chain in tuned.chains):
        yield "not everything was tried; more --seconds may find more"
    for chain in tuned.chains:
        for name, tuning in chain.wrong:
            yield f"rows {chain.rows}: {name} as {_text(tuning)} gave wrong results and was left aside: a mistake of ours"


def _text(tuning: Any) -> str:
    return str(tuning).replace(", triggers_late=False", "").replace(", triggers_late=True", "")


def _document(stored: StoredTunings) -> dict[str, Any]:
    products = [
        {
            "name": times.name,
            "rows": times.rows,
            "rule_seconds": times.rule_seconds,
            "seconds": times.seconds,
            "bytes_per_second": times.bytes_per_second,
            "rule": times.rule,
            "tuning": times.tuning,
        }
        for times in stored.tuned.products
    ]
    return {
        "path": stored.path,
        "machine": stored.machine,
        "products": products,
        "chains": stored.tuned.chains,
    }
