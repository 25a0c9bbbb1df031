"""A run on disk: JSON with everything in it, and CSV with a row a request. The schema is in `bench/README.md`."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hotgraph_server.bench.sample import Sample

SCHEMA = "hotgraph-bench/1"

COLUMNS = (
    "index",
    "client",
    "num_prompt_tokens",
    "max_tokens",
    "num_output_tokens",
    "num_events",
    "scheduled_seconds",
    "lag_seconds",
    "ttft_seconds",
    "tpot_seconds",
    "max_itl_seconds",
    "end_to_end_seconds",
    "server_queue_seconds",
    "server_prefill_seconds",
    "server_ttft_seconds",
    "num_cached_prompt_tokens",
    "num_graph_steps",
    "num_eager_steps",
    "error",
    "error_message",
)


def csv_row(sample: Sample) -> dict[str, object]:
    """One request as a row of COLUMNS; what was not measured is empty."""
    gaps = sample.inter_token_latencies
    view = sample.server
    return {
        "index": sample.index,
        "client": sample.client,
        "num_prompt_tokens": sample.num_prompt_tokens,
        "max_tokens": sample.max_tokens,
        "num_output_tokens": sample.num_output_tokens,
        "num_events": sample.num_events,
        "scheduled_seconds": sample.scheduled,
        "lag_seconds": sample.lag,
        "ttft_seconds": sample.time_to_first_token,
        "tpot_seconds": sample.time_per_output_token,
        "max_itl_seconds": max(gaps) if gaps else None,
        "end_to_end_seconds": sample.end_to_end,
        "server_queue_seconds": view and view.queue_seconds,
        "server_prefill_seconds": view and view.prefill_seconds,
        "server_ttft_seconds": view and view.time_to_first_token_seconds,
        "num_cached_prompt_tokens": view and view.num_cached_prompt_tokens,
        "num_graph_steps": view and view.num_graph_steps,
        "num_eager_steps": view and view.num_eager_steps,
        "error": sample.error,
        "error_message": sample.error_message,
    }


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    """Writes a header and a row for each request. Raises OSError."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_row(sample) for sample in samples)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a run whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **document}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote; `requests` come back as samples. Raises OSError, ValueError."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not of schema {SCHEMA}")
    if "requests" in document:
        document["requests"] = [Sample.from_dict(value) for value in document["requests"]]
    return document
