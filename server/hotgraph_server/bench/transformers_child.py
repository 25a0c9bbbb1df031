"""The other side of `bench --compare-transformers`: a process of its own that runs transformers' generate and times it.

It knows no server. It reads one JSON request a line on standard input and answers each with one JSON line on standard
output; everything else it or its libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch


def main() -> int:
    """`python -m hotgraph_server.bench.transformers_child FOLDER NUM_THREADS`."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    folder, num_threads = sys.argv[1], int(sys.argv[2])

    import torch
    import transformers

    torch.set_num_threads(num_threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    side = TransformersSide(model)
    ready = {
        "load_seconds": time.perf_counter() - started,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "vocabulary_size": model.config.vocab_size,
    }
    _answer(answers, ready)
    for line in sys.stdin:
        request = json.loads(line)
        _answer(answers, side.run(request["prompts"], request["max_tokens"], is_batched=request["is_batched"]))
    return 0


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


class TransformersSide:
    """A model of transformers, asked as its documentation shows: generate, greedy, with its default KV cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.generation_config.eos_token_id = None  # both sides go on to the asked length, whatever is sampled

    def run(self, prompts: list[list[int]], max_tokens: int, *, is_batched: bool) -> dict[str, Any]:
        """New tokens of each prompt, exactly `max_tokens` each, and the seconds that generate took for all.

        One after another, or left-padded into one batch. Building the input tensors counts, as it does for the daemon.
        """
        started = time.perf_counter()
        if is_batched:
            token_ids = self._generate(prompts, max_tokens)
        else:
            token_ids = [self._generate([prompt], max_tokens)[0] for prompt in prompts]
        return {"seconds": time.perf_counter() - started, "token_ids": token_ids}

    def _generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        import torch

        length = max(map(len, prompts))
        ids: torch.Tensor = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
        mask: torch.Tensor = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=0,
            )
        rows: list[list[int]] = output[:, length:].tolist()
        return rows


if __name__ == "__main__":
    sys.exit(main())
