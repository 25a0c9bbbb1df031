"""What a fake engine says next: pure functions of what a sequence holds, so that tests can demand any completion."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hotgraph_server.request import SamplingParams

DEFAULT_ALPHABET = tuple(b"abcdefghijklmnopqrstuvwxyz ")
BYTE_EOS = 256
"""The id that ends the text for `text.ByteTokenizer`."""


@dataclass(frozen=True, slots=True)
class History:
    """All that a next token may depend on."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int


TokenRule = Callable[[History], int]


def hash_rule(alphabet: Sequence[int] = DEFAULT_ALPHABET) -> TokenRule:
    """The CRC-32 of all token ids so far, each as four little-endian bytes, then of the seed (eight bytes) unless greedy;
    modulo the size of `alphabet`, the index of the next token in it. Never ends by itself."""

    def rule(history: History) -> int:
        ids = history.prompt_token_ids + history.completion_token_ids
        data = struct.pack(f"<{len(ids)}I", *ids)
        if not history.sampling.is_greedy:
            data += history.seed.to_bytes(8, "little")
        return alphabet[zlib.crc32(data) % len(alphabet)]

    return rule


def echo_rule(eos_token_id: int = BYTE_EOS) -> TokenRule:
    """Says the prompt again, token by token, then ends the text."""

    def rule(history: History) -> int:
        num_said = len(history.completion_token_ids)
        return history.prompt_token_ids[num_said] if num_said < len(history.prompt_token_ids) else eos_token_id

    return rule


def script_rule(
    script: Sequence[int] | Mapping[tuple[int, ...], Sequence[int]],
    *,
    eos_token_id: int = BYTE_EOS,
    otherwise: TokenRule | None = None,
) -> TokenRule:
    """Says `script`, then ends the text. A mapping holds a script for each prompt; other prompts go to `otherwise`
    (default: `hash_rule()`)."""
    fallback = otherwise or hash_rule()

    def rule(history: History) -> int:
        lines = script.get(history.prompt_token_ids) if isinstance(script, Mapping) else script
        if lines is None:
            return fallback(history)
        num_said = len(history.completion_token_ids)
        return lines[num_said] if num_said < len(lines) else eos_token_id

    return rule
