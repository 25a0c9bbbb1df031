"""A request that brings the daemon down, sent again and again: what becomes of it, and of those that run beside it.

The test is the supervisor: it starts the next life of the daemon when the last has ended, with the same crash record.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from hotgraph.v1.inference_service_pb2 import CompleteRequest
from tests.integration.harness import PATIENCE_SECONDS, Caller, WireError, wire_error
from tests.reliability.victims import is_free, victim

NUM_HONEST: Final = 6
NUM_TOKENS: Final = 40
POISON: Final = "poison, in words that no file may hold"

# The engine ends as `action` has it in the step in which a sequence with that prompt gets its token number `at`.
TRAP: Final = """
import os
from hotgraph_server.engine.fake import FakeEngine
own_sample = FakeEngine._sample

def sample(self, batch):
    for row in batch.rows:
        history = self._checker.history(row.slot) if row.is_sampled else None
        text = bytes(n for n in history.prompt_token_ids if n < 256) if history else b""
        if text == {poison!r} and len(history.completion_token_ids) >= {at}:
            {action}
    return own_sample(self, batch)

FakeEngine._sample = sample
"""
ACTIONS: Final = {
    "killed": ("os.kill(os.getpid(), 9)", -9),
    "failed": ("raise RuntimeError('sticky')", 70),
}


async def ask(caller: Caller, text: str) -> WireError | None:
    """None when it was served wholly."""
    try:
        response = await caller.inference.Complete(
            CompleteRequest(text=text, max_tokens=NUM_TOKENS), timeout=PATIENCE_SECONDS
        )
    except grpc.aio.AioRpcError as error:
        return wire_error(error)
    assert len(response.choices[0].token_ids) == NUM_TOKENS
    return None


async def live(folder: Path, waiting: set[str], action: str, at: int, **scheduler: Any) -> tuple[WireError | None, Any]:
    """One life, in which the poison and all who wait are sent at once; who is served is taken out of `waiting`.

    The answer to the poison, and the exit status, None for a life that goes on.
    """
    statement, _ = ACTIONS[action]
    more = TRAP.format(poison=POISON.encode(), at=at, action=statement)
    async with (
        victim(more=more, is_tcp=False, sections={"scheduler": {"num_slots": 16} | scheduler}) as daemon,
        Caller(daemon.address) as caller,
    ):
        names = sorted(waiting)
        errors = await asyncio.gather(*(ask(caller, name) for name in (POISON, *names)))
        waiting.difference_update(name for name, error in zip(names, errors[1:], strict=True) if error is None)
        if errors[0] is not None and errors[0].code is grpc.StatusCode.UNAVAILABLE:
            return errors[0], await daemon.process.ended()
        assert {error.code for error in errors[1:] if error} == set()
        assert any(errors[0] is None or errors[0].metadata["incident"] in line for line in daemon.process.log), (
            "the log names the incident"
        )
        response = await caller.health.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        await is_free(caller)
        await caller.check_alive()
        return errors[0], None


async def poison(action: str, at: int, num_crashes: int, *, remembers: bool = True) -> None:
    with tempfile.TemporaryDirectory(prefix="hg") as name:
        folder = Path(name)
        record = folder / "crashes"
        changes = {"crash_record": record} if remembers else {}
        waiting = {f"honest {number}" for number in range(NUM_HONEST)}
        for _ in range(num_crashes):
            error, status = await live(folder, waiting, action, at, **changes)
            assert error is not None
            assert status == ACTIONS[action][1]
        error, status = await live(folder, waiting, action, at, **changes)
        assert status is None, "it died again"
        assert error is not None
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert error.retry_seconds is None
        assert error.pushback_ms is None
        assert not waiting, "others are served"
        content = record.read_bytes()
        assert b"poison" not in content
        assert b"honest" not in content


@pytest.mark.parametrize("action", ACTIONS)
async def test_poison_is_refused_the_third_time(action: str) -> None:
    """A request at whose first token the daemon dies does so twice; then it is refused, and all others are served."""
    await poison(action, 0, 2)


async def test_poison_that_works_late_is_refused_the_fourth_time() -> None:
    """One that takes thirty tokens to it, after its trial, is found at the third crash, and nobody else is blamed."""
    await poison("killed", 30, 3)


async def test_poison_is_not_refused_without_a_record() -> None:
    """The control: without a crash record the daemon dies the third time."""
    with pytest.raises(AssertionError, match="it died again"):
        await poison("killed", 0, 2, remembers=False)
