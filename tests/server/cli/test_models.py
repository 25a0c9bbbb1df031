"""`hotgraph model`: fetching, listing and showing, with a registry that fetches nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hotgraph_server.cli.models import DEFAULT_MODEL
from hotgraph_server.config import ModelSettings
from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models import registry
from tests.server.cli.conftest import Run

NAME = "smollm2-135m-instruct"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in registry puts models."""
    known = replace(registry.info(NAME), path=tmp_path / NAME, is_pulled=False)

    def info(name: str) -> registry.ModelInfo:
        if name != NAME:
            raise ModelLoadError(f"no embedded model is named {name!r}")
        return replace(known, is_pulled=known.path.exists())

    def pull(name: str, progress: Callable[[str, int, int], None]) -> Path:
        path = info(name).path
        if not path.exists():
            for stage in ("wait", "download", "unpack", "check", "convert", "publish"):
                for done in range(0, 101, 50):
                    progress(stage, done, 0 if stage == "wait" else 100)
            path.mkdir()
        return path

    monkeypatch.setattr(registry, "info", info)
    monkeypatch.setattr(registry, "list_models", lambda: [info(NAME)])
    monkeypatch.setattr(registry, "pull", pull)
    return tmp_path


def test_pull(run: Run, folder: Path) -> None:
    """A pull tells its stages and prints where the model is; a second one says that it was there."""
    ran = run("model", "pull", NAME)
    assert ran.status == 0, ran
    assert ran.stdout.strip() == str(folder / NAME)
    for words in ("downloading ...", "unpacking ...", "checking ...", "converting ...", "is ready"):
        assert words in ran.stderr
    again = run("model", "pull")
    assert "was there already" in again.stderr
    assert again.stdout == ran.stdout


def test_pull_json(run: Run, folder: Path) -> None:
    """With --json progress is lines, and the last one tells the path."""
    *steps, last = run("model", "pull", NAME, "--json").json_lines
    assert all(step.keys() == {"stage", "done_bytes", "total_bytes"} for step in steps)
    assert [step["stage"] for step in steps if step["done_bytes"] == 100] == [
        "download",
        "unpack",
        "check",
        "convert",
        "publish",
    ]
    assert last == {"name": NAME, "path": str(folder / NAME)}


def test_list_and_show(run: Run, folder: Path) -> None:
    """Models are listed and shown, for people and as objects with the documented keys."""
    keys = {"name", "description", "license", "package", "download_bytes", "size_bytes", "path", "is_pulled"}
    listed = run("model", "list", "--json").json
    assert listed.keys() == {"models"}
    assert [entry.keys() for entry in listed["models"]] == [keys]
    assert listed["models"][0]["is_pulled"] is False
    (folder / NAME).mkdir()
    assert run("model", "show", NAME, "--json").json["is_pulled"] is True
    assert NAME in run("model", "list").stdout
    shown = run("model", "show").stdout
    assert "Apache-2.0" in shown
    assert str(folder / NAME) in shown


def test_unknown_models(run: Run, folder: Path) -> None:
    """A name that is no model is one line and exit status 78."""
    for command in ("pull", "show"):
        ran = run("model", command, "gpt-5")
        assert ran.status == 78
        assert ran.stderr == "hotgraph: no embedded model is named 'gpt-5'\n"


def test_served_models(ask: Run) -> None:
    """--served asks the daemon."""
    (model,) = ask("model", "list", "--served", "--json").json["models"]
    assert (model["id"], model["context_length"]) == ("fake", 1024)
    assert "FakeForCausalLM" in ask("model", "list", "--served").stdout
    assert ask("model", "show", "--served", "--json").json == model
    assert "limits.max_choices" in ask("model", "show", "fake", "--served").stdout
    assert ask("model", "show", "other", "--served").status == 1


def test_the_default_is_the_same_everywhere() -> None:
    """Demo, pull and serve mean the same model when none is named."""
    assert ModelSettings().source == DEFAULT_MODEL
    assert DEFAULT_MODEL in registry.EMBEDDED
