"""Tests of bench/record.py."""

import csv
import json
from pathlib import Path

import pytest

from hotgraph_server.bench.record import COLUMNS, SCHEMA, read_json, write_csv, write_json
from hotgraph_server.bench.sample import Sample, ServerView


def samples() -> list[Sample]:
    good = Sample(0, 1, 10, 3, 0.0, 0.001, 0.5, [0.1, 0.2, 0.2], num_events=2)
    good.server = ServerView(0.01, 0.05, 0.08, 0.45, 10, 0, 3, 1, 0)
    bad = Sample(1, 0, 10, 3, 0.25, 0.25, 0.3)
    bad.fail("QUEUE_FULL", 'too much waits, "really"\nsecond line')
    return [good, bad]


def test_json_and_back(tmp_path: Path) -> None:
    """What is written is read again as it was, the samples as samples, and the schema is named."""
    path = tmp_path / "run.json"
    document = {"kind": "load", "settings": {"seed": 1}, "requests": [sample.to_dict() for sample in samples()]}
    write_json(path, document)
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert read_json(path) == {"schema": SCHEMA, "kind": "load", "settings": {"seed": 1}, "requests": samples()}
    assert list(tmp_path.iterdir()) == [path]


def test_json_of_another_schema_is_refused(tmp_path: Path) -> None:
    """A file that is none of ours is an error, not an odd result."""
    path = tmp_path / "other.json"
    path.write_text('{"schema": "other/1"}')
    with pytest.raises(ValueError, match="schema"):
        read_json(path)


def test_json_holds_no_nan(tmp_path: Path) -> None:
    """A number that JSON does not have is refused before anything is written."""
    path = tmp_path / "run.json"
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert not path.exists()


def test_csv_and_back(tmp_path: Path) -> None:
    """A row a request with every column; what was not measured is empty, and text survives quotes and line breaks."""
    path = tmp_path / "run.csv"
    write_csv(path, samples())
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [COLUMNS, COLUMNS]
    good, bad = rows
    assert float(good["ttft_seconds"]) == 0.1
    assert float(good["tpot_seconds"]) == pytest.approx(0.05)
    assert float(good["max_itl_seconds"]) == pytest.approx(0.1)
    assert float(good["server_ttft_seconds"]) == 0.08
    assert (good["num_output_tokens"], good["num_events"], good["error"]) == ("3", "2", "")
    assert (bad["error"], bad["ttft_seconds"], bad["server_ttft_seconds"], bad["tpot_seconds"]) == (
        "QUEUE_FULL",
        "",
        "",
        "",
    )
    assert bad["error_message"] == 'too much waits, "really"\nsecond line'
    assert float(bad["end_to_end_seconds"]) == pytest.approx(0.05)
