"""The step as a function over static buffers: what runs eagerly, and what graphcache is given to capture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphcache import CaptureError
from hotgraph_server.batch import Batch, Row, Sampler, SlotAssignment, StepKey
from hotgraph_server.engine.buffers import ALL_WORK, StepBuffers
from hotgraph_server.engine.kv_cache import KvCache
from hotgraph_server.engine.sampler import sample_step
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.engine.thread import ForwardThread
from hotgraph_server.kernels.prepare import prepare_step
from hotgraph_server.models.interface import Model
from hotgraph_server.request import SamplingParams

NUM_PROBES = 2
LOGPROB_TOLERANCE = 1e-3


class StepProgram:
    """prepare, forward, sample over the buffers' current content.

    `is_padded`: a bound function computes its key's whole shape, and all that sampling can do. Else it computes the shape
    and the work of the step that the buffers hold.
    """

    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        slots: SlotTables,
        buffers: StepBuffers,
        thread: ForwardThread,
        *,
        context_length: int,
        is_padded: bool,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._slots = slots
        self._buffers = buffers
        self._thread = thread
        self._context_length = context_length
        self._is_padded = is_padded
        if kv_cache.num_probe_blocks:
            first = kv_cache.num_blocks
            self._probe_blocks = range(first, first + kv_cache.num_probe_blocks)

    def run(self, tokens: int, rows: int, sampler: Sampler, *, is_fixed: bool = False) -> None:
        """One step of this shape, on the forward thread. `is_fixed`: nothing of the step at hand shapes the work."""
        buffers, slots = self._buffers, self._slots
        prepare_step(
            given_ids=buffers.given_ids[:tokens],
            row_slots=buffers.row_slots[:rows],
            row_starts=buffers.row_starts[:rows],
            row_offsets=buffers.row_offsets[: rows + 1],
            last_tokens=slots.last_tokens,
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
        logits = self._model.forward(buffers.step_tensors(tokens, rows), self._kv_cache.tensors)
        sample_step(logits, buffers, slots, sampler, ALL_WORK if is_fixed else buffers.step.work)

    def bind(self, key: StepKey) -> Callable[[], None]:
        """See graphcache.Program."""
        if self._is_padded:
            return lambda: self.run(key.tokens, key.rows, key.sampler, is_fixed=True)
        return lambda: self.run(self._buffers.step.num_tokens, self._buffers.step.num_rows, key.sampler)

    def verify(self, key: StepKey, replay: Callable[[], None]) -> bool:
        """Whether replay and eager run agree on probe steps, between two served steps, in the probe slot and blocks."""
        try:
            return self._thread.call(lambda: self._verify(key, replay))
        except RuntimeError as error:
            raise CaptureError("the verification could not run") from error

    @torch.inference_mode()
    def _verify(self, key: StepKey, replay: Callable[[], None]) -> bool:
        for probe in range(NUM_PROBES):
            batch = self._probe_batch(key, probe)
            self._slots.assign(batch.assignments)
            self._slots.set_blocks(self._slots.probe_slot, self._probe_blocks)
            self._buffers.fill(batch, key.tokens, key.rows, self._slots)
            self.run(key.tokens, key.rows, key.sampler, is_fixed=True)
            expected = self._results(key)
            self._buffers.sampled_ids.zero_()
            self._buffers.chosen_logprobs.zero_()
            self._slots.assign(batch.assignments)  # the counts as they were
            self._slots.set_blocks(self._slots.probe_slot, self._probe_blocks)
            replay()
            tokens, is_finite, logprobs = self._results(key)
            if not torch.equal(tokens, expected[0]) or not torch.equal(is_finite, expected[1]):
                return False
            if not torch.allclose(logprobs, expected[2], rtol=0, atol=LOGPROB_TOLERANCE):
                return False
        return True

    def _results(self, key: StepKey) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        buffers = self._buffers
        results = (buffers.sampled_ids, buffers.is_finite, buffers.chosen_logprobs)
        tokens, is_finite, logprobs = (result[: key.rows].clone() for result in results)
        return tokens, is_finite, logprobs

    def _probe_batch(self, key: StepKey, probe: int) -> Batch:
        """A step that fills the key's shape: rows over beginnings of one sequence, so that all write the same to a position.

        Raises CaptureError when a row would be longer than the context or the probe blocks.
        """
        longest = -(-key.tokens // key.rows)
        room = len(self._probe_blocks) * self._kv_cache.block_size
        if longest > min(self._context_length, room):
            raise CaptureError("no step fills this shape")
        ids = [(7919 * index + 104729 * (probe + 1)) % self._model.vocabulary_size for index in range(longest)]
        num_long = key.tokens - key.rows * (longest - 1)
        lengths = [longest] * num_long + [longest - 1] * (key.rows - num_long)
        slot = self._slots.probe_slot
        sampling = SamplingParams(temperature=0.8, top_k=50, repetition_penalty=1.1)
        if key.sampler is not Sampler.FILTERED:
            sampling = SamplingParams(temperature=0.8)
        return Batch(
            step=0,
            rows=[Row(slot, 0, length, ids[:length], True) for length in lengths],
            assignments=[SlotAssignment(slot, sampling, probe, ids, ())],
            sampler=key.sampler,
            num_logprobs=0 if key.sampler is Sampler.FILTERED else None,
        )
