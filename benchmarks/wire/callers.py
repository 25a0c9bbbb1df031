"""Callers that send requests one at a time, with a pause between, and tell when each message came.

Times are seconds of `time.perf_counter`, on Linux the monotonic clock that all processes share. Each caller is a function of
the target, the requests, and the pause in seconds; it raises RuntimeError when a request fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import grpc

from hotgraph.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc
from hotgraph_client import Client, HotgraphError, Tokens
from hotgraph_client.sync_stream import READ_BY_THE_READER

GO_FOLDER: Final = Path(__file__).parent / "go_client"
GO_VARIABLE: Final = "HOTGRAPH_WIRE_CLIENT"  # the Go caller, built elsewhere: for a machine without Go
TIMEOUT_SECONDS: Final = 30.0
TOKENS_FIELD: Final = inference_service_pb2.GenerateResponse.DESCRIPTOR.fields_by_name["tokens"].number

GenerateRequest = inference_service_pb2.GenerateRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was sent, its first token was there, and its stream had ended."""

    sent: float
    token: float
    ended: float


Caller = Callable[[str, Sequence[GenerateRequest], float], list[Answer]]


def make_request(prompt_token_ids: Sequence[int], max_tokens: int) -> GenerateRequest:
    """Greedy, of that many tokens for certain."""
    return GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=prompt_token_ids),
        max_tokens=max_tokens,
        sampling=generation_pb2.SamplingParams(temperature=0.0),
        stop=generation_pb2.StopConditions(ignore_eos=True),
        output=generation_pb2.OutputOptions(omit_text=True),
    )


def call_stub(target: str, requests: Sequence[GenerateRequest], gap_seconds: float) -> list[Answer]:
    """gRPC's generated stub in Python, blocking, without a thread of its own: the least that a caller in Python can do."""
    answers = []
    with grpc.insecure_channel(target, options=[READ_BY_THE_READER]) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        for request in requests:
            time.sleep(gap_seconds)
            token: float | None = None
            sent = time.perf_counter()
            try:
                for response in stub.Generate(request, timeout=TIMEOUT_SECONDS):
                    if token is None and response.HasField("tokens"):
                        token = time.perf_counter()
            except grpc.RpcError as error:
                raise RuntimeError(f"a request failed: {error}") from error
            answers.append(_answer(sent, token, time.perf_counter()))
    return answers


def call_client(target: str, requests: Sequence[GenerateRequest], gap_seconds: float) -> list[Answer]:
    """Our own client, blocking."""
    answers = []
    with Client(target) as client:
        for request in requests:
            time.sleep(gap_seconds)
            token: float | None = None
            sent = time.perf_counter()
            try:
                with client.generate(
                    list(request.token_ids.ids),
                    max_tokens=request.max_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    omit_text=True,
                    timeout=TIMEOUT_SECONDS,
                ) as generation:
                    for event in generation:
                        if token is None and isinstance(event, Tokens):
                            token = time.perf_counter()
            except HotgraphError as error:
                raise RuntimeError(f"a request failed: {error}") from error
            answers.append(_answer(sent, token, time.perf_counter()))
    return answers


def call_go(target: str, requests: Sequence[GenerateRequest], gap_seconds: float) -> list[Answer]:
    """gRPC's client in Go, in a process of its own: what the server's side and the wire cost, with little of a caller's."""
    with tempfile.TemporaryDirectory(prefix="hotgraph-wire-") as folder:
        program = _go_program(Path(folder))
        command = [str(program), "-target", target, "-gap", f"{gap_seconds:.6f}s", "-timeout", f"{TIMEOUT_SECONDS}s"]
        lines = "".join(request.SerializeToString().hex() + "\n" for request in requests)
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the caller in Go failed: {done.stderr.strip()}")
    return [go_answer(json.loads(line)) for line in done.stdout.splitlines()]


def has_go() -> bool:
    """Whether there is a caller in Go, or what builds it."""
    return bool(os.environ.get(GO_VARIABLE)) or shutil.which("go") is not None


def build_go(program: Path) -> None:
    """Builds the caller in Go, statically linked, so that it runs on any Linux of this processor. Raises RuntimeError."""
    command = ["go", "build", "-trimpath", "-ldflags=-s -w", "-o", str(program.resolve()), "."]
    environment = {**os.environ, "CGO_ENABLED": "0"}
    done = subprocess.run(command, cwd=GO_FOLDER, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the caller in Go was not built: {done.stderr.strip()}")


def _go_program(folder: Path) -> Path:
    if built := os.environ.get(GO_VARIABLE):
        return Path(built)
    build_go(folder / "caller")
    return folder / "caller"


def go_answer(line: dict[str, Any]) -> Answer:
    """What the caller in Go says of one request. Raises RuntimeError when it got no token."""
    tokens = (message["seconds"] for message in line["messages"] if message["field"] == TOKENS_FIELD)
    return _answer(line["sent"], next(tokens, None), line["ended"])


def _answer(sent: float, token: float | None, ended: float) -> Answer:
    if token is None:
        raise RuntimeError("a request ended without a token")
    return Answer(sent, token, ended)


CALLERS: Final[Mapping[str, Caller]] = MappingProxyType({"stub": call_stub, "client": call_client, "go": call_go})
