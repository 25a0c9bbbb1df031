"""`hotgraph graphs profile`: which shapes were hot, to a file and from one. The file is the one that the daemon's
graphs.profile setting reads and writes, with the model's name beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hotgraph_server.cli.connection import ConnectionOptions, JsonFlag
from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import jsonable, note, print_json

if TYPE_CHECKING:
    from hotgraph_client.graph_types import GraphProfile

profiles = typer.Typer(no_args_is_help=True, help="Take what was hot from one daemon to another.")

FORMAT = 1  # of graphcache.Profile


@profiles.command("export", epilog="Example: [bold]hotgraph graphs profile export hot.json[/bold]")
@with_groups
def export_profile(
    *,
    file: Annotated[Path | None, typer.Argument(help="Where to. Absent or -: standard output.")] = None,
    max_entries: Annotated[int | None, typer.Option("--max-entries", min=1, help="At most so many shapes.")] = None,
    connection: ConnectionOptions,
) -> None:
    """Write which shapes were hot, most valuable first, as JSON.

    Keys: format, model, create_time, entries (key, num_hits, num_misses, saved_seconds, size_bytes).
    """
    with connection.client() as client:
        profile = client.export_profile(max_entries)
    text = json.dumps(to_json(profile), indent=2) + "\n"
    if file is None or str(file) == "-":
        sys.stdout.write(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}") from None
    note(f"{len(profile.entries)} shapes written to {file}")


@profiles.command("import", epilog="Example: [bold]hotgraph graphs profile import hot.json[/bold]")
@with_groups
def import_profile(
    *,
    file: Annotated[Path, typer.Argument(help="Where from; - is standard input.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Take it as learned with this model, whatever it says.")
    ] = None,
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Queue captures of the shapes of a profile, most valuable first. Keys of --json: num_queued, num_skipped."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} cannot be read: {error}", ExitStatus.USAGE) from None
    try:
        profile = from_json(json.loads(text), model)
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{file} is no profile: {error}") from None
    with connection.client() as client:
        result = client.import_profile(profile)
    if as_json:
        print_json(result)
    else:
        note(f"{result.num_queued} captures queued, {result.num_skipped} shapes skipped")


def to_json(profile: GraphProfile) -> dict[str, Any]:
    """The profile as an object of the file."""
    return {
        "format": FORMAT,
        "model": profile.model,
        "create_time": jsonable(profile.create_time),
        "entries": [
            {
                "key": f"t{entry.key.tokens}-r{entry.key.rows}-{entry.key.sampler.value}",
                "num_hits": entry.num_hits,
                "num_misses": entry.num_misses,
                "saved_seconds": entry.saved_per_step_seconds,
                "size_bytes": entry.size_bytes,
            }
            for entry in profile.entries
        ],
    }


def from_json(data: Any, model: str | None = None) -> GraphProfile:
    """The inverse. `model` replaces the model's name in the file. Raises ValueError."""
    from graphcache import Profile
    from hotgraph_client.graph_types import GraphKey, GraphProfile, ProfileEntry, SamplerVariant
    from hotgraph_server.batch import StepKey

    parsed: Profile[StepKey] = Profile.from_dict(data, StepKey.parse)
    name = model if model is not None else data.get("model", "")
    if not isinstance(name, str):
        raise ValueError(f"its model is a name, not {name!r}")
    return GraphProfile(
        model=name,
        create_time=None,
        entries=tuple(
            ProfileEntry(
                key=GraphKey(entry.key.tokens, entry.key.rows, SamplerVariant(entry.key.sampler.value)),
                num_hits=entry.num_hits,
                num_misses=entry.num_misses,
                saved_per_step_seconds=entry.saved_seconds,
                size_bytes=entry.size_bytes,
            )
            for entry in parsed.entries
        ),
    )
