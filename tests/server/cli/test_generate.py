"""`hotgraph generate` and `hotgraph tokenize` against a daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.cli.conftest import Run


def test_text_goes_to_standard_output(ask: Run) -> None:
    """The answer, and nothing else, is on standard output."""
    ran = ask("generate", "hello", "--max-tokens", "8", "--greedy")
    assert ran.status == 0, ran
    assert len(ran.stdout.rstrip("\n")) == 8
    assert ran.stderr == ""


def test_the_prompt_may_stand_in_four_places(ask: Run, tmp_path: Path) -> None:
    """Argument, file, standard input and a lone dash give the same prompt and so the same greedy answer."""
    file = tmp_path / "prompt.txt"
    file.write_text("hello\n", encoding="utf-8")
    options = ("-n", "8", "-g")
    ways = [
        ask("generate", "hello", *options),
        ask("generate", "--file", str(file), *options),
        ask("generate", *options, stdin="hello\n"),
        ask("generate", "-", *options, stdin="hello"),
        ask("generate", *options, "--ids", "257,104,101,108 108 111"),
    ]
    assert {(ran.status, ran.stdout) for ran in ways} == {(0, ways[0].stdout)}


def test_json_lines_are_the_events(ask: Run) -> None:
    """With --json each event is a line: started, tokens, finished, with the documented keys."""
    ran = ask("generate", "hello", "-n", "8", "-g", "--json")
    assert ran.status == 0, ran
    first, *middle, last = ran.json_lines
    assert first.keys() == {"event", "request_id", "model", "prompt_tokens", "seed"}
    assert (first["event"], first["model"], first["prompt_tokens"]) == ("started", "fake", 6)
    assert {line["event"] for line in middle} == {"tokens"}
    assert middle[0].keys() == {"event", "choice_index", "token_ids", "text", "logprobs", "finish"}
    assert sum(len(line["token_ids"]) for line in middle) == 8
    assert last.keys() == {"event", "choices", "usage", "timings", "receipt", "num_resumes"}
    assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "cached_prompt_tokens": 0}
    assert last["receipt"]["num_steps"] == 8


def test_json_without_stream_is_one_object(ask: Run) -> None:
    """With --json --no-stream the whole completion is one object, the same as the stream's."""
    whole = ask("generate", "hello", "-n", "8", "-g", "--json", "--no-stream").json
    assert whole.keys() == {"request_id", "model", "seed", "choices", "usage", "timings", "receipt", "num_resumes"}
    assert whole["choices"][0]["text"] == ask("generate", "hello", "-n", "8", "-g").stdout.rstrip("\n")
    assert ask("generate", "hello", "-n", "8", "-g", "--no-stream").stdout.rstrip("\n") == whole["choices"][0]["text"]


def test_statistics_go_to_standard_error(ask: Run) -> None:
    """--stats prints timings and receipt beside the answer, not in it."""
    ran = ask("generate", "hello", "-n", "8", "-g", "--stats")
    assert len(ran.stdout.rstrip("\n")) == 8
    for word in ("queue", "prefill", "TTFT", "TPOT", "8 completion tokens", "Receipt", "8 steps", "ended by length"):
        assert word in ran.stderr


def test_choices_are_numbered(ask: Run) -> None:
    """Several choices come one after the other, each under its number, whole."""
    ran = ask("generate", "hello", "-n", "8", "--seed", "1", "--choices", "3")
    assert ran.status == 0, ran
    parts = ran.stdout.strip().split("\n\n")
    assert [part[:4] for part in parts] == ["[1] ", "[2] ", "[3] "]
    assert all(len(part) == 12 for part in parts)
    assert ask("generate", "hello", "-n", "8", "--seed", "1", "--choices", "3", "--no-stream").stdout == ran.stdout


def test_a_seed_repeats(ask: Run) -> None:
    """The same seed gives the same text, another one another."""
    texts = [ask("generate", "hello", "-n", "32", "-T", "2", "--seed", seed).stdout for seed in ("5", "5", "6")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_all_options_reach_the_daemon(ask: Run) -> None:
    """Every sampling and request option is accepted and acts on the request."""
    sampling = "--temperature 0.5 --top-k 40 --top-p 0.9 --min-p 0.01 --seed 3 --repetition-penalty 1.1"
    penalties = "--presence-penalty 0.1 --frequency-penalty 0.1 --logit-bias 97=-100 --logit-bias 98=1.5"
    ending = "-n 6 --min-tokens 2 --stop zzz --stop yyy --stop-token-id 3 --include-stop --ignore-eos"
    request = (
        "--logprobs 2 --graphs eager-only --model fake --request-id cli-1 --session-key s --no-resume --timeout 30s"
    )
    ran = ask("generate", "hello", "--json", *f"{sampling} {penalties} {ending} {request}".split())
    assert ran.status == 0, ran
    started, *_, finished = ran.json_lines
    assert (started["request_id"], started["seed"]) == ("cli-1", 3)
    assert finished["receipt"]["num_graph_steps"] == 0
    logprobs = [entry for line in ran.json_lines[1:-1] for entry in line["logprobs"]]
    assert len(logprobs) == finished["usage"]["completion_tokens"]
    assert len(logprobs[0]["top"]) == 2


def test_chat_uses_the_template(ask: Run) -> None:
    """--chat and --system make a conversation of the prompt, which has more tokens than the text."""
    plain = ask("tokenize", "hi", "--no-special", "--json").json
    chat = ask("tokenize", "hi", "--chat", "--json").json
    system = ask("tokenize", "hi", "--system", "be brief", "--json").json
    assert bytes(plain["token_ids"]) == b"hi"
    assert bytes(chat["token_ids"]) == b"<user>hi\n<assistant>"
    assert bytes(system["token_ids"]) == b"<system>be brief\n<user>hi\n<assistant>"
    assert ask("generate", "hi", "--chat", "-n", "2", "--json").json_lines[0]["prompt_tokens"] == len(chat["token_ids"])


def test_tokenize_and_back(ask: Run) -> None:
    """Tokens are shown with position and piece, counted, and turned back to text; markup in them is text."""
    text = "a [b]<é>"
    shown = ask("tokenize", text)
    assert "11 tokens; the context holds 1024" not in shown.stdout  # ten bytes and the beginning of text
    assert "10 tokens; the context holds 1024" in shown.stdout
    assert "[" in shown.stdout
    assert ask("tokenize", text, "--count").stdout == "10\n"
    found = ask("tokenize", text, "--json").json
    assert found.keys() == {"token_ids", "pieces", "context_length"}
    ids = " ".join(map(str, found["token_ids"]))
    assert ask("tokenize", "--decode", ids).stdout == f"<bos>{text}\n"
    assert ask("tokenize", "--decode", ids, "--no-special", "--json").json == {"text": text}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--file", "b"], "give a prompt or --file, not both"),
        (["generate", "1", "--ids", "--chat"], "--ids does not go with --chat"),
        (["generate", "x", "--ids"], "no list of token ids: 'x'"),
        (["generate", "x", "--greedy", "--temperature", "1"], "--greedy is temperature 0"),
        (["generate", "x", "--logit-bias", "5"], "--logit-bias wants ID=BIAS"),
        (["generate", "x", "--logit-bias", "5=1", "--logit-bias", "5=2"], "each id once"),
        (["generate", "x", "--graphs", "maybe"], "--graphs is prefer, require, eager-only or a time"),
        (["generate", "x", "--timeout", "soon"], "not a time"),
        (["generate", "x", "--max-token", "3"], "No such option: --max-token"),
        (["generate", "x", "--top-k", "few"], "--top-k"),
        (["generate", "x", "y"], "unexpected extra argument"),
        (["tokenize", "5", "--ids"], "--ids does not go with this command"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, run: Run) -> None:
    """A wrong command line is told in words, with exit status 2, before any daemon is asked."""
    ran = run(*arguments)
    assert ran.status == 2, ran
    assert message in ran.stderr
    assert ran.stdout == ""


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    """A prompt file that cannot be read is one line."""
    ran = run("generate", "--file", str(tmp_path / "absent"))
    assert ran.status == 2
    assert ran.stderr == f"hotgraph: {tmp_path}/absent cannot be read: No such file or directory\n"


def test_input_that_is_no_text(run: Run) -> None:
    """Bytes that are not UTF-8 are told by position."""
    ran = run("generate", stdin=b"ab\xff")
    assert ran.status == 1
    assert ran.stderr == "hotgraph: standard input is not UTF-8 text: byte 2 is 0xff\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "max_tokens: must be at least 1 [INVALID_REQUEST]"),
        (["--temperature", "nan"], "sampling.temperature"),
        (["--model", "other"], "no model of this name: 'other' [MODEL_NOT_FOUND]"),
        (["-n", "5000"], "[CONTEXT_LENGTH]"),
    ],
)
def test_refused_requests(arguments: list[str], message: str, ask: Run) -> None:
    """What the daemon refuses is one line with its reason on standard error, and exit status 1."""
    ran = ask("generate", "hello", *arguments)
    assert ran.status == 1, ran
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_nobody_there(run: Run, tmp_path: Path) -> None:
    """Without a daemon the exit status is 69, and the line says how to start one."""
    ran = run("generate", "hello", "--target", f"unix:{tmp_path}/none.sock")
    assert ran.status == 69
    assert "no daemon answers" in ran.stderr
    assert "hotgraph serve starts one" in ran.stderr
    assert ran.stderr.count("\n") == 1
