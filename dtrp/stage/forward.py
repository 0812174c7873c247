"""A stage's forward, which a backward may repeat: the same computation every time for a micro-batch.

The weights are those it is told, its random draws begin in the same place, the autocast settings are those of the first
time, its writes to buffers go where they should, and its input is not written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..tensors.autocast import AutocastState
from ..tensors.compile import compiled
from ..tensors.layout import aligned_clone, enter, parts_of
from ..tensors.module_buffers import Buffers, Slot, buffers_of, copies_of, kinds_of, names_of, slot_of, write
from ..tensors.module_mode import Roster, in_mode, members
from ..tensors.nbytes import tensor_bytes
from ..tensors.parameter_swap import Places
from ..tensors.pytree import flatten, map_tensors, num_samples, tensors_of, unflatten
from ..tensors.rng import Draws
from ..tensors.torch_private import non_persistent_buffers, write_count
from ..typing import Tree
from .buffers import ABSENT, BuffersRead, BufferState, Mark, doubles, marks, same
from .losses import collecting
from .reach import Reach
from .repetition import repeating, wants_gradients
from .specs import StageNetwork
from .stash import StashEntry
from .tied import SharedBuffers

Moves = Literal["current", "ahead", "discarded", "tried", "returned"]


class RepeatableForward:
    """The forward of a stage, with the loss of a stage that has one.

    Args:
        network: what the stage computes.
        draws: the stage's random draws, on the device where it computes.
        reach: knows which tensors belong to which stage; None: nothing is checked.
        is_last: whether the loss is the output too.

    Attributes:
        module: the stage's module, without its auxiliary network.
        changes_input: whether the module writes its input; None: not known yet.
        ahead: the buffers that the next first forward runs on, where some forwards are waiting for their repetition.
        roster, roster_of_module: the modules within the stage's, with and without its auxiliary network.
        made: shape and dtype of every buffer, by name, when the stage was made.
    """

    def __init__(self, network: StageNetwork, draws: Draws, reach: Reach | None, *, is_last: bool) -> None:
        self.changes_input: bool | None = None
        self.ahead: BufferState | None = None
        self.module, self._whole, self._loss_fn = network.module, network.whole, network.loss_fn
        self._draws, self._is_last, self._reach = draws, is_last, reach
        self._compiles = network.compile is not None

        def prepared(module: nn.Module) -> Callable[[Tree], Tree]:
            return module if network.compile is None else compiled(module, network.compile)

        self.roster, self.roster_of_module = Roster(self._whole), Roster(self.module)
        self._call = network.call or prepared(network.module)
        self._call_aux = None if network.aux is None else prepared(network.aux[1])
        self._places = Places(self._whole)
        self.made = kinds_of(self._whole)
        self._shared = SharedBuffers(network.module, draws.stage, network.shared_buffers)
        self._started = False
        self._doubles: dict[Slot, str] | None = None  # buffers that have another name too
        self._moving: set[Slot] = set()  # buffers that the module has been seen to move
        self._looked: set[tuple[bool, ...]] = set()  # the train and eval modes in which it was looked for such buffers
        attention = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        self._frozen_attention = [
            member
            for member in members(self._whole)
            if isinstance(member, attention) and not any(p.requires_grad for p in member.parameters())
        ]

    @property
    def may_be_fused(self) -> bool:
        """Whether torch may run attention by its inference path, although gradients are enabled."""
        return any(not member.training for member in self._frozen_attention)

    @property
    def can_be_watched(self) -> bool:
        """Whether a mode around the module sees what it calls and changes nothing; it keeps attention off its inference path."""
        return not self._compiles and not self.may_be_fused

    def at(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Within it the module has these weights, by parameter name, in the places of its parameters."""
        return self._places.hold(weights)

    def run(
        self, held: StashEntry, weights: dict[str, Tensor], moves: Moves = "current", *, judges: bool = True
    ) -> tuple[Tree, Tensor | None]:
        """The module's forward and the loss, where there is one.

        Args:
            held: the micro-batch: its input and target, and what was noted the first time. Where autograd is on, it
                receives the lists in which the input's gradients will be.
            weights: what the module reads, by the names of its parameters; the others are read as they are.
            moves: on which buffers the forward runs, and moves: on the module's ``current`` ones; on those that are
                ``ahead`` of them; or on copies: of what a graph or the next first forward reads, ``discarded``
                afterwards; of the current ones, ``tried`` and discarded; or of the current ones, ``returned`` to the
                module afterwards, so that nothing writes what a kept graph has saved.
            judges: whether to call the loss.

        Returns:
            The output, and the loss or None. At the last stage the loss is the output too, if it was called.
        """
        current = buffers_of(self.roster) if moves != "current" or self.ahead is not None else {}
        state = self._state(held, current, moves)
        read = {} if state is None else dict(state.buffers)
        unwritten = marks(read) if moves == "returned" else {}
        check_unshared = None if state is None else self._sharing_check(current, read)
        # A module that writes its input (an in-place ReLU at its front) would write the stash, or what the stage
        # before has saved. The first run, on a copy, shows whether it does; one that does gets a copy every time.
        inputs, form = flatten(held.leaf)
        entered = self._entered(held, inputs, copy=self.changes_input is not False)
        counts = list(map(write_count, entered))
        is_trial = moves in ("discarded", "tried")
        with self._draws.region(held.micro.index), held.autocast.region(), repeating() if is_trial else nullcontext():
            within = self._entered_state(state, current, moves)
            with self._shared_unwritten(state):
                out, loss = self._compute(
                    held, weights, unflatten(form, iter(entered)), inputs, entered, within, judges
                )
        made = {} if state is None else dict(state.buffers)
        if check_unshared is not None:
            check_unshared(made)
        if state is None:
            if self.ahead is not None:
                self.ahead.seen = marks(buffers_of(self.roster))
        elif moves == "ahead":
            self._started = True
            # A buffer that the forward has put there may be a part of its input or output.
            state.buffers |= copies_of({slot: buffer for slot, buffer in made.items() if buffer is not read.get(slot)})
        elif moves == "returned" and (current or state.buffers):
            self._return(held, current, unwritten, made)
        if state is not None and self._reach is not None and self._reach.covers(held.micro.minibatch):
            self._reach.copied(buffers_of(self.roster), made)
            self._reach.copied(state.buffers, made)
        self._note_writes(written=list(map(write_count, entered)) != counts)
        return out, loss

    def _compute(
        self,
        held: StashEntry,
        weights: dict[str, Tensor],
        x: Tree,
        inputs: list[Tensor],
        entered: list[Tensor],
        state: AbstractContextManager[None],
        judges: bool,
    ) -> tuple[Tree, Tensor | None]:
        """Call the module, the auxiliary network and the loss, and check what they have read.

        Args:
            held: the micro-batch.
            weights: what the module reads.
            x: the input of the module.
            inputs: the tensors of the stage's input.
            entered: the same as the module is given them, the tensors of x.
            state: within it the module has the buffers that it is to move.
            judges: whether to call the loss.
        """
        stage, reach = self._draws.stage, self._reach
        watched = reach if reach is not None and reach.covers(held.micro.minibatch) else None
        watch = nullcontext() if watched is None else watched.watching(stage, entered, tensors_of(held.target))
        with collecting() as terms, self._places.hold(weights), state, _naming_single_samples(held):
            with watch if self.can_be_watched else nullcontext():
                out = self._call(x)
                judged = out if self._call_aux is None else self._judged(out)
            with watch:
                loss = None if self._loss_fn is None or not judges else self._loss(judged, held, terms)
        held.added = functools.reduce(torch.add, terms) if terms else None

        def inside() -> list[Tensor]:
            return [*self._whole.parameters(), *weights.values(), *inputs]

        if watched is not None:
            watched.check(stage, (out, judged, terms), inside)
        elif reach is not None and terms:
            reach.check_leaves(stage, terms, inside)
        if reach is not None and loss is not None:
            reach.check_loss(stage, judged, loss, inside, self._loss_fn)
        if self._is_last and judges:
            return loss, loss
        flatten(out)  # raises where the output cannot be passed on
        return out, loss

    def _note_writes(self, *, written: bool) -> None:
        """Note whether the module has written its input."""
        if written and self.changes_input is False:
            raise RuntimeError(
                "the stage changed its input in place, and did not when it was first tried; make its first operation "
                "out of place (inplace=False)"
            )
        self.changes_input = written or bool(self.changes_input)

    def changed(self) -> dict[str, bool]:
        """The buffers that have come, gone or changed since the stage was made, and whether state dicts have them."""
        now = kinds_of(self._whole)
        names = [name for name in self.made | now if self.made.get(name) != now.get(name)]
        slots = [slot_of(self._whole, name) for name in names]
        persistent = [slot not in non_persistent_buffers(module) for module, slot in slots]
        return dict(zip(names, persistent, strict=True))

    def written(self) -> list[Tensor]:
        """The parts of the buffers that the next forward may write."""
        buffers = buffers_of(self.roster) if self.ahead is None else self.ahead.buffers
        return [part for t in buffers.values() if t is not None for part in parts_of(t)]

    @property
    def ahead_bytes(self) -> int:
        """Bytes of the buffers that are ahead of the module's."""
        buffers = {} if self.ahead is None else {id(t): t for t in self.ahead.buffers.values() if t is not None}
        return sum(map(tensor_bytes, buffers.values()))

    def _judged(self, out: Tree) -> Tree:
        """The output of the auxiliary network for the module's output."""
        assert self._call_aux is not None
        before = list(map(write_count, tensors_of(out)))
        judged = self._call_aux(out)
        if list(map(write_count, tensors_of(out))) != before:
            raise RuntimeError(
                "the auxiliary network changed its input in place, which is the next stage's too; make its first operation "
                "out of place (inplace=False)"
            )
        return judged

    def _state(self, held: StashEntry, current: Buffers, moves: Moves) -> BufferState | None:
        """The state in which the module runs; None: its current one."""
        if moves in ("current", "ahead"):
            if self.ahead is not None:
                self.ahead.follow(current)
            elif moves == "ahead":
                self.ahead = BufferState(copies_of(current), seen=marks(current))
            return self.ahead if moves == "ahead" else None
        if moves == "discarded" and held.met is not None:  # the second time
            values = {**current, **held.met.moved}
            return BufferState(copies_of({slot: value for slot, value in values.items() if value is not ABSENT}))
        if moves == "discarded" and self.ahead is not None:
            return BufferState(copies_of(self.ahead.buffers), dict(self.ahead.attributes))
        return BufferState(copies_of(current))

    def _entered_state(self, state: BufferState | None, current: Buffers, moves: Moves) -> AbstractContextManager[None]:
        if state is None:
            return nullcontext()
        noted: set[nn.Module] = set()
        if moves != "returned":
            noted = {module for module, _ in current | state.buffers} if self._started else set(members(self.roster))
        return state.entered(self.roster, current, noted)

    def _shared_unwritten(self, state: BufferState | None) -> AbstractContextManager[None]:
        """Refuse a forward that writes a buffer which other stages hold too."""
        if not self._shared:
            return nullcontext()
        return self._shared.checked(lambda: buffers_of(self.roster) if state is None else state.buffers)

    def _sharing_check(self, current: Buffers, read: Buffers) -> Callable[[Buffers], None] | None:
        """Makes the check that refuses a forward on copies that moves a buffer which shares memory with something else.

        Args:
            current: the module's buffers.
            read: the copies.

        Returns:
            The check, to be called with the buffers after the forward; None where no buffer shares memory.
        """
        is_first = self._doubles is None
        shared = self._doubles = doubles(self._whole, current) if self._doubles is None else self._doubles
        slots = shared.keys() & current.keys() & read.keys()
        if not slots:
            return None
        before = [marks({slot: buffers[slot] for slot in slots}) for buffers in (current, read)]

        def check(made: Buffers) -> None:
            after = marks({slot: current[slot] for slot in slots}), marks({slot: made.get(slot) for slot in slots})
            for slot in slots:
                (buffer, _), (copied, _) = after[0][slot], after[1][slot]
                if any(not same(now[slot], then[slot]) for now, then in zip(after, before, strict=True)) or (
                    is_first and buffer is not None and copied is not None and not _equal(buffer, copied)
                ):
                    name = names_of(self._whole, current)[slot]
                    raise RuntimeError(
                        f"the stage's forward moves the buffer {name}, and runs on a copy of it, which "
                        f"{shared[slot]}, in the same memory as the buffer, has no part in; use the buffer's name alone, or let "
                        "the other have its own memory (clone())"
                    )

        return check

    @torch.no_grad()
    def _return(self, held: StashEntry, current: Buffers, unwritten: dict[Slot, Mark], after: Buffers) -> None:
        """Give the module the buffers that a forward on copies has left; keep the old values of those that it moved."""
        moved = current.keys() - after.keys()
        moved |= {slot for slot, mark in marks(after).items() if not same(mark, unwritten.get(slot))}
        if held.modes not in self._looked:  # some operations, batch norm among them, write without counting
            self._moving |= {
                slot
                for slot, buffer in current.items()
                if buffer is not None and slot not in moved and not _equal(buffer, cast(Tensor, after[slot]))
            }
            self._looked.add(held.modes)
        met = BuffersRead(before=marks(current))
        met.moved |= copies_of({slot: b for slot, b in current.items() if slot in moved or slot in self._moving})
        met.moved |= dict.fromkeys(moved - current.keys(), ABSENT)
        met.after = marks(write(current, after, moved))
        held.met = met

    def _entered(self, held: StashEntry, inputs: list[Tensor], *, copy: bool) -> list[Tensor]:
        """The tensors of the input, as the module is given them."""
        if not torch.is_grad_enabled():
            return [aligned_clone(t) if copy else t for t in inputs]
        held.input_gradients = [[] for _ in inputs]
        return [
            enter(t, gradients, copy=copy) if t.requires_grad else aligned_clone(t) if copy else t
            for t, gradients in zip(inputs, held.input_gradients, strict=True)
        ]

    def _loss(self, out: Tree, held: StashEntry, terms: list[Tensor]) -> Tensor:
        """The micro-batch's part of the loss, with the ``terms`` that the forward has added."""
        assert self._loss_fn is not None
        device = out.device if isinstance(out, Tensor) else self._draws.device
        loss = self._loss_fn(out, map_tensors(lambda t: t.to(device), held.target))
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returned a {type(loss).__name__}; it returns a scalar tensor, the mean over samples"
            )
        if loss.dim():
            raise ValueError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it returns a scalar, the mean over samples "
                "(reduction='mean')"
            )
        factor = held.micro.factor
        return functools.reduce(torch.add, terms, loss) * factor if factor else loss.new_zeros(())

    def infer(self, x: Tree, number: int, *, in_eval_mode: bool = True) -> Tree:
        """The output at the present weights; called without autograd.

        Args:
            x: the stage's input.
            number: the number that the random draws depend on, in the place of a micro-batch's.
            in_eval_mode: whether in eval mode, or in the mode that the module is in.
        """
        try:
            return self._infer(x, number, in_eval_mode)
        except Exception as error:
            if not wants_gradients(error):
                raise
        # A forward that differentiates within itself, as one that computes forces does.
        with torch.inference_mode(False), torch.enable_grad():
            return map_tensors(Tensor.detach, self._infer(map_tensors(aligned_clone, x), number, in_eval_mode))

    def _infer(self, x: Tree, number: int, in_eval_mode: bool) -> Tree:
        mode = in_mode(self.module, training=False) if in_eval_mode else nullcontext()
        autocast = AutocastState.now(self._draws.device.type).region()
        with mode, self._draws.region(number), autocast:
            return self._call(x if self.changes_input is False else map_tensors(aligned_clone, x))


@contextmanager
def _naming_single_samples(held: StashEntry) -> Iterator[None]:
    """The context in which batch norm's refusal of a single sample says how such a micro-batch came about."""
    try:
        yield
    except Exception as error:
        if "Expected more than 1 value per channel" not in str(error) or num_samples(held.leaf) != 1:
            raise
        raise ValueError(
            f"{error}: the micro-batch has one sample, of which batch norm takes no statistics; pass a num_microbatches of at most "
            "half the samples of the smallest mini-batch, or leave out the last samples of an epoch (drop_last=True of a "
            "DataLoader)"
        ) from error


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one layout have the same values, in the same places of their parts."""
    pairs = zip(parts_of(a), parts_of(b), strict=True)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pairs)
