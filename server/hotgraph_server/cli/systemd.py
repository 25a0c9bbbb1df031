"""`hotgraph systemd`: writes the unit files that come with the package, and removes them, after showing what would change."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotgraph_server.cli.connection import JsonFlag
from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.cli.output import note, print_json, safe

if TYPE_CHECKING:
    from hotgraph_server.systemd.installation import Change

systemd = typer.Typer(no_args_is_help=True, help="Run the daemon under systemd: write its unit files, or remove them.")

HIDDEN_BY_SANDBOX = ("/home", "/root", "/run/user", "/tmp", "/var")

Destination = Annotated[
    Path, typer.Option("--destdir", metavar="DIR", help="Write below it, such as for a package. Default: this machine.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it. Without, what would change is shown and nothing more.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would change: the default.")]


@systemd.command(
    "install",
    epilog="Examples: [bold]hotgraph systemd install[/bold] shows, [bold]sudo hotgraph systemd install --yes[/bold] writes,"
    " [bold]hotgraph systemd install --with unix-only --destdir ./pkg --prefix /opt/hotgraph --yes[/bold]",
)
def install(
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="NAME", help="Also a drop-in: credentials, lan, systemd-254, unix-only. Repeatable."
        ),
    ] = None,
    prefix: Annotated[
        Path | None,
        typer.Option(
            "--prefix", metavar="DIR", help="Where hotgraph is: DIR/bin/hotgraph. Default: the one that runs now."
        ),
    ] = None,
    destdir: Destination = Path("/"),
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Show, and with --yes write, units, users, folders and example settings for systemd.

    Settings that are there are never written over. Nothing is started: the commands that do are printed.

    Keys of --json: files (path, action: create, replace or keep, diff), is_written.
    """
    from hotgraph_server.systemd.installation import plan_install

    prefix = Path(sys.prefix) if prefix is None else prefix
    program = prefix / "bin" / "hotgraph"
    is_here = destdir == Path("/")
    if is_here and not program.is_file():
        raise CommandError(f"there is no {program}; --prefix says where hotgraph is", ExitStatus.USAGE)
    if str(prefix.absolute()).startswith(HIDDEN_BY_SANDBOX):
        note(
            f"hotgraph: {prefix} is hidden from the service by its sandbox: install hotgraph elsewhere, such as in /opt"
        )
    _carry_out(lambda: plan_install(prefix=prefix, destdir=destdir, drop_ins=with_ or ()), yes and not dry_run, as_json)
    if not as_json:
        _say_what_is_next(program, is_written=yes and not dry_run)


@systemd.command("uninstall", epilog="Example: [bold]sudo hotgraph systemd uninstall --yes[/bold]")
def uninstall(
    destdir: Destination = Path("/"), yes: Yes = False, dry_run: DryRun = False, as_json: JsonFlag = False
) -> None:
    """Show, and with --yes remove, the files that an install wrote. Files that somebody changed since stay.

    Stop and disable the services first. The user, its state and its models stay.

    Keys of --json: files (path, action: remove or keep, diff), is_written.
    """
    from hotgraph_server.systemd.installation import plan_uninstall

    _carry_out(lambda: plan_uninstall(destdir=destdir), yes and not dry_run, as_json)


def _carry_out(plan: Any, is_wanted: bool, as_json: bool) -> None:
    """Shows the changes that `plan` makes, and does them when that is wanted. Raises CommandError."""
    from hotgraph_server.systemd.installation import Action, apply

    try:
        changes: list[Change] = plan()
        if is_wanted:
            apply(changes)
    except ValueError as error:
        raise CommandError(str(error), ExitStatus.USAGE) from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}", ExitStatus.FAILED) from None
    if as_json:
        files = [{"path": change.path, "action": change.action.value, "diff": change.diff} for change in changes]
        print_json({"files": files, "is_written": is_wanted})
        return
    for change in changes:
        sys.stdout.write(safe(change.diff))
        if change.action is Action.KEEP:
            note(f"hotgraph: {change.path} stays as it is")
    num_changes = sum(change.action is not Action.KEEP for change in changes)
    if is_wanted:
        note(f"hotgraph: {num_changes} files changed")
    else:
        note(f"hotgraph: {num_changes} files would change; nothing is done without --yes")


def _say_what_is_next(program: Path, *, is_written: bool) -> None:
    if not is_written:
        return
    for line in (
        "then, as root:",
        "  systemd-sysusers && systemd-tmpfiles --create",
        f"  runuser -u hotgraph -- env XDG_CACHE_HOME=/var/cache {program} model pull   # unless hotgraph.toml names a folder",
        "  systemctl daemon-reload",
        "  systemctl enable --now hotgraph            # or hotgraph@0, hotgraph@1: one a GPU",
    ):
        note(line)
