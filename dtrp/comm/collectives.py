"""What all ranks do together: values that go from neighbour to neighbour, along a chain through all of them.

Every rank calls the same methods in the same order; each message says which, so that one that does not is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..errors import WorkerError
from ..launch.ranks import Ranks
from ..tensors.pytree import map_tensors
from .link import Receiver, Sender
from .message import Kind, Message, Note, object_tensor


class Waits(Protocol):
    """How a chain waits; `dtrp.comm.transport.Transport` does."""

    def receive(self, link: Receiver, what: Callable[[], str]) -> Message: ...
    def wait_for_room(self, link: Sender) -> None: ...


class Chain:
    """A rank's place in the chain.

    Args:
        ranks: who hosts what.
        waits: for messages, and for room for them.
        from_left, to_left, from_right, to_right: links to the neighbours; None at the ends.

    Attributes:
        handing: the method that hands tensors from stage to stage, for messages.
    """

    handing = "infer"

    def __init__(
        self,
        ranks: Ranks,
        waits: Waits,
        from_left: Receiver | None,
        to_left: Sender | None,
        from_right: Receiver | None,
        to_right: Sender | None,
    ) -> None:
        self._ranks, self._waits = ranks, waits
        self._from_left, self._to_left = from_left, to_left
        self._from_right, self._to_right = from_right, to_right

    def exchange(self, method: str, value: Any) -> list[Any]:
        """Every rank's value, by place in the chain, on every rank."""
        values = self._pass_on(self._from_left, self._to_right, method, lambda sofar: [*(sofar or []), value])
        everything: list[Any] = self._pass_on(
            self._from_right, self._to_left, method, lambda whole: values if whole is None else whole
        )
        return everything

    def collect(self, method: str, value: Any) -> list[Any] | None:
        """Every rank's value, on the first rank of the chain; None elsewhere."""
        values = self._pass_on(self._from_right, self._to_left, method, lambda sofar: [value, *(sofar or [])])
        return values if self._to_left is None else None

    def spread(self, method: str, value: Any) -> Any:
        """The first rank's value, on every rank."""
        return self._pass_on(
            self._from_left, self._to_right, method, lambda given: (value,) if given is None else given
        )[0]

    def scatter(self, method: str, values: Sequence[Any] | None) -> Any:
        """The place's own of the first rank's ``values``."""
        mine: list[Any] = []

        def split(rest: list[Any] | None) -> list[Any]:
            rest = list(values or ()) if rest is None else rest
            mine.append(rest[0])
            return rest[1:]

        self._pass_on(self._from_left, self._to_right, method, split)
        return mine[0]

    def spread_back(self, method: str, value: Any) -> Any:
        """The last stage's value, on every rank of its replica."""
        last, first = self._ranks.after is None, self._ranks.before is None
        into = None if last else self._from_right
        return self._pass_on(into, None if first else self._to_left, method, lambda v: (value,) if v is None else v)[0]

    def hand_over(self, method: str, x: Any, work: Callable[[Any], Any]) -> Any:
        """``work`` of each stage in turn on what the one before made of ``x``; the result on the last, None elsewhere."""
        if self._ranks.before is not None:
            assert self._from_left is not None
            x = self._next(self._from_left, method).tensor
        out = work(x)
        if self._ranks.after is None:
            return out
        link = self._to_right
        assert link is not None
        self._waits.wait_for_room(link)  # a stage that is faster than the next one would pile up a whole data set here
        out = map_tensors(Tensor.cpu, out)
        link.send(Kind.of(out), Note(), out)
        return None

    def meanwhile(self) -> str:
        """What neighbours do whose message waits here for one that this rank waits for; for errors."""
        text = ""
        for link in (self._from_left, self._from_right):
            message = link.peek() if link is not None else None
            if link is not None and message is not None:
                text += f"; rank {link.peer} is in {self._called(message)}() meanwhile"
        return text

    def _pass_on(self, into: Receiver | None, out: Sender | None, method: str, work: Callable[[Any], Any]) -> Any:
        """Take the neighbour's value (None at the chain's end), and send on what ``work`` makes of it."""
        given = None
        if into is not None:
            name, given = self._next(into, method).object()
            if name != method:
                raise _out_of_step(into.peer, name, method)
        result = work(given)
        if out is not None:
            out.send(Kind.OBJECT, Note(), object_tensor((method, result)))
        return result

    def _next(self, link: Receiver, method: str) -> Message:
        message = self._waits.receive(link, lambda: f"its part in {method}()")
        if (message.kind is not Kind.OBJECT) != (method == self.handing):
            raise _out_of_step(link.peer, self._called(message), method)
        return message

    def _called(self, message: Message) -> str:
        """The method that a message belongs to."""
        return str(message.object()[0]) if message.kind is Kind.OBJECT else self.handing


def _out_of_step(peer: int, theirs: str, ours: str) -> WorkerError:
    return WorkerError(
        f"rank {peer} has called {theirs}() where this rank has called {ours}(); every rank must call the same methods "
        "in the same order"
    )
