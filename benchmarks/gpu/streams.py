"""Streams of several clients at once, each client a process of its own, as users are: one process would wait for itself.

`python -m benchmarks.gpu.streams TARGET` is such a client: it reads wishes from its standard input, a JSON a line, and answers
each with the times of all tokens. It knows the daemon by its client library only. Times are of one clock on one machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hotgraph_client import Client, Finished, Receipt, Tokens

MAX_CLIENTS = 8
STOP_SECONDS = 30.0


def stream(client: Client, prompt: Sequence[int], max_tokens: int) -> tuple[float, list[float], list[int], Receipt]:
    """One greedy request: the time before it, the time of every token, the tokens, and the receipt."""
    begin_seconds = time.perf_counter()
    token_seconds: list[float] = []
    token_ids: list[int] = []
    receipt = Receipt()
    with client.generate(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, omit_text=True) as events:
        for event in events:
            if isinstance(event, Tokens):
                now = time.perf_counter()
                token_ids += event.token_ids
                token_seconds += [now] * len(event.token_ids)
            elif isinstance(event, Finished):
                receipt = event.receipt
    return begin_seconds, token_seconds, token_ids, receipt


class Clients:
    """Client processes at one daemon, made by `clients`. A stream is a thread of one of them."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def token_seconds(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[float]]:
        """Times of the tokens of so many streams at once. Raises RuntimeError with what was said of a stream that failed."""
        shares = [prompts[index :: len(self._processes)] for index in range(len(self._processes))]
        busy = [(process, share) for process, share in zip(self._processes, shares, strict=True) if share]
        for process, share in busy:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"prompts": share, "max_tokens": max_tokens}) + "\n")
            process.stdin.flush()
        found: list[list[float]] = []
        for process, _ in busy:
            assert process.stdout is not None
            line = process.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": "a client ended before it had answered"}
            if "error" in answer:
                raise RuntimeError(answer["error"])
            found += answer["token_seconds"]
        return found


@contextmanager
def clients(target: str, num_clients: int) -> Iterator[Clients]:
    """So many processes, or as many as there are processors or MAX_CLIENTS, if that is less."""
    count = max(1, min(num_clients, MAX_CLIENTS, (os.cpu_count() or 2) - 1))
    command = [sys.executable, "-m", "benchmarks.gpu.streams", target]
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(_stop, process)
            processes.append(process)
        yield Clients(processes)


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # which ends its loop
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _answer(client: Client, prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, object]:
    times: list[list[float]] = [[] for _ in prompts]
    errors: list[str] = []

    def read(index: int) -> None:
        try:
            times[index] = stream(client, prompts[index], max_tokens)[1]
        except Exception as error:  # told to whoever asked
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"error": errors[0]} if errors else {"token_seconds": times}


def main() -> None:
    """Answers until its input ends."""
    with Client(sys.argv[1]) as client:
        for line in sys.stdin:
            wish = json.loads(line)
            sys.stdout.write(json.dumps(_answer(client, wish["prompts"], wish["max_tokens"])) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
