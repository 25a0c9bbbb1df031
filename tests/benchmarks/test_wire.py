"""The wire's benchmark: every part of every request is there, and the parts are the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.wire import trace
from benchmarks.wire.__main__ import PARTS, PLACES, main, table
from benchmarks.wire.callers import CALLERS, TOKENS_FIELD, go_answer, make_request

NUM_REQUESTS = 6
STEP_SECONDS = 0.002


def test_the_parts_of_a_request_are_its_whole_time(tmp_path: Path) -> None:
    """Each caller's requests are all traced, no part is negative, and parts and step add up to what the caller waited."""
    out = tmp_path / "wire.json"
    command = ["--caller", "stub", "--caller", "client", "--num-requests", str(NUM_REQUESTS), "--num-warmups", "2"]
    assert main([*command, "--gap-ms", "1", "--step-ms", str(STEP_SECONDS * 1e3), "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["results"]) == {"stub", "client"}
    for found in report["results"].values():
        samples = {name: part["samples_seconds"] for name, part in found.items()}
        for index in range(NUM_REQUESTS):
            parts = [samples[part][index] for part in PARTS]
            step = samples[f"{trace.WORK} to {trace.RESULT}"][index]
            assert min(parts) > 0
            assert step >= STEP_SECONDS
            assert sum(parts) + step == pytest.approx(samples["total"][index], abs=1e-5)
    rows = table(report).splitlines()
    assert len(rows) == 2 + (len(PLACES) - 1) + len(PARTS) + 3  # titles; ways; parts; total, total without step, CPU


def test_an_answer_of_the_caller_in_go_is_read() -> None:
    """The first message that holds tokens counts, whatever came before it; without one it is an error."""
    line = {
        "sent": 1.0,
        "messages": [{"field": 99, "seconds": 1.5}] + [{"field": TOKENS_FIELD, "seconds": at} for at in (2.0, 2.5)],
        "ended": 3.0,
    }
    answer = go_answer(line)
    assert (answer.sent, answer.token, answer.ended) == (1.0, 2.0, 3.0)
    with pytest.raises(RuntimeError, match="without a token"):
        go_answer({**line, "messages": []})


def test_a_daemon_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A request that fails is no sample."""
    with pytest.raises(RuntimeError, match="a request failed"):
        CALLERS["stub"](f"unix:{tmp_path}/none", [make_request([1, 2], 1)], 0.0)
