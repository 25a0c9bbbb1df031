"""Sequences of which nothing counts but whose they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    client: str


@dataclass(frozen=True)
class Ticket:
    request: Request


@dataclass(eq=False)
class OfCaller:
    """Stands for a sequence of a caller."""

    ticket: Ticket


def of_caller(client: str) -> OfCaller:
    return OfCaller(Ticket(Request(client)))
