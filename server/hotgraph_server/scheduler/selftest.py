"""Generates a few tokens the way requests do, before anyone is told that the daemon serves.

It knows that tokens must come, and be tokens; whether they are good ones it cannot know.
"""

from __future__ import annotations

import asyncio
from typing import Final

from hotgraph_server.errors import EngineFailedError, InternalError, ModelLoadError
from hotgraph_server.request import GraphMode, GraphPolicy, Request, SamplingParams, StopParams, TokensEvent
from hotgraph_server.scheduler.scheduler import Scheduler
from hotgraph_server.text import Tokenizer

REQUEST_ID: Final = "self-test"
PROMPT: Final = "The sky is"
NUM_TOKENS: Final = 4
LIMIT_SECONDS: Final = 120.0  # the slowest processor with the largest model is quicker; what takes longer hangs


async def self_test(scheduler: Scheduler, tokenizer: Tokenizer, *, limit_seconds: float = LIMIT_SECONDS) -> None:
    """One greedy request through the scheduler that nobody else uses yet; its counts are forgotten afterwards.

    Raises ModelLoadError when what comes cannot be a model's answer (the same start would fail again), and
    EngineFailedError when the engine fails or is not done within the limit (a fresh process may do better).
    """
    request = Request(
        REQUEST_ID,
        tuple(tokenizer.encode(PROMPT)),
        max_tokens=NUM_TOKENS,
        sampling=SamplingParams(temperature=0.0),
        stop=StopParams(ignore_eos=True),
        graph_policy=GraphPolicy(
            GraphMode.EAGER_ONLY
        ),  # graphs are checked when they are captured, and cached for callers
    )
    token_ids: list[int] = []
    try:
        async with asyncio.timeout(limit_seconds), scheduler.submit(request) as stream:
            async for event in stream:
                if isinstance(event, TokensEvent):
                    token_ids += event.token_ids
            await scheduler.wait_idle()  # an engine that runs ahead may still have a step
    except TimeoutError:
        raise EngineFailedError(
            f"the engine did not make {NUM_TOKENS} tokens within {limit_seconds:.0f} s", retry_after_seconds=1.0
        ) from None
    except InternalError as error:
        raise ModelLoadError(
            "the model's logits are not finite: its weights are damaged or too large for dtype"
        ) from error
    if len(token_ids) != NUM_TOKENS or not all(0 <= token_id < tokenizer.vocabulary_size for token_id in token_ids):
        raise ModelLoadError(f"the model answered {token_ids} where {NUM_TOKENS} tokens were asked for")
    scheduler.forget_counts()
