"""Text to token ids and back for a Hugging Face folder: its tokenizer.json, special tokens and chat template.

It uses the `tokenizers` library directly, and transformers only for folders without a tokenizer.json. It knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hotgraph_server.errors import InvalidRequestError, ModelLoadError, NotPossibleError, Violation
from hotgraph_server.models.chat_template import ChatTemplate, ChatTemplateError
from hotgraph_server.models.json_file import read_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SPACE_MARK = "▁"  # SentencePiece's way to write a space in a piece


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What stands beside the tokenizer proper: `special_tokens` by name (as in SPECIAL_TOKENS), and the chat template."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str = ""


class HuggingFaceTokenizer:
    """Implements `text.Tokenizer`. Thread-safe: nothing in it changes after it is made."""

    def __init__(self, backend: Tokenizer, settings: TokenizerSettings, *, eos_token_ids: Iterable[int] = ()) -> None:
        """`eos_token_ids` are the model's; the tokenizer's own end-of-text token is added to them.

        Raises ModelLoadError for a chat template that is no template.
        """
        backend.no_truncation()  # both may be left in the file by whoever trained it, and would change prompts
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(settings.special_tokens)
        self._added_tokens = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._piece_kind = _piece_kind(backend)
        self._template = ChatTemplate(settings.chat_template) if settings.chat_template else None
        self.chat_template = settings.chat_template
        self.vocabulary_size = max(
            backend.get_vocab_size(with_added_tokens=True), 1 + max(self._added_tokens, default=-1)
        )
        self.bos_token_id = self._special_id("bos_token")
        own_eos = self._special_id("eos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if own_eos is None else {own_eos})

    @property
    def backend(self) -> Tokenizer:
        """The library's tokenizer."""
        return self._backend

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognised."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of (role, content) turns in the model's chat template.

        Raises NotPossibleError without a template, InvalidRequestError for turns that the template does not take.
        """
        return self.encode(
            self.render_chat(messages, add_generation_prompt=add_generation_prompt), add_special_tokens=False
        )

    def render_chat(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text that `encode_chat` encodes. Raises as it does."""
        if self._template is None:
            raise NotPossibleError("the model has no chat template: send text or token ids")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(turns, self._special_tokens, add_generation_prompt=add_generation_prompt)
        except ChatTemplateError as error:
            raise InvalidRequestError([Violation("chat.messages", str(error))]) from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids, exactly: no clean-up of spaces, which could change text already streamed."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def piece(self, token_id: int) -> bytes:
        """The bytes one token stands for; maybe a part of a character. Empty for an id that is no token."""
        if (content := self._added_tokens.get(token_id)) is not None:
            return content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._piece_kind == "byte_level":
            return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in token)
        if self._piece_kind == "sentencepiece":
            return _sentencepiece_bytes(token)
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def load_tokenizer(folder: Path, *, eos_token_ids: Iterable[int] = ()) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder. Raises ModelLoadError naming the file that is missing or wrong.

    What tokenizer.json says about tokens put around a text holds; add_bos_token and the like beside it are passed over, as
    they are in transformers.
    """
    config_path, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = read_json(config_path, is_optional=True)
    special = read_json(folder / "special_tokens_map.json", is_optional=True) | config
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no error type of its own
            raise ModelLoadError(f"{path}: is no readable tokenizer ({error})") from error
    else:
        backend = _through_transformers(folder)
    try:
        tokens = {name: _content(special[name]) for name in SPECIAL_TOKENS if special.get(name)}
        template = _chat_template(folder, config)
        if path.is_file():
            _add_missing_tokens(backend, config, tokens)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{config_path}: is not in the form of a tokenizer's configuration ({error!r})") from error
    return HuggingFaceTokenizer(backend, TokenizerSettings(tokens, template), eos_token_ids=eos_token_ids)


def _content(token: Any) -> str:
    """A special token's text: the files write it as a string or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _add_missing_tokens(backend: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Tokens that only tokenizer_config.json knows, as transformers adds them: in order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            flags = {
                name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            backend.add_tokens([AddedToken(entry["content"], **flags)])
            known.add(entry["content"])
    for token in special_tokens.values():
        if token not in known:
            backend.add_special_tokens([AddedToken(token, special=True)])
            known.add(token)


def _through_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and folders with a tokenizer.json need none of it

    names = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "merges.txt")
    if not any((folder / name).is_file() for name in names):
        raise ModelLoadError(f"{folder / 'tokenizer.json'}: is missing, and there is no other tokenizer file")
    try:
        built = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return built.backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelLoadError(f"{folder}: its tokenizer cannot be read ({error})") from error


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    """chat_template.jinja wins over tokenizer_config.json, where a list of named templates may stand."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({error})") from error
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return str(template)


def _piece_kind(backend: Tokenizer) -> str:
    """How the vocabulary writes bytes: "byte_level", "sentencepiece", or "other"."""
    if backend.decoder is None:
        return "other"
    steps = json.loads(backend.decoder.__getstate__())  # the decoder as JSON
    kinds = {step["type"]: step for step in (steps.get("decoders") or [steps])}
    if "ByteLevel" in kinds:
        return "byte_level"
    is_spaced = kinds.get("Replace", {}).get("pattern") == {"String": SPACE_MARK}
    return "sentencepiece" if is_spaced or kinds.keys() & {"Metaspace", "ByteFallback"} else "other"


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return token.encode()
    return token.replace(SPACE_MARK, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others are moved, in order, to U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF = _byte_alphabet()
