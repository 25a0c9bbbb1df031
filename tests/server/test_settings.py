"""Where settings come from, which place wins, and what is said about wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph_server.cli.print_config import to_json, to_toml
from hotgraph_server.config import Settings
from hotgraph_server.errors import SettingsError
from hotgraph_server.settings import OPTIONS, OPTIONS_BY_PATH, RESERVED_VARIABLES, Kind, Option, load_settings

NUM_SLOTS = OPTIONS_BY_PATH["scheduler.num_slots"]


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "hotgraph.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults() -> None:
    """With nothing said, the settings are the defaults and every origin says so."""
    loaded = load_settings(environment={})
    assert loaded.settings == Settings()
    assert {loaded.origin(option) for option in OPTIONS} == {"default"}


def test_every_setting_has_one_flag_and_one_variable() -> None:
    """No two settings share a flag or variable, and none takes a reserved name."""
    assert len({option.flag for option in OPTIONS}) == len(OPTIONS)
    variables = {option.variable for option in OPTIONS}
    assert len(variables) == len(OPTIONS)
    assert not variables & RESERVED_VARIABLES.keys()
    assert all(option.description for option in OPTIONS)


@pytest.mark.parametrize("has_flag", [False, True])
@pytest.mark.parametrize("has_variable", [False, True])
@pytest.mark.parametrize("has_file", [False, True])
def test_precedence(has_flag: bool, has_variable: bool, has_file: bool, toml: Callable[[str], Path]) -> None:
    """A flag wins over the environment, that over the file, that over the default; the origin tells which."""
    file = toml("[scheduler]\nnum_slots = 3\nmax_waiting = 7\n") if has_file else None
    environment = {"HOTGRAPH_SCHEDULER__NUM_SLOTS": "2"} if has_variable else {}
    loaded = load_settings(flags={NUM_SLOTS.path: "1" if has_flag else None}, environment=environment, file=file)
    expected = [(1, "--num-slots")] * has_flag
    expected += [(2, "HOTGRAPH_SCHEDULER__NUM_SLOTS")] * has_variable
    expected += [(3, str(file))] * has_file
    expected += [(64, "default")]
    assert (loaded.settings.scheduler.num_slots, loaded.origin(NUM_SLOTS)) == expected[0]
    assert loaded.settings.scheduler.max_waiting == (7 if has_file else 256)


def test_file_named_by_the_environment(toml: Callable[[str], Path]) -> None:
    """HOTGRAPH_CONFIG names the file, unless a file is given."""
    file = toml("[scheduler]\nnum_slots = 3\n")
    assert load_settings(environment={"HOTGRAPH_CONFIG": str(file)}).settings.scheduler.num_slots == 3
    other = file.with_name("other.toml")
    other.write_text("[scheduler]\nnum_slots = 4\n", encoding="utf-8")
    assert load_settings(environment={"HOTGRAPH_CONFIG": str(file)}, file=other).settings.scheduler.num_slots == 4


def test_empty_variable_is_not_set() -> None:
    """A variable without a value counts as absent, as unit files write it."""
    assert load_settings(environment={"HOTGRAPH_MODEL__ID": ""}).settings == Settings()


def test_variables_of_others_and_reserved_ones_are_left_alone() -> None:
    """Only our prefix is ours, and reserved names are no settings."""
    environment = {
        "PATH": "/bin",
        "hotgraph_x": "1",
        **dict.fromkeys(RESERVED_VARIABLES.keys() - {"HOTGRAPH_CONFIG"}, "x"),
    }
    assert load_settings(environment=environment).settings == Settings()


@pytest.mark.parametrize("value", ["2GiB", "2147483648"])
def test_sizes_take_suffixes_everywhere(value: str, toml: Callable[[str], Path]) -> None:
    """A size may be written with a unit as flag, variable and in the file."""
    path = "kv_cache.size_bytes"
    assert load_settings(flags={path: value}, environment={}).settings.kv_cache.size_bytes == 2 << 30
    environment = {"HOTGRAPH_KV_CACHE__SIZE_BYTES": value}
    assert load_settings(environment=environment).settings.kv_cache.size_bytes == 2 << 30
    file = toml(f'[kv_cache]\nsize_bytes = "{value}"\n')
    assert load_settings(environment={}, file=file).settings.kv_cache.size_bytes == 2 << 30


def test_times_take_suffixes(toml: Callable[[str], Path]) -> None:
    """A time may be written with a unit."""
    file = toml('[server]\ndrain_grace_seconds = "1min"\n')
    loaded = load_settings(flags={"server.max_request_seconds": "500ms"}, environment={}, file=file)
    assert loaded.settings.server.drain_grace_seconds == 60.0
    assert loaded.settings.server.max_request_seconds == 0.5


def test_lists() -> None:
    """A list is a repeated flag, or a variable with commas."""
    environment = {"HOTGRAPH_SERVER__LISTEN": "unix:a.sock, 127.0.0.1:0"}
    assert load_settings(environment=environment).settings.server.listen == ("unix:a.sock", "127.0.0.1:0")
    flags = {"server.listen": ["unix:b,c.sock"]}
    assert load_settings(flags=flags, environment=environment).settings.server.listen == ("unix:b,c.sock",)


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("ON", True), ("0", False), ("no", False)])
def test_switches_in_the_environment(text: str, expected: bool) -> None:
    """A switch reads the usual words."""
    assert load_settings(environment={"HOTGRAPH_SERVER__REFLECTION": text}).settings.server.reflection is expected


@pytest.mark.parametrize(
    ("environment", "text", "message"),
    [
        (
            {"HOTGRAPH_SCHEDULER__NUM_SLOT": "1"},
            "",
            "HOTGRAPH_SCHEDULER__NUM_SLOT; did you mean HOTGRAPH_SCHEDULER__NUM_SLOTS?",
        ),
        ({"HOTGRAPH_TARGETS": "x"}, "", "unknown environment variable HOTGRAPH_TARGETS; did you mean HOTGRAPH_TARGET?"),
        ({}, "[schedular]\n", "unknown section [schedular]; did you mean scheduler?"),
        ({}, "[scheduler]\nnum_slot = 1\n", "unknown setting scheduler.num_slot; did you mean scheduler.num_slots?"),
        ({}, "[server]\nnum_slots = 1\n", "unknown setting server.num_slots; did you mean scheduler.num_slots?"),
        ({}, "scheduler = 1\n", "scheduler is a section: write [scheduler]"),
        ({}, "[scheduler]\nnum_slots = true\n", "scheduler.num_slots: wants a whole number, not bool True"),
        ({}, "[scheduler]\nnum_slots = 1.0\n", "scheduler.num_slots: wants a whole number, not float 1.0"),
        ({}, "[scheduler]\nprefix_caching = 1\n", "scheduler.prefix_caching: wants true or false, not int 1"),
        ({}, "[server]\nlisten = 'unix:x'\n", "server.listen: wants a list of strings, not str 'unix:x'"),
        ({}, "[server]\nlisten = []\n", "server.listen: tuple should have at least 1 item"),
        ({}, "[model]\nsource = ''\n", "model.source: string should have at least 1 character"),
        ({}, "[scheduler]\nnum_slots = 0\n", "scheduler.num_slots: input should be greater than or equal to 1, not 0"),
        ({}, "[graphs]\npolicy = 'fifo'\n", "graphs.policy: input should be 'value', 'lru' or 'lfu', not 'fifo'"),
        ({}, "[kv_cache]\nsize_bytes = '2G'\n", "kv_cache.size_bytes: not a size in bytes"),
        ({}, "[scheduler\n", "hotgraph.toml: "),
        (
            {"HOTGRAPH_SCHEDULER__NUM_SLOTS": "many"},
            "",
            "HOTGRAPH_SCHEDULER__NUM_SLOTS: wants a whole number, not 'many'",
        ),
        ({"HOTGRAPH_SCHEDULER__NUM_SLOTS": " "}, "", "HOTGRAPH_SCHEDULER__NUM_SLOTS: wants a value"),
        ({"HOTGRAPH_SERVER__REFLECTION": "maybe"}, "", "HOTGRAPH_SERVER__REFLECTION: wants true or false, not 'maybe'"),
        (
            {"HOTGRAPH_GRAPHS__MAX_PADDING_RATIO": "x"},
            "",
            "HOTGRAPH_GRAPHS__MAX_PADDING_RATIO: wants a number, not 'x'",
        ),
        ({"HOTGRAPH_GRAPHS__MAX_PADDING_RATIO": "nan"}, "", "HOTGRAPH_GRAPHS__MAX_PADDING_RATIO: input should be"),
        ({"HOTGRAPH_SERVER__DRAIN_GRACE_SECONDS": "1 week"}, "", "HOTGRAPH_SERVER__DRAIN_GRACE_SECONDS: not a time"),
        ({"HOTGRAPH_MODEL__DEVICE": "gpu"}, "", "HOTGRAPH_MODEL__DEVICE: string should match pattern"),
    ],
)
def test_wrong_settings(environment: dict[str, str], text: str, message: str, toml: Callable[[str], Path]) -> None:
    """A wrong or unknown setting is an error that names it, where it stands and, when near, what was meant."""
    with pytest.raises(SettingsError) as caught:
        load_settings(environment=environment, file=toml(text))
    assert message in caught.value.message


def test_wrong_flag() -> None:
    """A wrong value of a flag names the flag."""
    with pytest.raises(SettingsError, match="--kv-cache-bytes: not a size in bytes"):
        load_settings(flags={"kv_cache.size_bytes": "lots"}, environment={})


def test_missing_file(tmp_path: Path) -> None:
    """A file that cannot be read is an error of the settings."""
    with pytest.raises(SettingsError, match=r"absent\.toml cannot be read: No such file or directory"):
        load_settings(environment={}, file=tmp_path / "absent.toml")


def test_all_problems_are_told_at_once(toml: Callable[[str], Path]) -> None:
    """Somebody who made three mistakes sees three lines."""
    with pytest.raises(SettingsError) as caught:
        load_settings(
            flags={"scheduler.num_slots": "0"}, environment={"HOTGRAPH_X": "1"}, file=toml("[server]\nport = 1\n")
        )
    assert len(caught.value.message.splitlines()) == 3


def test_toml_names_the_origin_of_each_value(toml: Callable[[str], Path]) -> None:
    """The printed settings say beside each value where it comes from, and are valid TOML for people to keep."""
    file = toml("[scheduler]\nmax_waiting = 5\n")
    loaded = load_settings(
        flags={"kv_cache.size_bytes": "2GiB", "server.reflection": False},
        environment={"HOTGRAPH_SCHEDULER__NUM_SLOTS": "8"},
        file=file,
    )
    lines = to_toml(loaded).splitlines()
    assert 'size_bytes = "2GiB"  # --kv-cache-bytes' in lines
    assert "reflection = false  # --no-reflection" in lines
    assert "num_slots = 8  # HOTGRAPH_SCHEDULER__NUM_SLOTS" in lines
    assert f"max_waiting = 5  # {file}" in lines
    assert 'level = "info"  # default' in lines


def test_json_has_every_setting_and_origin() -> None:
    """The JSON form holds each setting under its section and an origin for each path."""
    document = json.loads(json.dumps(to_json(load_settings(flags={"scheduler.num_slots": "8"}, environment={}))))
    assert document["origins"].keys() == OPTIONS_BY_PATH.keys()
    assert document["origins"]["scheduler.num_slots"] == "--num-slots"
    assert document["settings"]["scheduler"]["num_slots"] == 8
    assert all(option.name in document["settings"][option.section] for option in OPTIONS)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def values_of(option: Option) -> st.SearchStrategy[Any]:
    """Values that the option's model takes."""
    low = option.minimum
    high = option.maximum
    strategies: dict[Kind, st.SearchStrategy[Any]] = {
        Kind.TEXT: st.sampled_from(["auto", "cpu", "cuda:1"]) if option.path == "model.device" else TEXTS,
        Kind.CHOICE: st.sampled_from(option.choices or ("",)),
        Kind.SWITCH: st.booleans(),
        Kind.LIST: st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        Kind.PATH: TEXTS.filter(lambda text: "\0" not in text).map(Path),
    }
    if option.kind in (Kind.INTEGER, Kind.BYTES):
        ceiling = 1 << 50 if high is None else int(high)
        value: st.SearchStrategy[Any] = st.integers(int(low or 0), ceiling)
    elif option.kind in (Kind.NUMBER, Kind.SECONDS):
        value = st.floats(low or 0.0, high or 1e9, exclude_min=option.path == "server.max_request_seconds")
    else:
        value = strategies[option.kind]
    return st.none() | value if option.is_optional else value


SETTINGS = st.fixed_dictionaries({option.path: values_of(option) for option in OPTIONS})


@settings(max_examples=60, deadline=None)
@given(values=SETTINGS)
def test_printed_settings_read_back_the_same(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """What --print-config prints, given back with --config, makes the same settings."""
    document: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, name = path.partition(".")
        document.setdefault(section, {})[name] = value
    wanted = Settings.model_validate(document, strict=True)
    loaded = load_settings(environment={})
    printed = to_toml(type(loaded)(wanted, {"model.id": "a file\nwith a line break.toml"}))
    file = tmp_path_factory.mktemp("settings") / "printed.toml"
    file.write_text(printed, encoding="utf-8")
    again = load_settings(environment={}, file=file)
    assert again.settings == wanted
    assert to_toml(again).count(str(file)) == sum(value is not None for value in values.values())
