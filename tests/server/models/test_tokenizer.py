"""Tests of models/tokenizer.py and models/chat_template.py."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hotgraph_server.errors import InvalidRequestError, ModelLoadError, NotPossibleError
from hotgraph_server.models.tokenizer import HuggingFaceTokenizer, TokenizerSettings, load_tokenizer
from tests.server.models import tiny_models

CHATML = TokenizerSettings({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, tiny_models.CHAT_TEMPLATE)
TINY = HuggingFaceTokenizer(tiny_models.byte_level_tokenizer(), CHATML)
SENTENCEPIECE = HuggingFaceTokenizer(tiny_models.sentencepiece_tokenizer(), TokenizerSettings())

TEXTS = (
    "",
    "What is the capital of France?",
    "def f(x):\n    return x + 1234\n",
    "naïve café, 東京 is 首都; 🙂🙃 and \u200d joins",
    "  two spaces,\ttabs\r\n and 3.14159 or 1,000,000",
    "<|im_start|>user\nhi<|im_end|>",
    "a  1 12   123",
    "x" * 500,
)


@given(st.text())
def test_byte_level_text_survives(text: str) -> None:
    """Any text comes back whole, and the pieces of its tokens are its bytes."""
    ids = TINY.encode(text)
    assert TINY.decode(ids, skip_special_tokens=False) == text
    assert b"".join(TINY.piece(token_id) for token_id in ids) == text.encode()


@given(st.text(alphabet=st.characters(exclude_characters="▁", codec="utf-8")))
def test_sentencepiece_pieces_are_the_bytes(text: str) -> None:
    """The pieces of a SentencePiece-like vocabulary are the text's bytes after the space that it puts first."""
    ids = SENTENCEPIECE.encode(text)
    if not any(token in text for token in ("<unk>", "<s>", "</s>")):
        assert b"".join(SENTENCEPIECE.piece(token_id) for token_id in ids) == (b" " + text.encode() if text else b"")


def test_sentencepiece_byte_piece() -> None:
    """A byte-fallback token is its byte, and a word token has its space."""
    assert SENTENCEPIECE.piece(3 + 0xE6) == b"\xe6"
    assert SENTENCEPIECE.piece(SENTENCEPIECE.encode("hi")[0]) == b" hi"


def test_piece_of_added_and_unknown_tokens() -> None:
    """An added token is spelled out; an id that is no token has no bytes."""
    assert TINY.piece(2) == b"<|im_end|>"
    assert TINY.piece(10**6) == b""


def test_special_tokens_are_recognised_and_skipped() -> None:
    """Special tokens in a text are one id each, and decoding leaves them out unless told otherwise."""
    ids = TINY.encode("<|im_start|>hello<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert TINY.decode(ids) == "hello"
    assert TINY.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_chat_template() -> None:
    """Turns are rendered by the template, with or without the start of the answer, and no token is added around them."""
    turns = [("system", "Be brief."), ("user", "hello")]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert TINY.render_chat(turns, add_generation_prompt=False) == expected
    assert TINY.encode_chat(turns) == TINY.encode(expected + "<|im_start|>assistant\n")


def test_no_chat_template() -> None:
    """Without a template, chat is not possible."""
    with pytest.raises(NotPossibleError):
        SENTENCEPIECE.encode_chat([("user", "hi")])


def _with_template(template: str) -> HuggingFaceTokenizer:
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return HuggingFaceTokenizer(tiny_models.byte_level_tokenizer(), TokenizerSettings(tokens, template))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].role }}", "does not take them"),
        ("{{ 1 / 0 }}", "does not take them"),
        ("{{ messages + 1 }}", "does not take them"),
        ("{{ messages.append(1) }}", "does not take them"),
        ("{{ ''.__class__.__mro__ }}", "does not take them"),
    ],
)
def test_template_errors_are_the_requests(template: str, said: str) -> None:
    """Whatever goes wrong in a template is a violation of chat.messages; the sandbox holds."""
    with pytest.raises(InvalidRequestError) as caught:
        _with_template(template).encode_chat([("user", "hi")])
    (violation,) = caught.value.violations
    assert violation.field == "chat.messages"
    assert said in violation.description


def test_template_functions() -> None:
    """Templates may use what transformers gives them: tojson without HTML escapes, loop controls, generation blocks."""
    template = (
        "{{ bos_token }}{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}"
        "{% if tools is none and not documents %}{{ strftime_now('%Y')[:2] }}{% endif %}"
    )
    rendered = _with_template(template).render_chat([("user", "<b>é"), ("user", "second")])
    assert rendered == '<|im_start|>{"role": "user", "content": "<b>é"}20'


def test_broken_template_is_a_load_error() -> None:
    """A template that does not compile is found when the model is loaded, not by the first request."""
    with pytest.raises(ModelLoadError, match="template"):
        _with_template("{% for %}")


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    tiny_models.write_json(folder / "tokenizer_config.json", config)
    return folder


def test_folder(tmp_path: Path) -> None:
    """A folder's tokenizer has its special tokens, its template file first, and the model's end tokens beside its own."""
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "old"}
    folder = _write(tmp_path, tiny_models.byte_level_tokenizer(), config)
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = load_tokenizer(folder, eos_token_ids=[0])
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.chat_template == "new"
    assert tokenizer.vocabulary_size == len(tiny_models.byte_level_vocabulary()[0])


def test_named_templates(tmp_path: Path) -> None:
    """Of a list of named templates, the default one is taken."""
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = _write(tmp_path, tiny_models.byte_level_tokenizer(), {"chat_template": templates})
    assert load_tokenizer(folder).chat_template == "plain"


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_configuration_as_in_transformers(tmp_path: Path, flags: dict[str, bool]) -> None:
    """Flags in the configuration do what they do in transformers, and so do tokens named only there."""
    from transformers import AutoTokenizer

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        **flags,
    }
    folder = _write(tmp_path, tiny_models.byte_level_tokenizer(), config)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in (*TEXTS, "a<|pad|>b"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.vocabulary_size == len(theirs)


def test_truncation_left_in_the_file_is_ignored(tmp_path: Path) -> None:
    """A truncation or padding that someone left in tokenizer.json does not change prompts."""
    backend = tiny_models.byte_level_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(_write(tmp_path, backend, {}))
    assert len(tokenizer.encode("xyz" * 10)) == 30


def test_folder_without_tokenizer_json(tmp_path: Path) -> None:
    """A folder with only vocab.json and merges.txt is read through transformers."""
    tokens, merges = tiny_models.byte_level_vocabulary()
    tiny_models.write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    tiny_models.write_json(tmp_path / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in merges))
    tiny_models.write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello  world")) == "hello  world"
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json: is no readable tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: is no JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: is no valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "tokenizer_config.json: is not in the form"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}', "tokenizer_config.json: is not in the form"),
        ("tokenizer_config.json", '{"bos_token": {"text": 1}}', "tokenizer_config.json: is not in the form"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, said: str) -> None:
    """A damaged file is named."""
    folder = _write(tmp_path, tiny_models.byte_level_tokenizer(), {})
    (folder / name).write_text(content)
    with pytest.raises(ModelLoadError, match=said):
        load_tokenizer(folder)


def test_threads_agree() -> None:
    """Many threads that encode and decode at once get what one gets alone."""
    expected = [TINY.encode(text) for text in TEXTS]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(50):
            for text, ids in zip(TEXTS, expected, strict=True):
                if TINY.encode(text) != ids or TINY.decode(ids, skip_special_tokens=False) != text:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.model
def test_smollm2_tokens(smollm2_folder: Path) -> None:
    """SmolLM2 stops at <|im_end|>, adds no token of its own accord, and takes digits and spaces apart as it was trained."""
    tokenizer = load_tokenizer(smollm2_folder)
    assert tokenizer.eos_token_ids == {tokenizer.encode("<|im_end|>")[0]} == {2}
    assert tokenizer.bos_token_id == 1
    assert tokenizer.vocabulary_size == 49152
    assert [tokenizer.piece(i) for i in tokenizer.encode("a  1 12")] == [b"a", b"  ", b"1", b" ", b"1", b"2"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("Hello world")] == [b"Hello", b" world"]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert b"".join(tokenizer.piece(i) for i in ids) == text.encode()


@pytest.mark.model
def test_smollm2_as_transformers(smollm2_folder: Path) -> None:
    """Text and chats have the ids that transformers gives them for the same folder."""
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(smollm2_folder), AutoTokenizer.from_pretrained(str(smollm2_folder))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    for turns in ([("user", "Hi")], [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "1  2")]):
        messages = [{"role": role, "content": content} for role, content in turns]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(turns) == expected


@pytest.mark.model
def test_smollm2_chat(smollm2_folder: Path) -> None:
    """The template is SmolLM2's: ChatML, with its own system turn where there is none."""
    tokenizer = load_tokenizer(smollm2_folder)
    assert tokenizer.render_chat([("user", "Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.render_chat([("system", "S"), ("user", "U"), ("assistant", "A")], add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
