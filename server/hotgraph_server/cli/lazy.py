"""Commands that load their module only when they run or show their own help, so that every other command starts fast.

It also holds the root group: the one place where an error turns into a line on standard error and an exit status.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hotgraph_server.cli.failures import CommandError, ExitStatus, report


class RootGroup(TyperGroup):
    """All commands, as `app.py` orders them. No error of a command leaves it but as an exit status."""

    order: tuple[str, ...] = ()  # of the commands in help

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: self.order.index(name) if name in self.order else len(self.order))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            if _is_for_typer(error):
                raise
            raise typer.Exit(int(report(error))) from None


def _is_for_typer(error: BaseException) -> bool:
    """Whether Typer itself handles it: wrong usage, an exit that was asked for, a pipe whose reader left."""
    return isinstance(error, typer.Exit | typer.Abort | BrokenPipeError) or hasattr(error, "exit_code")


def lazy_command(location: str) -> type[TyperCommand]:
    """A command class that stands in for the function at `location` ("module:function") until that is needed."""

    class LazyCommand(TyperCommand):
        """Stands in the list of commands; hands parsing, help and running to the real one."""

        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            return self._load().make_context(info_name, args, parent=parent, **extra)

        def _load(self) -> Any:
            application = typer.Typer(add_completion=False, rich_markup_mode="rich")
            register = application.command(self.name, context_settings=dict(self.context_settings), epilog=self.epilog)
            register(_load_function(location, f"hotgraph {self.name}"))
            return typer.main.get_command(application)

    return LazyCommand


def _load_function(location: str, command: str) -> Any:
    """The function. Raises CommandError when a package that its module needs is not installed."""
    module, _, function = location.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0].startswith(("hotgraph", "graphcache")):
            raise  # a part of ours: our mistake
        message = f"{command} needs more than is installed: pip install 'hotgraph[server]' (missing: {error.name})"
        raise CommandError(message, ExitStatus.UNAVAILABLE) from None
