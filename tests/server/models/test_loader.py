"""Tests of models/loader.py and what it opens: checkpoints, GGUF files, sources."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hotgraph_server.config import ModelSettings
from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models import convert, loader, registry, sources
from hotgraph_server.models.checkpoint import open_checkpoint, read_header
from hotgraph_server.models.gguf_file import GgufFile
from hotgraph_server.models.loader import choose_device, choose_dtype, load_model
from tests.server.models import tiny_models

CPU = torch.device("cpu")


def _settings(source: Path | str, **others: Any) -> ModelSettings:
    return ModelSettings(source=str(source), device="cpu", **others)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_folder(tmp_path: Path, num_shards: int) -> None:
    """A folder loads with its tokenizer, generation settings and id, whether its weights are one file or several."""
    folder = tiny_models.write_llama(tmp_path / "tiny-llama", num_shards=num_shards)
    loaded = load_model(_settings(folder))
    assert loaded.model.runner == "decoder"
    assert loaded.model.dtype == torch.float32
    assert loaded.model.device == CPU
    assert loaded.model.context_length == 128
    assert loaded.model.vocabulary_size == loaded.tokenizer.vocabulary_size
    assert loaded.model.num_parameters == sum(w.numel() for w in tiny_models.llama_weights(262).values())
    assert loaded.tokenizer.eos_token_ids == {0, 2}
    assert loaded.generation.temperature == 0.7
    assert loaded.model_id == "tiny-llama"
    assert load_model(_settings(folder, id="other", max_context=64)).model_id == "other"


@pytest.mark.parametrize("num_shards", [1, 2])
def test_checkpoint_reads_what_was_written(tmp_path: Path, num_shards: int) -> None:
    """Every tensor of a checkpoint is the one that was saved."""
    checkpoint = open_checkpoint(tiny_models.write_llama(tmp_path, num_shards=num_shards))
    expected = tiny_models.llama_weights(262)
    assert set(checkpoint) == set(expected)
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in expected.items())
    assert checkpoint.dtype == torch.float32


# Each takes a sound folder and breaks it; the message must have the text beside it.


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _truncate_into_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def _flip_header_length(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[5] ^= 0xFF
    path.write_bytes(data)


def _flip_header_text(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] ^= 0xFF
    path.write_bytes(data)


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _drop_tensor(folder: Path) -> None:
    _change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def _add_tensor(folder: Path) -> None:
    _change_weights(folder, lambda weights: weights.update({"model.layers.0.adapter.weight": torch.zeros(2)}))


def _reshape_tensor(folder: Path) -> None:
    _change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(7)}))


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _two_files_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    tiny_models.write_json(folder / "config.json", config | changes)


def _own_code(folder: Path) -> None:
    _edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    (folder / "mine.py").write_text("raise SystemExit('this code must never run')")


def _unsound_config(folder: Path) -> None:
    _edit_config(folder, hidden_size="large")


def _quantised(folder: Path) -> None:
    _edit_config(folder, quantization_config={"quant_method": "awq"})


def _nameless_config(folder: Path) -> None:
    _edit_config(folder, model_type=None)


def _small_vocabulary(folder: Path) -> None:
    _edit_config(folder, vocab_size=100)


def _wrong_eos(folder: Path) -> None:
    tiny_models.write_json(folder / "generation_config.json", {"eos_token_id": "</s>"})


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_truncate, r"model\.safetensors: .*truncated"),
        (_truncate_into_header, r"model\.safetensors: .*header"),
        (_flip_header_length, r"model\.safetensors: .*header"),
        (_flip_header_text, r"model\.safetensors: .*header"),
        (_drop_tensor, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        (_add_tensor, r"model\.layers\.0\.adapter\.weight"),
        (_reshape_tensor, r"model\.norm\.weight"),
        (_only_bin, r"pytorch_model\.bin: only safetensors"),
        (_no_weights, r"model\.safetensors: is missing"),
        (_two_files_without_index, r"model\.safetensors\.index\.json: is missing"),
        (_no_tokenizer, r"tokenizer\.json: is missing"),
        (_no_config, r"config\.json: is missing"),
        (_broken_config, r"config\.json: is no valid JSON"),
        (_own_code, r"config\.json: model_type 'mine' is not known, and the code it brings along \(auto_map\)"),
        (_unsound_config, r"config\.json"),
        (_quantised, r"config\.json: .*awq"),
        (_nameless_config, r"config\.json: names no model_type"),
        (_small_vocabulary, r"its tokenizer has 262 tokens, its model only 100"),
        (_wrong_eos, r"generation_config\.json: eos_token_id"),
    ],
)
def test_broken_folders(tmp_path: Path, break_it: Callable[[Path], None], said: str) -> None:
    """A broken folder is a ModelLoadError that names the folder and the file or tensor, whatever is wrong with it."""
    folder = tiny_models.write_llama(tmp_path / "broken")
    break_it(folder)
    with pytest.raises(ModelLoadError, match=said) as caught:
        load_model(_settings(folder))
    assert str(folder) in str(caught.value)


def test_missing_shard(tmp_path: Path) -> None:
    """A shard that is not there is named."""
    folder = tiny_models.write_llama(tmp_path, num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00003\.safetensors: is missing"):
        load_model(_settings(folder))


def test_index_that_lies(tmp_path: Path) -> None:
    """A tensor that the index puts into the wrong shard is named, and so is a path that leaves the folder."""
    folder = tiny_models.write_llama(tmp_path / "model", num_shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    tiny_models.write_json(path, index)
    with pytest.raises(ModelLoadError, match=r"has no tensor model\.ghost\.weight"):
        load_model(_settings(folder))
    shutil.move(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.safetensors")
    tiny_models.write_json(path, index)
    with pytest.raises(ModelLoadError, match="no safetensors file of the folder"):
        load_model(_settings(folder))


def test_auto_map_of_a_known_architecture_is_passed_over(tmp_path: Path) -> None:
    """A folder that asks for its own code, but for an architecture we know, loads without that code."""
    folder = tiny_models.write_llama(tmp_path)
    _edit_config(folder, auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"})
    (folder / "mine.py").write_text("raise SystemExit('this code must never run')")
    assert load_model(_settings(folder)).model.runner == "decoder"


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    """A safetensors file cut anywhere is refused by its header alone."""
    save_file({"a": torch.arange(3.0), "b": torch.zeros(2, 2)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert set(read_header(tmp_path / "whole.safetensors")) == {"a", "b"}
    for size in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"cut\.safetensors"):
            read_header(tmp_path / "cut.safetensors")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    """Two tensors over the same bytes are refused."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelLoadError, match="overlap"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "model.gguf", "~/nowhere", "a/b/c", "two words"])
def test_no_such_source(source: str) -> None:
    """A source that is neither here nor a possible hub id is not looked for on the hub."""
    with pytest.raises(ModelLoadError, match="no such folder or file"):
        load_model(_settings(source))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    """A file that is no GGUF file is refused."""
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"weights\.bin: is neither a folder nor a \.gguf file"):
        load_model(_settings(tmp_path / "weights.bin"))


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub or the lack of a network says becomes a ModelLoadError that names the id."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    response: Any = SimpleNamespace(headers={}, request=None)
    raised: list[Exception] = []

    def refuse(*_: object, **__: object) -> str:
        raise raised[0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for error, said in (
        (GatedRepoError("gated", response=response), "logged in"),
        (RepositoryNotFoundError("unknown", response=response), "no model of the hub"),
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("disk full"), "disk full"),
    ):
        raised[:] = [error]
        with pytest.raises(ModelLoadError, match=f"someone/model: .*{said}"):
            load_model(_settings("someone/model"))


def test_hub_fetches_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a hub model only safetensors, JSON, templates and tokenizer files are fetched."""
    import huggingface_hub

    patterns: list[str] = []
    folder = tiny_models.write_llama(tmp_path)

    def snapshot(hub_id: str, *, allow_patterns: list[str]) -> str:
        assert hub_id == "someone/model"
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_model(_settings("someone/model")).model_id == "someone/model"
    fetched = {
        name
        for name in ("a.py", "a.bin", "a.pt", "a.safetensors", "config.json")
        for p in patterns
        if Path(name).match(p)
    }
    assert fetched == {"a.safetensors", "config.json"}


def test_embedded_name_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name of an embedded model means that model, in the given cache, even beside a folder of the same name."""
    name = next(iter(registry.EMBEDDED))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "pull", lambda name, *, cache, progress: Path(cache) / name)
    source = sources.resolve(name, cache=Path("cache"))
    assert (source.path, source.model_id) == (Path("cache") / name, name)


def test_device_and_dtype_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto means float32 on the CPU and a half type on a GPU; a GPU asked for and not there is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    for wanted in ("cuda", "cuda:0", "cuda:3"):
        with pytest.raises(ModelLoadError, match=f"{wanted} was asked for"):
            choose_device(wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = choose_device("auto")
    assert gpu == choose_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(ModelLoadError, match="2 CUDA devices"):
        choose_device("cuda:2")
    assert choose_device("cpu") == CPU
    assert choose_dtype("auto", CPU, torch.bfloat16) == torch.float32
    assert choose_dtype("auto", gpu, torch.float16) == torch.float16
    assert choose_dtype("auto", gpu, torch.float32) == torch.bfloat16
    assert choose_dtype("float16", CPU, torch.float32) == torch.float16


def test_runner_can_be_forced(tmp_path: Path) -> None:
    """The bridge can be forced, and gives the same model; the decoder cannot be forced on what it does not know."""
    folder = tiny_models.write_llama(tmp_path / "llama")
    decoder, bridge = load_model(_settings(folder)).model, load_model(_settings(folder, runner="bridge")).model
    assert (decoder.runner, bridge.runner) == ("decoder", "bridge")
    assert decoder.num_parameters == bridge.num_parameters
    assert list(decoder.kv_layout) == list(bridge.kv_layout)
    gpt2 = _write_gpt2(tmp_path / "gpt2")
    assert load_model(_settings(gpt2)).model.runner == "bridge"
    with pytest.raises(ModelLoadError, match="use the bridge"):
        load_model(_settings(gpt2, runner="decoder"))


def test_batch_invariant_is_an_error_where_it_cannot_be(tmp_path: Path) -> None:
    """On the CPU, and for models of the bridge, loading fails and says why."""
    folder = tiny_models.write_llama(tmp_path / "llama")
    with pytest.raises(ModelLoadError, match=r"model\.batch_invariant needs an NVIDIA GPU of compute capability 9"):
        load_model(_settings(folder, batch_invariant=True))
    with pytest.raises(ModelLoadError, match=r"model\.batch_invariant needs a model that the lean decoder runs"):
        load_model(_settings(folder, runner="bridge", batch_invariant=True))


def _write_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny_models.write_llama(folder)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=262)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_drop_tensor, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (_reshape_tensor, r"model\.norm\.weight"),
        (_truncate, r"model\.safetensors: .*truncated"),
    ],
)
def test_broken_folders_for_the_bridge(tmp_path: Path, break_it: Callable[[Path], None], said: str) -> None:
    """The bridge does not run a model whose weights are not all there, though transformers would fill them in."""
    folder = tiny_models.write_llama(tmp_path / "broken")
    break_it(folder)
    with pytest.raises(ModelLoadError, match=said):
        load_model(_settings(folder, runner="bridge"))


def test_a_model_that_is_no_causal_one(tmp_path: Path) -> None:
    """A known configuration without a causal language model is refused."""
    folder = tiny_models.write_llama(tmp_path)
    tiny_models.write_json(folder / "config.json", {"model_type": "vit", "vocab_size": 262})
    with pytest.raises(ModelLoadError):
        load_model(_settings(folder))


def test_max_context_beyond_the_model(tmp_path: Path) -> None:
    """A context longer than the model's own is refused."""
    with pytest.raises(ModelLoadError, match="max_context"):
        load_model(_settings(tiny_models.write_llama(tmp_path), max_context=4096))


def test_gguf_holds_the_same_model(tmp_path: Path) -> None:
    """A GGUF file gives the weights, tokenizer and configuration of the folder it was made from."""
    weights = tiny_models.write_gguf(tmp_path / "tiny.gguf")
    folder = tiny_models.write_llama(tmp_path / "folder")
    file = GgufFile(tmp_path / "tiny.gguf")
    config = convert.read_config(file)
    expected = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    read = convert.GgufWeights(file, config)
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    assert all(read.shape(name) == tensor.shape for name, tensor in weights.items())
    ours, theirs = load_model(_settings(tmp_path / "tiny.gguf")), load_model(_settings(folder))
    assert ours.model_id == "tiny"
    assert ours.tokenizer.eos_token_ids == {2}
    text = "<|im_start|>hello  1 23, é"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.model.num_parameters == theirs.model.num_parameters


def test_gguf_with_two_ends(tmp_path: Path) -> None:
    """A GGUF file's end of turn ends a text too, there and in the folder made from it."""
    tiny_models.write_gguf(tmp_path / "tiny.gguf", eot_token_id=0)
    (tmp_path / "converted").mkdir()
    convert.write_folder(tmp_path / "tiny.gguf", tmp_path / "converted", notes={})
    for source in ("tiny.gguf", "converted"):
        assert load_model(_settings(tmp_path / source)).tokenizer.eos_token_ids == {0, 2}


def test_quantised_gguf(tmp_path: Path) -> None:
    """Quantised tensors are dequantised to what they stand for, in the order transformers wants them."""
    weights = tiny_models.write_gguf(tmp_path / "tiny.gguf", quantise=True)
    file = GgufFile(tmp_path / "tiny.gguf")
    read = convert.GgufWeights(file, convert.read_config(file))
    for name, tensor in weights.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0.003)


def test_gguf_in_a_folder(tmp_path: Path) -> None:
    """A folder with one GGUF file and no config.json is that file; with two, one must be named."""
    tiny_models.write_gguf(tmp_path / "tiny.gguf")
    assert sources.resolve(str(tmp_path)).path == (tmp_path / "tiny.gguf").resolve()
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match="name one of them"):
        sources.resolve(str(tmp_path))


def test_converted_folder_loads_everywhere(tmp_path: Path) -> None:
    """A converted folder is one that transformers reads, with the same weights and the same tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = tiny_models.write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "converted"
    folder.mkdir()
    told: list[tuple[int, int]] = []
    notes = {"NOTICE": "where it comes from"}
    convert.write_folder(tmp_path / "tiny.gguf", folder, notes=notes, progress=lambda *bytes_: told.append(bytes_))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    state = model.state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert model.generation_config.eos_token_id == 2
    loaded = load_model(_settings(folder))
    text = "hello  1 23 <|im_end|>"
    assert AutoTokenizer.from_pretrained(str(folder)).encode(text) == loaded.tokenizer.encode(text)
    assert (folder / "NOTICE").read_text() == "where it comes from"
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in weights.values())


def test_every_cut_of_a_gguf_file_is_an_error(tmp_path: Path) -> None:
    """A GGUF file cut anywhere is a ModelLoadError that names it."""
    tiny_models.write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 1, 4, 10, 24, 100, 1000, 3000, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            load_model(_settings(cut))


def test_gguf_of_an_unknown_kind(tmp_path: Path) -> None:
    """An architecture that nobody here can read is refused, naming the file."""
    tiny_models.write_gguf(tmp_path / "tiny.gguf", architecture="rwkv7")
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf"):
        load_model(_settings(tmp_path / "tiny.gguf"))


def test_gguf_through_the_bridge(tmp_path: Path) -> None:
    """A GGUF file runs through the bridge too, by force or because only transformers knows its names."""
    tiny_models.write_gguf(tmp_path / "llama.gguf")
    assert load_model(_settings(tmp_path / "llama.gguf", runner="bridge")).model.runner == "bridge"
    num_parameters = tiny_models.write_starcoder2_gguf(tmp_path / "starcoder2.gguf")
    loaded = load_model(_settings(tmp_path / "starcoder2.gguf"))
    assert (loaded.model.runner, loaded.model.architecture) == ("bridge", "Starcoder2ForCausalLM")
    assert loaded.model.num_parameters == num_parameters
    assert loaded.tokenizer.eos_token_ids == {2}


def test_llama3_rope_factors(tmp_path: Path) -> None:
    """Llama 3's rope factors in a GGUF file are recognised as the settings they come from; others are refused."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_theta": 500000.0, **scaling}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)

    class File(GgufFile):
        def __init__(self, factors: torch.Tensor) -> None:
            self.path = tmp_path / "llama3.gguf"
            self.metadata = {"general.architecture": "llama", "llama.rope.freq_base": 500000.0}
            self.tensors = {"rope_freqs.weight": None}  # type: ignore[dict-item]
            self._factors = factors

        def read_tensor(self, name: str) -> Any:
            return self._factors.numpy()

    assert convert._rope_scaling(File(plain / scaled)) == scaling
    with pytest.raises(ModelLoadError, match="rope factors"):
        convert._rope_scaling(File(torch.linspace(1, 5, 64)))


@pytest.mark.model
def test_smollm2_loads_in_time(smollm2_folder: Path) -> None:
    """The embedded model loads from its converted folder in under 3 seconds, imports apart, as the lean decoder."""
    import transformers.models.llama.configuration_llama  # noqa: F401 - imported before the clock starts

    from hotgraph_server.models import decoder  # noqa: F401

    times_seconds: list[float] = []
    while not times_seconds or (min(times_seconds) >= 3 and len(times_seconds) < 4):  # the machine may be busy
        start = time.perf_counter()
        loaded = load_model(_settings(smollm2_folder))
        times_seconds.append(time.perf_counter() - start)
    print(f"SmolLM2 loads in {min(times_seconds):.2f} s")
    assert min(times_seconds) < 3
    assert loaded.model.runner == "decoder"
    assert loaded.model.num_parameters == 134_515_008
    assert loaded.model.context_length == 8192
    assert loaded.generation == loader.GenerationDefaults()
