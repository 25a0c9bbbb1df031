"""The settings in force as TOML and as JSON, for `hotgraph serve --print-config`. Loading them is `settings.py`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hotgraph_server.config import Settings
from hotgraph_server.settings import OPTIONS, Kind, LoadedSettings, Option
from hotgraph_server.units import exact_bytes


def to_toml(loaded: LoadedSettings) -> str:
    """The settings in force as a document that `load_settings` reads back equal, each with its origin in a comment."""
    lines = ["# Settings in force. Flags win over HOTGRAPH_* variables, those over the file, that over the defaults."]
    for section in Settings.model_fields:
        lines += ["", f"[{section}]"]
        for option in OPTIONS:
            if option.section != section:
                continue
            value = loaded.value(option)
            if value is None:  # TOML has no null: absent means the default, which is what None stands for
                lines.append(f"# {option.name} is not set. {option.description}")
            else:
                lines.append(f"{option.name} = {_toml_value(option, value)}  # {_comment(loaded.origin(option))}")
    return "\n".join(lines) + "\n"


def to_json(loaded: LoadedSettings) -> dict[str, Any]:
    """{"settings": the sections, "origins": path to origin, "default" included}, of JSON types only."""
    return {
        "settings": loaded.settings.model_dump(mode="json"),
        "origins": {option.path: loaded.origin(option) for option in OPTIONS},
    }


def _toml_value(option: Option, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_string(item) for item in value)}]"
    if option.kind is Kind.BYTES:
        text = exact_bytes(value)
        return text if text.isdigit() else _toml_string(text)
    if isinstance(value, int | float):
        return repr(value)
    return _toml_string(str(value))


def _comment(text: str) -> str:
    """`text` without what would end or break a comment, such as a line break in a file's name."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _toml_string(text: str) -> str:
    """A basic string: what TOML does not allow in one is escaped."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(_toml_character(character, escapes) for character in text) + '"'


def _toml_character(character: str, escapes: Mapping[str, str]) -> str:
    if character in escapes:
        return escapes[character]
    return f"\\u{ord(character):04x}" if ord(character) < 0x20 or ord(character) == 0x7F else character
