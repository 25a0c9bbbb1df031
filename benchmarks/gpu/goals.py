"""The figures that results are put beside: the goals of this project, and what vLLM did on the same kind of GPU.

Nothing here was measured by the programs beside this file. Every figure holds for a Llama-2-7B shape in float16 with random
weights on one H200, and says nothing on other hardware. Milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONFIG = "llama2-7b"

SOURCE = (
    "vLLM 0.26.0 with its defaults, in process, our own run on one H200 in November 2026; goal and gate are what this "
    "project set itself for that GPU, and figures from another one may not be set beside them"
)


@dataclass(frozen=True, slots=True)
class Target:
    """What is aimed at, and what must be reached, in the unit of its table."""

    goal: float
    gate: float


TTFT: Mapping[int, Target] = {
    10: Target(3.9, 4.5),
    32: Target(3.9, 4.5),
    64: Target(4.2, 4.8),
    100: Target(4.7, 5.2),
    200: Target(5.6, 6.2),
    300: Target(7.2, 8.0),
    400: Target(8.8, 9.8),
    500: Target(10.4, 11.5),
}
"""p50 in milliseconds by prompt tokens, a lone request over a Unix socket, warm."""

TTFT_P99_OVER_P50 = Target(1.05, 1.15)

TPOT: Mapping[int, Target] = {
    1: Target(3.2, 3.5),
    2: Target(3.35, 3.7),
    4: Target(3.5, 3.85),
    8: Target(3.7, 4.1),
    16: Target(4.1, 4.6),
    32: Target(4.8, 5.4),
    64: Target(6.0, 6.5),
}
"""Milliseconds by batch size, context 256."""

START_SECONDS = Target(8.0, 15.0)
CAPTURE_P99_RATIO = Target(1.05, 1.15)
CAPTURED_WITHIN = Target(100.0, 250.0)
GRPC_SHARE = Target(0.3, 0.6)
SMOLLM2_TPOT = Target(0.35, 0.6)

VLLM_TTFT: Mapping[int, float] = {10: 6.61, 50: 6.84, 100: 6.94, 200: 8.85, 300: 10.27, 400: 11.85, 500: 13.91}
VLLM_TPOT: Mapping[int, float] = {1: 4.56, 4: 4.61, 8: 4.83, 16: 5.09, 32: 5.65, 64: 6.55}
