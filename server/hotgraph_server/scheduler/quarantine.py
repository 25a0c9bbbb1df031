"""Requests that bring the daemon down: who is suspected after a crash, who runs on trial, and who is refused from then on.

Whoever ran when the daemon died is a suspect in its next life. Suspects are on trial one at a time, beside all others: until
their first tokens, or to their end when they were there at two crashes. When the daemon dies again, the one on trial is
convicted and refused for an hour; who ran beside it is not blamed. When nobody was on trial, all that ran are suspects. A
suspect that finishes is none any more. So a request that always crashes does it twice, or three times when it takes many tokens
to it, and what it ran beside is served. A crash that is nobody's fault costs its requests some waiting in the next life.

It reads no file and knows no request's words: a request is a digest, and `crash_record.py` keeps them.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Final

from graphcache import Clock
from hotgraph_server.errors import HotgraphError, InternalError
from hotgraph_server.request import FinishedEvent, Request
from hotgraph_server.scheduler.crash_record import DIGEST_BYTES, CrashRecord, Suspect
from hotgraph_server.scheduler.ticket import Ticket

logger = logging.getLogger("hotgraph.scheduler")

TRIAL_TOKENS: Final = 4
MEMORY_SECONDS: Final = 3600.0
MAX_CRASHES: Final = 2  # as many as are told apart


def digest_of(request: Request) -> bytes:
    """Of what a request asks the engine for. Whoever asks, by which id, by when and with which seed, does not count, nor do the
    tokens that it resumes with: the next attempt at the same thing has others."""
    sampling, stop = request.sampling, request.stop
    digest = hashlib.blake2b(array("q", request.prompt_token_ids), digest_size=DIGEST_BYTES)
    digest.update(
        repr(
            (
                request.max_tokens,
                replace(sampling, seed=0, logit_bias={}),
                sorted(sampling.logit_bias.items()),
                replace(stop, token_ids=frozenset()),
                sorted(stop.token_ids),
                request.num_choices,
                request.num_logprobs,
            )
        ).encode()
    )
    return digest.digest()


class Quarantine:
    """Keeps a crash record, for one scheduler. Event loop's thread only."""

    def __init__(self, record: CrashRecord, clock: Clock) -> None:
        """Judges the last life by what it left. `clock` is the host's monotonic one."""
        self.num_refused = 0
        self._record = record
        self._clock = clock
        self._trial: Ticket | None = None
        self._judge(clock.monotonic())

    @property
    def num_suspects(self) -> int:
        """Those that wait for their trial, and are not convicted."""
        return sum(not suspect.is_convicted for suspect in self._suspects.values())

    @property
    def num_convicted(self) -> int:
        return len(self._suspects) - self.num_suspects

    def _judge(self, now: float) -> None:
        # A time to come is of another life of the host, of which nothing is known.
        self._suspects = {
            digest: suspect
            for digest, suspect in self._record.suspects().items()
            if 0 <= now - suspect.since < MEMORY_SECONDS
        }
        running = self._record.running()
        on_trial = [digest for digest, is_on_trial in running.items() if is_on_trial]
        if on_trial:
            for digest in on_trial:
                incident = uuid.uuid4().hex
                self._suspects[digest] = Suspect(MAX_CRASHES, now, incident)
                logger.error(
                    "a request was there at two crashes and is refused for %.0f s, incident %s",
                    MEMORY_SECONDS,
                    incident,
                    extra={"incident": incident},
                )
        else:
            for digest in running:
                before = self._suspects.get(digest)
                num_crashes = 1 if before is None else min(before.num_crashes + 1, MAX_CRASHES)
                self._suspects[digest] = Suspect(num_crashes, now)
        if running:
            logger.warning(
                "the last life of this daemon ended with %d requests running: %d are on trial, one after the other",
                len(running),
                self.num_suspects,
            )
        # The latest first: they stay when there are too many.
        self._suspects = dict(sorted(self._suspects.items(), key=lambda item: -item[1].since))
        self._record.set_suspects(self._suspects)
        self._record.forget_running()

    def check(self, request: Request) -> bytes:
        """The request's digest. Raises InternalError, with the incident of its conviction, for one that is refused."""
        digest = digest_of(request)
        suspect = self._suspects.get(digest)
        if suspect is not None and suspect.is_convicted:
            if self._clock.monotonic() - suspect.since < MEMORY_SECONDS:
                self.num_refused += 1
                raise InternalError(suspect.incident)
            self._forget(digest)
        return digest

    def may_start(self, ticket: Ticket) -> bool:
        """Whether it may come in now. A suspect's trial begins with that, so who asks means it."""
        suspect = self._suspects.get(ticket.digest)
        if suspect is None or ticket is self._trial:
            return True
        if ticket.crash_place is not None:
            return True  # it ran before, gave way, and comes back
        if self._trial is not None:
            return False
        self._trial = ticket
        ticket.crash_place = self._record.begin(ticket.digest, is_on_trial=True)
        return True

    def begin(self, ticket: Ticket) -> None:
        """Its first step is about to be given to the engine."""
        if ticket.crash_place is None:
            ticket.crash_place = self._record.begin(ticket.digest, is_on_trial=False)

    def step_done(self) -> None:
        """Looks at the one on trial; its place may be the next one's after that."""
        ticket = self._trial
        if ticket is None:
            return
        suspect = self._suspects.get(ticket.digest)
        if suspect is not None and suspect.num_crashes >= MAX_CRASHES:
            return  # to the end
        if any(s.num_completion_tokens < TRIAL_TOKENS and s.finish is None for s in ticket.sequences):
            return
        self._trial = None
        if ticket.crash_place is not None:
            self._record.acquit(ticket.crash_place, ticket.digest)

    def end(self, ticket: Ticket, end: FinishedEvent | HotgraphError) -> None:
        """It runs no more, and the engine lives."""
        if ticket is self._trial:
            self._trial = None
        if ticket.crash_place is not None:
            self._record.end(ticket.crash_place)
            ticket.crash_place = None
        if isinstance(end, FinishedEvent) and ticket.digest in self._suspects:
            self._forget(ticket.digest)

    def _forget(self, digest: bytes) -> None:
        del self._suspects[digest]
        self._record.set_suspects(self._suspects)

    def close(self) -> None:
        """Nothing is noted any more; what still runs stays noted."""
        self._record.close()


def open_quarantine(path: Path | None, clock: Clock) -> Quarantine | None:
    """With the record at `path`; None without a path. A record that cannot be used is a warning: it is a help, no need."""
    if path is None:
        return None
    try:
        return Quarantine(CrashRecord(path), clock)
    except (OSError, ValueError) as error:
        logger.warning("the crash record %s cannot be used, nobody is suspected after a crash: %s", path, error)
        return None
