"""What crosses between the scheduler and the engine: one step's work down, its tokens up. Plain data, no torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from hotgraph_server.request import SamplingParams, TokenLogprobs


class Sampler(enum.Enum):
    """What sampling a step must be able to do; part of the graph's key. Later members can do what earlier ones can."""

    GREEDY = "greedy"  # argmax
    GUMBEL = "gumbel"  # temperature
    FILTERED = "filtered"  # everything: filters, penalties, bias, banned stops, log-probabilities


class Phase(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class StepKey:
    """All that a step graph depends on. `tokens` new tokens for `rows` sequences; context length is not part of it.

    Looked up at every step, so its hash is computed once.
    """

    tokens: int
    rows: int
    sampler: Sampler
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= self.tokens:
            raise ValueError(f"a step has 1 <= rows <= tokens, not rows {self.rows}, tokens {self.tokens}")
        object.__setattr__(self, "_hash", hash((self.tokens, self.rows, self.sampler.value)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"t{self.tokens}-r{self.rows}-{self.sampler.value}"

    @classmethod
    def parse(cls, text: str) -> StepKey:
        """The inverse of str(). Raises ValueError."""
        tokens, rows, sampler = text.split("-")
        if tokens[:1] != "t" or rows[:1] != "r":
            raise ValueError(f"no step key: {text!r}")
        return cls(int(tokens[1:]), int(rows[1:]), Sampler(sampler))


@dataclass(frozen=True, slots=True)
class SlotAssignment:
    """A sequence takes a slot, from this step on, until the slot is assigned again.

    `prompt_token_ids` and `completion_token_ids` are what the sequence holds already; penalties count them. Tokens of
    `banned_until[1]` cannot be sampled while the sequence is shorter than `banned_until[0]` positions (min_tokens).
    `seed` is the choice's own.
    """

    slot: int
    sampling: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    banned_until: tuple[int, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class BlockAppend:
    """From this step on, entry `index` of the slot's block table is `block`."""

    slot: int
    index: int
    block: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: tokens at positions start .. start + num_tokens - 1.

    `token_ids` are given for prefill chunks. None is a decode row: one token, the one this slot sampled last, which the
    engine holds (the host may not have read it yet). `is_sampled`: the logits after the last token choose the next one.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: Sequence[int] | None
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Assignments and block appends take effect before the rows run. At least one row; no slot twice.

    `num_logprobs` is the most that any row asks for (None: nobody asks). `is_eager`: no graph may be used.
    """

    step: int
    rows: Sequence[Row]
    assignments: Sequence[SlotAssignment] = ()
    block_appends: Sequence[BlockAppend] = ()
    sampler: Sampler = Sampler.GREEDY
    num_logprobs: int | None = None
    is_eager: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def phase(self) -> Phase:
        num_decode = sum(row.token_ids is None for row in self.rows)
        if num_decode == len(self.rows):
            return Phase.DECODE
        return Phase.MIXED if num_decode else Phase.PREFILL


@dataclass(frozen=True, slots=True)
class StepReceipt:
    """How a step ran. `graph` is the cache's name for the graph it replayed, empty when it ran eagerly."""

    phase: Phase
    graph: str
    num_tokens: int
    num_rows: int
    tokens_bucket: int
    rows_bucket: int
    graph_age_seconds: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave. `token_ids` and, when asked for, `logprobs` align with the batch's rows; None where not sampled.

    A row whose logits were not finite has its index in `failed_rows`, and no token.
    """

    step: int
    token_ids: Sequence[int | None]
    receipt: StepReceipt
    logprobs: Sequence[TokenLogprobs | None] = ()
    failed_rows: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and how much it holds; fixed once it is started."""

    model_id: str
    architecture: str
    runner: str  # "decoder" or "bridge"
    dtype: str
    device: str
    device_name: str
    num_parameters: int
    weights_bytes: int
    load_seconds: float
    load_time: float  # seconds since the epoch
    vocabulary_size: int
    context_length: int  # tokens one sequence may reach
    num_slots: int
    num_blocks: int
    block_size: int
    kv_cache_bytes: int
    max_step_tokens: int
    run_ahead: int  # steps that may be submitted before the first of them is read, less one
    gpu_address: str | None = None  # on the PCI bus, as the kernel writes it: "0000:18:00.0"
