"""Tensors that several stages hold: a parameter, as an embedding that is the head too, or a buffer that all read.

The first stage that holds it owns it: it alone has it in its optimizer. In every mini-batch ::

    after its last B    another holder    gives the owner its part of the gradient, and has none of its own then
    U                   the owner         adds the parts up, stage by stage, and updates
                        another holder    has the owner's values before its next F

So copies never differ, the optimizer's state exists once, and a norm over all stages counts the gradient once. A flush
ends at the owner, through which the others' next input comes: they wait for nothing that they would not wait for
anyway.

A method that does not flush knows no such moment: when a later holder updates, the owner's backward of that mini-batch
is slots away, and waiting for it is what the method is there to avoid.

A buffer may be in several stages where no forward writes it (a causal mask, a table of angles): `SharedBuffers` looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods import Method
from ..tensors.module_buffers import Buffers, Slot, copies_of, slot_of
from ..tensors.module_mode import modes_of, writes_buffer
from .buffers import marks, same


@dataclass(frozen=True)
class Tie:
    """One parameter that several stages hold.

    Args:
        names: what each of them calls it, by stage, in order.
        trained: whether it requires a gradient.
    """

    names: Mapping[int, tuple[str, ...]]
    trained: bool

    @property
    def owner(self) -> int:
        """The stage that updates it."""
        return min(self.names)

    @property
    def name(self) -> str:
        """What it is called in the optimizer's state."""
        return self.names[self.owner][0]

    def partners(self, stage: int) -> list[int]:
        """The stages that ``stage`` exchanges its gradients and values with."""
        if stage not in self.names:
            return []
        return [other for other in self.names if other != stage and self.owner in (stage, other)]

    def __str__(self) -> str:
        return " and ".join(f"{names[0]} of stage {stage}" for stage, names in self.names.items())


def find_ties(stages: Sequence[nn.Module]) -> list[Tie]:
    """The parameters that more than one stage holds, in the order of the first."""
    return _held_by_several(stages, lambda module: module.named_parameters(remove_duplicate=False))


def find_shared_buffers(stages: Sequence[nn.Module]) -> list[Tie]:
    """The buffers that more than one stage holds, in the order of the first.

    Raises:
        ValueError: one that a forward is known to write.
    """
    shared = _held_by_several(stages, lambda module: module.named_buffers(remove_duplicate=False))
    for tie in shared:
        if any(writes_buffer(stages[stage], name) for stage, names in tie.names.items() for name in names):
            raise ValueError(_written_apart(tie))
    return shared


def _held_by_several(
    stages: Sequence[nn.Module], tensors_of: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]
) -> list[Tie]:
    names: dict[int, dict[int, list[str]]] = {}
    trained: dict[int, bool] = {}
    for stage, module in enumerate(stages):
        for name, tensor in tensors_of(module):
            trained[id(tensor)] = tensor.requires_grad
            names.setdefault(id(tensor), {}).setdefault(stage, []).append(name)
    return [
        Tie({stage: tuple(stage_names) for stage, stage_names in places.items()}, trained[key])
        for key, places in names.items()
        if len(places) > 1
    ]


def _written_apart(tie: Tie) -> str:
    return (
        f"{tie} are one tensor, and a buffer that the forward writes: two stages would move it apart. Cut the model so that "
        "both lie in one stage, or give each its own"
    )


class SharedBuffers:
    """The buffers of a stage that others hold too, and that nothing may write.

    Args:
        module: the stage's module.
        stage: k.
        shared: the buffers that several stages hold.
    """

    def __init__(self, module: nn.Module, stage: int, shared: Sequence[Tie]) -> None:
        self._module = module
        self._ties: dict[Slot, Tie] = {
            slot_of(module, name): tie for tie in shared for name in tie.names.get(stage, ())
        }
        self._looked: set[tuple[bool, ...]] = set()  # the train and eval modes in which values were compared

    def __bool__(self) -> bool:
        return bool(self._ties)

    @contextmanager
    @torch.no_grad()
    def checked(self, buffers: Callable[[], Buffers]) -> Iterator[None]:
        """Refuse a forward, run within it, that writes one of them.

        Args:
            buffers: gives the buffers that the forward runs on.

        Raises:
            RuntimeError: naming the buffer, and the ways out.
        """
        before = {slot: buffer for slot, buffer in buffers().items() if slot in self._ties}
        seen, modes = marks(before), modes_of(self._module)
        copies = copies_of(before) if modes not in self._looked else {}  # some operations write without counting
        yield
        after = {slot: buffer for slot, buffer in buffers().items() if slot in self._ties}
        now = marks(after)
        for slot, tie in self._ties.items():
            copy, buffer = copies.get(slot), after.get(slot)
            is_equal = copy is None or (buffer is not None and torch.equal(copy, buffer))
            if not same(seen.get(slot), now.get(slot)) or not is_equal:
                raise RuntimeError(_written_apart(tie))
        self._looked.add(modes)


def check_ties(ties: Sequence[Tie], method: Method) -> None:
    """Refuse tied parameters that ``method`` would train apart.

    Raises:
        ValueError: naming them and the ways out.
    """
    trained = [tie for tie in ties if tie.trained]
    if trained and not method.flush:
        more = f" (and {len(trained) - 1} more)" if len(trained) > 1 else ""
        raise ValueError(
            f"{trained[0]} are one tensor{more}, and stages of method={method.name!r} update without waiting for each other, so "
            "that its gradients never meet in one update. Pass method='bp' or 'gpipe', which add them up; cut the model so that "
            "both lie in one stage; freeze it; or give each stage its own: module.weight = nn.Parameter(module.weight.clone()), "
            "tie_word_embeddings=False in the configuration of a Hugging Face model"
        )
