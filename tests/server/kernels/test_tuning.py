"""Tables of tunings: what is looked up, what a file may hold, and that a bad one changes nothing but the log."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels import tuning
from hotgraph_server.kernels.few_rows_cuts import MAX_ROWS, ROW_CLASSES, DotTuning, SumTuning, Tuning, row_class
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton
from hotgraph_server.kernels.tuning import (
    NO_TUNINGS,
    SHIPPED_FOLDER,
    Machine,
    ProductShape,
    TuningTable,
    fault,
    load_tunings,
    read_table,
    store_table,
    table_of,
    write_table,
)
from tests.server.kernels.chains import CHAINS, LLAMA_7B
from tests.server.kernels.compiler import compile_launches

CUDA = torch.device("cuda", 0)
MACHINE = Machine("NVIDIA H300 PCIe", "600.1", "2.11.0", "3.6.0")
GATE_UP = LLAMA_7B.products["gate_up"]
QKV = LLAMA_7B.products["qkv"]
ONE = SumTuning(2, 2048, num_warps=4, ahead=2)
EIGHT = DotTuning(32, parts=1, num_warps=4, ahead=5, tokens_ahead=2)
TABLE = table_of([(GATE_UP, 1, ONE), (GATE_UP, 8, EIGHT), (QKV, 2, replace(ONE, triggers_late=True))], "a run")
MAX_SHARED_BYTES = 227 << 10  # of a program, at compute capability 9.0


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """On a GPU of MACHINE's kind: the user's own folder and the shipped one, both empty."""
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tuning, "cache_folder", lambda: own)
    monkeypatch.setattr(tuning, "SHIPPED_FOLDER", shipped)
    monkeypatch.setattr(tuning, "has_pdl", lambda device: device.type == "cuda")
    monkeypatch.setattr(Machine, "of", lambda device: MACHINE)
    return own, shipped


def test_each_number_of_rows_has_its_class() -> None:
    """One and two have their own, then up to 8 and up to 16."""
    assert [row_class(rows) for rows in range(1, MAX_ROWS + 1)] == [1, 2, *[8] * 6, *[16] * 8]


def test_what_was_measured_is_taken_and_the_rule_for_all_else() -> None:
    """By product and row class; another product, dtype or class has the rule's, and so has everything without a table."""
    tunings = TABLE.tunings_of(GATE_UP)
    assert list(tunings) == list(range(1, MAX_ROWS + 1))
    assert tunings[1] == ONE
    assert all(tunings[rows] == EIGHT for rows in range(3, 9))
    for rows in (2, *range(9, 17)):
        assert tunings[rows] == GATE_UP.rule(rows)
    for other in (replace(GATE_UP, dtype="bfloat16"), replace(GATE_UP, num_inputs=8192), LLAMA_7B.products["down"]):
        assert TABLE.tunings_of(other) == {rows: other.rule(rows) for rows in range(1, MAX_ROWS + 1)}
    assert NO_TUNINGS.tunings_of(GATE_UP) == {rows: GATE_UP.rule(rows) for rows in range(1, MAX_ROWS + 1)}


@pytest.mark.parametrize("name", CHAINS)
def test_the_rule_can_be_used_everywhere(name: str) -> None:
    """The bounds of a table leave the rule's own tunings in, whatever the product."""
    for product in CHAINS[name].products.values():
        for rows in ROW_CLASSES:
            assert fault(product.rule(rows), product, rows) is None


def test_products_of_a_chain() -> None:
    """They have the sizes of a layer's weights: query, key and value rows together, gates and ups together."""
    sizes = {name: (p.num_weight_rows, p.num_inputs) for name, p in CHAINS["8B"].products.items()}
    assert sizes == {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    }
    assert CHAINS["8B"].products["down"].num_bytes == 2 * 4096 * 14336


FAULTS: list[tuple[str, Tuning, int]] = [
    ("block_rows", replace(ONE, block_rows=3), 1),
    ("block_rows", replace(ONE, block_rows=1), 1),  # a pair of rows belongs to one program
    ("block_rows", replace(ONE, block_rows=32), 2),
    ("num_warps", replace(ONE, num_warps=3), 1),
    ("tile", replace(ONE, tile=2047), 1),
    ("tile", replace(ONE, tile=512), 1),
    ("tile", replace(ONE, tile=8192), 1),  # beyond the weight
    ("ahead", replace(ONE, ahead=0), 1),
    ("ahead", replace(ONE, ahead=9), 1),
    ("in flight", replace(ONE, block_rows=16, tile=4096), 1),
    ("number of rows", ONE, 8),
    ("number of rows", EIGHT, 2),
    ("another time", replace(ONE, triggers_late=True), 1),
    ("block_rows", replace(EIGHT, block_rows=8), 8),
    ("block_rows", replace(EIGHT, block_rows=48), 8),
    ("parts", replace(EIGHT, parts=3), 8),
    ("num_warps", replace(EIGHT, num_warps=16), 8),
    ("ahead", replace(EIGHT, ahead=17), 16),
    ("ahead", replace(EIGHT, parts=8, num_warps=8, ahead=4), 8),  # beyond the weight
    ("tokens_ahead", replace(EIGHT, tokens_ahead=0), 8),
    ("tokens_ahead", replace(EIGHT, tokens_ahead=6), 8),
    ("in flight", replace(EIGHT, block_rows=64, ahead=5), 8),
]


@pytest.mark.parametrize(("words", "cut", "rows"), FAULTS, ids=lambda value: str(value))
def test_what_no_kernel_takes_has_a_fault(words: str, cut: Tuning, rows: int) -> None:
    """And it says which; what it was made from has none."""
    assert fault(ONE, GATE_UP, 1) is None
    assert fault(EIGHT, GATE_UP, 8) is None
    problem = fault(cut, GATE_UP, rows)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize(
    ("cut", "rows"),
    [
        (SumTuning(16, 4096, num_warps=16, ahead=1), 2),
        (SumTuning(2, 4096, num_warps=1, ahead=1), 2),
        (SumTuning(2, 256, num_warps=1, ahead=8), 1),
        (SumTuning(16, 256, num_warps=1, ahead=2), 2),
        (DotTuning(64, 4, num_warps=8, ahead=1, tokens_ahead=1), 16),
        (DotTuning(64, 1, num_warps=8, ahead=4, tokens_ahead=4), 16),
        (DotTuning(16, 1, num_warps=8, ahead=16, tokens_ahead=4), 16),
        (DotTuning(16, 8, num_warps=2, ahead=2, tokens_ahead=2), 8),
    ],
    ids=str,
)
def test_what_has_no_fault_compiles_and_fits(cut: Tuning, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corners of what a table may say need no more shared memory than there is."""
    assert fault(cut, GATE_UP, rows) is None
    kernels = compile_launches(monkeypatch)
    weight = torch.empty(GATE_UP.num_weight_rows, GATE_UP.num_inputs, dtype=torch.float16)
    few_rows_linear_triton(torch.empty(rows, 4096).half(), weight, norm=weight[0], activation="silu", tuning=cut)
    assert 0 <= kernels[-1].metadata.shared <= MAX_SHARED_BYTES


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """Tunings, and whose they are, for the same GPU and Triton whatever the driver."""
    path = tmp_path / "new" / "table.json"
    write_table(path, MACHINE, TABLE)
    found = read_table(path, replace(MACHINE, driver_version="700", torch_version="3"))
    assert found.measured == TABLE.measured
    assert found.source == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert "triggers_late" not in path.read_text(encoding="utf-8")  # which no file may change


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the old table stays as it was, with nothing beside it."""
    path = tmp_path / "table.json"
    write_table(path, MACHINE, TABLE)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, MACHINE, NO_TUNINGS)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_storing_keeps_other_products(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is new replaces what is old, what is only old stays; a table of another machine goes."""
    path = tmp_path / "table.json"
    store_table(path, MACHINE, TABLE)
    other = SumTuning(8, 2048, num_warps=4, ahead=1)
    store_table(path, MACHINE, table_of([(GATE_UP, 1, other)], "again"))
    assert read_table(path, MACHINE).measured == {**TABLE.measured, (GATE_UP, 1): other}
    assert not caplog.records
    newer = replace(MACHINE, triton_version="4.0")
    store_table(path, newer, table_of([(GATE_UP, 1, other)], "again"))
    assert read_table(path, newer).measured == {(GATE_UP, 1): other}
    assert "triton version '3.6.0'" in caplog.text


def changed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    return edit


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def first(document: Any) -> Any:
    return document["products"][0]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "no JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "no JSON"),
    "nested without end": (lambda path: path.write_text("[" * 100_000), "no JSON"),
    "too large": (lambda path: path.write_text(" " * (tuning.MAX_FILE_BYTES + 1)), "too large"),
    "a list": (lambda path: path.write_text("[]"), "not of format"),
    "another format": (changed(lambda d: d.update(format=2)), "not of format"),
    "another GPU": (changed(lambda d: d["machine"].update(gpu="NVIDIA H100")), "gpu 'NVIDIA H100'"),
    "another Triton": (changed(lambda d: d["machine"].update(triton_version="3.7")), "triton version '3.7'"),
    "no products": (changed(lambda d: d.pop("products")), "products: Field required"),
    "more than there is": (changed(lambda d: first(d).update(shared=1)), "Extra inputs"),
    "a number as text": (changed(lambda d: first(d).update(num_inputs="4096")), "valid integer"),
    "another dtype": (changed(lambda d: first(d).update(dtype="float8")), "dtype"),
    "rows of no class": (changed(lambda d: first(d).update(rows=3)), "rows"),
    "a tuning for more rows": (changed(lambda d: first(d).update(rows=16)), "number of rows"),
    "an odd block": (changed(lambda d: first(d)["tuning"].update(block_rows=5)), "block_rows is 5"),
    "nothing ahead": (changed(lambda d: first(d)["tuning"].update(ahead=0)), "greater than or equal to 1"),
    "a huge tile": (changed(lambda d: first(d)["tuning"].update(tile=1 << 20)), "tile is 1048576"),
    "a trigger": (changed(lambda d: first(d)["tuning"].update(triggers_late=False)), "Extra inputs"),
    "a folder": (made_a_folder, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_table_is_left_aside_with_a_warning(
    damage: str, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """It is no error, and names file and reason; the one that is shipped serves instead, and without one the rule."""
    own, shipped = folders
    path = own / MACHINE.file_name
    write_table(path, MACHINE, TABLE)
    assert load_tunings("auto", CUDA).measured == TABLE.measured
    assert not caplog.records
    edit, words = DAMAGES[damage]
    edit(path)
    assert load_tunings("auto", CUDA).measured == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    assert words in caplog.text
    other = SumTuning(8, 2048, num_warps=4, ahead=1)
    write_table(shipped / MACHINE.file_name, MACHINE, table_of([(GATE_UP, 1, other)], "shipped"))
    assert load_tunings("auto", CUDA).measured == {(GATE_UP, 1): other}
    assert load_tunings(str(path), CUDA) is NO_TUNINGS


def test_which_table_is_taken(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """auto: this host's over what is shipped; off: none; a file: that one alone. Without a GPU that has them: none."""
    own, shipped = folders
    assert load_tunings("auto", CUDA) is NO_TUNINGS
    other = SumTuning(8, 2048, num_warps=4, ahead=1)
    down = LLAMA_7B.products["down"]
    write_table(shipped / MACHINE.file_name, MACHINE, table_of([(GATE_UP, 1, other), (down, 1, other)], ""))
    write_table(own / MACHINE.file_name, MACHINE, TABLE)
    taken = load_tunings("auto", CUDA)
    assert taken.measured == {**TABLE.measured, (down, 1): other}
    assert taken.source == f"{own / MACHINE.file_name} over {shipped / MACHINE.file_name}"
    assert load_tunings("off", CUDA) is NO_TUNINGS
    assert load_tunings("auto", torch.device("cpu")) is NO_TUNINGS
    assert load_tunings(str(shipped / MACHINE.file_name), CUDA).measured.keys() == {(GATE_UP, 1), (down, 1)}
    assert not caplog.records
    assert load_tunings(str(own / "absent.json"), CUDA) is NO_TUNINGS
    assert "absent.json cannot be read" in caplog.text


def test_shipped_tables_can_be_used() -> None:
    """Each is sound, of the version of Triton that is installed with us, and stands where a GPU of its kind looks for it."""
    paths = sorted(SHIPPED_FOLDER.glob("*.json"))
    assert [path.name for path in paths] == ["nvidia-h200.json"]
    for path in paths:
        machine = Machine(**json.loads(path.read_text(encoding="utf-8"))["machine"])
        assert machine.file_name == path.name
        assert machine.triton_version == metadata.version("triton")
        table = read_table(path, machine)
        for name in ("qkv", "output", "gate_up", "down"):
            for rows in ROW_CLASSES:
                assert (LLAMA_7B.products[name], rows) in table.measured


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Oct 7 2025\nGCC version: 12.3\n",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n", "570.86.15"),
        ("something else\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_driver_version(text: str | None, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the kernel module's; where that does not tell, it is unknown, which is no error."""
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tuning, "_VERSION_FILE", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H300 PCIe")
    machine = Machine.of(CUDA)
    assert machine.driver_version == version
    assert machine.file_name == "nvidia-h300-pcie.json"
    assert machine.torch_version == torch.__version__


def test_a_table_holds_nothing_that_cannot_be_used() -> None:
    """Who makes one of something else has made a mistake."""
    with pytest.raises(AssertionError, match="can be used"):
        table_of([(GATE_UP, 1, replace(ONE, block_rows=3))], "")
    with pytest.raises(AssertionError, match="can be used"):
        table_of([(ProductShape(64, 64, False, True, "float16"), 1, ONE)], "")


def test_a_table_says_where_it_is_from() -> None:
    """Of two the empty one is not named."""
    assert TABLE.over(NO_TUNINGS).source == NO_TUNINGS.over(TABLE).source == "a run"
    assert TABLE.over(TuningTable(TABLE.measured, "another")).source == "a run over another"
