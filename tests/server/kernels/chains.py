"""Sizes of models whose products of few rows are tuned in tests."""

from __future__ import annotations

import torch

from hotgraph_server.kernels.tuning import ChainShape

LLAMA_7B = ChainShape(4096, 11008, 32, 32, 128, 32000, 32, "silu", torch.float16, fuses_rope=True)
LLAMA_3_8B = ChainShape(4096, 14336, 32, 8, 128, 128256, 32, "silu", torch.bfloat16, fuses_rope=True)
SMOLLM2 = ChainShape(576, 1536, 9, 3, 64, 49152, 30, "silu", torch.float16, fuses_rope=True)
QWEN_LIKE = ChainShape(1024, 3072, 16, 8, 128, 151936, 28, "silu", torch.bfloat16, fuses_rope=False)
TINY = ChainShape(64, 96, 4, 2, 16, 160, 3, "gelu", torch.float16, fuses_rope=True)

CHAINS = {"7B": LLAMA_7B, "8B": LLAMA_3_8B, "135M": SMOLLM2, "qwen": QWEN_LIKE, "tiny": TINY}
