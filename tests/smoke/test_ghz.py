"""The load profiles of `ghz/` for a few seconds against a real daemon: no error, a whole report, counts that agree."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hotgraph_client import Client
from tests.smoke.daemon_process import Daemon, daemon

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NO_GO = 3  # install_tool.sh
NUM_SECONDS = 2
PERCENTAGES = [10, 25, 50, 75, 90, 95, 99]
PROFILES = sorted(path.stem for path in (HERE / "ghz").glob("*.json"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ghz() -> str:
    """The pinned ghz, built once for this checkout; GHZ names another."""
    if path := os.environ.get("GHZ"):
        return path
    done = subprocess.run([str(HERE / "install_ghz.sh")], capture_output=True, text=True, timeout=280)
    if done.returncode == NO_GO:
        pytest.skip(f"no ghz: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fake_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the fake engine."""
    with daemon(tmp_path_factory.mktemp("fake"), "--model", "fake") as running:
        yield running


def address_of(running: Daemon, kind: str) -> str:
    """As ghz takes it."""
    return running.unix_target.replace("unix:", "unix://", 1) if kind == "unix" else running.tcp_target


def profile_of(name: str) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads((HERE / "ghz" / f"{name}.json").read_text())
    return profile


def load(ghz: str, profile: str, address: str, *flags: str) -> dict[str, Any]:
    """ghz's report of one profile, run for a few seconds from the root of the repository."""
    command = [ghz, "--config", f"tests/smoke/ghz/{profile}.json", "--duration", f"{NUM_SECONDS}s", "--format", "json"]
    done = subprocess.run([*command, *flags, address], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def counts(running: Daemon) -> dict[str, int]:
    """What the daemon has counted so far."""
    with Client(running.unix_target) as client:
        scheduler = client.get_status().scheduler
    return {
        "accepted": scheduler.num_requests,
        "finished": scheduler.num_finished,
        "tokens": scheduler.num_completion_tokens,
        "else": scheduler.num_cancelled + scheduler.num_expired + scheduler.num_failed + scheduler.num_rejected,
    }


def check(report: dict[str, Any], profile: str, before: dict[str, int], after: dict[str, int]) -> None:
    """No error, percentiles in order, and each of ghz's calls is one that the daemon has finished, with all its tokens."""
    count = report["count"]
    assert report["errorDistribution"] == {}
    assert report["statusCodeDistribution"] == {"OK": count}
    assert count > 0
    percentiles = report["latencyDistribution"]
    assert [one["percentage"] for one in percentiles] == PERCENTAGES
    latencies = [one["latency"] for one in percentiles]
    assert latencies == sorted(latencies)
    assert 0 < report["fastest"] <= latencies[0] <= latencies[-1] <= report["slowest"]
    counted = {name: after[name] - before[name] for name in after}
    num_tokens = count * profile_of(profile)["data"]["max_tokens"]
    assert counted == {"accepted": count, "finished": count, "tokens": num_tokens, "else": 0}


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_runs(ghz: str, fake_daemon: Daemon, profile: str, kind: str) -> None:
    """Each profile runs without an error over either transport, and the daemon has counted what ghz has."""
    before = counts(fake_daemon)
    report = load(ghz, profile, address_of(fake_daemon, kind))
    check(report, profile, before, counts(fake_daemon))


def test_an_open_loop_keeps_its_rate(ghz: str, fake_daemon: Daemon) -> None:
    """Calls of the open loop come by the clock: so many a second as told, however fast the daemon is."""
    rate = 10
    report = load(ghz, "open_loop", address_of(fake_daemon, "unix"), "--rps", str(rate))
    assert 0.5 * rate * NUM_SECONDS <= report["count"] <= 1.5 * rate * NUM_SECONDS


def test_errors_are_found(ghz: str, fake_daemon: Daemon) -> None:
    """The control: a load that the daemon refuses is told as errors, and the check does not pass."""
    before = counts(fake_daemon)
    refused = json.dumps({"text": "x", "model": "none", "max_tokens": 16})
    report = load(ghz, "complete", address_of(fake_daemon, "tcp"), "--data", refused)
    assert report["statusCodeDistribution"] == {"NotFound": report["count"]}
    with pytest.raises(AssertionError):
        check(report, "complete", before, counts(fake_daemon))


def test_calls_of_others_are_found(ghz: str, fake_daemon: Daemon) -> None:
    """The control of the counts: with a request that ghz did not send they do not agree."""
    before = counts(fake_daemon)
    report = load(ghz, "complete", address_of(fake_daemon, "unix"))
    with Client(fake_daemon.unix_target) as client:
        client.generate("x", max_tokens=1).result()
    with pytest.raises(AssertionError, match="accepted"):
        check(report, "complete", before, counts(fake_daemon))


@pytest.mark.model
def test_a_real_model_under_load(ghz: str, tmp_path: Path) -> None:
    """Unary and streaming load on the embedded model, over either transport, has no error and counts that agree."""
    # One thread: two that wait for each other are slow beyond measure on a machine that is busy with other tests.
    with daemon(tmp_path, "--num-threads", "1") as running:
        for profile, kind in (("complete", "unix"), ("generate", "tcp")):
            before = counts(running)
            report = load(ghz, profile, address_of(running, kind))
            check(report, profile, before, counts(running))
