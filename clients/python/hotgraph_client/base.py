"""What both clients are told and keep: the connection's settings and the defaults of generations. It opens no channel."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol, Unpack
from weakref import WeakSet

from hotgraph_client.channel import ChannelConfig, Option, TlsConfig, Token, check_timeout, session_metadata
from hotgraph_client.requests import GenerationSpec, generation_spec
from hotgraph_client.resume import GenerationProgress, ResumePolicy
from hotgraph_client.types import GenerateOptions, Prompt

DEFAULT_TARGET = "unix:hotgraph.sock"


class _Generation(Protocol):
    """What the clients' streams have in common here."""

    def cancel(self) -> bool: ...


class BaseClient:
    """The constructor of both clients. It connects to nothing yet.

    target: unix:PATH, HOST:PORT, or any other name gRPC resolves, such as ipv4:10.0.0.1:50051,10.0.0.2:50051.
    token: sent as `authorization: bearer ...`; a function is asked for each call. Over plain TCP to another host it is
        refused, unless allow_insecure_token says that the path is safe.
    tls: True for the system's root certificates, or a TlsConfig, also for mutual TLS.
    timeout: seconds for each call that names none; None: no limit but the server's. Watches have none of it.
    max_attempts: of each call in all, 1 to 5, by gRPC's retries; see `channel.service_config`.
    wait_for_ready: calls wait for a server, up to their timeout, instead of failing at once when there is none.
    resume, resume_policy: whether and how far generations go on after a lost server; see GenerateOptions and ResumePolicy.
    keepalive_seconds, keepalive_timeout_seconds: a ping after so much silence during calls; a server that does not answer
        it in time is dead. The daemon allows one each 5 s.
    client_id: sent as `x-client-id`.
    options: gRPC channel options; they win over ours.
    Raises ValueError for what cannot work or is not safe.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        token: Token | None = None,
        tls: bool | TlsConfig | None = None,
        timeout: float | None = None,
        max_attempts: int = 4,
        wait_for_ready: bool = False,
        resume: bool | None = None,
        resume_policy: ResumePolicy | None = None,
        keepalive_seconds: float = 10.0,
        keepalive_timeout_seconds: float = 5.0,
        client_id: str = "",
        allow_insecure_token: bool = False,
        options: Sequence[Option] = (),
    ) -> None:
        self._config = ChannelConfig(
            target=target,
            token=token,
            tls=TlsConfig() if tls is True else tls or None,
            timeout_seconds=timeout,
            max_attempts=max_attempts,
            wait_for_ready=wait_for_ready,
            keepalive_seconds=keepalive_seconds,
            keepalive_timeout_seconds=keepalive_timeout_seconds,
            client_id=client_id,
            allow_insecure_token=allow_insecure_token,
            extra_options=tuple(options),
        )
        self._resume = resume
        self._resume_policy = resume_policy or ResumePolicy()
        self._is_closed = False
        self._lock = threading.Lock()  # over opening and closing
        self._generations: WeakSet[_Generation] = WeakSet()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<{type(self).__name__} {self._config.target} {state}>"

    @property
    def target(self) -> str:
        """What it connects to."""
        return self._config.target

    def _close_generations(self) -> None:
        """Ends what still streams: it would take the end of the channel for a lost server."""
        with self._lock:
            generations = list(self._generations)
        for generation in generations:
            generation.cancel()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the client is closed")

    def _timeout(self, timeout: float | None) -> float | None:
        check_timeout(timeout)
        return self._config.timeout_seconds if timeout is None else timeout

    def _spec(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationSpec:
        options["timeout"] = self._timeout(options.get("timeout"))
        options["resume"] = self._resume if options.get("resume") is None else options["resume"]
        return generation_spec(prompt, **options)

    def _progress(self, spec: GenerationSpec) -> GenerationProgress:
        return GenerationProgress(spec, self._resume_policy)

    def _generation_metadata(self, spec: GenerationSpec) -> tuple[tuple[str, str], ...]:
        return self._config.metadata(*session_metadata(spec.request.session_key))
