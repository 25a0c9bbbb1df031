"""The process of transformers' generate, seen from the comparison: started, asked, ended. It knows no torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STOP_SECONDS = 20.0


class ChildError(Exception):
    """The process ended before its time."""


@dataclass(frozen=True, slots=True)
class TimedTokens:
    """Generated tokens, a list for each prompt, and the seconds they took together."""

    seconds: float
    token_ids: list[list[int]]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.token_ids)) / self.seconds


class TransformersProcess:
    """A running `transformers_child`. `facts` is what it told of itself: versions, threads, kind of attention."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.facts = self._read()

    async def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, is_batched: bool = False) -> TimedTokens:
        """Generates `max_tokens` for every prompt. Raises ChildError."""
        request = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens, "is_batched": is_batched}
        answer = await asyncio.to_thread(self._exchange, request)
        return TimedTokens(answer["seconds"], answer["token_ids"])

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise ChildError("the process was started without pipes")
        with contextlib.suppress(BrokenPipeError):  # it ended; reading tells
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise ChildError("the process was started without pipes")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(_STOP_SECONDS)
            raise ChildError(f"the transformers process ended with status {status}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def transformers_process(folder: Path, num_threads: int) -> Iterator[TransformersProcess]:
    """Starts it and waits until the model is loaded; ends it on leaving. Raises ChildError."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hotgraph_server.bench.transformers_child", str(folder), str(num_threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"},
    )
    with process:
        try:
            yield TransformersProcess(process)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
