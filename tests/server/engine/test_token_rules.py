"""Token rules are pure functions that say what they document."""

from __future__ import annotations

import zlib

from hotgraph_server.engine import History, echo_rule, hash_rule, script_rule
from hotgraph_server.engine.token_rules import BYTE_EOS, DEFAULT_ALPHABET
from hotgraph_server.request import SamplingParams

GREEDY, WARM = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)


def history(prompt: bytes, completion: bytes = b"", sampling: SamplingParams = GREEDY, seed: int = 0) -> History:
    """Of bytes."""
    return History(tuple(prompt), tuple(completion), sampling, seed)


def test_hash_rule_is_the_documented_function() -> None:
    """The next token is the CRC-32 of all ids, and of the seed unless greedy, in the alphabet."""
    ids = b"".join(byte.to_bytes(4, "little") for byte in b"abc")
    assert hash_rule()(history(b"ab", b"c")) == DEFAULT_ALPHABET[zlib.crc32(ids) % len(DEFAULT_ALPHABET)]
    with_seed = zlib.crc32(ids + (7).to_bytes(8, "little")) % 3
    assert hash_rule([10, 20, 30])(history(b"a", b"bc", WARM, 7)) == [10, 20, 30][with_seed]
    assert hash_rule()(history(b"ab", b"c", seed=9)) == hash_rule()(history(b"ab", b"c"))


def test_echo_rule_says_the_prompt_and_ends() -> None:
    """The prompt's tokens in order, then the end of text."""
    rule = echo_rule()
    assert [rule(history(b"hi", b"hi"[:said])) for said in range(3)] == [ord("h"), ord("i"), BYTE_EOS]


def test_script_rule_says_the_script_and_ends() -> None:
    """One script for all, or one for each prompt; other prompts are answered by the fallback."""
    rule = script_rule([5, 6], eos_token_id=1)
    assert [rule(history(b"x", bytes(said))) for said in range(3)] == [5, 6, 1]
    mapped = script_rule({tuple(b"x"): [9]}, otherwise=lambda _: 77)
    assert mapped(history(b"x")) == 9
    assert mapped(history(b"x", b"\x09")) == BYTE_EOS
    assert mapped(history(b"y")) == 77
