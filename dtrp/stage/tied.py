"""Parameters that several stages hold: one tensor of the model, as an embedding that is the head too.

The first stage that holds it owns it: it alone has it in its optimizer. In every mini-batch ::

    after its last B    another holder    gives the owner its part of the gradient, and has none of its own then
    U                   the owner         adds the parts up, stage by stage, and updates
                        another holder    has the owner's values before its next F

So copies never differ, the optimizer's state exists once, and a norm over all stages counts the gradient once. A flush
ends at the owner, through which the others' next input comes: they wait for nothing that they would not wait for
anyway.

A method that does not flush knows no such moment: when a later holder updates, the owner's backward of that mini-batch
is slots away, and waiting for it is what the method is there to avoid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..methods import Method


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
    """The parameters that more than one stage holds, in the order of the first.

    Raises:
        ValueError: a buffer that does.
    """
    names: dict[int, dict[int, list[str]]] = {}
    tensors: dict[int, Tensor] = {}
    for stage, module in enumerate(stages):
        parameters, buffers = module.named_parameters, module.named_buffers
        for name, tensor in [*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)]:
            tensors[id(tensor)] = tensor
            names.setdefault(id(tensor), {}).setdefault(stage, []).append(name)
    ties = []
    for key, places in names.items():
        if len(places) > 1:
            tie = Tie({stage: tuple(stage_names) for stage, stage_names in places.items()}, tensors[key].requires_grad)
            if not isinstance(tensors[key], nn.Parameter):
                raise ValueError(
                    f"{tie} are one tensor, and a buffer may be written by any forward: two stages would move it apart. "
                    "Cut the model so that both lie in one stage, or give each its own"
                )
            ties.append(tie)
    return ties


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
