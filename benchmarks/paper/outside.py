"""Adapters to other engines, for the same prompts on the same GPU with random weights of the same shape.

They are imported only when they are asked for, and nothing here installs them. Their weights are their own random ones
("dummy"): the time of a step does not depend on them.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.models import SHAPES

MEMORY_SHARE = 0.5  # of the GPU, weights included; the rest belongs to what else this process holds


class OutsideEngine:
    """An engine with a blocking call. `ask` takes token ids and a number of tokens, and gives the tokens."""

    def __init__(self, ask: Callable[[list[int], int], Sequence[int]], close: Callable[[], None]) -> None:
        self._ask = ask
        self._close = close

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Exactly `num_tokens` greedy tokens. Raises RuntimeError when there are fewer."""
        tokens = list(self._ask(list(prompt), num_tokens))
        if len(tokens) != num_tokens:
            raise RuntimeError(f"{len(tokens)} tokens came instead of {num_tokens}")
        return tokens

    def close(self) -> None:
        self._close()


def open_vllm(config_name: str, dtype: str) -> OutsideEngine:
    """vLLM's offline engine with its defaults: compiled, captured, prefix caching off. Raises ImportError."""
    vllm = importlib.import_module("vllm")
    folder = _config_folder(config_name)
    engine: Any = vllm.LLM(
        model=folder.name,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=dtype,
        enable_prefix_caching=False,
        gpu_memory_utilization=MEMORY_SHARE,
    )

    def ask(prompt: list[int], num_tokens: int) -> Sequence[int]:
        parameters = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        (result,) = engine.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        ids: Sequence[int] = result.outputs[0].token_ids
        return ids

    return OutsideEngine(ask, folder.cleanup)


def open_tensorrt_llm(config_name: str, dtype: str) -> OutsideEngine:
    """TensorRT-LLM's LLM interface with its defaults. Raises ImportError."""
    tensorrt_llm = importlib.import_module("tensorrt_llm")
    folder = _config_folder(config_name)
    engine: Any = tensorrt_llm.LLM(model=folder.name, load_format="dummy", skip_tokenizer_init=True, dtype=dtype)

    def ask(prompt: list[int], num_tokens: int) -> Sequence[int]:
        parameters = tensorrt_llm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, end_id=-1, pad_id=-1
        )
        ids: Sequence[int] = engine.generate(prompt, parameters, use_tqdm=False).outputs[0].token_ids
        return ids

    def close() -> None:
        engine.shutdown()
        folder.cleanup()

    return OutsideEngine(ask, close)


def _config_folder(config_name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder with the shape's config.json and nothing else."""
    folder = tempfile.TemporaryDirectory(prefix="hotgraph-bench-")
    config = SHAPES[config_name].config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder.name)
    return folder
