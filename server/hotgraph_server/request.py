"""What one call asked for, in our own types: checked, tokenized, ready for the scheduler. It knows no protobuf and no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"  # a stop string, a stop token or the model's end of text
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # the caller left
    FAILED = "failed"  # the call ended with an error


class GraphMode(enum.Enum):
    """How a request wants its steps to run; see GraphPolicy in the contract."""

    PREFER = "prefer"
    REQUIRE = "require"
    EAGER_ONLY = "eager_only"
    WAIT_UP_TO = "wait_up_to"


@dataclass(frozen=True, slots=True)
class GraphPolicy:
    mode: GraphMode = GraphMode.PREFER
    max_wait_seconds: float = 0.0  # for WAIT_UP_TO


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Bounds are those of the contract and already checked.

    Applied in this order: repetition, presence and frequency penalties, logit bias, temperature, top-k, top-p, min-p,
    then Gumbel-max with noise hashed from (seed, position, token id).
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0  # 64 bits, unsigned; always set: drawn by `rpc` when the caller gave none

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_filters(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


@dataclass(frozen=True, slots=True)
class StopParams:
    """What ends a completion before max_tokens."""

    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    include_in_text: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One call. `deadline` is on the scheduler's clock (seconds); `resume` maps choice index to the tokens the caller has.

    When `resume` is not empty only its choices are generated. `num_logprobs` is None for no log-probabilities, 0 for those of
    the chosen tokens, n for the n likeliest as well.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: StopParams = StopParams()
    num_choices: int = 1
    num_logprobs: int | None = None
    skip_special_tokens: bool = True
    omit_text: bool = False
    graph_policy: GraphPolicy = GraphPolicy()
    deadline: float | None = None
    is_server_deadline: bool = False  # the deadline is the server's own limit, not the caller's
    client: str = ""
    session_key: str = ""
    resume: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def choice_indices(self) -> tuple[int, ...]:
        """The choices to generate, in order."""
        return tuple(sorted(self.resume)) if self.resume else tuple(range(self.num_choices))


_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads choice indices over the seed space


def choice_seed(seed: int, choice_index: int) -> int:
    """The seed of one choice: `seed` itself for choice 0, a different one for each other index. 64 bits, unsigned."""
    return (seed + choice_index * _SEED_STEP) & 0xFFFFFFFFFFFFFFFF


# What comes back, from the scheduler to the servicer.


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms at one position, of the model's own distribution: (token id, logprob)."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...] = ()

    def limited(self, num_top: int) -> TokenLogprobs:
        """Without the top ones past the first `num_top`: a step computes as many as any of its rows asked for."""
        return self if len(self.top) <= num_top else TokenLogprobs(self.chosen, self.top[:num_top])


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """Why a choice ended, and what matched."""

    choice_index: int
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class TokensEvent:
    """New tokens of one choice. `finish` is set on the last event of the choice."""

    choice_index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    finish: ChoiceFinish | None = None


@dataclass(frozen=True, slots=True)
class StepGroup:
    """Steps of one kind that a request took part in; `graph` is empty for eager ones."""

    phase: str  # "prefill", "decode" or "mixed"
    graph: str
    num_steps: int
    tokens_bucket: int
    rows_bucket: int
    num_padding_tokens: int
    graph_age_seconds: float | None
    engine_seconds: float


@dataclass(frozen=True, slots=True)
class Receipt:
    num_steps: int
    num_graph_steps: int
    num_eager_steps: int
    num_preemptions: int
    step_groups: tuple[StepGroup, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the scheduler's clock; see the contract's Timings."""

    queue: float
    prefill: float
    decode: float
    time_to_first_token: float
    time_per_output_token: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The request is done: the last event of its stream."""

    choices: tuple[ChoiceFinish, ...]
    usage: Usage
    timings: Timings
    receipt: Receipt


Event = TokensEvent | FinishedEvent
