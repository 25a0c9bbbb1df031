"""Groups of options as Typer sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from hotgraph_server.cli.options import with_groups


@dataclass(frozen=True)
class Colors:
    """A group."""

    ink: Annotated[str, typer.Option("--ink", help="Of the lines.")] = "black"
    papers: Annotated[list[str], typer.Option("--paper")] = field(default_factory=lambda: ["white"])


@dataclass(frozen=True)
class Sizes:
    """Another group, with an option that must be given."""

    width: Annotated[int, typer.Option("--width")]


@dataclass(frozen=True)
class Clash:
    """A group with the name of another's option."""

    ink: Annotated[str, typer.Option("--ink")] = ""


def application() -> tuple[typer.Typer, list[tuple[str, Colors, Sizes]]]:
    seen: list[tuple[str, Colors, Sizes]] = []

    @with_groups
    def draw(*, name: Annotated[str, typer.Argument()], colors: Colors, sizes: Sizes) -> None:
        """Draw."""
        seen.append((name, colors, sizes))

    app = typer.Typer()
    app.command()(draw)
    return app, seen


def test_a_command_gets_its_groups_filled() -> None:
    """What was given on the command line stands in the group, the rest has its default."""
    app, seen = application()
    assert CliRunner().invoke(app, ["box", "--width", "3", "--ink", "red"]).exit_code == 0
    assert CliRunner().invoke(app, ["box", "--width", "4", "--paper", "a", "--paper", "b"]).exit_code == 0
    assert seen == [("box", Colors("red", ["white"]), Sizes(3)), ("box", Colors("black", ["a", "b"]), Sizes(4))]


def test_required_options_stay_required() -> None:
    """An option of a group without a default must be given."""
    app, seen = application()
    assert CliRunner().invoke(app, ["box"]).exit_code == 2
    assert not seen


def test_help_shows_the_options_of_groups() -> None:
    """Help lists a group's options with their text, and never the group itself."""
    app, _ = application()
    text = CliRunner().invoke(app, ["--help"]).stdout
    for word in ("--ink", "--paper", "--width", "Of the lines.", "Draw."):
        assert word in text
    assert "colors" not in text


def test_names_that_clash_are_an_error() -> None:
    """Two options of one name are found when the command is made, not when it runs."""

    def draw(*, colors: Colors, clash: Clash) -> None:
        raise AssertionError((colors, clash))

    with pytest.raises(TypeError, match="share a name"):
        with_groups(draw)
