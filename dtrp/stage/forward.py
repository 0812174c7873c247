"""A stage's forward, which a backward may repeat: every time the same for a micro-batch.

The weights are those it is told, its random draws begin in the same place, the autocast settings are those of the first
time, what it does to buffers goes where it should, and its input is not written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..tensors.autocast import AutocastState
from ..tensors.layout import aligned_clone, enter, parts_of
from ..tensors.module_mode import in_mode, members
from ..tensors.nbytes import tensor_bytes
from ..tensors.parameter_swap import Exchange, Places
from ..tensors.pytree import flatten, map_tensors, tensors_of, unflatten
from ..tensors.rng import Draws
from .buffers import (
    ABSENT,
    Buffers,
    Elsewhere,
    Mark,
    Met,
    Slot,
    buffers_of,
    copies_of,
    doubles,
    kinds_of,
    marks,
    names_of,
    same,
    slot_of,
    write,
)
from .reach import Reach
from .repetition import wants_gradients
from .stash import Held

LossFn = Callable[[Any, Any], Tensor]
Moves = Literal["own", "ahead", "discarded", "tried", "returned"]


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
        module: as given.
        changes_input: whether the module writes its input; None: not seen yet.
        ahead: what the next first forward meets, where some are waiting for their repetition.
        made: shape and dtype of every buffer, by name, as the module came.
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
        self._whole, self.module = whole, module
        self._call, self._call_aux, self._loss_fn = call, call_aux, loss_fn
        self._is_last, self._draws, self._reach, self._compiles = is_last, draws, reach, compiles
        self._places = Places(whole)
        self.ahead: Elsewhere | None = None
        self.made = kinds_of(whole)
        self._started = False
        self._doubles: dict[Slot, str] | None = None  # buffers that go by another name too
        self._moving: set[Slot] = set()  # buffers that the module has been seen to move
        self._looked: set[tuple[bool, ...]] = set()  # for them, in these modes
        attention = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        self._frozen_attention = [
            member
            for member in members(whole)
            if isinstance(member, attention) and not any(p.requires_grad for p in member.parameters())
        ]

    @property
    def may_be_fused(self) -> bool:
        """Whether torch may run attention by its inference path though gradients are on, where none is asked for."""
        return any(not member.training for member in self._frozen_attention)

    @property
    def can_be_watched(self) -> bool:
        """Whether a mode around the module sees what it calls, and changes nothing: it keeps attention off its inference path."""
        return not self._compiles and not self.may_be_fused

    def at(self, weights: dict[str, Tensor]) -> Exchange:
        """Within it the module has these for its own."""
        return self._places.hold(weights)

    def run(self, held: Held, weights: dict[str, Tensor], buffers: Moves = "own") -> tuple[Any, Tensor | None]:
        """The module's forward and the loss, where there is one.

        Args:
            held: the micro-batch: its input and target, and what was noted the first time. Where autograd is on, it is told
                where the input's gradients will be.
            weights: what the module reads, by the names of its parameters; those that are left out are its own.
            buffers: what the module does to buffers happens to its ``own``; to those that are ``ahead`` of them; or to copies:
                of what a graph or the next first forward meets, ``discarded``; of its own, which are ``tried``; or of its own,
                ``returned`` to it afterwards, so that nobody writes what a graph that is kept has saved.

        Returns:
            The output, and the loss or None. At the last stage the loss is the output too.
        """
        own = buffers_of(self._whole) if buffers != "own" or self.ahead is not None else {}
        state = self._state(held, own, buffers)
        met = {} if state is None else dict(state.buffers)
        unwritten = marks(met) if buffers == "returned" else {}
        alone = None if state is None else self._alone(own, met)
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
            with (
                self._places.hold(weights),
                self._entered_state(state, own, buffers),
                watch if self.can_be_watched else nullcontext(),
            ):
                out = self._call(x)
                judged = out if self._call_aux is None else self._judged(out)
            with watch:
                loss = None if self._loss_fn is None else self._loss(judged, held)

            def inside() -> list[Tensor]:
                return [*self._whole.parameters(), *weights.values(), *inputs]

            if reach is not None:
                reach.check(stage, (out, judged), inside)
            if self._reach is not None and loss is not None:
                self._reach.check_loss(stage, judged, loss, inside, self._loss_fn)
            if self._is_last:
                out = loss
            else:
                flatten(out)  # refuses what cannot be passed on
        made = {} if state is None else dict(state.buffers)
        if alone is not None:
            alone(made)
        if state is None:
            if self.ahead is not None:
                self.ahead.seen = marks(buffers_of(self._whole))
        elif buffers == "ahead":
            self._started = True
            # One that the forward has put there may be a part of its input or output.
            new = {slot: buffer for slot, buffer in made.items() if buffer is not met.get(slot)}
            state.buffers |= copies_of(new)
        elif buffers == "returned" and (own or state.buffers):
            self._return(held, own, unwritten, made)
        if reach is not None and state is not None:
            reach.copied(buffers_of(self._whole), made)
            reach.copied(state.buffers, made)
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

    def changed(self) -> dict[str, bool]:
        """The buffers that have come, gone, or another shape or dtype since, and whether they are in state dicts."""
        now = kinds_of(self._whole)
        names = [name for name in self.made | now if self.made.get(name) != now.get(name)]
        slots = [slot_of(self._whole, name) for name in names]
        persistent = [slot not in module._non_persistent_buffers_set for module, slot in slots]
        return dict(zip(names, persistent, strict=True))

    def written(self) -> list[Tensor]:
        """The buffers that the next forward may write, in their parts."""
        buffers = buffers_of(self._whole) if self.ahead is None else self.ahead.buffers
        return [part for t in buffers.values() if t is not None for part in parts_of(t)]

    @property
    def ahead_bytes(self) -> int:
        """Of the buffers that are ahead of the module's own."""
        buffers = {} if self.ahead is None else {id(t): t for t in self.ahead.buffers.values() if t is not None}
        return sum(map(tensor_bytes, buffers.values()))

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

    def _state(self, held: Held, own: Buffers, moves: Moves) -> Elsewhere | None:
        """What the module is in while it runs; None: in its own state."""
        if moves == "own" or moves == "ahead":
            if self.ahead is not None:
                self.ahead.follow(own)
            elif moves == "ahead":
                self.ahead = Elsewhere(copies_of(own), seen=marks(own))
            return self.ahead if moves == "ahead" else None
        if moves == "discarded" and held.met is not None:  # the second time
            values = {**own, **held.met.moved}
            return Elsewhere(copies_of({slot: value for slot, value in values.items() if value is not ABSENT}))
        if moves == "discarded" and self.ahead is not None:
            return Elsewhere(copies_of(self.ahead.buffers), dict(self.ahead.attributes))
        return Elsewhere(copies_of(own))

    def _entered_state(self, state: Elsewhere | None, own: Buffers, moves: Moves) -> AbstractContextManager[None]:
        if state is None:
            return nullcontext()
        noted: set[nn.Module] = set()
        if moves != "returned":
            noted = {module for module, _ in own | state.buffers} if self._started else set(members(self._whole))
        return state.entered(self._whole, own, noted)

    def _alone(self, own: Buffers, met: Buffers) -> Callable[[Buffers], None] | None:
        """What refuses a forward on copies that moves a buffer which something else shares: an attribute, another buffer.

        Args:
            own: the module's own buffers.
            met: the copies.
        """
        is_first = self._doubles is None
        shared = self._doubles = doubles(self._whole, own) if self._doubles is None else self._doubles
        slots = shared.keys() & own.keys() & met.keys()
        if not slots:
            return None
        before = [marks({slot: buffers[slot] for slot in slots}) for buffers in (own, met)]

        def check(made: Buffers) -> None:
            for slot in slots:
                now = [(buffer, 0 if buffer is None else buffer._version) for buffer in (own[slot], made.get(slot))]
                (mine, _), (copied, _) = now
                if any(not same(mark, marked[slot]) for mark, marked in zip(now, before, strict=True)) or (
                    is_first and mine is not None and copied is not None and not _equal(mine, copied)
                ):
                    raise RuntimeError(
                        f"the stage's forward moves the buffer {names_of(self._whole, own)[slot]}, and runs on a copy of it, which "
                        f"{shared[slot]}, in the same memory as the buffer, has no part in; use the buffer's name alone, or let "
                        "the other have its own memory (clone())"
                    )

        return check

    @torch.no_grad()
    def _return(self, held: Held, own: Buffers, unwritten: dict[Slot, Mark], after: Buffers) -> None:
        """Give the module its buffers as a forward on copies has left them, and keep what it has met where it moved them."""
        moved = own.keys() - after.keys()
        moved |= {slot for slot, mark in marks(after).items() if not same(mark, unwritten.get(slot))}
        if held.modes not in self._looked:  # some operations, batch norm among them, write without counting
            self._moving |= {
                slot
                for slot, buffer in own.items()
                if buffer is not None and slot not in moved and not _equal(buffer, cast(Tensor, after[slot]))
            }
            self._looked.add(held.modes)
        met = Met(before=marks(own))
        met.moved |= copies_of({slot: buffer for slot, buffer in own.items() if slot in moved or slot in self._moving})
        met.moved |= dict.fromkeys(moved - own.keys(), ABSENT)
        met.after = marks(write(own, after, moved))
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
        try:
            return self._infer(x)
        except Exception as error:
            if not wants_gradients(error):
                raise
        # A forward that differentiates something of its own, as that of forces does.
        with torch.inference_mode(False), torch.enable_grad():
            return map_tensors(Tensor.detach, self._infer(map_tensors(aligned_clone, x)))

    def _infer(self, x: Any) -> Any:
        autocast = AutocastState.now(self._draws.device.type).region()
        with in_mode(self.module, training=False), self._draws.region(-1), autocast:
            return self._call(x if self.changes_input is False else map_tensors(aligned_clone, x))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one layout have the same values, in the same places of their parts."""
    pairs = zip(parts_of(a), parts_of(b), strict=True)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pairs)
