"""Object collectives over the chain of neighbours: a value goes from rank to rank, through all of them.

Every rank calls the same methods in the same order. Each message carries the name of the method, so that a rank that
calls another one is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..errors import WorkerError
from ..launch.ranks import Ranks
from ..tensors.pytree import map_tensors
from ..typing import Tree
from .link import Connection, Receiver, Sender
from .message import Kind, Message, Note, object_tensor

T = TypeVar("T")


class Waiting(Protocol):
    """How the main thread waits for messages, and for room; see `dtrp.comm.transport.Transport`."""

    def receive(self, link: Receiver, describe: Callable[[], str]) -> Message: ...
    def wait_for_room(self, link: Sender) -> None: ...


class Collectives:
    """The collectives of one rank. Values must be picklable; tensors in them arrive on the CPU.

    In every collective ``method`` is the name of the method that all ranks are in, for messages.

    Args:
        ranks: which rank hosts which stage.
        waiting: how to wait.
        left: the connection to the rank before in the chain; None on the first rank.
        right: the connection to the rank after in the chain; None on the last rank.

    Attributes:
        tensor_method: the name of the method that calls `through_stages`, for messages.
    """

    tensor_method = "infer"

    def __init__(self, ranks: Ranks, waiting: Waiting, left: Connection | None, right: Connection | None) -> None:
        self._ranks, self._waiting, self._left, self._right = ranks, waiting, left, right

    def all_gather(self, method: str, value: T) -> list[T]:
        """Every rank's value, in the order of the chain, on every rank."""
        values = [*self._receive(self._left, method, []), value]
        self._send(self._right, method, values)
        values = self._receive(self._right, method, values)
        self._send(self._left, method, values)
        return values

    def gather(self, method: str, value: T) -> list[T] | None:
        """Every rank's value, in the order of the chain, on the first rank; None elsewhere."""
        values = [value, *self._receive(self._right, method, [])]
        self._send(self._left, method, values)
        return values if self._left is None else None

    def broadcast(self, method: str, value: T) -> T:
        """The first rank's value, on every rank."""
        value = self._receive(self._left, method, value)
        self._send(self._right, method, value)
        return value

    def scatter(self, method: str, values: Sequence[T] | None) -> T:
        """To each rank one of the first rank's ``values``, in the order of the chain; None elsewhere."""
        values = self._receive(self._left, method, values)
        assert values is not None
        self._send(self._right, method, values[1:])
        return values[0]

    def broadcast_from_last_stage(self, method: str, value: T) -> T:
        """The value of the last stage, on every rank of its replica."""
        if self._ranks.after is not None:
            value = self._receive(self._right, method, value)
        if self._ranks.before is not None:
            self._send(self._left, method, value)
        return value

    def through_stages(self, method: str, x: Tree, run: Callable[[Tree], Tree]) -> Tree:
        """Run a tree of tensors through all stages of a replica.

        Args:
            method: the name of the method, `tensor_method`.
            x: the input of the first stage.
            run: what this rank's stage makes of its input.

        Returns:
            The output of the last stage there; None elsewhere.
        """
        if self._ranks.before is not None:
            assert self._left is not None
            x = self._next(self._left.receiver, method).tensor
        out = run(x)
        if self._ranks.after is None:
            return out
        assert self._right is not None
        self._waiting.wait_for_room(self._right.sender)  # otherwise the outputs of a fast stage would pile up here
        out = map_tensors(Tensor.cpu, out)
        self._right.sender.send(Kind.for_value(out), Note(), out)
        return None

    def neighbours_methods(self) -> str:
        """The methods that neighbours are in whose message this rank has not taken; an addition to an error message."""
        return "".join(
            f"; rank {link.receiver.peer} is in {self._method_of(message)}() meanwhile"
            for link in (self._left, self._right)
            if link is not None and (message := link.receiver.peek()) is not None
        )

    def _receive(self, link: Connection | None, method: str, value: T) -> T:
        """What the neighbour sends; ``value`` where there is no neighbour."""
        if link is None:
            return value
        name, received = self._next(link.receiver, method).object()
        if name != method:
            raise _out_of_step(link.receiver.peer, name, method)
        return received  # type: ignore[no-any-return]

    def _send(self, link: Connection | None, method: str, value: Any) -> None:
        if link is not None:
            link.sender.send(Kind.OBJECT, Note(), object_tensor((method, value)))

    def _next(self, link: Receiver, method: str) -> Message:
        message = self._waiting.receive(link, lambda: f"its part in {method}()")
        if (message.kind is not Kind.OBJECT) != (method == self.tensor_method):
            raise _out_of_step(link.peer, self._method_of(message), method)
        return message

    def _method_of(self, message: Message) -> str:
        return str(message.object()[0]) if message.kind is Kind.OBJECT else self.tensor_method


def _out_of_step(peer: int, theirs: str, ours: str) -> WorkerError:
    return WorkerError(
        f"rank {peer} has called {theirs}() where this rank has called {ours}(); every rank must call the same methods "
        "in the same order"
    )
