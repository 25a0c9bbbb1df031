"""Every setting there is, with its default, range and unit, and the bounds of a request. Read once, passed down by section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MIB = 1 << 20
GIB = 1 << 30


class Section(BaseModel):
    """A part of the settings: frozen, and an unknown name in it is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Which model, in which form, where."""

    source: Annotated[
        str, Field(min_length=1, description="Folder, GGUF file, hub id, or name of an embedded model.")
    ] = "smollm2-135m-instruct"
    id: Annotated[
        str | None, Field(min_length=1, description="Name that requests use. Default: made from the source.")
    ] = None
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes cuda:0 when there is one.")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Field(description="auto: float32 on the CPU, else the checkpoint's, bfloat16 for float32 ones."),
    ] = "auto"
    max_context: Annotated[
        int | None, Field(ge=16, description="Tokens of one sequence. Default: the model's own.")
    ] = None
    runner: Annotated[
        Literal["auto", "decoder", "bridge"],
        Field(description="auto: the lean decoder when it knows the architecture."),
    ] = "auto"
    tuning: Annotated[
        str,
        Field(
            min_length=1,
            description="Table of measured tunings: auto takes this host's own (hotgraph tune makes it) over the one that is"
            " shipped for its GPU, off takes none, else a file.",
        ),
    ] = "auto"
    batch_invariant: Annotated[
        bool,
        Field(
            description="A request's tokens and log-probabilities are the same bits whatever else runs. On Hopper GPUs, in 16"
            " bits, with the lean decoder; elsewhere it is an error."
        ),
    ] = False
    num_threads: Annotated[
        int | None, Field(ge=1, description="CPU threads of one step. Default: the CPU's cores.")
    ] = None


class ServerSettings(Section):
    """Where to listen and how long things may take."""

    listen: Annotated[
        tuple[str, ...], Field(min_length=1, description="Addresses: unix:PATH or HOST:PORT, port 0 for any.")
    ] = ("unix:hotgraph.sock",)
    socket_access: Annotated[
        Literal["auto", "owner", "group"],
        Field(description="Who may connect to a Unix socket. auto: its group, too, where the umask says so."),
    ] = "auto"
    socket_role: Annotated[
        Literal["admin", "use", "none"],
        Field(description="What a caller on a Unix socket of listen may do without a token. none: nothing."),
    ] = "admin"
    admin_listen: Annotated[
        tuple[str, ...],
        Field(
            description="The admin's own addresses, as in listen: the admin's methods are then served there alone. Unix sockets"
            " of it are for the daemon's user alone."
        ),
    ] = ()
    tls_certificate: Annotated[
        Path | None,
        Field(
            description="PEM certificate, with those in between: all TCP addresses speak TLS. A file may stand below"
            " $CREDENTIALS_DIRECTORY."
        ),
    ] = None
    tls_key: Annotated[Path | None, Field(description="PEM key of that certificate; not for every user to read.")] = (
        None
    )
    tls_client_ca: Annotated[
        Path | None,
        Field(description="PEM certificates: TCP callers have to show a certificate signed by one of them."),
    ] = None
    tls_admins: Annotated[
        tuple[str, ...],
        Field(
            description="Names in certificates of callers that may administer; the others may use. Without token_file."
        ),
    ] = ()
    token_file: Annotated[
        Path | None,
        Field(
            description="Tokens that TCP callers have to show: lines ROLE NAME TOKEN, role use or admin, token in the clear or"
            " sha256:HEX."
        ),
    ] = None
    max_message_bytes: Annotated[int, Field(ge=64 * 1024, le=256 * MIB, description="One message, either way.")] = (
        4 * MIB
    )
    max_connection_streams: Annotated[
        int,
        Field(
            ge=1,
            le=65536,
            description="Calls that one connection may have open; allow twice what a client needs. Fewer bear floods better.",
        ),
    ] = 1024
    max_request_seconds: Annotated[float, Field(gt=0, le=86400, description="One request, from arrival.")] = 600.0
    drain_grace_seconds: Annotated[float, Field(ge=0, le=3600, description="For what runs when asked to stop.")] = 30.0
    reflection: Annotated[bool, Field(description="Serve gRPC server reflection.")] = True
    awake_cores: Annotated[
        int | None,
        Field(
            ge=0,
            le=64,
            description="Processor cores that serve and are kept from falling asleep while requests come, at idle priority."
            " Default: with a GPU 4 of 16 or more, 2 of 8 or more; else, or under a quota of processor time, 0.",
        ),
    ] = None
    awake_seconds: Annotated[
        float, Field(ge=0.1, le=86400, description="After the last request, until those cores may fall asleep.")
    ] = 30.0


class SchedulerSettings(Section):
    """How much runs and waits at once."""

    num_slots: Annotated[int, Field(ge=1, le=1024, description="Sequences that run at once.")] = 64
    max_waiting: Annotated[int, Field(ge=0, le=100_000, description="Sequences that may wait for a slot.")] = 256
    max_step_tokens: Annotated[
        int, Field(ge=16, le=65536, description="New tokens of one step, prompts and decode together.")
    ] = 512
    default_max_tokens: Annotated[int, Field(ge=1, description="Completion tokens when a request names none.")] = 256
    prefix_caching: Annotated[bool, Field(description="Share KV blocks of equal prefixes.")] = True
    fair_preemption: Annotated[
        bool,
        Field(
            description="When no slot is free, a caller that runs nothing gets one of the caller that runs most, whose newest"
            " sequence goes on later. Else it waits until one is free."
        ),
    ] = False
    crash_record: Annotated[
        Path | None,
        Field(
            description="File that knows digests of the requests that run, so that one at which the daemon dies again and again"
            " is refused. Default: none."
        ),
    ] = None


class KvCacheSettings(Section):
    """Keys and values of the tokens in flight."""

    size_bytes: Annotated[int | None, Field(ge=1, description="Default: 1 GiB on the CPU; on a GPU, what is left.")] = (
        None
    )
    block_size: Annotated[int, Field(ge=1, le=256, description="Token positions in a block.")] = 16


class GraphSettings(Section):
    """The graph cache."""

    budget_bytes: Annotated[int, Field(ge=0, description="Bytes all graphs may hold together.")] = GIB
    policy: Annotated[Literal["value", "lru", "lfu"], Field(description="What eviction ranks by.")] = "value"
    stall_budget_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Capture interference allowed, seconds per second of serving; steps that miss their graph allow more.",
        ),
    ] = 0.05
    max_padding_ratio: Annotated[
        float, Field(ge=1, le=16, description="A graph is used up to this many times the tokens.")
    ] = 2.0
    padding: Annotated[
        Literal["auto", "always", "never"],
        Field(description="Whether a step computes its whole bucket. auto: only where a graph has a fixed shape."),
    ] = "auto"
    profile: Annotated[Path | None, Field(description="Profile to import on start, export on stop.")] = None


class MetricsSettings(Section):
    """What Prometheus may read, and where."""

    listen: Annotated[
        tuple[str, ...],
        Field(description="Addresses for GET /metrics, as in server.listen and guarded like those. Default: none."),
    ] = ()
    token_file: Annotated[
        Path | None,
        Field(description="Tokens that TCP scrapers have to show, as in server.token_file, whatever their role."),
    ] = None
    max_clients: Annotated[
        int,
        Field(ge=0, le=1000, description="Clients that have counters of their own; the rest is one. 0: nobody has."),
    ] = 32


class TraceSettings(Section):
    """Where spans of calls go, over OTLP. Wants the extra otel."""

    endpoint: Annotated[
        str | None,
        Field(
            min_length=1,
            description="A collector's address for OTLP over gRPC, such as http://127.0.0.1:4317. Default: no traces.",
        ),
    ] = None
    sample_ratio: Annotated[
        float, Field(ge=0, le=1, description="Of calls whose caller traces nothing; the others go by their caller.")
    ] = 1.0


class LoggingSettings(Section):
    """What is logged, and how."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="Least level that is logged.")] = (
        "info"
    )
    format: Annotated[Literal["auto", "pretty", "json"], Field(description="auto: pretty on a terminal.")] = "auto"


class Settings(Section):
    """All sections."""

    model: ModelSettings = ModelSettings()
    server: ServerSettings = ServerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    kv_cache: KvCacheSettings = KvCacheSettings()
    graphs: GraphSettings = GraphSettings()
    metrics: MetricsSettings = MetricsSettings()
    traces: TraceSettings = TraceSettings()
    logging: LoggingSettings = LoggingSettings()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one request may ask. The one table behind the validator, the contract's comments, GetModel and the tests."""

    max_request_id_bytes: int = 128
    max_session_key_bytes: int = 128
    max_prompt_bytes: int = 2 * MIB
    max_messages: int = 1024
    max_choices: int = 16
    min_temperature: float = 0.01  # of the temperatures that are not 0
    max_temperature: float = 2.0
    max_repetition_penalty: float = 10.0
    max_abs_penalty: float = 2.0
    max_logit_bias: int = 512
    max_abs_bias: float = 100.0
    max_stop_strings: int = 16
    max_stop_string_bytes: int = 256
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_graph_wait_seconds: float = 60.0
    max_timeout_seconds: float = 86400.0
    max_prewarm_keys: int = 256
    max_pin_seconds: float = 86400.0
    default_pin_seconds: float = 600.0
    max_profile_entries: int = 1000


BOUNDS = Bounds()
