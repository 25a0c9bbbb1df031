"""From a step's logits to its tokens: runs the sampling kernels over slot tables and writes what the next step needs.

Nothing is read back but on the CPU, where it costs nothing: results go to the ring that the host reads. On a GPU the plain
samplers have kernels of their own that do all of this.
"""

from __future__ import annotations

import torch

from hotgraph_server.batch import Sampler
from hotgraph_server.engine.buffers import SamplingWork, StepBuffers
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.kernels.logprobs import token_logprobs
from hotgraph_server.kernels.penalties import apply_bans, apply_bias, apply_penalties, count_tokens
from hotgraph_server.kernels.ring import write_ring
from hotgraph_server.kernels.sample import RowSampling, row_peaks, sample_filtered, sample_greedy, sample_gumbel


def sample_step(logits: torch.Tensor, buffers: StepBuffers, sampler: Sampler, work: SamplingWork) -> None:
    """Samples every row of `logits` ([R, V], float32 or of 16 bits), writes the results of `buffers` and advances its `slots`.

    Only rows that are sampled and whose logits are finite change their slot: the last token, and the counts. Of rows in one
    slot, as those of padding are, any may be the last to write."""
    slots = buffers.slots
    if buffers.plain is not None and sampler is not Sampler.FILTERED and _is_for_kernels(logits, slots):
        # Torch for the CPU alone comes without Triton.
        from hotgraph_server.kernels.sample_triton import sample_plain_triton

        sample_plain_triton(logits, *buffers.plain, is_greedy=sampler is Sampler.GREEDY)
        return

    num_rows = logits.shape[0]
    logits = logits.float()
    row_slots = buffers.row_slots[:num_rows]
    positions = buffers.context_lens[:num_rows].to(torch.int64)
    peaks = row_peaks(logits)
    is_finite = torch.isfinite(peaks)
    if logits.device.type != "cpu" or not bool(is_finite.all()):
        logits = torch.where(is_finite.unsqueeze(1), logits, 0.0)  # so that no kernel meets a NaN
    is_taken = is_finite & (buffers.is_sampled[:num_rows] != 0)

    if sampler is Sampler.GREEDY:
        token_ids = sample_greedy(logits)
    else:
        sampling = slots.row_sampling(row_slots, positions)
        if sampler is Sampler.GUMBEL:
            token_ids = sample_gumbel(logits, sampling)
        else:
            token_ids = _sample_changed(logits, row_slots, sampling, slots, work)
            if work.num_logprobs is not None:
                _write_logprobs(logits, token_ids, buffers, work.num_logprobs)
            if work.has_penalties:
                count_tokens(slots.counts, row_slots, token_ids, is_taken)

    # Rows that give no token write to the scratch slot.
    slots.last_tokens.index_copy_(0, torch.where(is_taken, row_slots, slots.scratch_slot), token_ids)
    values = buffers.values[:, :num_rows]
    values[0].copy_(peaks)
    ids = torch.where(is_finite, token_ids, -1)
    write_ring(buffers.ring_ids, buffers.ring_values, buffers.counter, ids, values)


def _is_for_kernels(logits: torch.Tensor, slots: SlotTables) -> bool:
    """Whether the plain samplers' kernels take such logits. Our decoder's they do; models of transformers lay out their own."""
    return logits.shape[1] == slots.vocabulary_size and logits.stride(1) == 1 and logits.data_ptr() % 16 == 0


def _sample_changed(
    logits: torch.Tensor, row_slots: torch.Tensor, sampling: RowSampling, slots: SlotTables, work: SamplingWork
) -> torch.Tensor:
    """Penalties, bias and bans, then filters. Leaves `logits` as they are: log-probabilities are of the model's own."""
    if not (work.has_penalties or work.has_bias or work.has_bans):
        return sample_filtered(logits, sampling)
    changed = logits.clone()
    if work.has_penalties:
        apply_penalties(
            changed,
            row_slots,
            repetition=slots.repetition,
            presence=slots.presence,
            frequency=slots.frequency,
            in_prompt=slots.in_prompt,
            counts=slots.counts,
        )
    if work.has_bias:
        apply_bias(changed, row_slots, bias_ids=slots.bias_ids, bias_values=slots.bias_values)
    if work.has_bans:
        apply_bans(changed, row_slots, sampling.positions, banned_ids=slots.banned_ids, banned_until=slots.banned_until)
    return sample_filtered(changed, sampling)


def _write_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, buffers: StepBuffers, num_top: int) -> None:
    num_rows = logits.shape[0]
    num_top = min(num_top, logits.shape[1])
    chosen, top_ids, top_values = token_logprobs(logits, token_ids, num_top)
    buffers.values[1, :num_rows].copy_(chosen)
    buffers.top_ids[:num_rows, :num_top].copy_(top_ids)
    buffers.top_logprobs[:num_rows, :num_top].copy_(top_values)
