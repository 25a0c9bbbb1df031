"""`hotgraph serve`: its flags, its settings, its life as a process."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from hotgraph_server.settings import OPTIONS, Kind, load_settings
from tests.server.cli.conftest import COMMAND, FakeDaemon, Run, clean_environment


def test_every_setting_has_a_flag_in_help(run: Run) -> None:
    """Help shows each setting's flag with its name in files, grouped by section."""
    text = run("serve", "--help", COLUMNS="250").stdout
    for option in OPTIONS:
        assert option.flag in text
        assert f"[{option.path}]" in text
    assert "scheduler: how much runs and waits at once" in text
    assert "64KiB to 256MiB" in text


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.path)
def test_every_flag_sets_its_setting(option: object, run: Run) -> None:
    """Each flag reaches the setting it is named after, and is told as its origin."""
    from hotgraph_server.settings import Option

    assert isinstance(option, Option)
    special = {
        "model.device": "cpu",
        "model.max_context": "128",
        "scheduler.max_step_tokens": "128",
        "traces.sample_ratio": "0.5",
    }
    values = {
        Kind.TEXT: "word",
        Kind.CHOICE: option.choices[-1] if option.choices else "",
        Kind.INTEGER: "8",
        Kind.NUMBER: "1.5",
        Kind.SECONDS: "500ms",
        Kind.BYTES: "8MiB",
        Kind.PATH: "file.json",
        Kind.LIST: "unix:x.sock",
    }
    text = special.get(option.path) or values.get(option.kind, "")
    arguments = [option.negative_flag] if option.kind is Kind.SWITCH else [option.flag, text]
    document = run("serve", *arguments, "--print-config", "--json").json
    expected = {
        Kind.SWITCH: False,
        Kind.INTEGER: int(text) if text.isdigit() else None,
        Kind.NUMBER: float(text) if option.kind is Kind.NUMBER else None,
        Kind.SECONDS: 0.5,
        Kind.BYTES: 8 << 20,
        Kind.LIST: ["unix:x.sock"],
    }.get(option.kind, text)
    assert document["settings"][option.section][option.name] == expected
    assert document["origins"][option.path] == arguments[0]
    assert sum(origin != "default" for origin in document["origins"].values()) == 1


def test_printed_settings_start_the_same(run: Run, tmp_path: Path) -> None:
    """What --print-config prints, given back with --config, prints the same settings."""
    flags = ["--num-slots", "7", "--listen", "unix:a.sock", "--listen", "127.0.0.1:0", "--no-prefix-caching"]
    printed = run("serve", *flags, "--kv-cache-bytes", "1.5GiB", "--print-config", HOTGRAPH_LOGGING__LEVEL="debug")
    assert printed.status == 0
    file = tmp_path / "hotgraph.toml"
    file.write_text(printed.stdout, encoding="utf-8")
    again = run("serve", "--config", str(file), "--print-config", "--json").json
    settings = load_settings(environment={}, file=file).settings
    assert again["settings"] == settings.model_dump(mode="json")
    assert (settings.scheduler.num_slots, settings.kv_cache.size_bytes) == (7, 3 << 29)
    assert settings.logging.level == "debug"
    assert set(again["origins"].values()) == {str(file), "default"}


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        (["--num-slot", "3"], {}, 2, "--num-slots"),
        (["--num-slots", "0"], {}, 78, "hotgraph: --num-slots: input should be greater than or equal to 1, not 0"),
        (["--kv-cache-bytes", "2 bits"], {}, 78, "hotgraph: --kv-cache-bytes: not a size in bytes"),
        ([], {"HOTGRAPH_SCHEDULER__NUM_SLOT": "3"}, 78, "did you mean HOTGRAPH_SCHEDULER__NUM_SLOTS?"),
        (["--config", "absent.toml"], {}, 78, "hotgraph: the settings file absent.toml cannot be read"),
        ([], {"HOTGRAPH_CONFIG": "absent.toml"}, 78, "hotgraph: the settings file absent.toml cannot be read"),
    ],
)
def test_wrong_settings(arguments: list[str], environment: dict[str, str], status: int, message: str, run: Run) -> None:
    """Wrong settings end the program before anything starts, with 78; an unknown flag with 2 and the nearest one."""
    ran = run("serve", *arguments, **environment)
    assert ran.status == status, ran
    assert message in ran.stderr
    assert ran.stdout == ""


def test_each_wrong_setting_has_a_line(run: Run) -> None:
    """Three mistakes are three lines, each begun by the program's name."""
    ran = run("serve", "--num-slots", "0", "--device", "gpu", HOTGRAPH_X="1")
    assert ran.status == 78
    assert [line.startswith("hotgraph: ") for line in ran.stderr.splitlines()] == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_well(number: signal.Signals, own_daemon: FakeDaemon) -> None:
    """SIGTERM and SIGINT stop the daemon with status 0; its log is JSON lines, as it goes to no terminal."""
    assert own_daemon.end(number) == 0
    events = [json.loads(line) for line in own_daemon.log.read_text(encoding="utf-8").splitlines()]
    assert {"event", "level", "logger", "timestamp"} <= events[0].keys()
    assert any("serving fake" in event["event"] for event in events)


def test_a_live_socket_is_respected(daemon: FakeDaemon) -> None:
    """A second daemon on the same socket says so and exits with 69; the first one goes on."""
    command = [*COMMAND, "serve", "--model", "fake", "--listen", daemon.target]
    ran = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False, timeout=60)
    assert ran.returncode == 69
    assert str(daemon.socket) in ran.stderr
    assert "Traceback" not in ran.stderr
    assert daemon.process.poll() is None


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """A model that cannot be loaded ends the daemon with 78 and names it."""
    command = [*COMMAND, "serve", "--model", str(tmp_path / "no-model"), "--listen", f"unix:{tmp_path}/x.sock"]
    environment = clean_environment(HF_HUB_OFFLINE="1")
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert ran.returncode == 78
    assert "no-model" in ran.stderr
    assert "Traceback" not in ran.stderr
