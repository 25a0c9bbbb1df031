"""Tests of bench/command.py: the command as users run it, against a daemon with the fake engine."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotgraph_server.bench.record import COLUMNS, read_json
from hotgraph_server.bench.result import evaluate
from tests.smoke.daemon_process import Daemon, daemon


@pytest.fixture(scope="module")
def fake_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the fake engine."""
    with daemon(tmp_path_factory.mktemp("bench"), "--model", "fake") as running:
        yield running


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hotgraph_server.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "140", "NO_COLOR": "1"},
    )


def test_a_closed_loop_run(fake_daemon: Daemon, tmp_path: Path) -> None:
    """A run prints its tables and writes files that hold every request; what they sum up to is what the result says."""
    json_file, csv_file = tmp_path / "run.json", tmp_path / "run.csv"
    load = ("-n", "20", "-c", "4", "--prompt-tokens", "8,40", "--output-tokens", "3-9", "--seed", "5", "--warmup", "2")
    done = run("-t", fake_daemon.unix_target, *load, "--json", str(json_file), "--csv", str(csv_file))
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "fake, float32",
        "4 clients",
        "seed 5",
        "TTFT",
        "TPOT",
        "ITL",
        "end to end",
        "p50",
        "p95",
        "p99",
        "output tokens/s",
        "20 of 20",
    ):
        assert word in done.stdout

    document = read_json(json_file)
    samples = document["requests"]
    assert [sample.index for sample in samples] == list(range(20))
    assert {sample.num_prompt_tokens for sample in samples} == {8, 40}
    assert {sample.num_output_tokens for sample in samples} <= set(range(3, 10))
    assert document["result"] == evaluate(samples).to_dict()
    assert document["result"]["num_ok"] == 20
    assert document["model"]["id"] == "fake"
    assert document["settings"]["seed"] == 5
    assert document["settings"]["loop"] == "closed"
    assert document["environment"]["packages"]["grpcio"]
    with csv_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["ttft_seconds"]) for row in rows] == [sample.time_to_first_token for sample in samples]


def test_an_open_loop_run(fake_daemon: Daemon, tmp_path: Path) -> None:
    """With a rate and a duration requests arrive at their own moments until the time is over."""
    json_file = tmp_path / "run.json"
    load = (
        "--rate",
        "100",
        "--duration",
        "500ms",
        "--prompt-tokens",
        "8",
        "--output-tokens",
        "2",
        "--warmup",
        "1",
        "--seed",
        "1",
    )
    done = run("-t", fake_daemon.tcp_target, *load, "--json", str(json_file))
    assert done.returncode == 0, done.stdout + done.stderr
    document = read_json(json_file)
    samples = document["requests"]
    assert 20 <= len(samples) <= 90
    assert all(0 < sample.scheduled < 0.5 for sample in samples)
    assert len({sample.scheduled for sample in samples}) == len(samples)
    assert document["settings"]["loop"] == "open"


def test_prompts_of_a_file(fake_daemon: Daemon, tmp_path: Path) -> None:
    """Lines of a text are sent as text, and the server's token counts are taken."""
    text, json_file = tmp_path / "prompts.txt", tmp_path / "run.json"
    text.write_text("Hello\nA longer prompt\n")
    load = ("-n", "4", "--prompt-file", str(text), "--output-tokens", "2", "--warmup", "0")
    done = run("-t", fake_daemon.unix_target, *load, "--json", str(json_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {sample.num_prompt_tokens for sample in read_json(json_file)["requests"]} == {6, 16}


def test_a_run_without_success_fails(fake_daemon: Daemon, tmp_path: Path) -> None:
    """When every request fails the exit status says so, the reasons are shown, and no latency is."""
    json_file = tmp_path / "run.json"
    load = ("-n", "3", "--output-tokens", "2", "--temperature", "50", "--warmup", "0", "--json", str(json_file))
    done = run("-t", fake_daemon.unix_target, *load)
    assert done.returncode == 1
    assert "INVALID_REQUEST" in done.stdout
    assert "no request went well" in done.stderr
    document = read_json(json_file)
    assert document["result"]["errors"] == {"INVALID_REQUEST": 3}
    assert document["result"]["latencies_seconds"]["ttft"] is None


def test_no_daemon(tmp_path: Path) -> None:
    """Where nobody listens the command says so, with the status of a service that is not there."""
    done = run("-t", f"unix:{tmp_path}/none.sock")
    assert done.returncode == 69
    assert "no daemon answers" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt-tokens", "0"),
        ("--output-tokens", "9-3"),
        ("--rate", "0"),
        ("--arrivals", "never", "--rate", "1"),
        ("--gate", "8=2.5"),
        ("--compare-transformers", "--gate", "4=1"),
        ("--compare-transformers", "--prompt-tokens", "1,2"),
        ("--compare-transformers", "--model", "no-such-model"),
        ("--prompt-tokens", "5000"),
        ("--prompt-file", "no-such-file"),
    ],
)
def test_wrong_usage(fake_daemon: Daemon, arguments: tuple[str, ...]) -> None:
    """What cannot be run is refused as wrong usage before any load is made."""
    done = run("-t", fake_daemon.unix_target, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr


def test_no_torch_without_a_comparison() -> None:
    """Importing the command loads neither torch nor transformers."""
    code = "import sys, hotgraph_server.bench.command; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.model
@pytest.mark.slow
def test_a_comparison(smollm2_folder: Path, tmp_path: Path) -> None:
    """Both sides run the same prompts with the embedded model and give the same tokens; the file holds every round."""
    json_file = tmp_path / "comparison.json"
    work = (
        "--rounds",
        "2",
        "--compare-clients",
        "1,2",
        "--prompt-tokens",
        "6",
        "--output-tokens",
        "4",
        "--threads",
        "1",
    )
    done = run("--compare-transformers", "--model", str(smollm2_folder), *work, "--json", str(json_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers generate" in done.stdout
    document = read_json(json_file)
    assert document["kind"] == "comparison"
    assert [line["num_clients"] for line in document["result"]] == [1, 2]
    for line in document["result"]:
        assert len(line["ratios"]) == 2
        assert line["num_same_sequences"] == line["num_sequences"] == 8
    assert document["model"]["dtype"] == "float32"
    assert document["transformers"]["num_threads"] == document["settings"]["num_threads"]
