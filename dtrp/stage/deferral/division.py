"""The division of a stage's backward: what is recorded, what is queued by I, and W, which runs the queue."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ...tensors.layout import edge_of
from ...tensors.torch_private import has_gradient_hooks, write_count
from .accumulation import accumulate
from .deferring import computed, receiving
from .recorder import Known, Recorder, Use
from .trying import Run, Share, Trial


@dataclass(slots=True)
class Deferred:
    """The gradients of one use's weight and bias, not computed yet: of the input x and the gradient g of the output."""

    use: Use
    x: Tensor
    w: Tensor
    g: Tensor
    x_count: int  # of writes of x
    g_count: int

    def gradients(self) -> Iterator[tuple[Known, Tensor]]:
        """The gradients, and what they belong to."""
        if write_count(self.x) != self.x_count or write_count(self.g) != self.g_count:
            raise RuntimeError(
                "what the gradient of a weight is computed of was written in place after the gradient of the stage's input "
                "was made; make the operation that writes it (a hook on a gradient, often) out of place"
            )
        weight, bias = self.use.operation.weight_gradients(self.g, self.x, self.w)
        for known, gradient in ((self.use.weight, weight), (self.use.bias, bias)):
            if known is not None and gradient is not None:
                yield known, gradient if gradient.dtype is known.tensor.dtype else gradient.to(known.tensor.dtype)


@dataclass(slots=True)
class Computed:
    """The gradient of a leaf that `dtrp.defer` queued."""

    index: int
    compute: Callable[[], Tensor]


class Queue:
    """What I leaves of one micro-batch's backward for W.

    Args:
        leaves: where its gradients go.
        hooked: which of them have hooks.

    Attributes:
        parts: by index of a leaf that has something in the queue, what autograd has given it already.
    """

    def __init__(self, leaves: Sequence[Tensor], hooked: Sequence[bool]) -> None:
        self.leaves, self.hooked = leaves, hooked
        self.parts: dict[int, Tensor] = {}
        self._entries: deque[Deferred | Computed] = deque()
        self._counts: Counter[int] = Counter()  # of the gradients to compute, by leaf
        # Leaves whose gradient the engine adds: what is computed of them is in the queue, or what a caller returns is.
        self._by_engine: set[int] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def add_use(self, use: Use, x: Tensor, w: Tensor, g: Tensor) -> None:
        """Queue the gradients of a use's weight and bias; in the order in which the backward meets uses."""
        self._entries.append(Deferred(use, x, w, g, write_count(x), write_count(g)))
        for known in (use.weight, use.bias):
            if known is None:
                continue
            if known.leaf is None:
                self._by_engine |= known.roots
            else:
                self._counts[known.leaf] += 1

    def add_computed(self, index: int, compute: Callable[[], Tensor]) -> None:
        """Queue the gradient of a leaf that ``compute`` returns."""
        self._entries.append(Computed(index, compute))
        self._counts[index] += 1
        self._by_engine.add(index)

    @property
    def indices(self) -> set[int]:
        """The leaves that have something in the queue."""
        return self._counts.keys() | self._by_engine

    def tensors(self) -> list[Tensor]:
        """What the queue holds, which must not be written before W."""
        held = [t for entry in self._entries if isinstance(entry, Deferred) for t in (entry.x, entry.g)]
        return [*held, *self.parts.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of what the queue holds, the copies of weights that autocast has made included."""
        weights = [entry.w for entry in self._entries if isinstance(entry, Deferred)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*self.tensors(), *weights)}
        for leaf in self.leaves:  # which are there anyway
            storages.pop(leaf.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    @property
    def flops(self) -> int:
        """The floating-point operations of W, roughly; those of `dtrp.defer` are not counted."""
        uses = [entry for entry in self._entries if isinstance(entry, Deferred)]
        return sum(entry.use.operation.weight_flops(entry.g, entry.x, entry.w) for entry in uses)

    @torch.no_grad()
    def run(self) -> None:
        """W: compute the gradients, and add them to ``.grad`` of the leaves, as one backward would.

        Raises:
            RuntimeError: what they are computed of has been written since I.
        """
        sums: dict[int, Tensor] = {}
        further: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: what is computed of leaves, and its gradient
        for index, part in self.parts.items():
            self._add(sums, index, part, more=self._counts[index])
        while self._entries:
            entry = self._entries.popleft()
            if isinstance(entry, Computed):
                self._counts[entry.index] -= 1
                gradient = computed(self.leaves[entry.index], entry.compute)
                self._add(sums, entry.index, gradient, more=self._counts[entry.index])
                continue
            for known, gradient in entry.gradients():
                if known.leaf is not None:
                    self._counts[known.leaf] -= 1
                    self._add(sums, known.leaf, gradient, more=self._counts[known.leaf])
                else:
                    before = further.get(id(known.tensor))
                    further[id(known.tensor)] = (known.tensor, gradient if before is None else before[1] + gradient)
        roots = [t for t, _ in further.values()] + [self.leaves[index] for index in sums]
        if roots:
            starts = [gradient for _, gradient in further.values()] + list(sums.values())
            torch.autograd.backward([edge_of(t) for t in roots], starts)

    def _add(self, sums: dict[int, Tensor], index: int, gradient: Tensor, *, more: int) -> None:
        """Add to the sum of a leaf; the last one, while it is in the cache, to ``.grad``, unless the engine has to do that."""
        before = sums.get(index)
        total = gradient if before is None else before + gradient
        if more or self.hooked[index] or index in self._by_engine or total.layout is not torch.strided:
            sums[index] = total
        else:
            sums.pop(index, None)
            accumulate(self.leaves[index], total)


class Division:
    """The divided backward of a stage.

    Args:
        module: the stage's module, or a whole with an auxiliary network or a loss.
        parameters: its trainable parameters, in the order of ``named_parameters()``.

    Attributes:
        names: of the parameters.
        whole: the parameters whose uses are not divided, by index, with the reason.
        mixed: in a trial, those with hooks that were used both divided and undivided.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        self.names = [names.get(id(p), str(i)) for i, p in enumerate(parameters)]
        self._parameters = list(parameters)
        self.whole: dict[int, str] = {}
        self.mixed: set[int] = set()
        self._queue: Queue | None = None  # in I
        self._deferred: set[int] | None = None  # the parameters with gradients in a queue; None: not known yet
        self._recorder: tuple[list[bool], Recorder] | None = None  # on the parameters, with the hooks that they have
        self._seen: set[int] = set()  # the parameters that had gradients in the last queue
        self._noted: dict[int, str] = {}  # functions in which weights are used undivided
        self._flops = 0

    # -- R, I -----------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether nothing is divided."""
        return len(self.whole) == len(self._parameters) or self._deferred == set()

    def recording(self, leaves: Sequence[Tensor] | None = None) -> AbstractContextManager[Any]:
        """Within it uses of the weights are recorded, for `input_backward` to divide.

        Args:
            leaves: what stands in the parameters' places; None: the parameters themselves.
        """
        if self.is_empty:
            return nullcontext()
        hooked = self._hooked()
        if leaves is not None and leaves is not self._parameters:
            return self._recorded(Recorder(self, leaves, hooked))
        if self._recorder is None or self._recorder[0] != hooked:
            self._recorder = hooked, Recorder(self, self._parameters, hooked)
        return self._recorded(self._recorder[1])

    @contextmanager
    def _recorded(self, recorder: Recorder) -> Iterator[None]:
        known = recorder.known
        recorder.known = dict(known)  # with what is computed meanwhile
        try:
            with recorder:
                yield
        finally:
            recorder.known = known

    def _hooked(self) -> list[bool]:
        return [has_gradient_hooks(p) for p in self._parameters]

    def input_backward(
        self,
        roots: Sequence[Tensor | GradientEdge],
        grads: Sequence[Tensor | None],
        leaves: Sequence[Tensor] | None = None,
    ) -> Queue:
        """I: differentiate, and queue the gradients of weights.

        Gradients of what is not divided are in ``.grad`` of the leaves afterwards.

        Args:
            roots: where differentiation starts.
            grads: the gradients of these; None, of a scalar: 1.
            leaves: as in `recording`.

        Returns:
            What is left, for `Queue.run`.

        Raises:
            RuntimeError: a parameter with a hook is used in another way than in the trial.
        """
        leaves = self._parameters if leaves is None else leaves
        hooked = self._hooked()
        queue = Queue(leaves, hooked)
        # A loss is an edge too: torch.autograd.backward([tensor]) would leave the mode, and what a checkpoint
        # recomputes would be another graph than what it recorded.
        starts = [_ones(root) if grad is None else grad for root, grad in zip(roots, grads, strict=True)]
        edges = [edge_of(root) if isinstance(root, Tensor) else root for root in roots]
        with self._apart(queue), receiving(self._parameters, leaves, self._defer_computed), self.recording(leaves):
            torch.autograd.backward(edges, starts)
        return queue

    @contextmanager
    def _apart(self, queue: Queue) -> Iterator[None]:
        """Within it the queue receives what is deferred, and afterwards what autograd has given to the same weights."""
        deferred = (
            [i for i in range(len(queue.leaves)) if i not in self.whole] if self._deferred is None else self._deferred
        )
        before = {i: queue.leaves[i].grad for i in deferred}
        for i in deferred:
            queue.leaves[i].grad = None
        parts: dict[int, Tensor | None] = {}
        self._queue = queue
        try:
            yield
        finally:
            self._queue = None
            for i, gradient in before.items():
                parts[i], queue.leaves[i].grad = queue.leaves[i].grad, gradient
        queued = queue.indices
        undivided = {i for i, part in parts.items() if part is not None} | (queued - before.keys())
        self.mixed = {i for i in queued & undivided if queue.hooked[i]}
        if self.mixed:
            raise RuntimeError(
                f"{self.names[min(self.mixed)]} has a hook, and its uses were divided in the first micro-batch in another way "
                "than now: the hook would see a part of its gradient alone; let the module use it in one way in every forward, "
                "or pass split_backward=False"
            )
        self._seen, self._flops = queued, queue.flops if self._deferred is None else self._flops
        queue.parts = {i: part for i, part in parts.items() if part is not None}

    # -- the trial ------------------------------------------------------------------------------------

    def trial(self, run: Run) -> None:
        """Try the division, and leave whole what would differ by a bit from one backward, or raises.

        Args:
            run: the stage's forward and backward, divided or not.
        """
        self._deferred, self.whole = None, {}
        Trial(self, run).settle()
        self._deferred = self._seen - self.whole.keys()

    def share(self) -> Share:
        """How much of the backward is deferred, once the trial has been."""
        deferred = self._deferred or set()
        whole = {
            name: self.whole.get(i)
            or (f"used in {self._noted[i]}" if i in self._noted else "not used by a function that is divided")
            for i, name in enumerate(self.names)
            if i not in deferred
        }
        elements = [p.numel() for p in self._parameters]
        return Share(
            deferred=tuple(self.names[i] for i in sorted(deferred)),
            whole=whole,
            elements=sum(elements[i] for i in deferred) / max(1, sum(elements)),
            flops=self._flops,
        )

    # -- what recorder and nodes call -----------------------------------------------------------------

    def defer(self, use: Use, x: Tensor, w: Tensor, g: Tensor) -> None:
        """Queue the gradients of a use's weight and bias."""
        if self._queue is not None and not torch.is_grad_enabled():
            self._queue.add_use(use, x, w, g)
            return
        if self._deferred is None:
            raise RuntimeError("the forward differentiates within itself")
        raise RuntimeError(
            "a part of the stage differentiates within itself, by weights whose gradients are deferred; it did not in the first "
            "micro-batch: let it always do so, or pass split_backward=False"
        )

    def _defer_computed(self, index: int, compute: Callable[[], Tensor]) -> bool:
        if self._queue is None or index in self.whole:
            return False
        self._queue.add_computed(index, compute)
        return True

    def leaves_whole(self, known: Known) -> bool:
        return bool(self.whole) and not self.whole.keys().isdisjoint(known.roots)

    def note(self, roots: Iterable[frozenset[int]], function: Any) -> None:
        if self._deferred is not None:  # the trial has told
            return
        for root in itertools.chain.from_iterable(roots):
            self._noted.setdefault(root, getattr(function, "__name__", str(function)))


def _ones(root: Tensor | GradientEdge) -> Tensor:
    assert isinstance(root, Tensor), "an edge has no gradient of its own"
    return torch.ones_like(root)
