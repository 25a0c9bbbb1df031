"""The comparison of the paper from command line to tables."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu.models import make_transformers, random_prompt
from benchmarks.paper import __main__ as paper
from benchmarks.paper import outside, plots
from benchmarks.paper.coverage import strategies
from benchmarks.paper.length_graphs import LengthGraphs
from benchmarks.paper.modes import MODES, TransformersEager
from benchmarks.paper.tables import Table, comma_separated, latex, markdown

SMALL = ["--lengths", "10,40", "--iterations", "2", "--p99-iterations", "3", "--gap-ms", "0", "--repeats", "1"]
SMALL += ["--long-lengths", "20", "--long-iterations", "4"]
SMALL += ["--decode-to", "16", "--decode-points", "12,16", "--longest", "24", "--stride", "5", "--capacity", "4"]
SMALL += ["--budget-graphs", "2", "--walk", "6", "--ablation-prompt", "20", "--ablation-tokens", "5"]
COMMANDS = (*paper.COMMANDS, paper.IPC)


@pytest.mark.usefixtures("shared_daemon")
def test_every_command(small: Sequence[str], tmp_path: Path) -> None:
    """All of them pass their checks, and write JSON, CSV, Markdown and LaTeX."""
    assert paper.main(["all", *small, *SMALL, "--out", str(tmp_path)]) == 0
    results: dict[str, Any] = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in COMMANDS}
    for name, result in results.items():
        assert result["results"]["tables"], name
        assert all(check["is_passed"] for check in result["checks"]), name
        assert result["checks"], name
        for table in result["results"]["tables"]:
            assert table["title"] in tables.tables(result)
            for suffix in ("csv", "md", "tex"):
                assert (tmp_path / f"{table['name']}.{suffix}").stat().st_size > 0

    ttft = results["ttft"]["results"]["ttft"]
    ran = [name for name in MODES if "lengths" in ttft[name]]
    assert ran == ["transformers eager", "CUDA graphs only", "JIT only", "hotgraph"]
    assert all(len(ttft[name]["lengths"]["40"]["many"]["samples_seconds"]) == 3 for name in ran)
    long_run = results["ttft-long"]["results"]
    assert all(len(long_run["ttft_long"][name]["lengths"]["20"]["many"]["samples_seconds"]) == 4 for name in ran)
    assert [(row[0], row[1]) for row in long_run["tables"][0]["rows"]] == [(20, name) for name in MODES]
    with (tmp_path / "ttft-p99.csv").open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    assert rows[0] == ["prompt tokens", *MODES]
    assert [row[0] for row in rows[1:]] == ["10", "40"]
    assert rows[1][-2:] == ["not run", "not run"]

    rolling = {row[0]: row for row in results["rolling"]["results"]["tables"][0]["rows"]}
    name, created, evicted, resident = rolling["a graph a length"][:4]
    assert created - evicted == resident == 4, name
    assert rolling["hotgraph"][3] <= 2

    names = {figure.name for result in results.values() for figure in plots.figures(result)}
    assert names == {"ttft", "ttft-p99", "decode", "decode-distribution"}
    for line in plots.figures(results["decode"])[0].lines:
        assert list(line.x) == [11, 12, 13, 14, 15, 16]
        assert len(line.y) == 6
    is_drawn = importlib.util.find_spec("matplotlib") is not None
    assert plots.main([str(tmp_path)]) == (0 if is_drawn else 1)
    assert len(list(tmp_path.glob("*.svg"))) == (4 if is_drawn else 0)


def test_length_graphs_give_the_models_tokens() -> None:
    """A graph of the exact length, and a longer one padded, give the token of the plain forward; the oldest goes first."""
    model = make_transformers("tiny", device=torch.device("cpu"), dtype=torch.float32)
    graphs = LengthGraphs(model, capacity=2)
    eager = TransformersEager(model)
    for length in (5, 9, 14):
        text = random_prompt(length, 512, random.Random(length))
        assert eager.is_likeliest(text, graphs.next_token(text))
        assert eager.is_likeliest(text, graphs.next_token(text, 14))
        assert not eager.is_likeliest(text, (graphs.next_token(text) + 1) % 512)
    assert graphs.lengths == [9, 14] or graphs.lengths == [14, 9]
    assert graphs.num_created - graphs.num_evicted == 2


def test_strategies_cover_every_length() -> None:
    """Each has a graph that holds the longest prompt, and no more beyond it than one."""
    for longest in (1, 37, 500, 512, 600):
        for name, sizes in strategies(longest).items():
            assert sizes == sorted(set(sizes)), name
            assert sizes[-1] >= longest, name
            assert len([size for size in sizes if size > longest]) <= 1, name


def test_an_outside_engine_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter gives vLLM a folder with the shape's config, token ids and greedy settings, and takes its ids."""
    seen: dict[str, Any] = {}

    class Engine:
        def __init__(self, **settings: Any) -> None:
            seen["config"] = json.loads((Path(settings["model"]) / "config.json").read_text())

        def generate(self, prompts: list[dict[str, Any]], parameters: dict[str, Any], use_tqdm: bool) -> list[Any]:
            seen["prompt"] = prompts[0]["prompt_token_ids"]
            ids = list(range(parameters["max_tokens"]))
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])]

    module = types.SimpleNamespace(LLM=Engine, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = outside.open_vllm("tiny", "float32")
    assert engine.generate((7, 8, 9), 3) == [0, 1, 2]
    assert seen["prompt"] == [7, 8, 9]
    assert seen["config"]["hidden_size"] == 64
    engine.close()


def test_an_engine_that_is_not_there_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its absence is an ImportError, which the comparison shows as not run."""
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ImportError):
        outside.open_tensorrt_llm("tiny", "float32")


def test_tables_say_what_they_are() -> None:
    """Every form has the figures, the note and the machine; what was not run says so."""
    table = Table("name", "Title & more", ("mode", "p50_ms"), [["ours", 1.23456], ["theirs", None]], "a note")
    for text in (markdown(table, "machine"), latex(table, "machine"), comma_separated(table, "machine")):
        for part in ("1.23", "not run", "a note", "machine"):
            assert part in text
    assert "1.23456" in comma_separated(table, "machine")
    assert r"Title \& more" in latex(table, "machine")
    assert r"p50\_ms" in latex(table, "machine")


def test_an_unknown_mode_is_refused(small: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mode that there is not ends the program before anything is measured."""
    with pytest.raises(SystemExit):
        paper.main(["ttft", *small, "--modes", "magic", "--out", str(tmp_path)])
    assert "no such mode: magic" in capsys.readouterr().err
