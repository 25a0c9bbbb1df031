"""What a generation takes and gives, and what a model is, as frozen dataclasses. It knows no protobuf and no gRPC.

Every duration is in seconds. Enums have UNSPECIFIED for what was not told, or what a newer server tells and this
client does not know.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TypeAlias, TypedDict

# What goes in.


class Role(enum.StrEnum):
    """Who speaks in a conversation."""

    UNSPECIFIED = "unspecified"
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is a Role or its value, such as "user"."""

    role: Role | str
    content: str


MessageLike: TypeAlias = Message | tuple[str, str] | Mapping[str, str]
"""A turn: a Message, a (role, content) pair, or a mapping with the keys role and content."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[MessageLike]
"""Text, token ids taken as they are, or a conversation for the model's own chat template."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. None means the server's default; zero means zero. The contract tells the ranges."""

    temperature: float | None = None  # 0: greedy. Default: 1
    top_k: int | None = None  # 0: all
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None  # 64 bits, unsigned. Default: drawn by the server and told in Started


class GraphMode(enum.StrEnum):
    """How a request wants its steps to run."""

    UNSPECIFIED = "unspecified"
    PREFER = "prefer"  # a graph when one is ready, else eager; never waits
    REQUIRE = "require"  # GraphNotReadyError when its graphs are not ready
    EAGER_ONLY = "eager_only"
    WAIT_UP_TO = "wait_up_to"  # waits in the queue for its graphs, at most max_wait_seconds


@dataclass(frozen=True, slots=True)
class GraphPolicy:
    mode: GraphMode = GraphMode.PREFER
    max_wait_seconds: float | None = None  # for WAIT_UP_TO


class GenerateOptions(TypedDict, total=False):
    """The keywords of `generate` and `complete`. What is left out has the server's default.

    model: the model's id.
    request_id: names the request in logs and errors; not one in flight.
    sampling: SamplingParams; the keywords temperature to seed override its fields.
    max_tokens: completion tokens of each choice, at most.
    stop, stop_token_ids: what ends a choice; include_stop: whether its text is part of the text.
    ignore_eos: go on after the model's end of text. min_tokens: no stop of any kind before.
    num_choices: completions of the same prompt.
    logprobs: None for none, 0 for those of the chosen tokens, n for the n likeliest as well.
    skip_special_tokens: leave special tokens out of the text (default True). omit_text: token ids only.
    add_special_tokens: for a text prompt (default True). add_generation_prompt: for a conversation (default True).
    graph_policy: a GraphPolicy, a GraphMode or its value.
    timeout: seconds for all of it, reconnections included; default: the client's.
    session_key: requests with one key go to the same server behind a balancer that hashes it.
    resume: go on on a new connection when the server is lost. None: for greedy and seeded requests. See ResumePolicy.
    """

    model: str
    request_id: str
    sampling: SamplingParams | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool | None
    ignore_eos: bool | None
    min_tokens: int | None
    num_choices: int | None
    logprobs: int | None
    skip_special_tokens: bool | None
    omit_text: bool | None
    add_special_tokens: bool | None
    add_generation_prompt: bool | None
    graph_policy: GraphPolicy | GraphMode | str | None
    timeout: float | None
    session_key: str
    resume: bool | None


# What comes back.


class FinishReason(enum.StrEnum):
    """Why a choice ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"  # a stop string, a stop token or the model's end of text
    LENGTH = "length"  # max_tokens reached


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """Why one choice ended, and what matched."""

    choice_index: int
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability, and its bytes (maybe a part of a character)."""

    token_id: int
    logprob: float
    piece: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token, and of the likeliest ones, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The request is accepted. The first event."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one choice. `finish` is set on the last event of the choice; text may lag behind the ids."""

    choice_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: ChoiceFinish | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out, of all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, by the server's clock; after a resume, of the last connection.

    `is_measured_by_client` is set when every token came but the server was lost before it told: then the times are from
    the client's first send, `queue_seconds` is 0 and `prefill_seconds` is all the time to the first token.
    """

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    time_to_first_token_seconds: float
    time_per_output_token_seconds: float | None  # None with fewer than two tokens
    total_seconds: float
    is_measured_by_client: bool = False


class StepPhase(enum.StrEnum):
    """What a step does."""

    UNSPECIFIED = "unspecified"
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class StepGroup:
    """Steps of one kind that a request took part in. `graph` is empty for eager ones."""

    phase: StepPhase
    graph: str
    num_steps: int
    tokens_bucket: int
    rows_bucket: int
    num_padding_tokens: int
    graph_age_seconds: float | None
    engine_seconds: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What ran for a request; after a resume, on the last connection. All zero when the server was lost before it told."""

    num_steps: int = 0
    num_graph_steps: int = 0
    num_eager_steps: int = 0
    num_preemptions: int = 0
    step_groups: tuple[StepGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """All is here. The last event. `num_resumes` counts the times a lost server was made up for."""

    choices: tuple[ChoiceFinish, ...]
    usage: Usage
    timings: Timings
    receipt: Receipt
    num_resumes: int = 0


Event: TypeAlias = Started | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion. `finish` is None only in the partial result of a generation that failed."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: ChoiceFinish | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer."""

    request_id: str
    model: str
    seed: int
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    receipt: Receipt
    num_resumes: int = 0

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        finish = self.choices[0].finish
        return FinishReason.UNSPECIFIED if finish is None else finish.reason


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a text, and the bytes of each."""

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    context_length: int


# Models.


class ModelRunner(enum.StrEnum):
    """Which forward runs a model."""

    UNSPECIFIED = "unspecified"
    DECODER = "decoder"
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What one request may ask."""

    max_prompt_bytes: int
    default_max_tokens: int
    max_choices: int
    max_stop_strings: int
    max_stop_string_bytes: int
    max_stop_token_ids: int
    max_logit_bias: int
    max_logprobs: int
    max_request_seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the daemon serves."""

    name: str  # models/{id}
    id: str
    architecture: str
    context_length: int
    vocabulary_size: int
    dtype: str
    device: str
    device_name: str
    runner: ModelRunner
    num_parameters: int
    weights_bytes: int
    chat_template: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    limits: ModelLimits
    load_time: datetime | None
    load_seconds: float
