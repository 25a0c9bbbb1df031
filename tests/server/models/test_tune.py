"""Tuning for a model, on a bench without a GPU: which sizes are tuned, where the table goes, and that a decoder takes it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from graphcache import FakeClock
from hotgraph_server.config import ModelSettings
from hotgraph_server.errors import ModelLoadError, NotPossibleError
from hotgraph_server.kernels import tile_rows, tuning
from hotgraph_server.kernels.few_rows_cuts import SumTuning, Tuning
from hotgraph_server.kernels.tuning import ChainShape, Machine, read_table, table_of, write_table
from hotgraph_server.models import few_rows_layers, tune
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.few_rows_layers import FewRowsLayers, chain_shape
from hotgraph_server.models.loader import DecoderSizes, load_model, read_sizes
from hotgraph_server.models.shape import DecoderShape
from tests.server.kernels.fake_bench import FakeBench
from tests.server.models import tiny_models
from tests.server.models.driver import Driver, random_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MACHINE = Machine("NVIDIA H300", "600.1", "2.11.0", "3.6.0")
CONFIG = LlamaConfig(
    vocab_size=320,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    pad_token_id=None,
)
SIZES = DecoderSizes(DecoderShape.from_config(CONFIG), 64, torch.float16, CUDA)


class _NoDevice:
    """Stands in for torch.cuda.device where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU of MACHINE's kind, as far as names go. The folder where tables are looked for."""
    monkeypatch.setattr(few_rows_layers, "has_pdl", lambda device: True)
    monkeypatch.setattr(tuning, "has_pdl", lambda device: True)
    monkeypatch.setattr(tile_rows, "runs_on", lambda device: device == CUDA)
    monkeypatch.setattr(Machine, "of", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "device", _NoDevice)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: MACHINE.gpu)
    monkeypatch.setattr(tune, "read_sizes", lambda settings: SIZES)
    for module in (tune, tuning):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "tunings")
    return tmp_path / "tunings"


def wide_blocks(rows: int, name: str, cut: Tuning) -> float:
    """The fake GPU likes blocks of eight rows, or of 32."""
    return abs(cut.block_rows - (8 if isinstance(cut, SumTuning) else 32)) / 10


def bench(shape: ChainShape, device: torch.device) -> FakeBench:
    assert device == CUDA
    return FakeBench(shape, wide_blocks)


def test_a_table_is_made_where_the_daemon_looks(gpu: Path) -> None:
    """For the model's products and the rows that are served with these kernels; the default setting finds it."""
    stored = tune.tune(ModelSettings(), bench=bench, clock=FakeClock())
    assert stored.path == gpu / "nvidia-h300.json"
    assert stored.machine == MACHINE
    found = tuning.load_tunings(ModelSettings().tuning, CUDA)
    assert found.source == str(stored.path)
    products = chain_shape(SIZES.shape, torch.float16, 64).products
    assert set(found.measured) == {(product, rows) for product in products.values() for rows in (1, 2, 8)}
    for (_, rows), cut in found.measured.items():
        assert cut.block_rows == (8 if rows < 3 else 32)


def test_rows_that_other_kernels_serve_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper GPU a model with large layers takes other kernels from three tokens on; no small one does, nor elsewhere."""
    large = replace(chain_shape(SIZES.shape, torch.float16, 64), hidden_size=4096, intermediate_size=11008)
    for is_hopper in (False, True):
        monkeypatch.setattr(tile_rows, "runs_on", lambda device, is_hopper=is_hopper: is_hopper)
        assert tune.served_rows(chain_shape(SIZES.shape, torch.float16, 64), CUDA) == (1, 2, 8)
        assert tune.served_rows(large, CUDA) == ((1, 2) if is_hopper else (1, 2, 8))


def test_output_goes_where_it_is_told(gpu: Path, tmp_path: Path) -> None:
    """A file of its own, in a folder that is made; what the daemon looks at by default stays as it is."""
    path = tmp_path / "elsewhere" / "table.json"
    stored = tune.tune(ModelSettings(), rows=[16], output=path, bench=bench, clock=FakeClock())
    assert stored.path == path
    assert {rows for _, rows in read_table(path, MACHINE).measured} == {16}
    assert not gpu.exists()


def test_another_model_adds_to_the_table(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured for one model stays when another one is tuned."""
    first = tune.tune(ModelSettings(), rows=[1], bench=bench, clock=FakeClock())
    bfloat16 = DecoderSizes(SIZES.shape, 64, torch.bfloat16, CUDA)
    monkeypatch.setattr(tune, "read_sizes", lambda settings: bfloat16)
    second = tune.tune(ModelSettings(), rows=[1], bench=bench, clock=FakeClock())
    assert first.path == second.path
    measured = read_table(first.path, MACHINE).measured
    assert {shape.dtype for shape, _ in measured} == {"float16", "bfloat16"}
    assert {**first.tuned.table.measured, **second.tuned.table.measured} == measured


def test_a_folder_that_cannot_be_written_is_known_before_the_work(gpu: Path) -> None:
    """Nobody waits a minute for that."""
    gpu.write_text("a file where the folder should be", encoding="utf-8")

    def never(shape: ChainShape, device: torch.device) -> FakeBench:
        raise AssertionError("nothing is measured")

    with pytest.raises(OSError, match="exists"):
        tune.tune(ModelSettings(), bench=never, clock=FakeClock())


def test_no_room_on_the_gpu(gpu: Path) -> None:
    """Another process there leaves nothing to measure with: said in words."""

    def full(shape: ChainShape, device: torch.device) -> FakeBench:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(NotPossibleError, match="another process"):
        tune.tune(ModelSettings(), bench=full, clock=FakeClock())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (None, "through transformers"),
        (DecoderSizes(SIZES.shape, 64, torch.float32, CPU), "needs an NVIDIA GPU"),
        (DecoderSizes(SIZES.shape, 64, torch.float32, CUDA), "float32"),
    ],
    ids=["bridge", "CPU", "float32"],
)
def test_where_there_is_nothing_to_tune(
    sizes: DecoderSizes | None, words: str, gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why, and writes nothing."""
    monkeypatch.setattr(tune, "read_sizes", lambda settings: sizes)
    with pytest.raises(NotPossibleError, match=words):
        tune.tune(ModelSettings(), bench=bench, clock=FakeClock())
    assert not gpu.exists()


def test_sizes_are_those_of_the_model_that_would_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the configuration alone, in the dtype and on the device of the settings; none for what the bridge runs."""
    folder = tiny_models.write_llama(tmp_path / "tiny")
    settings = ModelSettings(source=str(folder), device="cpu", dtype="bfloat16")
    model = load_model(settings).model
    monkeypatch.setattr(Decoder, "from_config", None)  # no model is made
    sizes = read_sizes(settings)
    assert sizes is not None
    assert (sizes.dtype, sizes.device) == (torch.bfloat16, CPU)
    assert (sizes.shape.vocabulary_size, sizes.shape.num_layers) == (model.vocabulary_size, len(model.kv_layout))
    assert sizes.num_turned == sizes.shape.head_dim
    assert read_sizes(settings.model_copy(update={"runner": "bridge"})) is None
    with pytest.raises(ModelLoadError):
        read_sizes(ModelSettings(source=str(tmp_path / "absent"), device="cpu"))


def small_decoder(**options: Any) -> Decoder:
    model = random_model(CONFIG)
    weights = model.state_dict()
    return Decoder.from_config(model.config, weights, dtype=torch.float16, device=CPU, fuses_few_rows=True, **options)


def test_a_decoder_takes_the_table(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each product is told its own tuning for its number of rows, chosen once; the log says where it is from."""
    products = chain_shape(SIZES.shape, torch.float16, 64).products
    cuts: dict[str, Tuning] = {
        name: SumTuning(2, 256, num_warps=1, ahead=2, triggers_late=product.rule(1).triggers_late)
        for name, product in products.items()
    }
    table = table_of([(products[name], 1, cut) for name, cut in cuts.items()], "a file")
    told: list[Tuning | None] = []
    for name in ("few_rows_linear", "few_rows_qkv"):
        function = getattr(few_rows_layers, name)

        def noting(*arguments: Any, function: Any = function, **options: Any) -> Any:
            told.append(options["tuning"])
            return function(*arguments, **options)

        monkeypatch.setattr(few_rows_layers, name, noting)
    with caplog.at_level(logging.INFO, "hotgraph.models"):
        driver = Driver(small_decoder(tunings=table))
    assert "5 of 5 are cut up as measured (a file)" in caplog.text
    driver.step({"a": [3]})
    names = ("qkv", "output", "gate_up", "down")
    layer = [cuts[name] for name in names]
    assert told == [*layer, *layer, cuts["head"]]
    told.clear()
    driver.step({"a": [3], "b": [4], "c": [5]})
    layer = [products[name].rule(3) for name in names]
    assert told == [*layer, *layer, products["head"].rule(3)]
    told.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "hotgraph.models"):
        Driver(small_decoder()).step({"a": [3]})
    assert told[0] == products["qkv"].rule(1)
    assert "0 of 5 are cut up as measured; hotgraph tune measures them" in caplog.text


@pytest.mark.parametrize("choice", ["auto", "off", "file", "damaged"])
def test_the_loader_reads_the_table_of_the_settings(
    choice: str, gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, when the model is loaded; a damaged one is a warning, and the model loads."""
    folder = tiny_models.write_llama(tmp_path / "tiny")
    sizes = read_sizes(ModelSettings(source=str(folder), device="cpu", dtype="float16"))
    assert sizes is not None
    product = chain_shape(sizes.shape, sizes.dtype, sizes.num_turned).products["head"]
    own, other = ((product, 1, SumTuning(rows, 256, 1, ahead=1, triggers_late=True)) for rows in (2, 4))
    write_table(gpu / MACHINE.file_name, MACHINE, table_of([own], ""))
    write_table(tmp_path / "other.json", MACHINE, table_of([other], ""))
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    names = {"file": str(tmp_path / "other.json"), "damaged": str(tmp_path / "damaged.json")}
    tables: list[tuning.TuningTable] = []
    from_config = Decoder.from_config

    def noting(*arguments: Any, **options: Any) -> Decoder:
        tables.append(options["tunings"])
        return from_config(*arguments, **options)

    monkeypatch.setattr(Decoder, "from_config", noting)
    monkeypatch.setattr(FewRowsLayers, "suit", staticmethod(lambda layers: False))
    load_model(ModelSettings(source=str(folder), device="cpu", dtype="float16", tuning=names.get(choice, choice)))
    expected = {"auto": [own], "file": [other]}.get(choice, [])
    assert [dict(table.measured) for table in tables] == [{(shape, rows): cut for shape, rows, cut in expected}]
    assert ("are left aside" in caplog.text) == (choice == "damaged")
