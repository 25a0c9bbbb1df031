"""The page about kernels and its pictures, from results that were made up and from those that are there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.gpu import page, pictures
from benchmarks.gpu.floor import Rates
from tests.benchmarks.made_up import made_up_breakdown, made_up_rates, part_of, result_of

MARKED = "Before.\n<!-- result: {} -->\nstale 1.23 ms\n<!-- end -->\nAfter.\n"


def test_the_page_is_as_its_results_say() -> None:
    """The page in docs has been written from the results beside it, and from nothing else."""
    assert page.main(["--check"]) == 0


def test_markers_are_filled_and_filled_again(tmp_path: Path) -> None:
    """A marker's content is replaced by the table of its part; doing it again changes nothing; text around it stays."""
    (tmp_path / "breakdown-x.json").write_text(json.dumps(made_up_breakdown("smollm2")))
    text = MARKED.format("breakdown-x, decode, batch 64")
    found = page.filled(text, tmp_path, tmp_path)
    assert "| gate_up | `sums_kernel` | 30 |" in found
    assert "batch 1:" not in found
    assert "stale" not in found
    assert found.startswith("Before.\n<!-- result: breakdown-x, decode, batch 64 -->\n")
    assert found.endswith("<!-- end -->\nAfter.\n")
    assert page.filled(found, tmp_path, tmp_path) == found
    whole = page.filled(MARKED.format("breakdown-x"), tmp_path, tmp_path)
    assert "prompt of 512:" in whole


@pytest.mark.parametrize("what", ["breakdown-y", "breakdown-x, decode, batch 3", "latency, floor"])
def test_what_was_not_measured_is_said(tmp_path: Path, what: str) -> None:
    """Without the result, or without that part of it, there is no figure."""
    (tmp_path / "breakdown-x.json").write_text(json.dumps(made_up_breakdown("smollm2")))
    (tmp_path / "latency.json").write_text(json.dumps(result_of("latency", "llama2-7b", {})))
    found = page.filled(MARKED.format(what), tmp_path, tmp_path)
    assert "Not measured yet" in found
    assert "stale" not in found


def test_a_latency_result_has_its_shares(tmp_path: Path) -> None:
    """With rates of its own run a latency result gives the floor of each cell."""
    level = {"ttft": {"100": part_of(0.005)}, "tpot": {"1": {"tpot": part_of(0.0033)}}}
    results = {"rates": made_up_rates(), "in process": level}
    settings = {"batch_prompt": 192, "batch_tokens": 128}
    (tmp_path / "latency.json").write_text(json.dumps(result_of("latency", "llama2-7b", results, **settings)))
    found = page.filled(MARKED.format("latency, floor"), tmp_path, tmp_path)
    assert "| 1 | 3.30 | 3.18 | 96% |" in found  # 13.35 GB at 4.2 TB/s


def test_pictures_stand_where_they_are(tmp_path: Path) -> None:
    """A picture that was drawn is linked from the page's folder; one that was not is told as that."""
    text = "<!-- picture: roofline-x -->\n<!-- end -->\n"
    assert "Not measured yet" in page.filled(text, tmp_path, tmp_path)
    (tmp_path / "roofline-x.svg").write_text("<svg/>")
    assert f"![roofline-x]({tmp_path.name}/roofline-x.svg)" in page.filled(text, tmp_path, tmp_path)


def test_points_are_rates_over_intensity() -> None:
    """A decode step does about a FLOP a byte, a prompt hundreds; every role with products has a point, and every step."""
    result = made_up_breakdown("llama2-7b")
    points = {(point.step, point.role): point for point in pictures.points_of(result)}
    roles = {"qkv", "attention", "output", "gate_up", "down", "head", pictures.WHOLE}
    assert {role for step, role in points if step == "decode, batch 1"} == roles
    assert points["decode, batch 1", "qkv"].intensity == pytest.approx(1, rel=0.01)
    assert points["prompt of 512", pictures.WHOLE].intensity > 400
    for (name, role), point in points.items():
        assert point.flops == pytest.approx(point.intensity * point.num_bytes)
        if role == pictures.WHOLE:
            step = result["results"]["steps"][name]
            assert point.flops == step["work"]["flops"] / step["device"]["summary"]["p50"]
    assert Rates.of(result["results"]["rates"]).copy_bytes == 4.2e12


def test_bars_add_up_to_the_step() -> None:
    """Bars are the kernels of one step, parted where the one before ends; the layer enlarged is one of the middle."""
    kept = pictures.bars_of(made_up_breakdown("llama2-7b"))
    assert kept is not None
    name, bars = kept
    assert name == "decode, batch 1"
    assert all(bar.begin_ms <= bar.alone_ms <= bar.end_ms for bar in bars)
    assert any(bar.alone_ms > bar.begin_ms for bar in bars)
    enlarged = pictures.middle_layer(bars)
    assert enlarged is not None
    layer, inside = enlarged
    assert layer == 16
    assert [bar.role for bar in inside] == ["qkv", "attention", "output", "gate_up", "down"]


def test_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With matplotlib both pictures are files, the same each time; without it the program says so and fails."""
    path = tmp_path / "breakdown.json"
    path.write_text(json.dumps(made_up_breakdown("smollm2")))
    status = pictures.main([str(path), "--out", str(tmp_path / "pictures")])
    if importlib.util.find_spec("matplotlib") is None:
        assert status == 1
        assert "matplotlib" in capsys.readouterr().err
        return
    assert status == 0
    drawn = {file.name: file.read_bytes() for file in (tmp_path / "pictures").iterdir()}
    assert set(drawn) == {"roofline-smollm2.svg", "timeline-smollm2.svg"}
    assert pictures.main([str(path), "--out", str(tmp_path / "again")]) == 0
    assert drawn == {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}


def test_what_is_no_breakdown_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another result is refused by its name."""
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(result_of("latency", "tiny", {})))
    assert pictures.main([str(path), "--out", str(tmp_path)]) == 1
    assert "no result of the breakdown" in capsys.readouterr().err
