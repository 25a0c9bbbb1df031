"""`hotgraph tune`: flags to a tuning run, its table, its JSON and its failures, with a run that measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graphcache import FakeClock
from hotgraph_server.cli import tune as command
from hotgraph_server.config import ModelSettings
from hotgraph_server.errors import ModelLoadError, NotPossibleError
from hotgraph_server.kernels.few_rows_cuts import ROW_CLASSES, Tuning
from hotgraph_server.kernels.tuner import tune_chain
from hotgraph_server.kernels.tuning import Machine
from hotgraph_server.models import tune as tuning
from hotgraph_server.models.tune import StoredTunings
from tests.server.cli.conftest import Run
from tests.server.kernels.chains import LLAMA_7B
from tests.server.kernels.fake_bench import FakeBench

MACHINE = Machine("NVIDIA H300", "600.1", "2.11.0", "3.6.0")


class Runs:
    """Stands in for `models.tune.tune`: notes what it is asked, and tunes on a fake bench."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.compile_seconds = 0.0
        self.wrong_blocks = 0
        monkeypatch.setattr(tuning, "tune", self._tune)

    def _tune(self, settings: ModelSettings, *, report: Any, **options: Any) -> StoredTunings:
        self.asked.append({"settings": settings, **options})
        if self.error is not None:
            raise self.error

        def cost(rows: int, name: str, cut: Tuning) -> float:
            return 0.5 - cut.block_rows / 100

        bench = FakeBench(
            LLAMA_7B,
            cost,
            clock=FakeClock(),
            compile_seconds=self.compile_seconds,
            wrong=lambda rows, name, cut: cut.block_rows == self.wrong_blocks,
        )
        tuned = tune_chain(
            bench, options["rows"] or (1, 2), seconds=options["seconds"], clock=bench.clock, report=report
        )
        return StoredTunings(tuned, MACHINE, options["output"] or Path("/cache/tunings/nvidia-h300.json"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def test_the_table(run: Run, runs: Runs) -> None:
    """Every product and row class has a line with its times, every chain a remark; the path is the last line."""
    ran = run("tune", "--model", "./llama", "--dtype", "float16", "--rows", "8,1")
    assert ran.status == 0, ran
    (asked,) = runs.asked
    assert (asked["settings"].source, asked["settings"].dtype) == ("./llama", "float16")
    assert (asked["rows"], asked["seconds"], asked["output"]) == ((1, 8), 60.0, None)
    lines = ran.stdout.splitlines()
    assert lines[0] == "NVIDIA H300, driver 600.1, triton 3.6.0"
    for word in ("product", "rows", "us before", "us after", "TB/s"):
        assert word in lines[1]
    for rows in (1, 8):
        for name in LLAMA_7B.products:
            assert sum(line.split()[:2] == [name, str(rows)] for line in lines) == 1
        assert sum(line.startswith(f"rows {rows}: the whole chain ") for line in lines) == 1
    assert "% less" in ran.stdout
    assert "block_rows=8" in ran.stdout
    assert "triggers" not in ran.stdout
    assert lines[-1] == "/cache/tunings/nvidia-h300.json"
    assert "hotgraph serve reads it" in ran.stderr
    assert "not everything" not in ran.stderr


def test_json(run: Run, runs: Runs, tmp_path: Path) -> None:
    """With --json there is one document with the documented keys, in seconds and bytes."""
    path = tmp_path / "table.json"
    document = run("tune", "--rows", "2", "--output", str(path), "--seconds", "2min", "--json").json
    assert runs.asked[0]["output"] == path
    assert runs.asked[0]["seconds"] == 120.0
    assert document.keys() == {"path", "machine", "products", "chains"}
    assert document["path"] == str(path)
    assert document["machine"]["gpu"] == "NVIDIA H300"
    assert len(document["products"]) == len(LLAMA_7B.products)
    for product in document["products"]:
        assert product.keys() == {
            *("name", "rows", "rule_seconds", "seconds", "bytes_per_second", "rule", "tuning"),
        }
        assert 0 < product["seconds"] <= product["rule_seconds"]
        assert product["tuning"]["block_rows"] >= 2
    (chain,) = document["chains"]
    assert chain.keys() == {
        *("rows", "rule_seconds", "seconds", "num_tried", "num_choices", "is_whole", "wrong"),
    }
    assert chain["is_whole"] is True


def test_by_default_it_is_what_the_daemon_would_serve(run: Run, runs: Runs, tmp_path: Path) -> None:
    """Model and rows come from where the daemon has them: variables, the file, and the decoder."""
    file = tmp_path / "settings.toml"
    file.write_text('[model]\nsource = "from-the-file"\nmax_context = 512\n', encoding="utf-8")
    assert run("tune", "--config", str(file), HOTGRAPH_MODEL__DTYPE="bfloat16").status == 0
    settings = runs.asked[0]["settings"]
    assert (settings.source, settings.dtype, settings.max_context) == ("from-the-file", "bfloat16", 512)
    assert runs.asked[0]["rows"] is None  # which is what is served
    assert command.ROW_CLASSES == ROW_CLASSES


def test_what_went_less_well_is_said(run: Run, runs: Runs) -> None:
    """Too little time, and results that were wrong, which is our mistake."""
    runs.compile_seconds = 1.0
    ran = run("tune", "--rows", "1", "--seconds", "10")
    assert ran.status == 0
    assert "not everything was tried" in ran.stderr
    runs.compile_seconds, runs.wrong_blocks = 0.0, 8
    ran = run("tune", "--rows", "1")
    assert "gave wrong results and was left aside" in ran.stderr


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (NotPossibleError("tuning needs an NVIDIA GPU, and there is none here"), 69, "needs an NVIDIA GPU"),
        (ModelLoadError("/llama: is missing"), 78, "/llama: is missing"),
        (PermissionError(13, "Permission denied", "/cache"), 1, "the table cannot be written"),
    ],
)
def test_failures(error: Exception, status: int, words: str, run: Run, runs: Runs) -> None:
    """Each has its status and one line."""
    runs.error = error
    ran = run("tune")
    assert ran.status == status
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not ran.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "3"], "1, 2, 8, 16"),
        (["--rows", ""], "1, 2, 8, 16"),
        (["--rows", "1,two"], "two"),
        (["--seconds", "soon"], "soon"),
        (["--seconds", "0"], "1 s to a day"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, run: Run, runs: Runs) -> None:
    """They are wrong usage, told before anything runs."""
    ran = run("tune", *flags)
    assert ran.status == 2
    assert words in ran.stderr
    assert not runs.asked


def test_without_a_gpu(run: Run, tmp_path: Path) -> None:
    """On the CPU the real command says what it needs, writes nothing, and ends with the status for that."""
    from tests.server.models import tiny_models

    folder = tiny_models.write_llama(tmp_path / "tiny")
    output = tmp_path / "table.json"
    ran = run("tune", "--model", str(folder), "--device", "cpu", "--output", str(output))
    assert ran.status == 69
    assert ran.stderr == "hotgraph: tuning needs an NVIDIA GPU, and there is none here\n"
    assert not output.exists()
