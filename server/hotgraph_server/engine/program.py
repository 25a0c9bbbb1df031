"""The step as a function over static buffers: what runs eagerly, and what graphcache is given to capture."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from graphcache import Backend, CaptureError, DeviceLostError
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.engine.buffers import ALL_WORK, RunLostError, StepResults
from hotgraph_server.engine.kv_cache import KvCache
from hotgraph_server.engine.probe import ProbeLayout
from hotgraph_server.engine.sampler import sample_step
from hotgraph_server.engine.state import StepState
from hotgraph_server.engine.thread import Deferred, ForwardThread
from hotgraph_server.models.interface import Model, StepTensors

log = logging.getLogger(__name__)

MEMORY_WAITS_SECONDS = (0.01, 0.03, 0.1, 0.3)  # recording takes some tens of milliseconds of a capture's time

TOLERANCE = 1e-2
"""Of a probe's largest logits and log-probabilities, absolute and relative: the same kernels in the same order give the same
numbers, so this only forgives a library that chooses another algorithm for another stream."""


class StepProgram:
    """prepare, forward, sample over a state's current content.

    `is_padded`: a bound function computes its key's whole shape, and all that sampling can do. Else it computes the shape
    and the work of the step that the buffers hold. `shadow`: a second state, for probes on the capture thread, which `backend`
    runs apart from what is served; None where nothing is verified. `is_idle`: whether no step is outstanding.
    """

    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        live: StepState,
        shadow: StepState | None,
        thread: ForwardThread,
        *,
        probe: ProbeLayout | None,
        backend: Backend,
        is_idle: Callable[[], bool],
        is_padded: bool,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._live = live
        self._shadow = shadow
        self._thread = thread
        self._probe = probe
        self._backend = backend
        self._is_idle = is_idle
        self._is_padded = is_padded
        self._expected: dict[StepKey, StepResults] = {}
        self._rehearsed: set[StepKey] = set()  # since they were bound

    def run(
        self,
        state: StepState,
        tokens: int,
        rows: int,
        sampler: Sampler,
        *,
        is_fixed: bool = False,
        give_way: Callable[[float], None] | None = None,
    ) -> None:
        """One step of this shape. `is_fixed`: nothing of the step at hand shapes the work. `give_way`: see Model.forward."""
        buffers = state.buffers
        with torch.inference_mode():  # a mode of the thread
            buffers.prepare(tokens, rows, block_size=self._kv_cache.block_size)
            step = buffers.step_tensors(tokens, rows)
            logits = self._forward(step, state, give_way)
            if give_way is not None and sampler is Sampler.FILTERED:
                give_way(math.inf)  # its many kernels are a part of their own
            sample_step(logits, buffers, sampler, ALL_WORK if is_fixed else buffers.step.work)

    def _forward(self, step: StepTensors, state: StepState, give_way: Callable[[float], None] | None) -> torch.Tensor:
        """The logits. Where the device lacks memory for it, it runs again a little later, a few times.

        torch itself gives back what it keeps and tries again, but not while a capture is under way anywhere; that is over soon.
        A step may run again: until here it has written nothing but the keys and values that it writes again. A capture
        (`give_way`) fails instead, which costs nobody an answer.
        """
        for seconds in MEMORY_WAITS_SECONDS:
            try:
                return self._model.forward(step, self._kv_cache.tensors, state.arena, give_way)
            except torch.OutOfMemoryError as error:
                if give_way is not None:
                    raise
                log.warning("no memory for a step, which runs again in %.0f ms: %s", seconds * 1e3, error)
            time.sleep(seconds)
        return self._model.forward(step, self._kv_cache.tensors, state.arena, give_way)

    def bind(self, key: StepKey) -> Callable[[], None]:
        """See graphcache.Program. Runs the shape once on the shadow, which loads what it needs and says what it must give."""
        if not self._is_padded:
            return lambda: self.run(
                self._live, self._live.buffers.step.num_tokens, self._live.buffers.step.num_rows, key.sampler
            )
        self._rehearsed.discard(key)
        if self._shadow is not None and key not in self._expected:
            self._expected[key] = self._probe_shadow(key, self._shadow, self._backend.warm_up)

        return lambda: self.run(
            self._live, key.tokens, key.rows, key.sampler, is_fixed=True, give_way=self._backend.give_way
        )

    def verify(self, key: StepKey, replay: Callable[[], None]) -> bool | None:
        """Whether a probe step gives what the shadow gave eagerly; None for yes, when the graph itself is not replayed yet.

        While nothing is served it is a replay of the graph. That would hold a step up by another one's length, so while
        others are served the shadow runs what was recorded, recorded once more, in parts that take turns with theirs.
        """
        expected = self._expected[key]
        is_idle = self._is_idle()
        if not is_idle and key in self._rehearsed:
            return None  # as before
        try:
            if is_idle:
                found = self._thread.call(lambda: self._probe_live(key, replay))
            else:
                assert self._shadow is not None
                found = self._probe_shadow(key, self._shadow, self._backend.rehearse)
        except RunLostError as error:
            log.warning("verifying %s: %s", key, error)
            return False
        except (CaptureError, DeviceLostError):
            raise
        except Exception as error:
            self._backend.warm_up(_nothing)  # raises DeviceLostError if that is why
            raise CaptureError("the verification could not run") from error
        if found.token_ids == expected.token_ids and _are_close(found, expected, key.sampler):
            if not is_idle:
                self._rehearsed.add(key)
            return True if is_idle else None
        log.warning("verifying %s, %s: %s", key, "replayed" if is_idle else "rehearsed", _difference(found, expected))
        return False

    def _probe_shadow(
        self, key: StepKey, shadow: StepState, run_apart: Callable[[Callable[[], None]], None]
    ) -> StepResults:
        """On the capture thread. `run_apart`: the backend's warm_up or rehearse."""
        assert self._probe is not None
        batch = self._probe.batch(key, shadow.slots.probe_slot)

        def fill() -> None:
            shadow.fill(batch, key.rows, probe_blocks=self._kv_cache.probe_blocks)
            shadow.buffers.counter.fill_(shadow.buffers.num_runs)  # the run before may have failed half way

        def work() -> None:
            self.run(shadow, key.tokens, key.rows, key.sampler, is_fixed=True, give_way=self._backend.give_way)

        self._backend.warm_up(fill)
        run_apart(work)
        return shadow.buffers.results(shadow.buffers.note_run(), len(batch.rows))

    def _probe_live(self, key: StepKey, replay: Callable[[], None]) -> Deferred[StepResults]:
        """On the forward thread, which does not wait for it."""
        assert self._probe is not None
        live = self._live
        batch = self._probe.batch(key, live.slots.probe_slot)
        live.fill(batch, key.rows, probe_blocks=self._kv_cache.probe_blocks)
        replay()
        number = live.buffers.note_run()
        live.buffers.counter.fill_(number + 1)  # whatever it did, the next run is counted right
        return self._thread.after_launched(lambda: live.buffers.results(number, len(batch.rows)))


def _nothing() -> None:
    """Work that does nothing: whoever runs it asks the device whether it is there."""


def _difference(found: StepResults, expected: StepResults) -> str:
    """In words, for the log."""
    pairs = list(zip(found.token_ids, expected.token_ids, strict=True))
    rows = [row for row, (one, other) in enumerate(pairs) if one != other]
    peaks = max(abs(one - other) for one, other in zip(found.peaks, expected.peaks, strict=True))
    tokens = ", ".join(f"row {row}: {pairs[row][0]} instead of {pairs[row][1]}" for row in rows[:3])
    return f"{len(rows)} of {len(pairs)} tokens differ ({tokens}), largest logits by up to {peaks:.3g}"


def _are_close(found: StepResults, expected: StepResults, sampler: Sampler) -> bool:
    pairs = list(zip(found.peaks, expected.peaks, strict=True))
    if sampler is Sampler.FILTERED:  # no other computes them: what stands there is an older step's
        pairs += zip(found.logprobs, expected.logprobs, strict=True)
    return all(abs(one - other) <= TOLERANCE * (1 + abs(other)) for one, other in pairs)
