"""A step's first work: reads the stage that the host wrote, and makes of it what the model and the sampler read.

It also brings the slots up to date that the step is about, so that nothing is copied to the device for a step. No value is
read back, and nothing but the sizes of the tensors comes from the host. On the CPU this is plain torch, which is the
reference; on a GPU one Triton kernel does the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hotgraph_server.kernels.again import launch
from hotgraph_server.kernels.jit import jit, next_power_of_two, tl
from hotgraph_server.kernels.prepare_stage import IS_LAST, IS_NEW, IS_SAMPLED, RECORD_WORDS, RowRecord, StageLayout

_PART_TOKENS = 256  # of a row, for one program
_PART_BLOCKS = 1024  # of a table, at once


@dataclass(frozen=True, slots=True)
class StepSource:
    """Where steps come from: a ring of stages, and what the device holds for each of S slots.

    `stages`: int32 [D, layout.num_words], and contiguous; the step's is at `counter` modulo D. `counter`: int64 [1], the steps
    before this one. `last_tokens`: int64 [S]. `block_tables`: int32 [S, max_blocks], `parameters`: int32 [S, num_parameters];
    `prepare_step` writes both where the stage says so.
    """

    layout: StageLayout
    stages: torch.Tensor
    counter: torch.Tensor
    last_tokens: torch.Tensor
    block_tables: torch.Tensor
    parameters: torch.Tensor


def prepare_step(
    source: StepSource,
    *,
    block_size: int,
    row_slots: torch.Tensor,
    is_sampled: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    last_indices: torch.Tensor,
) -> None:
    """Applies what the step's stage says of its slots, and writes all tensors given, for R rows and T tokens.

    `row_slots` and `is_sampled`: int64 [R], the latter 0 or 1; the others are those of models.interface.StepTensors. The
    stage has R records, padding rows among them, in the order of their tokens. Tokens past the last row's end are padding:
    given as 0, they stand at position 0 and are written to the first place of the scratch block.
    """
    if source.counter.is_cuda:
        prepare_step_triton(
            source,
            block_size=block_size,
            row_slots=row_slots,
            is_sampled=is_sampled,
            token_ids=token_ids,
            positions=positions,
            kv_indices=kv_indices,
            block_tables=block_tables,
            context_lens=context_lens,
            query_starts=query_starts,
            last_indices=last_indices,
        )
        return
    layout, stage = source.layout, source.stages[int(source.counter) % len(source.stages)]
    num_rows, num_tokens = row_slots.shape[0], token_ids.shape[0]
    records = layout.records(stage)[:num_rows]
    for record in map(RowRecord._make, records.tolist()):
        if record.flags & IS_NEW:
            source.parameters[record.slot] = layout.parameters(stage)[record.source]
            source.block_tables[record.slot] = 0
        if record.first_block < record.end_block:
            blocks = slice(record.first_block, record.end_block)
            source.block_tables[record.slot, blocks] = layout.tables(stage)[record.source, blocks]

    slots, starts, offsets, ends, flags = records[:, :5].to(torch.int64).unbind(1)
    row_slots.copy_(slots)
    torch.bitwise_and(flags, IS_SAMPLED, out=is_sampled)
    index = torch.arange(num_tokens)
    row_of_token = torch.searchsorted(ends.contiguous(), index, right=True).clamp_(max=num_rows - 1)
    slot_of_token = slots.index_select(0, row_of_token)
    is_padding = index >= ends[-1]

    is_last = (flags & IS_LAST).index_select(0, row_of_token) != 0
    given_ids = layout.token_ids(stage)[:num_tokens].to(torch.int64)
    torch.where(is_last, source.last_tokens.index_select(0, slot_of_token), given_ids, out=token_ids)
    token_ids.masked_fill_(is_padding, 0)

    torch.add((starts - offsets).index_select(0, row_of_token), index, out=positions)
    positions.masked_fill_(is_padding, 0)

    entry = positions.div(block_size, rounding_mode="floor").add_(slot_of_token, alpha=layout.max_blocks)
    block = source.block_tables.view(-1).index_select(0, entry)
    torch.remainder(positions, block_size, out=kv_indices)
    kv_indices.add_(block, alpha=block_size).masked_fill_(is_padding, 0)

    torch.index_select(source.block_tables, 0, slots, out=block_tables)
    query_starts[:1] = offsets[0]
    query_starts[1:] = ends
    context_lens.copy_((starts - offsets).add_(ends))
    torch.sub(ends, 1, out=last_indices).clamp_(min=0)


def prepare_step_triton(
    source: StepSource,
    *,
    block_size: int,
    row_slots: torch.Tensor,
    is_sampled: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    last_indices: torch.Tensor,
) -> None:
    """`prepare_step` in one kernel, for contiguous tensors. With tensors on a device the stages are pinned memory of the host.

    A row's programs take what is new of its slot from the stage, so that none waits for another to write the slot's.
    """
    layout = source.layout
    num_tokens, num_rows = len(token_ids), len(row_slots)
    launch(
        _prepare_kernel,
        (num_rows + 1, -(-num_tokens // _PART_TOKENS)),
        {
            "stages": source.stages,
            "counter": source.counter,
            "last_tokens": source.last_tokens,
            "slot_block_tables": source.block_tables,
            "slot_parameters": source.parameters,
            "row_slots": row_slots,
            "is_sampled": is_sampled,
            "token_ids": token_ids,
            "positions": positions,
            "kv_indices": kv_indices,
            "block_tables": block_tables,
            "context_lens": context_lens,
            "query_starts": query_starts,
            "last_indices": last_indices,
        },
        {
            "num_tokens": num_tokens,
            "num_rows": num_rows,
            "DEPTH": len(source.stages),
            "STAGE_WORDS": layout.num_words,
            "RECORD_WORDS": RECORD_WORDS,
            "IDS_AT": layout.ids_at,
            "PARAMETERS_AT": layout.parameters_at,
            "PARAMETERS_STRIDE": layout.parameters_stride,
            "NUM_PARAMETERS": layout.num_parameters,
            "TABLES_AT": layout.tables_at,
            "MAX_BLOCKS": layout.max_blocks,
            "BLOCK_SIZE": block_size,
            "IS_SAMPLED": IS_SAMPLED,
            "IS_LAST": IS_LAST,
            "IS_NEW": IS_NEW,
            "PART_TOKENS": _PART_TOKENS,
            "PART_BLOCKS": min(_PART_BLOCKS, next_power_of_two(layout.max_blocks)),
            "num_warps": 4,
        },
    )


@jit(unspecialized=["num_tokens", "num_rows"])
def _prepare_kernel(
    stages: tl.tensor,
    counter: tl.tensor,
    last_tokens: tl.tensor,
    slot_block_tables: tl.tensor,
    slot_parameters: tl.tensor,
    row_slots: tl.tensor,
    is_sampled: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    kv_indices: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_starts: tl.tensor,
    last_indices: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    DEPTH: tl.constexpr,
    STAGE_WORDS: tl.constexpr,
    RECORD_WORDS: tl.constexpr,
    IDS_AT: tl.constexpr,
    PARAMETERS_AT: tl.constexpr,
    PARAMETERS_STRIDE: tl.constexpr,
    NUM_PARAMETERS: tl.constexpr,
    TABLES_AT: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SAMPLED: tl.constexpr,
    IS_LAST: tl.constexpr,
    IS_NEW: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
) -> None:
    """One program for each row and part of the step's tokens, and behind the rows as many for padding tokens.

    The host's memory is far: a row's record is read in one go, and then all that it points to at once.
    """
    program = tl.program_id(0)
    part = tl.program_id(1)
    stage = stages + (tl.load(counter) % DEPTH) * STAGE_WORDS
    row = tl.minimum(program, num_rows - 1)
    word = tl.arange(0, RECORD_WORDS)
    record = tl.load(stage + row * RECORD_WORDS + word)
    end = tl.sum(tl.where(word == 3, record, 0), axis=0)
    if program == num_rows:
        token = end + part * PART_TOKENS + tl.arange(0, PART_TOKENS)
        is_padding = token < num_tokens
        nothing = tl.zeros([PART_TOKENS], tl.int64)
        tl.store(token_ids + token, nothing, mask=is_padding)
        tl.store(positions + token, nothing, mask=is_padding)
        tl.store(kv_indices + token, nothing, mask=is_padding)
    else:
        slot = tl.sum(tl.where(word == 0, record, 0), axis=0).to(tl.int64)
        start = tl.sum(tl.where(word == 1, record, 0), axis=0)
        offset = tl.sum(tl.where(word == 2, record, 0), axis=0)
        flags = tl.sum(tl.where(word == 4, record, 0), axis=0)
        source = tl.sum(tl.where(word == 5, record, 0), axis=0)
        first_block = tl.sum(tl.where(word == 6, record, 0), axis=0)
        end_block = tl.sum(tl.where(word == 7, record, 0), axis=0)
        is_last = (flags & IS_LAST) != 0
        is_new = (flags & IS_NEW) != 0
        slot_table = slot_block_tables + slot * MAX_BLOCKS
        stage_table = stage + TABLES_AT + source * MAX_BLOCKS

        token = offset + part * PART_TOKENS + tl.arange(0, PART_TOKENS)
        is_token = token < end
        position = start + token - offset
        entry = position // BLOCK_SIZE
        is_staged = (entry >= first_block) & (entry < end_block)
        given = tl.load(stage + IDS_AT + token, mask=is_token & (is_last == 0), other=0).to(tl.int64)
        staged = tl.load(stage_table + entry, mask=is_token & is_staged, other=0)
        held = tl.load(slot_table + entry, mask=is_token & (is_staged == 0) & (is_new == 0), other=0)
        last = tl.load(last_tokens + slot)
        tl.store(token_ids + token, tl.where(is_last, last, given), mask=is_token)
        tl.store(positions + token, position.to(tl.int64), mask=is_token)
        block = (staged + held).to(tl.int64)  # one of them is 0
        tl.store(kv_indices + token, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=is_token)

        if part == 0:
            tl.store(row_slots + row, slot)
            tl.store(is_sampled + row, (flags & IS_SAMPLED).to(tl.int64))
            if row == 0:
                tl.store(query_starts, offset)
            tl.store(query_starts + row + 1, end)
            tl.store(context_lens + row, start + end - offset)
            tl.store(last_indices + row, tl.maximum(end - 1, 0).to(tl.int64))
            # Rows of one slot write the same.
            parameter = tl.arange(0, PARAMETERS_STRIDE)
            is_parameter = (parameter < NUM_PARAMETERS) & is_new
            given_parameters = tl.load(
                stage + PARAMETERS_AT + source * PARAMETERS_STRIDE + parameter, mask=is_parameter
            )
            tl.store(slot_parameters + slot * NUM_PARAMETERS + parameter, given_parameters, mask=is_parameter)
            for first in tl.static_range(0, MAX_BLOCKS, PART_BLOCKS):
                index = first + tl.arange(0, PART_BLOCKS)
                is_index = index < MAX_BLOCKS
                is_given = is_index & (index >= first_block) & (index < end_block)
                is_kept = is_index & (is_given == 0) & (is_new == 0)
                given_blocks = tl.load(stage_table + index, mask=is_given, other=0)
                kept_blocks = tl.load(slot_table + index, mask=is_kept, other=0)
                blocks = given_blocks + kept_blocks
                tl.store(slot_table + index, blocks, mask=is_index & (is_kept == 0))
                tl.store(block_tables + row.to(tl.int64) * MAX_BLOCKS + index, blocks, mask=is_index)
