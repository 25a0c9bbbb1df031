"""The models of the benchmarks: shapes with random weights, made on the device itself. It knows no engine and no files.

A weight depends on its name and the seed alone, so our decoder and transformers' own model hold the same numbers.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.interface import Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TIE_TOLERANCES = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
"""Of a logit: two ways to compute one step in this dtype may differ by so much, so nearer tokens may change places."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, in the words of transformers' LlamaConfig, and the standard deviation of its weights."""

    sizes: Mapping[str, Any]
    weight_std: float

    def config(self) -> PretrainedConfig:
        from transformers import LlamaConfig  # slow to import, as below

        return LlamaConfig(**self.sizes, pad_token_id=None)

    def with_positions(self, num_positions: int | None) -> Shape:
        """The same for contexts of so many tokens, whatever the model was trained for; None: as it is."""
        if num_positions is None:
            return self
        return Shape({**self.sizes, "max_position_embeddings": num_positions}, self.weight_std)


SHAPES: dict[str, Shape] = {
    # Large enough for the longest prompt of the tables, small enough for two slow cores.
    "tiny": Shape(
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
        weight_std=0.2,
    ),
    "smollm2": Shape(  # SmolLM2-135M
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        weight_std=0.042,
    ),
    "llama2-7b": Shape(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
        weight_std=0.02,
    ),
    "llama3-8b": Shape(  # grouped-query attention: four query heads to a KV head
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
        weight_std=0.02,
    ),
}


class RandomWeights(Mapping[str, torch.Tensor]):
    """Weights by their transformers names, each drawn on `device` when it is asked for and kept by nobody.

    Matrices are normal with the shape's deviation, norms are near one. The same name gives the same numbers on one kind of
    device. Not to be read while a CUDA graph is captured: torch's generators know of captures.
    """

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        # Slow to import, and not imported by a daemon: the time to the first token is measured here, too.
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape.config())  # type: ignore[no-untyped-call]
        self.sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._std = shape.weight_std
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device=device)
        self._seed = seed

    def __getitem__(self, name: str) -> torch.Tensor:
        size = self.sizes[name]
        self._generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        values = torch.empty(size, dtype=self._dtype, device=self._device)
        if len(size) > 1:
            return values.normal_(0.0, self._std, generator=self._generator)
        return values.normal_(1.0, 0.1, generator=self._generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Loaded:
    """What an engine is given: a model in place and its name. `load_seconds`: what making it took."""

    model: Model
    model_id: str
    load_seconds: float


def make_loaded(
    config_name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_positions: int | None = None,
    batch_invariant: bool = False,
) -> Loaded:
    """Our decoder in this shape, on this device. num_positions: contexts it is made for; None: its model's own.

    Raises ModelLoadError where it cannot be batch-invariant and has to be.
    """
    begin_seconds = time.perf_counter()
    shape = SHAPES[config_name].with_positions(num_positions)
    config = shape.config()
    weights = RandomWeights(shape, dtype=dtype, device=device)
    model = Decoder.from_config(
        config, weights, dtype=dtype, device=device, max_context=None, batch_invariant=batch_invariant
    )
    synchronize(device)
    return Loaded(model, f"random-{config_name}", time.perf_counter() - begin_seconds)


def make_transformers(config_name: str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own model with the same weights as `make_loaded`, with its default attention (sdpa)."""
    shape = SHAPES[config_name]
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shape.config(), dtype=dtype, attn_implementation="sdpa"
        )
    weights = RandomWeights(shape, dtype=dtype, device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.eval()  # type: ignore[no-untyped-call]
    return model


def random_prompt(num_tokens: int, vocabulary_size: int, source: random.Random) -> tuple[int, ...]:
    """Token ids that no other prompt of the source begins with, but for chance."""
    return tuple(source.randrange(vocabulary_size) for _ in range(num_tokens))


def synchronize(device: torch.device) -> None:
    """Waits for the device, where there is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
