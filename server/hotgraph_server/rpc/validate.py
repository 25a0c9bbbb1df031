"""What a request may ask: every violation at once, each with its field's path in the contract. Bounds are `config.BOUNDS`.

It knows messages and the model's sizes; it changes nothing. Ranges are written so that NaN is outside of them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration

from hotgraph.v1 import generation_pb2, graph_pb2, graph_service_pb2, inference_service_pb2
from hotgraph_server.config import BOUNDS
from hotgraph_server.errors import ContextLengthError, InvalidRequestError, Violation
from hotgraph_server.rpc.wire.common import from_duration
from hotgraph_server.rpc.wire.generation import GenerationRequest

IDENTIFIER_RULE: Final = f"must be 1 to {BOUNDS.max_request_id_bytes} of [A-Za-z0-9._:/-]"
MAX_LISTED_ITEMS: Final = 8  # of one list: a prompt of a million bad ids is told by its first few
MAX_DURATION_SECONDS: Final = 315_576_000_000  # of the type's own definition
BUDGET_PATHS: Final = ("limit_bytes", "stall_budget_per_second")


# Enumerations are open on the wire: a number that only a newer caller knows arrives as it is.
_CHAT_ROLES: Final = frozenset(generation_pb2.ChatRole.values())
_GRAPH_MODES: Final = frozenset(generation_pb2.GraphMode.values())
_GRAPH_STATES: Final = frozenset(graph_pb2.GraphState.values())
_SAMPLERS: Final = frozenset(graph_pb2.SamplerVariant.values())


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The sizes of the served model that requests are held against."""

    vocabulary_size: int
    context_length: int


class Violations:
    """Gathers what is wrong with a message."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, description: str) -> None:
        self._found.append(Violation(field, description))

    def raise_any(self) -> None:
        """Raises InvalidRequestError when there is one."""
        if self._found:
            raise InvalidRequestError(self._found)

    def in_range(self, field: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            self.add(field, f"must be in [{low:g}, {high:g}]")

    def above_zero(self, field: str, value: float, high: float) -> None:
        if not 0 < value <= high:
            self.add(field, f"must be greater than 0 and at most {high:g}")

    def at_most(self, field: str, count: int, limit: int, unit: str) -> bool:
        """Whether the count keeps to the limit."""
        if count > limit:
            self.add(field, f"holds {count} {unit}, at most {limit} are allowed")
        return count <= limit

    def token_ids(self, field: str, ids: Sequence[int], vocabulary_size: int) -> None:
        if ids and max(ids[:]) >= vocabulary_size:  # a list: protobuf's own is walked through three times as slowly
            wrong = (index for index, token_id in enumerate(ids) if token_id >= vocabulary_size)
            for index, _ in zip(wrong, range(MAX_LISTED_ITEMS), strict=False):
                self.add(f"{field}[{index}]", f"must be below the vocabulary's size, {vocabulary_size}")

    def enum(self, field: str, value: int, kinds: Collection[int], *, is_required: bool) -> None:
        if value not in kinds:
            self.add(field, f"{value} is no value of this enumeration")
        elif is_required and value == 0:
            self.add(field, "is required")

    def duration(self, field: str, value: Duration, high_seconds: float) -> None:
        """A duration greater than 0 and at most `high_seconds`."""
        if self.well_formed_duration(field, value):
            self.above_zero(field, from_duration(value), high_seconds)

    def well_formed_duration(self, field: str, value: Duration) -> bool:
        is_good = (
            abs(value.seconds) <= MAX_DURATION_SECONDS
            and abs(value.nanos) < 1_000_000_000
            and value.seconds * value.nanos >= 0
        )
        if not is_good:
            self.add(field, "is no valid duration")
        return is_good


_IDENTIFIER: Final = re.compile(rf"[A-Za-z0-9._:/-]{{1,{BOUNDS.max_request_id_bytes}}}")


def is_identifier(text: str) -> bool:
    """Whether a caller may name a request, or itself, so."""
    return _IDENTIFIER.fullmatch(text) is not None


def check_generation(request: GenerationRequest, limits: ModelLimits) -> None:
    """Raises InvalidRequestError with every violation, or else ContextLengthError for too many token ids."""
    found = Violations()
    if request.request_id and not is_identifier(request.request_id):
        found.add("request_id", IDENTIFIER_RULE)
    if len(request.session_key.encode()) > BOUNDS.max_session_key_bytes:
        found.add("session_key", f"must be at most {BOUNDS.max_session_key_bytes} bytes")
    _check_prompt(found, request, limits)
    _check_sampling(found, request.sampling, limits)
    _check_stop(found, request, limits)
    if request.output.HasField("logprobs"):
        found.in_range("output.logprobs", request.output.logprobs, 0, BOUNDS.max_logprobs)
    if request.HasField("max_tokens") and request.max_tokens < 1:
        found.add("max_tokens", "must be at least 1")
    if request.HasField("num_choices"):
        found.in_range("num_choices", request.num_choices, 1, BOUNDS.max_choices)
    _check_graph_policy(found, request.graph_policy)
    if request.HasField("timeout"):
        found.duration("timeout", request.timeout, BOUNDS.max_timeout_seconds)
    _check_resume(found, request, limits)
    found.raise_any()
    num_ids = len(request.token_ids.ids)
    if num_ids >= limits.context_length:
        raise ContextLengthError(limit=limits.context_length, prompt_tokens=num_ids, max_tokens=request.max_tokens or 1)


def _check_prompt(found: Violations, request: GenerationRequest, limits: ModelLimits) -> None:
    match request.WhichOneof("prompt"):
        case None:
            found.add("prompt", "is required: text, token_ids or chat")
        case "text":
            if not request.text:
                found.add("text", "must not be empty")
            _check_prompt_bytes(found, "text", (request.text,))
        case "token_ids":
            ids = request.token_ids.ids
            if not ids:
                found.add("token_ids.ids", "must not be empty")
            elif len(ids) < limits.context_length:  # longer ones are refused for that
                found.token_ids("token_ids.ids", ids, limits.vocabulary_size)
        case "chat":
            _check_chat(found, request.chat)


def _check_chat(found: Violations, chat: generation_pb2.ChatPrompt) -> None:
    if not chat.messages:
        found.add("chat.messages", "must not be empty")
    if not found.at_most("chat.messages", len(chat.messages), BOUNDS.max_messages, "messages"):
        return
    for index, message in enumerate(chat.messages):
        found.enum(f"chat.messages[{index}].role", message.role, _CHAT_ROLES, is_required=True)
    _check_prompt_bytes(found, "chat.messages", (message.content for message in chat.messages))


def _check_prompt_bytes(found: Violations, field: str, texts: Iterable[str]) -> None:
    found.at_most(field, sum(len(text.encode()) for text in texts), BOUNDS.max_prompt_bytes, "bytes")


def _float32(value: float) -> float:
    """The value as a float field carries it: 0.01 arrives as a little less."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


_MIN_TEMPERATURE: Final = _float32(BOUNDS.min_temperature)


def _check_sampling(found: Violations, sampling: generation_pb2.SamplingParams, limits: ModelLimits) -> None:
    temperature = sampling.temperature
    if sampling.HasField("temperature") and not (
        temperature == 0 or _MIN_TEMPERATURE <= temperature <= BOUNDS.max_temperature
    ):
        found.add("sampling.temperature", f"must be 0 or in [{BOUNDS.min_temperature:g}, {BOUNDS.max_temperature:g}]")
    if sampling.HasField("top_p"):
        found.above_zero("sampling.top_p", sampling.top_p, 1)
    if sampling.HasField("min_p"):
        found.in_range("sampling.min_p", sampling.min_p, 0, 1)
    if sampling.HasField("repetition_penalty"):
        found.above_zero("sampling.repetition_penalty", sampling.repetition_penalty, BOUNDS.max_repetition_penalty)
    if sampling.HasField("presence_penalty"):
        found.in_range(
            "sampling.presence_penalty", sampling.presence_penalty, -BOUNDS.max_abs_penalty, BOUNDS.max_abs_penalty
        )
    if sampling.HasField("frequency_penalty"):
        found.in_range(
            "sampling.frequency_penalty", sampling.frequency_penalty, -BOUNDS.max_abs_penalty, BOUNDS.max_abs_penalty
        )
    _check_logit_bias(found, sampling.logit_bias, limits)


def _check_logit_bias(found: Violations, entries: Sequence[generation_pb2.LogitBias], limits: ModelLimits) -> None:
    if not found.at_most("sampling.logit_bias", len(entries), BOUNDS.max_logit_bias, "entries"):
        return
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        field = f"sampling.logit_bias[{index}]"
        if entry.token_id >= limits.vocabulary_size:
            found.add(f"{field}.token_id", f"must be below the vocabulary's size, {limits.vocabulary_size}")
        if entry.token_id in seen:
            found.add(f"{field}.token_id", "this token has a bias already")
        seen.add(entry.token_id)
        found.in_range(f"{field}.bias", entry.bias, -BOUNDS.max_abs_bias, BOUNDS.max_abs_bias)


def _check_stop(found: Violations, request: GenerationRequest, limits: ModelLimits) -> None:
    stop = request.stop
    if found.at_most("stop.strings", len(stop.strings), BOUNDS.max_stop_strings, "strings"):
        for index, text in enumerate(stop.strings):
            if not 1 <= len(text.encode()) <= BOUNDS.max_stop_string_bytes:
                found.add(f"stop.strings[{index}]", f"must have 1 to {BOUNDS.max_stop_string_bytes} bytes")
    if found.at_most("stop.token_ids", len(stop.token_ids), BOUNDS.max_stop_token_ids, "token ids"):
        found.token_ids("stop.token_ids", stop.token_ids, limits.vocabulary_size)
    if request.HasField("max_tokens") and stop.min_tokens > request.max_tokens:
        found.add("stop.min_tokens", f"must be at most max_tokens, {request.max_tokens}")
    elif stop.min_tokens >= limits.context_length:
        found.add("stop.min_tokens", f"must be below the context length, {limits.context_length}")


def _check_graph_policy(found: Violations, policy: generation_pb2.GraphPolicy) -> None:
    found.enum("graph_policy.mode", policy.mode, _GRAPH_MODES, is_required=False)
    if policy.mode == generation_pb2.GRAPH_MODE_WAIT_UP_TO:
        found.duration("graph_policy.max_wait", policy.max_wait, BOUNDS.max_graph_wait_seconds)


def _check_resume(found: Violations, request: GenerationRequest, limits: ModelLimits) -> None:
    num_choices = request.num_choices if request.HasField("num_choices") else 1
    if not request.resume or not found.at_most("resume", len(request.resume), BOUNDS.max_choices, "choices"):
        return
    seen: set[int] = set()
    for position, choice in enumerate(request.resume):
        field = f"resume[{position}]"
        if choice.index >= num_choices:
            found.add(f"{field}.index", f"must be below num_choices, {num_choices}")
        if choice.index in seen:
            found.add(f"{field}.index", "this choice is resumed already")
        seen.add(choice.index)
        if found.at_most(f"{field}.token_ids", len(choice.token_ids), limits.context_length, "token ids"):
            found.token_ids(f"{field}.token_ids", choice.token_ids, limits.vocabulary_size)
        if request.HasField("max_tokens") and len(choice.token_ids) > request.max_tokens:
            found.add(f"{field}.token_ids", f"holds more than max_tokens, {request.max_tokens}")
    is_greedy = request.sampling.HasField("temperature") and request.sampling.temperature == 0
    if not is_greedy and not request.sampling.HasField("seed"):
        found.add("sampling.seed", "is required to resume a sampled request: the one that Started told")


def check_tokenize(request: inference_service_pb2.TokenizeRequest) -> None:
    """Raises InvalidRequestError."""
    found = Violations()
    match request.WhichOneof("input"):
        case None:
            found.add("input", "is required: text or chat")
        case "text":
            _check_prompt_bytes(found, "text", (request.text,))
        case "chat":
            _check_chat(found, request.chat)
    found.raise_any()


def check_detokenize(request: inference_service_pb2.DetokenizeRequest, limits: ModelLimits) -> None:
    """Raises InvalidRequestError."""
    found = Violations()
    if found.at_most("token_ids", len(request.token_ids), limits.context_length, "token ids"):
        found.token_ids("token_ids", request.token_ids, limits.vocabulary_size)
    found.raise_any()


def check_page_size(page_size: int, *, default: int, maximum: int) -> int:
    """The size to use. Raises InvalidRequestError for a negative one."""
    if page_size < 0:
        raise InvalidRequestError([Violation("page_size", "must not be negative")])
    return min(page_size or default, maximum)


def check_graph_name(name: str) -> str:
    """The cache's name of graphs/{id}. Raises InvalidRequestError for what is no such name."""
    graph_id = name.removeprefix("graphs/")
    if not graph_id or graph_id == name:
        raise InvalidRequestError([Violation("name", "must be graphs/{id}")])
    return graph_id


def check_graph_states(states: Sequence[int]) -> None:
    """Raises InvalidRequestError."""
    found = Violations()
    if found.at_most("states", len(states), len(_GRAPH_STATES), "states"):
        for index, state in enumerate(states):
            found.enum(f"states[{index}]", state, _GRAPH_STATES, is_required=True)
    found.raise_any()


def _check_graph_key(found: Violations, field: str, key: graph_pb2.GraphKey) -> None:
    if key.rows < 1:
        found.add(f"{field}.rows", "must be at least 1")
    if key.tokens < max(key.rows, 1):
        found.add(f"{field}.tokens", "must be at least 1, and at least rows")
    found.enum(f"{field}.sampler", key.sampler, _SAMPLERS, is_required=True)


def check_prewarm(request: graph_service_pb2.PrewarmGraphsRequest) -> None:
    """Raises InvalidRequestError."""
    found = Violations()
    if not request.keys:
        found.add("keys", "must not be empty")
    if found.at_most("keys", len(request.keys), BOUNDS.max_prewarm_keys, "keys"):
        for index, key in enumerate(request.keys):
            _check_graph_key(found, f"keys[{index}]", key)
    if request.HasField("wait"):
        found.duration("wait", request.wait, BOUNDS.max_graph_wait_seconds)
    found.raise_any()


def check_pin(request: graph_service_pb2.PinGraphRequest) -> float:
    """The lease in seconds. Raises InvalidRequestError."""
    if not request.HasField("lease"):
        return BOUNDS.default_pin_seconds
    found = Violations()
    found.duration("lease", request.lease, BOUNDS.max_pin_seconds)
    found.raise_any()
    return from_duration(request.lease)


def check_budget(budget: graph_pb2.Budget, paths: Collection[str]) -> None:
    """Raises InvalidRequestError for a mask that is empty or names what cannot be changed, and for values out of range."""
    found = Violations()
    if not paths:
        found.add("update_mask", f"is required: of {', '.join(BUDGET_PATHS)}")
    if found.at_most("update_mask.paths", len(paths), MAX_LISTED_ITEMS, "paths"):
        for index, path in enumerate(paths):
            if path not in BUDGET_PATHS:
                found.add(f"update_mask.paths[{index}]", f"must be one of {', '.join(BUDGET_PATHS)}")
    field = "budget.stall_budget_per_second"
    stall = budget.stall_budget_per_second
    if "stall_budget_per_second" in paths and found.well_formed_duration(field, stall):
        found.in_range(field, from_duration(stall), 0, 1)
    if "limit_bytes" in paths and budget.limit_bytes >= 1 << 63:
        found.add("budget.limit_bytes", "must be below 2^63")
    found.raise_any()


def check_profile(profile: graph_pb2.GraphProfile) -> None:
    """Raises InvalidRequestError."""
    found = Violations()
    if found.at_most("profile.entries", len(profile.entries), BOUNDS.max_profile_entries, "entries"):
        for index, entry in enumerate(profile.entries):
            field = f"profile.entries[{index}]"
            _check_graph_key(found, f"{field}.key", entry.key)
            found.well_formed_duration(f"{field}.saved_per_step", entry.saved_per_step)
    found.raise_any()


def check_export(max_entries: int) -> int:
    """How many entries to export. Raises InvalidRequestError."""
    if max_entries > BOUNDS.max_profile_entries:
        raise InvalidRequestError([Violation("max_entries", f"must be at most {BOUNDS.max_profile_entries}")])
    return max_entries or 256
