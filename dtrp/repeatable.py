"""A stage's forward, which a backward may repeat: every time the same for a micro-batch.

The weights are those it is told, its random draws begin in the same place, the autocast settings are those of the first
time, what it does to buffers goes where it should, and its input is not written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .aligned import aligned_clone, enter, parts_of
from .buffers import Met, buffers_of, copies_of, copy_all, marks
from .exchange import Exchange, Places
from .modes import in_mode
from .reach import Reach
from .rng import Draws
from .stash import AutocastState, Held
from .trees import flatten, map_tensors, tensors_of, unflatten

LossFn = Callable[[Any, Any], Tensor]
Buffers = Literal["own", "discarded", "returned"]


class Repeatable:
    """The module of a stage, and the loss of one that has one.

    Args:
        whole: the module, with its auxiliary network where it has one: what has the stage's parameters and buffers.
        module: without.
        call: runs ``module`` on an input.
        call_aux: runs the auxiliary network on the output; None: there is none.
        loss_fn: None: the stage has no loss.
        is_last: the loss is the output too.
        draws: the stage's random numbers, on the device where it works.
        reach: what tells whose tensors the stage reads, in the first mini-batch; None: nobody asks.
        compiles: whether ``call`` is compiled code, into which it does not look.

    Attributes:
        changes_input: whether the module writes its input; None: not seen yet.
    """

    def __init__(
        self,
        whole: nn.Module,
        module: nn.Module,
        call: Callable[[Any], Any],
        call_aux: Callable[[Any], Any] | None,
        loss_fn: LossFn | None,
        *,
        is_last: bool,
        draws: Draws,
        reach: Reach | None,
        compiles: bool,
    ) -> None:
        self.changes_input: bool | None = None
        self._whole, self._module = whole, module
        self._call, self._call_aux, self._loss_fn = call, call_aux, loss_fn
        self._is_last, self._draws, self._reach, self._compiles = is_last, draws, reach, compiles
        self._places = Places(whole)
        self._moving: set[str] = set()  # buffers that the module has been seen to move
        self._looked: set[tuple[bool, ...]] = set()  # for them, in these modes

    def at(self, weights: dict[str, Tensor]) -> Exchange:
        """Within it the module has these for its own."""
        return self._places.hold(weights)

    def run(self, held: Held, weights: dict[str, Tensor], buffers: Buffers = "own") -> tuple[Any, Tensor | None]:
        """The module's forward and the loss, where there is one.

        Args:
            held: the micro-batch: its input and target, and what was noted the first time. Where autograd is on, it is told
                where the input's gradients will be.
            weights: what the module reads, by the names of its parameters; those that are left out are its own.
            buffers: what the module does to buffers happens to its ``own``; or to copies that are ``discarded``, or that are
                ``returned`` to it afterwards, so that nobody writes what a graph that is kept has saved.

        Returns:
            The output, and the loss or None. At the last stage the loss is the output too.
        """
        own = buffers_of(self._whole) if buffers != "own" else {}
        copies = copies_of({**own, **held.met.moved} if held.met is not None and own else own)  # met: the second time
        unwritten = {name: copy._version for name, copy in copies.items()} if buffers == "returned" else {}
        tensors = {**weights, **copies}
        # A module that writes its input (an in-place ReLU at its front) would write the stash, or what the stage
        # before has saved. The first run, on a copy, shows whether it does; one that does gets a copy every time.
        inputs, form = flatten(held.leaf)
        entered = self._entered(held, inputs, copy=self.changes_input is not False)
        x = unflatten(form, iter(entered))
        before = [t._version for t in entered]
        reach, stage = self._reach, self._draws.stage
        if reach is not None and not reach.covers(held.micro.minibatch):
            reach = None
        watch = nullcontext() if reach is None else reach.watching(stage, entered, tensors_of(held.target))
        with self._draws.region(held.micro.index), held.autocast.region():
            with self._places.hold(tensors), nullcontext() if self._compiles else watch:
                out = self._call(x)
                judged = out if self._call_aux is None else self._judged(out)
            with watch:
                loss = None if self._loss_fn is None else self._loss(judged, held)
            if reach is not None:
                reach.copied(own, tensors)
                inside = [*self._whole.parameters(), *weights.values(), *inputs]
                reach.check(stage, (out, judged), loss, inside, self._loss_fn)
            if self._is_last:
                out = loss
            else:
                flatten(out)  # refuses what cannot be passed on
        if buffers == "returned" and own:
            moved = {
                name for name in own if tensors[name] is not copies[name] or tensors[name]._version != unwritten[name]
            }
            self._return(held, own, moved, tensors)
        if [t._version for t in entered] == before:
            self.changes_input = bool(self.changes_input)
        elif self.changes_input is False:
            raise RuntimeError(
                "the stage changed its input in place, and did not when it was first tried; make its first operation "
                "out of place (inplace=False)"
            )
        else:
            self.changes_input = True
        return out, loss

    def _judged(self, out: Any) -> Any:
        """What the auxiliary network makes of the output."""
        assert self._call_aux is not None
        before = [t._version for t in tensors_of(out)]
        judged = self._call_aux(out)
        if [t._version for t in tensors_of(out)] != before:
            raise RuntimeError(
                "the auxiliary network changed its input in place, which is the next stage's too; make its first operation "
                "out of place (inplace=False)"
            )
        return judged

    @torch.no_grad()
    def _return(self, held: Held, own: dict[str, Tensor], moved: set[str], after: dict[str, Tensor]) -> None:
        """Give the module its buffers as a forward on copies has left them, and keep what it has met where it ``moved``."""
        if held.modes not in self._looked:  # some operations, batch norm among them, write without counting
            self._moving |= {name for name, buffer in own.items() if not _equal(buffer, after[name])}
            self._looked.add(held.modes)
        met = Met(before=marks(own))
        met.moved = copies_of({name: buffer for name, buffer in own.items() if name in moved or name in self._moving})
        copy_all(own.values(), [after[name] for name in own])
        met.after = marks(own)
        held.met = met

    def _entered(self, held: Held, inputs: list[Tensor], *, copy: bool) -> list[Tensor]:
        """The tensors of the input, as the module is given them."""
        if not torch.is_grad_enabled():
            return [aligned_clone(t) if copy else t for t in inputs]
        held.input_gradients = [[] for _ in inputs]
        return [
            enter(t, gradients, copy=copy) if t.requires_grad else aligned_clone(t) if copy else t
            for t, gradients in zip(inputs, held.input_gradients, strict=True)
        ]

    def _loss(self, out: Any, held: Held) -> Tensor:
        assert self._loss_fn is not None
        place = out.device if isinstance(out, Tensor) else self._draws.device
        loss = self._loss_fn(out, map_tensors(lambda t: t.to(place), held.target))
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returned a {type(loss).__name__}; it returns a scalar tensor, the mean over samples"
            )
        if loss.dim():
            raise ValueError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it returns a scalar, the mean over samples "
                "(reduction='mean')"
            )
        return loss * held.micro.share

    def infer(self, x: Any) -> Any:
        """The output in eval mode, at the weights of now; called without autograd."""
        autocast = AutocastState.now(self._draws.device.type).region()
        with in_mode(self._module, training=False), self._draws.region(-1), autocast:
            return self._call(x if self.changes_input is False else map_tensors(aligned_clone, x))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one layout have the same values, in the same places of their parts."""
    pairs = zip(parts_of(a), parts_of(b), strict=True)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pairs)
