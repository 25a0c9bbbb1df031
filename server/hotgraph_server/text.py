"""What the daemon needs of a tokenizer, and a byte-level one for tests. The real one is `models/tokenizer.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe."""

    vocabulary_size: int
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    chat_template: str  # empty when the model has none

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of (role, content) turns in the model's chat template. Raises NotPossibleError without a template."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def piece(self, token_id: int) -> bytes:
        """The bytes one token stands for; maybe a part of a character."""
        ...


class ByteTokenizer:
    """Token id n is byte n; 256 ends the text, 257 begins it. Ships for tests and for the fake engine."""

    vocabulary_size = 258
    eos_token_ids = frozenset({256})
    bos_token_id: int | None = 257
    chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = list(text.encode())
        return [257, *ids] if add_special_tokens else ids

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        text = "".join(f"<{role}>{content}\n" for role, content in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        special = {256: b"<eos>", 257: b"<bos>"}
        if skip_special_tokens:
            special = dict.fromkeys(special, b"")
        return b"".join(special.get(i, bytes([i]) if i < 256 else b"") for i in token_ids).decode(errors="replace")

    def piece(self, token_id: int) -> bytes:
        return {256: b"<eos>", 257: b"<bos>"}.get(token_id) or bytes([token_id])
