"""Engine and tokenizer as the settings name them, made and not yet started. Torch is imported only when a model needs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from graphcache import CacheSettings, Clock
from hotgraph_server.config import Settings
from hotgraph_server.engine.interface import Engine
from hotgraph_server.text import ByteTokenizer, Tokenizer
from hotgraph_server.threads import in_daemon_thread

FAKE_SOURCE: Final = "fake"
FAKE_CONTEXT_LENGTH: Final = 1024


@dataclass(frozen=True, slots=True)
class Parts:
    """What serving needs and what is slow to make. The engine is not started yet."""

    engine: Engine
    tokenizer: Tokenizer
    model_id: str


BuildParts = Callable[[Settings, Clock], Awaitable[Parts]]


async def build_parts(settings: Settings, clock: Clock) -> Parts:
    """The parts that the settings name: source "fake" is the engine without a model, over bytes.

    Raises ModelLoadError or NotPossibleError.
    """
    if settings.model.source == FAKE_SOURCE:
        return _fake_parts(settings, clock)
    return await in_daemon_thread(lambda: _torch_parts(settings, clock), name="hotgraph-load")


def _fake_parts(settings: Settings, clock: Clock) -> Parts:
    from hotgraph_server.engine.fake import FakeEngine

    model_id = settings.model.id or FAKE_SOURCE
    context_length = settings.model.max_context or FAKE_CONTEXT_LENGTH
    block_size = settings.kv_cache.block_size
    blocks_per_slot = -(-context_length // block_size)
    engine = FakeEngine(
        clock=clock,
        cache_settings=CacheSettings(
            budget_bytes=settings.graphs.budget_bytes,
            policy=settings.graphs.policy,
            stall_budget_seconds=settings.graphs.stall_budget_seconds,
        ),
        num_slots=settings.scheduler.num_slots,
        num_blocks=1 + blocks_per_slot * settings.scheduler.num_slots,
        block_size=block_size,
        context_length=context_length,
        max_step_tokens=settings.scheduler.max_step_tokens,
        max_padding_ratio=settings.graphs.max_padding_ratio,
        model_id=model_id,
    )
    return Parts(engine, ByteTokenizer(), model_id)


def _torch_parts(settings: Settings, clock: Clock) -> Parts:
    """Imported here, because torch alone takes seconds and the daemon listens before."""
    from hotgraph_server.engine.engine import TorchEngine
    from hotgraph_server.models import load_model

    begin_seconds = clock.monotonic()
    loaded = load_model(settings.model)
    load_seconds = clock.monotonic() - begin_seconds
    engine = TorchEngine(loaded, settings, clock=clock, load_seconds=load_seconds)
    return Parts(engine, loaded.tokenizer, loaded.model_id)
