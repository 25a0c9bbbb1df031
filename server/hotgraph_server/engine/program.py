"""The step as a function over static buffers: what runs eagerly, and what graphcache is given to capture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphcache import CaptureError
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.engine.buffers import ALL_WORK, RunLostError, StepResults
from hotgraph_server.engine.kv_cache import KvCache
from hotgraph_server.engine.probe import ProbeLayout
from hotgraph_server.engine.sampler import sample_step
from hotgraph_server.engine.state import StepState
from hotgraph_server.engine.thread import Deferred, ForwardThread
from hotgraph_server.errors import EngineFailedError
from hotgraph_server.kernels.prepare import prepare_step
from hotgraph_server.models.interface import Model

TOLERANCE = 1e-2
"""Of a probe's largest logits and log-probabilities, absolute and relative: the same kernels in the same order give the same
numbers, so this only forgives a library that chooses another algorithm for another stream."""

WarmUp = Callable[[Callable[[], None]], None]


class StepProgram:
    """prepare, forward, sample over a state's current content.

    `is_padded`: a bound function computes its key's whole shape, and all that sampling can do. Else it computes the shape
    and the work of the step that the buffers hold. `shadow`: a second state, for probes on the capture thread, which `warm_up`
    runs apart from what is served; None where nothing is verified.
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
        warm_up: WarmUp,
        is_padded: bool,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._live = live
        self._shadow = shadow
        self._thread = thread
        self._probe = probe
        self._warm_up = warm_up
        self._is_padded = is_padded
        self._expected: dict[StepKey, StepResults] = {}

    def run(self, state: StepState, tokens: int, rows: int, sampler: Sampler, *, is_fixed: bool = False) -> None:
        """One step of this shape. `is_fixed`: nothing of the step at hand shapes the work."""
        buffers, slots = state.buffers, state.slots
        prepare_step(
            given_ids=buffers.given_ids[:tokens],
            row_slots=buffers.row_slots[:rows],
            row_starts=buffers.row_starts[:rows],
            row_offsets=buffers.row_offsets[: rows + 1],
            last_tokens=slots.last_tokens,
            slot_lens=slots.lengths,
            slot_block_tables=slots.block_tables,
            block_size=self._kv_cache.block_size,
            token_ids=buffers.token_ids[:tokens],
            positions=buffers.positions[:tokens],
            kv_indices=buffers.kv_indices[:tokens],
            block_tables=buffers.block_tables[:rows],
            context_lens=buffers.context_lens[:rows],
            query_starts=buffers.query_starts[: rows + 1],
            last_indices=buffers.last_indices[:rows],
        )
        logits = self._model.forward(buffers.step_tensors(tokens, rows), self._kv_cache.tensors, state.arena)
        sample_step(logits, buffers, slots, sampler, ALL_WORK if is_fixed else buffers.step.work)

    def bind(self, key: StepKey) -> Callable[[], None]:
        """See graphcache.Program. Runs the shape once on the shadow, which loads what it needs and says what it must give."""
        if not self._is_padded:
            return lambda: self.run(
                self._live, self._live.buffers.step.num_tokens, self._live.buffers.step.num_rows, key.sampler
            )
        if self._shadow is not None and key not in self._expected:
            self._expected[key] = self._probe_shadow(key, self._shadow)

        def work() -> None:
            with torch.inference_mode():  # a mode of the thread
                self.run(self._live, key.tokens, key.rows, key.sampler, is_fixed=True)

        return work

    def verify(self, key: StepKey, replay: Callable[[], None]) -> bool:
        """Whether a replay gives what the shadow gave eagerly, on a probe step that comes between two served ones."""
        expected = self._expected[key]
        try:
            found = self._thread.call(lambda: self._probe_live(key, replay))
        except RunLostError:
            return False
        except (RuntimeError, EngineFailedError) as error:
            raise CaptureError("the verification could not run") from error
        return found.token_ids == expected.token_ids and _are_close(found, expected)

    def _probe_shadow(self, key: StepKey, shadow: StepState) -> StepResults:
        """Eagerly, on the capture thread."""
        assert self._probe is not None
        batch = self._probe.batch(key, shadow.slots.probe_slot)
        number = -1

        def work() -> None:
            nonlocal number
            with torch.inference_mode():
                shadow.fill(batch, key.tokens, key.rows, probe_blocks=self._kv_cache.probe_blocks)
                self.run(shadow, key.tokens, key.rows, key.sampler, is_fixed=True)
                number = shadow.buffers.note_run()

        self._warm_up(work)
        return shadow.buffers.results(number, key.rows)

    def _probe_live(self, key: StepKey, replay: Callable[[], None]) -> Deferred[StepResults]:
        """On the forward thread, which does not wait for it."""
        assert self._probe is not None
        live = self._live
        batch = self._probe.batch(key, live.slots.probe_slot)
        with torch.inference_mode():
            live.fill(batch, key.tokens, key.rows, probe_blocks=self._kv_cache.probe_blocks)
            replay()
            number = live.buffers.note_run()
            live.buffers.counter.fill_(number + 1)  # whatever it did, the next run is counted right
        return self._thread.after_launched(lambda: live.buffers.results(number, key.rows))


def _are_close(found: StepResults, expected: StepResults) -> bool:
    pairs = zip(
        (*found.peaks, *found.logprobs),
        (*expected.peaks, *expected.logprobs),
        strict=True,
    )
    return all(abs(one - other) <= TOLERANCE * (1 + abs(other)) for one, other in pairs)
