"""`hotgraph serve`: flags to settings, then the daemon. Each setting of `config.py` has one flag, made from it here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hotgraph_server.cli.extras import require_server
from hotgraph_server.cli.output import print_json
from hotgraph_server.cli.print_config import to_json, to_toml
from hotgraph_server.config import Settings
from hotgraph_server.settings import OPTIONS, Kind, LoadedSettings, Option, load_settings
from hotgraph_server.units import exact_bytes

_OUTPUT = "Settings as a whole"


def _run(config: Path | None, print_config: bool, as_json: bool, **flags: Any) -> None:
    """Run the daemon: load a model and answer until SIGTERM or SIGINT, then finish what runs and stop.

    Every setting is also \\[section] name in the TOML file and HOTGRAPH_SECTION__NAME in the environment; it stands in
    brackets after each flag. Flags win over the environment, that over the file. Sizes may be written 512MiB or 2GiB,
    times 500ms, 30s or 10min.
    """
    named = {path.replace("__", "."): value for path, value in flags.items()}
    loaded = load_settings(flags=named, file=config)
    if print_config:
        if as_json:
            print_json(to_json(loaded))
        else:
            sys.stdout.write(to_toml(loaded))
        return
    require_server("hotgraph serve")
    status = run_daemon(loaded, load=lambda: load_settings(flags=named, file=config))
    if status:
        raise typer.Exit(status)


def run_daemon(loaded: LoadedSettings, *, load: Callable[[], LoadedSettings] | None = None) -> int:
    """Runs the daemon in this process until it ends, with logging set up. Returns its exit status.

    `load` reads the settings again when SIGHUP comes; the log's level is one that may change.
    """
    from hotgraph_server.daemon import run
    from hotgraph_server.logs import logging_to, set_level

    def load_again() -> Settings:
        assert load is not None
        settings = load().settings
        set_level(settings.logging.level)
        return settings

    with logging_to(loaded.settings.logging):
        return run(loaded.settings, load=None if load is None else load_again)


def _help(option: Option) -> str:
    """What the setting means, its range and default, and its name in files."""
    parts = [escape(option.description)]
    if option.default is not None:
        parts.append(f"Default: {escape(_default_text(option))}.")
    limits = _limits(option)
    if limits:
        parts.append(limits)
    parts.append(f"[dim]\\[{option.path}][/dim]")
    return " ".join(parts)


def _limits(option: Option) -> str:
    if option.minimum is None and option.maximum is None:
        return ""
    low, high = (None if bound is None else _number_text(option, bound) for bound in (option.minimum, option.maximum))
    if high is None:
        return f"From {low}."
    return f"Up to {high}." if low is None else f"{low} to {high}."


def _number_text(option: Option, value: float) -> str:
    return exact_bytes(int(value)) if option.kind is Kind.BYTES else f"{value:g}"


def _default_text(option: Option) -> str:
    if option.kind is Kind.LIST:
        return ", ".join(option.default)
    if option.kind is Kind.SWITCH:
        return "yes" if option.default else "no"
    is_number = option.kind in (Kind.BYTES, Kind.INTEGER, Kind.NUMBER, Kind.SECONDS)
    return _number_text(option, option.default) if is_number else str(option.default)


def _parameter(option: Option) -> inspect.Parameter:
    declared = [option.flag]
    annotation: Any = str | None
    metavar: str | None = option.metavar
    if option.kind is Kind.SWITCH:
        declared = [f"{option.flag}/{option.negative_flag}"]
        annotation, metavar = bool | None, None
    elif option.kind is Kind.LIST:
        annotation, metavar = list[str] | None, "TEXT"
    information = typer.Option(
        *declared,
        metavar=metavar,
        help=_help(option) + (" Repeatable." if option.kind is Kind.LIST else ""),
        rich_help_panel=_panel(option.section),
        show_default=False,
    )
    name = f"{option.section}__{option.name}"
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, information]
    )


def _panel(section: str) -> str:
    """The section's name and what it is for, as its class says."""
    model = Settings.model_fields[section].annotation
    about = (inspect.getdoc(model) or "").splitlines()[0].rstrip(".")
    return f"{section}: {about[:1].lower()}{about[1:]}"


def _command() -> Callable[..., None]:
    """`_run` with one parameter for each setting, as Typer wants to see it."""
    file = typer.Option("--config", metavar="FILE.toml", help="Read settings from it.", rich_help_panel=_OUTPUT)
    show = typer.Option(
        "--print-config",
        help="Print the settings in force, with where each comes from, and end.",
        rich_help_panel=_OUTPUT,
    )
    as_json = typer.Option("--json", help="With --print-config: as JSON (settings, origins).", rich_help_panel=_OUTPUT)
    own = [
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, file]
        ),
        inspect.Parameter(
            "print_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, show]
        ),
        inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, as_json]
        ),
    ]
    parameters = [_parameter(option) for option in OPTIONS] + own

    def command(**values: Any) -> None:
        _run(**values)

    command.__doc__ = _run.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


serve = _command()
