"""The programs of benchmarks/gpu from command line to JSON and tables."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu import breakdown, contexts, first_token, graphs, interference, latency, path, storm
from benchmarks.gpu.oracle import Oracle
from benchmarks.gpu.report import Report, machine_line
from benchmarks.gpu.storm import FailureInjector
from graphcache import CaptureError, EagerBackend
from tests.benchmarks.conftest import Serve


def run(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Runs a program, which must pass, and returns its JSON."""
    monkeypatch.setenv("HOTGRAPH_COMMIT", "0123abc")
    assert main([*arguments, "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["environment"]["commit"] == "0123abc"
    assert torch.__version__.startswith(result["environment"]["packages"]["torch"])
    assert result["checks"]
    return result


@pytest.mark.usefixtures("shared_daemon")
def test_latency_in_process_and_over_grpc(
    small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples of every length and batch are there, both ways, and stand in the tables."""
    arguments = [*small, "--lengths", "10,70", "--samples", "3", "--gap-ms", "0", "--batches", "1,3"]
    arguments += ["--batch-prompt", "20", "--batch-tokens", "12", "--rounds", "1", "--grpc"]
    result = run(latency.main, arguments, tmp_path / "latency.json", monkeypatch)
    for level in ("in process", "gRPC"):
        found = result["results"][level]
        assert [len(found["ttft"][length]["samples_seconds"]) for length in ("10", "70")] == [3, 3]
        assert len(found["tpot"]["3"]["tpot"]["samples_seconds"]) == 3
    text = tables.tables(result)
    assert "| 70 |" in text
    assert "gate" not in text  # goals are for another model
    assert machine_line(result["environment"]) in text


def test_goals_stand_beside_the_model_they_are_for() -> None:
    """The tables of the 7B shape on CUDA have vLLM's figures, goals and gates, and their source."""
    part = {"samples_seconds": [0.004], "summary": dict.fromkeys(("p50", "p99"), 0.004)}
    level = {"ttft": {"100": part}, "tpot": {"1": {"tpot": part, "gaps": part}}}
    result = {
        "settings": {"config": "llama2-7b", "device": "cuda", "lengths": [100], "batches": [1]},
        "environment": {"packages": dict.fromkeys(("torch", "triton", "transformers"), "1"), "gpu": "G", "commit": "c"},
        "results": {"in process": level, "gRPC": level},
    }
    text = latency.tables(result)
    assert "| 100 | 4.00 (4.00) | 4.00 (4.00) | 0.00 | 6.94 | 4.7 | 5.2 |" in text
    assert "| 1 | 4.00 (4.00) | 4.00 (4.00) | 4.56 | 3.2 | 3.5 |" in text
    assert "H200" in text


def test_steady_part_is_where_all_streams_decode() -> None:
    """Tokens before the last first token and after the first last token are left out."""
    per_stream, gaps = latency.steady_part([[0.0, 1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 9.0], [1.8, 2.0, 2.4]])
    assert per_stream == pytest.approx([0.3])  # of the third alone: the others have one token inside
    assert gaps == pytest.approx([0.2, 0.4])


def test_storm(small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures, evictions and injected failures happen, and every result is compared with the eager one."""
    arguments = [*small, "--seconds", "2.5", "--clients", "6", "--slots", "4", "--pool", "10", "--max-prompt", "60"]
    arguments += ["--max-tokens", "8", "--budget-graphs", "3", "--memory-seconds", "0.5", "--fail", "0.3"]
    result = run(storm.main, arguments, tmp_path / "storm.json", monkeypatch)
    found = result["results"]
    assert found["num_compared"] == found["num_finished"] + found["num_left"]
    assert found["num_left"] > 0
    assert len(found["memory"]) >= 3
    assert str(found["num_evictions"]) in tables.tables(result)


async def test_a_wrong_result_fails_the_storm(serve: Serve) -> None:
    """Outcomes with one token that is not the eager one fail the check."""
    arguments = argparse.Namespace(device="cpu", pool=5, max_prompt=20, max_tokens=6)
    async with serve() as service:
        pool = storm.make_pool(service, arguments, random.Random(1))
        oracle = Oracle(service)
        outcomes = storm.Outcomes([Counter() for _ in pool])
        for index, request in enumerate(pool):
            ids = await oracle.expected(request)
            outcomes.tokens[index][ids if index else (*ids[:-1], (ids[-1] + 1) % 512)] += 1
        report = Report("storm", arguments)
        await storm._check_tokens(report, oracle, pool, outcomes)
        assert not report.is_passed
        assert len(report.results["mismatches"]) == 1
        assert report.finish(None) == 1


def test_injected_failures_reach_the_cache() -> None:
    """An active injector raises what a failed capture raises, at its rate; an inactive one lets all pass."""
    backend = EagerBackend()
    injector = FailureInjector(backend, random.Random(2), rate=0.5, can_break=False)
    for _ in range(20):
        backend.capture("quiet", lambda: None)
    injector.activate(is_active=True)
    num_failed = 0
    for _ in range(100):
        try:
            backend.capture("loud", lambda: None)
        except CaptureError:
            num_failed += 1
    assert num_failed == injector.num_injected
    assert 25 < num_failed < 75


def test_interference(small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase has gaps, those with captures have captures, and each miss becomes a hit."""
    arguments = [*small, "--streams", "3", "--prompt", "12", "--phase-tokens", "40", "--rounds", "1"]
    arguments += ["--miss-lengths", "10,40", "--miss-rounds", "3", "--gap-ms", "0"]
    result = run(interference.main, arguments, tmp_path / "interference.json", monkeypatch)
    phases = result["results"]["phases"]
    assert [phase["num_captures"] > 0 for phase in phases] == [False, True, False, True]
    assert all(len(phase["gaps"]["samples_seconds"]) >= 3 * 30 for phase in phases)
    assert [len(row["hit"]["samples_seconds"]) for row in result["results"]["misses"]] == [2, 2]
    assert "captures, back to back" in tables.tables(result)


def test_path(small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of the way has its times, none is negative, and together they are the time to the first token."""
    arguments = [*small, "--lengths", "10,40", "--samples", "4", "--gap-ms", "0"]
    result = run(path.main, arguments, tmp_path / "path.json", monkeypatch)
    for found in result["results"]["parts"].values():
        assert list(found) == [name for name, _, _ in path.PARTS]
        assert all(len(part["samples_seconds"]) == 4 for part in found.values())
        assert all(seconds >= 0 for part in found.values() for seconds in part["samples_seconds"])
    assert [end for _, _, end in path.PARTS[:-1]] == [begin for _, begin, _ in path.PARTS[1:]]
    assert "| launch |" in tables.tables(result)


def test_breakdown(small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is timed and has its work and floor; without a device there is nothing to trace, and the tables say so."""
    arguments = [*small, "--batches", "1,3", "--lengths", "10,40", "--batch-prompt", "12", "--kv-tokens", "900"]
    arguments += ["--samples", "2", "--gap-ms", "0", "--window-seconds", "0.02"]
    result = run(breakdown.main, arguments, tmp_path / "breakdown.json", monkeypatch)
    steps = result["results"]["steps"]
    assert list(steps) == ["decode, batch 1", "decode, batch 3", "prompt of 10", "prompt of 40"]
    assert all(step["device"]["summary"]["p50"] > step["floor_seconds"] > 0 for step in steps.values())
    assert steps["prompt of 10"]["rows"] == [[0, 16]]  # what the graph computes
    assert all(12 < context < 300 for context, new in steps["decode, batch 3"]["rows"] if context and new == 1)
    assert "No kernels were traced." in tables.tables(result)


def test_contexts(small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context and length is timed on the host and around its replays, at about the context that was asked for."""
    arguments = [*small, "--contexts", "40,2100", "--batches", "1,2", "--tokens", "12", "--lengths", "10,64"]
    arguments += ["--samples", "3", "--gap-ms", "0", "--max-step-tokens", "700"]
    result = run(contexts.main, arguments, tmp_path / "contexts.json", monkeypatch)
    found = result["results"]
    assert found["num_positions"] > 2100  # more than the shape's own
    assert [(cell["batch"], cell["context"]) for cell in found["tpot"]] == [(1, 40), (1, 2100), (2, 40), (2, 2100)]
    for cell in found["tpot"]:
        assert abs(cell["middle_context"] - cell["context"]) <= 12
        assert cell["tpot"]["summary"]["p50"] > cell["floor_seconds"] > 0
        assert len(cell["device"]["samples_seconds"]) >= 6
    assert [len(cell["device"]["samples_seconds"]) for cell in found["prompts"]] == [3, 3]
    for cell in found["prompts"]:
        assert cell["device"]["summary"]["minimum"] < cell["host"]["summary"]["minimum"]
    text = tables.tables(result)
    assert "| 64 | `t64-r1-greedy` |" in text
    assert "whatever the model's own limit" in text


def test_contexts_without_room_are_left_out() -> None:
    """Of pairs of context and batch those whose KV cache fits are measured, and the others named."""
    arguments = argparse.Namespace(contexts=(100, 1000), batches=(1, 8), tokens=20, max_step_tokens=64)
    fitting, left_out = contexts.pairs_that_fit(arguments, 10, 8 * contexts.room(100, 8, arguments) * 10)
    assert fitting == [(100, 1), (1000, 1), (100, 8)]
    assert left_out == [(1000, 8)]


def test_graphs(small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many graphs are captured twice, and a process reads its weights and says when it had its first token."""
    arguments = [*small, "--num", "50", "--slots", "8", "--starts", "1", "--capture-first", "0", "--from-files"]
    result = run(graphs.main, arguments, tmp_path / "graphs.json", monkeypatch)
    assert [lap["num_graphs"] for lap in result["results"]["laps"]] == [50, 50]
    assert len({graph["name"] for graph in result["results"]["laps"][0]["graphs"]}) == 50
    (start,) = result["results"]["starts"]
    (times,) = start["runs"]
    assert list(times) == ["interpreter", "imports", "model", "engine", "first_token"]
    assert list(times.values()) == sorted(times.values())
    assert "first token" in tables.tables(result)


def test_first_token_after_captures(small: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With captures first, they end before the first token comes, and after the engine is there."""
    assert first_token.main([*small, "--prompt", "20", "--capture-first", "6"]) == 0
    times = json.loads(capsys.readouterr().out)
    assert times["engine"] < times["captured"] < times["first_token"]


def test_a_device_that_is_not_there_is_refused() -> None:
    """A benchmark that asks for CUDA never runs on the CPU instead."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device"):
        latency.main(["--device", "cuda", "--config", "tiny"])
