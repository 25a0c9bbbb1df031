"""Loads the settings: flags win over the environment, that over the TOML file, that over the defaults of `config.py`.

It knows where a value comes from and what it is called in each place, all derived from the models of `config.py`; what
a setting means is known there. Nothing else reads HOTGRAPH_* variables that are settings.
"""

from __future__ import annotations

import difflib
import enum
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hotgraph_server.config import Section, Settings
from hotgraph_server.errors import SettingsError
from hotgraph_server.units import parse_bytes, parse_seconds

ENVIRONMENT_PREFIX = "HOTGRAPH_"

# Variables with our prefix that are no settings of the daemon, and what they are.
RESERVED_VARIABLES: Mapping[str, str] = types.MappingProxyType(
    {
        "HOTGRAPH_CONFIG": "TOML file with settings, when --config is absent",
        "HOTGRAPH_TARGET": "address that client commands call, when --target is absent",
        "HOTGRAPH_TOKEN_FILE": "file with the token that client commands send",
        "HOTGRAPH_TLS_CA": "certificates that client commands trust",
        "HOTGRAPH_TLS_CERT": "certificate that client commands show",
        "HOTGRAPH_TLS_KEY": "private key of that certificate",
        "HOTGRAPH_TLS_SERVER_NAME": "name that the server's certificate must have",
    }
)

# Flags whose name is not the field's: where the name alone says too little, or two sections share it.
_FLAG_NAMES: Mapping[str, str] = types.MappingProxyType(
    {
        "model.source": "--model",
        "model.id": "--model-id",
        "model.runner": "--model-runner",
        "kv_cache.size_bytes": "--kv-cache-bytes",
        "kv_cache.block_size": "--kv-block-size",
        "graphs.budget_bytes": "--graph-budget-bytes",
        "graphs.policy": "--graph-policy",
        "graphs.max_padding_ratio": "--graph-max-padding-ratio",
        "graphs.padding": "--graph-padding",
        "graphs.profile": "--graph-profile",
        "metrics.listen": "--metrics-listen",
        "metrics.token_file": "--metrics-token-file",
        "metrics.max_clients": "--metrics-max-clients",
        "traces.endpoint": "--traces-endpoint",
        "traces.sample_ratio": "--traces-sample-ratio",
        "logging.level": "--log-level",
        "logging.format": "--log-format",
    }
)


class Kind(enum.Enum):
    """How a setting is written."""

    TEXT = "TEXT"
    CHOICE = "CHOICE"
    SWITCH = "SWITCH"
    INTEGER = "INTEGER"
    NUMBER = "NUMBER"
    SECONDS = "SECONDS"
    BYTES = "SIZE"
    PATH = "PATH"
    LIST = "LIST"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting, as it is called and written outside."""

    section: str
    name: str
    kind: Kind
    is_optional: bool
    choices: tuple[str, ...]
    default: Any
    description: str
    minimum: float | None
    maximum: float | None

    @property
    def path(self) -> str:
        """Its name in messages: section.name."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """Its flag of `hotgraph serve`."""
        return _FLAG_NAMES.get(self.path) or "--" + self.name.replace("_", "-")

    @property
    def negative_flag(self) -> str:
        """The flag that says no, of a switch."""
        return self.flag.replace("--", "--no-", 1)

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{ENVIRONMENT_PREFIX}{self.section.upper()}__{self.name.upper()}"

    @property
    def metavar(self) -> str:
        """What stands for its value in help."""
        return "|".join(self.choices) if self.kind is Kind.CHOICE else self.kind.value

    def parse(self, text: str) -> Any:
        """The value that `text` stands for in a flag or variable. Raises ValueError with a message for people."""
        match self.kind:
            case Kind.SWITCH:
                return _parse_switch(text)
            case Kind.INTEGER:
                return _parse_integer(text)
            case Kind.NUMBER:
                return _parse_number(text)
            case Kind.SECONDS:
                return parse_seconds(text)
            case Kind.BYTES:
                return parse_bytes(text)
            case Kind.PATH:
                return Path(text)
            case Kind.LIST:
                return tuple(part for part in (part.strip() for part in text.split(",")) if part)
            case Kind.TEXT | Kind.CHOICE:
                return text

    def convert(self, value: Any) -> Any:
        """The value of a TOML item; sizes, times and paths may be strings. Raises ValueError with words for people."""
        if isinstance(value, str) and self.kind in (Kind.BYTES, Kind.SECONDS, Kind.PATH):
            return self.parse(value)
        if self.kind is Kind.LIST and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        expected: tuple[type, ...] = {
            Kind.SWITCH: (bool,),
            Kind.INTEGER: (int,),
            Kind.BYTES: (int,),
            Kind.NUMBER: (int, float),
            Kind.SECONDS: (int, float),
            Kind.LIST: (),
        }.get(self.kind, (str,))
        # In Python a bool is an int; in a settings file it is a mistake.
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise ValueError(f"wants {_EXPECTATIONS[self.kind]}, not {type(value).__name__} {value!r}")
        return value


_EXPECTATIONS: dict[Kind, str] = {
    Kind.TEXT: "a string",
    Kind.CHOICE: "a string",
    Kind.SWITCH: "true or false",
    Kind.INTEGER: "a whole number",
    Kind.NUMBER: "a number",
    Kind.SECONDS: "a number of seconds or a time such as 1.5s",
    Kind.BYTES: "a whole number of bytes or a size such as 2GiB",
    Kind.PATH: "a path",
    Kind.LIST: "a list of strings",
}


def _parse_switch(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    value = words.get(text.strip().lower())
    if value is None:
        raise ValueError(f"wants true or false, not {text!r}")
    return value


def _parse_integer(text: str) -> int:
    try:
        return int(text.replace("_", ""), 10)
    except ValueError:
        raise ValueError(f"wants a whole number, not {text!r}") from None


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"wants a number, not {text!r}") from None


def _kind(name: str, annotation: Any) -> tuple[Kind, bool, tuple[str, ...]]:
    """Kind, whether None is allowed, and choices, of a field. Raises TypeError for a type that has no kind."""
    is_optional = False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        is_optional = len(members) < len(typing.get_args(annotation))
        (annotation,) = members
    if typing.get_origin(annotation) is Literal:
        return Kind.CHOICE, is_optional, typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return Kind.LIST, is_optional, ()
    kinds: dict[Any, Kind] = {bool: Kind.SWITCH, int: Kind.INTEGER, float: Kind.NUMBER, str: Kind.TEXT, Path: Kind.PATH}
    if annotation not in kinds:
        raise TypeError(f"the setting {name} has a type with no kind: {annotation}")
    kind = kinds[annotation]
    if kind is Kind.INTEGER and name.endswith("_bytes"):
        kind = Kind.BYTES
    if kind is Kind.NUMBER and name.endswith("_seconds"):
        kind = Kind.SECONDS
    return kind, is_optional, ()


def _bound(info: FieldInfo, *attributes: str) -> float | None:
    for constraint in info.metadata:
        for attribute in attributes:
            value = getattr(constraint, attribute, None)
            if isinstance(constraint, annotated_types.BaseMetadata) and value is not None:
                return float(value)
    return None


def _options() -> tuple[Option, ...]:
    found = []
    for section, section_info in Settings.model_fields.items():
        model = section_info.annotation
        if not (isinstance(model, type) and issubclass(model, Section)):
            raise TypeError(f"{section} is no section")
        for name, info in model.model_fields.items():
            kind, is_optional, choices = _kind(name, info.annotation)
            found.append(
                Option(
                    section=section,
                    name=name,
                    kind=kind,
                    is_optional=is_optional,
                    choices=choices,
                    default=info.default,
                    description=info.description or "",
                    minimum=_bound(info, "ge", "gt"),
                    maximum=_bound(info, "le", "lt"),
                )
            )
    return tuple(found)


OPTIONS: tuple[Option, ...] = _options()
OPTIONS_BY_PATH: Mapping[str, Option] = types.MappingProxyType({option.path: option for option in OPTIONS})


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The settings in force, and where each that is no default comes from ("--num-slots", a variable, a file)."""

    settings: Settings
    origins: Mapping[str, str]

    def value(self, option: Option) -> Any:
        """The value in force of one option."""
        return getattr(getattr(self.settings, option.section), option.name)

    def origin(self, option: Option) -> str:
        """Where that value comes from; "default" when nowhere."""
        return self.origins.get(option.path, "default")


@dataclass(slots=True)
class _Layers:
    """What has been gathered so far; a later layer replaces values of the ones before."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, option: Option, value: Any, origin: str) -> None:
        self.values.setdefault(option.section, {})[option.name] = value
        self.origins[option.path] = origin


def load_settings(
    *,
    flags: Mapping[str, str | bool | Sequence[str] | None] | None = None,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> LoadedSettings:
    """The settings in force, from all places. Raises SettingsError that names everything wrong, each with its origin.

    `flags` maps paths ("scheduler.num_slots") to what was written after the flag; None is absent. `environment` is
    os.environ by default; a variable with an empty value counts as not set. `file` is the TOML file to read; without it
    HOTGRAPH_CONFIG names one.
    """
    environment = os.environ if environment is None else environment
    layers = _Layers()
    if file is None and environment.get("HOTGRAPH_CONFIG"):
        file = Path(environment["HOTGRAPH_CONFIG"])
    if file is not None:
        _add_file(layers, file)
    _add_environment(layers, environment)
    _add_flags(layers, flags or {})
    settings = _validate(layers)
    if layers.problems or settings is None:
        raise SettingsError("\n".join(dict.fromkeys(layers.problems)))
    return LoadedSettings(settings, types.MappingProxyType(layers.origins))


def _add_file(layers: _Layers, file: Path) -> None:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        layers.problems.append(f"the settings file {file} cannot be read: {error.strerror or error}")
        return
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        layers.problems.append(f"{file}: {error}")
        return
    sections = list(Settings.model_fields)
    for section, items in document.items():
        if section not in sections:
            layers.problems.append(f"{file}: unknown section [{section}]{_suggestion(section, sections)}")
            continue
        if not isinstance(items, dict):
            layers.problems.append(f"{file}: {section} is a section: write [{section}] and its settings below")
            continue
        for name, value in items.items():
            path = f"{section}.{name}"
            option = OPTIONS_BY_PATH.get(path)
            if option is None:
                layers.problems.append(f"{file}: unknown setting {path}{_suggestion(path, OPTIONS_BY_PATH)}")
                continue
            try:
                layers.put(option, option.convert(value), str(file))
            except ValueError as error:
                layers.problems.append(f"{file}: {path}: {error}")


def _add_environment(layers: _Layers, environment: Mapping[str, str]) -> None:
    by_variable = {option.variable: option for option in OPTIONS}
    for variable in sorted(environment):
        text = environment[variable]
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES:
            continue
        option = by_variable.get(variable)
        if option is None:
            known = [*by_variable, *RESERVED_VARIABLES]
            layers.problems.append(f"unknown environment variable {variable}{_suggestion(variable, known)}")
        elif text:
            _put_text(layers, option, text, variable)


def _add_flags(layers: _Layers, flags: Mapping[str, str | bool | Sequence[str] | None]) -> None:
    for path, value in flags.items():
        option = OPTIONS_BY_PATH[path]
        if isinstance(value, bool):
            layers.put(option, value, option.flag if value else option.negative_flag)
        elif isinstance(value, str):
            _put_text(layers, option, value, option.flag)
        elif value:
            layers.put(option, tuple(value), option.flag)


def _put_text(layers: _Layers, option: Option, text: str, origin: str) -> None:
    try:
        if not text.strip():
            raise ValueError("wants a value")
        layers.put(option, option.parse(text), origin)
    except ValueError as error:
        layers.problems.append(f"{origin}: {error}")


def _validate(layers: _Layers) -> Settings | None:
    try:
        return Settings.model_validate(layers.values, strict=True)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            path = ".".join(str(part) for part in problem["loc"][:2])
            origin = layers.origins.get(path, path)
            place = origin if origin == path or origin.startswith(("--", ENVIRONMENT_PREFIX)) else f"{origin}: {path}"
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            hint = f" ({OPTIONS_BY_PATH[path].description})" if problem["type"] == "string_pattern_mismatch" else ""
            layers.problems.append(f"{place}: {message}, not {problem['input']!r}{hint}")
        return None


def _suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown ..." message: the nearest known name, when one is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # right name, wrong section
        near = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}" if len(known) < 10 else ""
