"""What the batch-invariant mode costs on a GPU: whole steps of a 7B Llama in both modes, and tunings of its long products.

`python -m tests.gpu.batch_invariant_times OUT.json [--sweep]` prints tables and writes all of it. All times are of graphs,
without the host and without sampling; between replays of long steps there is no pause, so these meet the GPU's power limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import make_loaded
from benchmarks.gpu.report import machine
from hotgraph_server.kernels.tile_rows_cuts import TileTuning, room_for, tuned
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton
from hotgraph_server.models.interface import KvTensors, Model, StepTensors
from tests.gpu.tile_rows_times import LAYER, NUM_LAUNCHES, graph_microseconds

CUDA = torch.device("cuda:0")
BLOCK_SIZE, MAX_BLOCKS = 16, 256
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (16, 64, 96, 128, 160, 192, 224, 256, 288, 320, 400, 512)  # sizes that steps are padded to
CONTEXTS = (256, 1024)
MAX_ROWS, MAX_TOKENS = 64, 512
SHARED_BYTES = 232_448


def step_of(query_lens: Sequence[int], context_len: int) -> StepTensors:
    """Rows of one context, in blocks of their own."""
    num_rows, num_tokens = len(query_lens), sum(query_lens)
    num_blocks = -(-context_len // BLOCK_SIZE)
    tables = torch.zeros(num_rows, MAX_BLOCKS, dtype=torch.int32)
    tables[:, :num_blocks] = 1 + torch.arange(num_rows * num_blocks).view(num_rows, num_blocks)
    positions = torch.cat([torch.arange(context_len - length, context_len) for length in query_lens])
    rows = torch.repeat_interleave(torch.arange(num_rows), torch.tensor(query_lens))
    slots = tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    return StepTensors(
        token_ids=torch.randint(0, 32000, (num_tokens,), device=CUDA),
        positions=positions.to(CUDA),
        kv_indices=slots.to(CUDA),
        block_tables=tables.to(CUDA),
        context_lens=torch.full((num_rows,), context_len, dtype=torch.int32, device=CUDA),
        query_starts=starts.int().to(CUDA),
        last_indices=(starts[1:] - 1).to(CUDA),
        query_lens=(),
        host_context_lens=(),
        num_decode_rows=0,
    )


def cache_of(model: Model) -> KvTensors:
    """Room for the largest batch and context."""
    num_blocks = 1 + MAX_ROWS * max(CONTEXTS) // BLOCK_SIZE

    def rooms() -> list[torch.Tensor]:
        return [
            torch.randn(num_blocks, BLOCK_SIZE, layer.num_heads, layer.key_dim, dtype=model.dtype, device=CUDA)
            for layer in model.kv_layout
        ]

    return KvTensors(rooms(), rooms(), BLOCK_SIZE)


def step_times(*, batch_invariant: bool) -> dict[str, float]:
    """Milliseconds of each kind of step."""
    model = make_loaded("llama2-7b", device=CUDA, dtype=torch.float16, batch_invariant=batch_invariant).model
    arena, cache = model.arena(MAX_TOKENS, MAX_ROWS), cache_of(model)
    steps = {f"{batch} rows, context {context}": ([1] * batch, context) for context in CONTEXTS for batch in BATCHES}
    steps |= {f"prompt of {length}": ([length], length) for length in PROMPTS}
    steps |= {"63 rows and a chunk of 193": ([1] * 63 + [193], 256)}
    found = {}
    for name, (query_lens, context) in steps.items():
        step = step_of(query_lens, context)
        found[name] = graph_microseconds([lambda step=step: model.forward(step, cache, arena)]) / 1000  # type: ignore[misc]
    return found


def tries(room: int) -> list[TileTuning]:
    """Tunings that split no sum and whose rings fit."""
    found = []
    for block_rows, num_warps in ((32, 4), (64, 4), (128, 8)):
        for parts in (1, 2, 4):
            for num_stages in range(2, 11):
                tuning = TileTuning(block_rows, parts, num_stages, num_warps)
                if tuning.shared_bytes(room) < SHARED_BYTES - 1024:
                    found += [tuning, replace(tuning, triggers_late=False)]
    return found


def sweep(num_rows: int) -> list[dict[str, Any]]:
    """Of each product the rule's time, the best tuning's, and that of torch, in microseconds; heads are not turned here."""
    result = []
    for projection in LAYER:
        x = torch.randn(num_rows, projection.num_inputs, dtype=torch.float16, device=CUDA)
        weights = [
            torch.randn(projection.num_weight_rows, projection.num_inputs, dtype=torch.float16, device=CUDA)
            for _ in range(4)
        ]
        out = x.new_zeros(num_rows, projection.num_outputs)
        wide = x.new_zeros(num_rows, projection.num_weight_rows)

        def microseconds(tuning: TileTuning, room: int) -> float:
            def work(layer: int) -> None:
                tile_rows_linear_triton(
                    x,  # noqa: B023  # it is called at once
                    weights[layer % 4],  # noqa: B023
                    out,  # noqa: B023
                    activation="silu" if projection.is_gated else None,  # noqa: B023
                    residual=None if projection.is_normed else out,  # noqa: B023
                    pdl=True,
                    tuning=tuning,
                    room=room,
                )

            return graph_microseconds([lambda i=i: work(i) for i in range(NUM_LAUNCHES)]) / NUM_LAUNCHES  # type: ignore[misc]

        head_dim = 128 if projection.name == "qkv" else 0
        own_room = room_for(num_rows, is_normed=projection.is_normed, head_dim=head_dim)
        own = tuned(
            num_rows,
            projection.num_weight_rows,
            projection.num_inputs,
            is_gated=projection.is_gated,
            is_normed=projection.is_normed,
            head_dim=head_dim,
        )
        rooms = sorted({own_room, 64, 128, 256} if num_rows > 64 else {own_room})
        rooms = [
            room for room in rooms if room >= min(num_rows, 128) and room <= (256 if projection.is_normed else 128)
        ]
        found = [(microseconds(tuning, room), room, str(tuning)) for room in rooms for tuning in tries(room)]
        torch_us = graph_microseconds(
            [lambda i=i: torch.mm(x, weights[i % 4].t(), out=wide) for i in range(NUM_LAUNCHES)]  # type: ignore[misc]  # noqa: B023
        )
        line = {
            "rows": num_rows,
            "name": projection.name,
            "rule": microseconds(own, own_room),
            "torch": torch_us / NUM_LAUNCHES,
            "best": sorted(found)[:5],
        }
        print(line)
        result.append(line)
    return result


def main() -> None:
    """Prints both tables and writes them."""
    parser = argparse.ArgumentParser(description="Times of the batch-invariant mode.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true", help="also tunings of products")
    parser.add_argument("--no-steps", action="store_true", help="only these")
    parser.add_argument(
        "--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 64, 128, 256, 384, 512]
    )
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "name": "batch-invariant",
        "environment": machine(CUDA),
        "device": torch.cuda.get_device_name(),
    }
    if not arguments.no_steps:
        plain, invariant = (step_times(batch_invariant=is_invariant) for is_invariant in (False, True))
        print(f"{result['device']}; milliseconds: default, batch-invariant, ratio")
        for name, milliseconds in plain.items():
            ratio = invariant[name] / milliseconds
            print(f"  {name:28} {milliseconds:7.3f} {invariant[name]:7.3f} {ratio:6.3f}")
        result |= {"default": plain, "batch-invariant": invariant}
    if arguments.sweep:
        result["products"] = [line for num_rows in arguments.rows for line in sweep(num_rows)]
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
