"""Who waits for a slot, and who is next: fair between callers, first come first served for each. It gives and takes no slot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class _Request(Protocol):
    @property
    def client(self) -> str: ...


class _Ticket(Protocol):
    @property
    def request(self) -> _Request: ...


class Waiter(Protocol):
    """What the queue must know of a sequence: whose it is."""

    @property
    def ticket(self) -> _Ticket: ...


WaiterT = TypeVar("WaiterT", bound=Waiter)


class WaitingQueue(Generic[WaiterT]):
    """Sequences in order of their callers' turns. Next is the first of a caller that runs least; among equals, of the caller
    whose turn is longest ago. Those that had run before, and gave way, come before all others.

    A caller who queues a thousand requests is thus in the way of their own alone.
    """

    def __init__(self) -> None:
        self._front: OrderedDict[int, WaiterT] = OrderedDict()  # by identity, here and below: they are found at once
        # In the order of turns; none is empty.
        self._of_client: OrderedDict[str, OrderedDict[int, WaiterT]] = OrderedDict()
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[WaiterT]:
        yield from self._front.values()
        for waiters in self._of_client.values():
            yield from waiters.values()

    def append(self, waiter: WaiterT) -> None:
        """Behind all others of its caller."""
        self._of_client.setdefault(waiter.ticket.request.client, OrderedDict())[id(waiter)] = waiter
        self._num += 1

    def push_front(self, waiter: WaiterT) -> None:
        """Before all others, whoever's they are."""
        self._front[id(waiter)] = waiter
        self._front.move_to_end(id(waiter), last=False)
        self._num += 1

    def next(self, num_running: Callable[[str], int]) -> WaiterT:
        """Who is next, given how many of a caller's sequences run. There must be one."""
        if self._front:
            return next(iter(self._front.values()))
        best: OrderedDict[int, WaiterT] | None = None
        least = 0
        for client, waiters in self._of_client.items():
            num = num_running(client)
            if best is None or num < least:
                best, least = waiters, num
            if not least:
                break  # a herd of new callers is not walked through for each of them
        assert best is not None, "nobody waits"
        return next(iter(best.values()))

    @property
    def has_front(self) -> bool:
        """Whether any waits that had run before and comes before all others."""
        return bool(self._front)

    def newcomers(self, num_running: Callable[[str], int]) -> Iterator[WaiterT]:
        """The first of each caller that runs nothing, in the order of turns."""
        for client, waiters in self._of_client.items():
            if not num_running(client):
                yield next(iter(waiters.values()))

    def num_of(self, client: str) -> int:
        """How many of a caller's wait for their turn."""
        return len(self._of_client.get(client, ()))

    def fullest(self) -> str | None:
        """The caller of whom most wait for their turn; None when nobody does."""
        return max(self._of_client, key=self.num_of, default=None)

    def newest_of(self, client: str) -> Iterator[WaiterT]:
        """A caller's that wait for their turn, the last that came first."""
        return reversed(self._of_client.get(client, OrderedDict()).values())

    def remove(self, waiter: WaiterT, *, is_turn: bool = False) -> None:
        """Takes it out, wherever it stands. `is_turn`: its caller's turn is over."""
        self._num -= 1
        if self._front.pop(id(waiter), None) is not None:
            return
        client = waiter.ticket.request.client
        waiters = self._of_client[client]
        del waiters[id(waiter)]
        if not waiters:
            del self._of_client[client]
        elif is_turn:
            self._of_client.move_to_end(client)

    def put_back(self, waiter: WaiterT, *, is_front: bool) -> None:
        """Where it was before `remove`: first of its caller's, or with `is_front` of all. Last taken, first put back."""
        if is_front:
            self.push_front(waiter)
            return
        client = waiter.ticket.request.client
        waiters = self._of_client.get(client)
        if waiters is None:
            waiters = self._of_client[client] = OrderedDict()
            self._of_client.move_to_end(client, last=False)
        waiters[id(waiter)] = waiter
        waiters.move_to_end(id(waiter), last=False)
        self._num += 1

    def is_front(self, waiter: WaiterT) -> bool:
        """Whether it stands before all callers' turns."""
        return id(waiter) in self._front
