"""What a traced forward stores on its modules is warned of by name, and hooks are refused by name."""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import dtrp

WAY = r"Pass a term of the loss \({}\) to dtrp.add_loss in the forward"


class Block(nn.Module):
    def __init__(self, store: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.store = nn.Linear(6, 6), store
        self.aux: Any = None
        self.count = 0
        self.log: list[Any] = [1]
        self.recent: deque[Any] = deque([2.0], maxlen=2)
        self.seen = {3}
        self.stats: dict[str, Any] = {"kept": 4}
        self.by_name: OrderedDict[str, Any] = OrderedDict(b=1, a=2)
        self.nested = {"inner": ([5],)}
        self.state = SimpleNamespace(total=0, parts=[])
        self.cache: Any = None
        self.masks: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x).tanh()
        self.store(self, h)
        return h


class Model(nn.Module):
    def __init__(self, store: Callable[[Any, Tensor], Any], num: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(store if i % 2 else nothing) for i in range(num))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


def nothing(self: Any, h: Tensor) -> None: ...


def sets_a_term(self: Any, h: Tensor) -> None:
    self.aux = h.square().mean()


def sets_a_detached_tensor(self: Any, h: Tensor) -> None:
    self.aux = h.detach().square().mean()


def sets_an_equal_value(self: Any, h: Tensor) -> None:
    self.aux = h.shape[1]


def sets_a_new_attribute(self: Any, h: Tensor) -> None:
    self.made = (h.mean(), "text")


def counts(self: Any, h: Tensor) -> None:
    self.count += 1


def appends(self: Any, h: Tensor) -> None:
    self.log.append(h.mean())


def replaces_in_a_list(self: Any, h: Tensor) -> None:
    self.log[0] = h.detach()


def pushes(self: Any, h: Tensor) -> None:
    self.recent.append(h.detach())


def remembers(self: Any, h: Tensor) -> None:
    self.seen.add(len(self.seen))


def fills_a_dict(self: Any, h: Tensor) -> None:
    self.stats["penalty"] = h.square().mean()


def moves_to_the_end(self: Any, h: Tensor) -> None:
    self.by_name.move_to_end(next(iter(self.by_name)))


def appends_inside(self: Any, h: Tensor) -> None:
    self.nested["inner"][0].append(h.detach())


def sets_on_an_object(self: Any, h: Tensor) -> None:
    self.state.total += 1
    self.state.parts.append(1)


STORES: list[tuple[Callable[[Any, Tensor], Any], str, bool]] = [
    (sets_a_term, "aux", True),
    (sets_a_detached_tensor, "aux", False),
    (sets_an_equal_value, "aux", False),
    (sets_a_new_attribute, "made", True),
    (counts, "count", False),
    (appends, "log", True),
    (replaces_in_a_list, "log", False),
    (pushes, "recent", False),
    (remembers, "seen", False),
    (fills_a_dict, "stats", True),
    (moves_to_the_end, "by_name", False),
    (appends_inside, "nested", False),
    (sets_on_an_object, "state", False),
]


@pytest.mark.parametrize(("store", "attribute", "is_term"), STORES)
def test_what_a_forward_stores_is_warned_of_and_put_back(store: Any, attribute: str, is_term: bool) -> None:
    model, x = Model(store), torch.randn(4, 6)
    before = [{name: repr(value) for name, value in vars(block).items()} for block in model.blocks]
    with pytest.warns(UserWarning, match="the forward stores") as caught:
        stages = dtrp.split(model, num_stages=2, example=x)
    (text,) = [str(warning.message) for warning in caught]
    name = f"blocks.1.{attribute}"
    assert text.startswith(f"the forward stores {name}, and the stages"), "that attribute alone"
    assert bool(re.search(WAY.format(re.escape(name)), text)) == is_term
    assert caught[0].filename == __file__
    assert [{name: repr(value) for name, value in vars(block).items()} for block in model.blocks] == before
    assert len(stages.cut([])) == 1, "cut again without a word"


def keeps_what_it_made(self: Any, h: Tensor) -> None:
    if self.cache is None:
        self.cache = torch.ones(6)
    if 6 not in self.masks:
        self.masks[6] = torch.ones(6)


@pytest.mark.parametrize("store", [nothing, keeps_what_it_made])
def test_a_cache_is_not_warned_of_but_emptied(store: Any) -> None:
    model = Model(store)
    dtrp.split(model, num_stages=2, example=torch.randn(4, 6))
    assert model.blocks[1].cache is None
    assert not model.blocks[1].masks


def test_what_cannot_be_run_is_told_by_the_trace() -> None:
    with pytest.warns(UserWarning, match="stores blocks.1.aux, and .*" + WAY.format("blocks.1.aux")):
        dtrp.split(Model(sets_a_term).to("meta"), num_stages=2, example=torch.randn(4, 6, device="meta"))


def test_long_lists_are_cut() -> None:
    with pytest.warns(UserWarning, match=r"blocks.39.aux, and 2 more, and .*blocks.5.aux, and 19 more\)"):
        dtrp.split(Model(sets_a_term, 44), num_stages=2, example=torch.randn(4, 6))


def test_what_it_reads_of_what_it_stores_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(6, 6), Counter[str]()

        def forward(self, x: Tensor) -> Tensor:
            self.seen["calls"] += 1
            return self.layer(x) * self.seen["calls"]

    with pytest.raises(ValueError, match="the stages do not do what the model does"):
        dtrp.split(Reads(), points=[], example=torch.randn(4, 6))


# -- hooks -----------------------------------------------------------------------------------------------------


class Recorder:
    def __call__(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...


def recording(*_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (recording, "recording"),
        (functools.partial(recording, None), "partial"),
        (Recorder(), "Recorder"),
        (Recorder().record, "Recorder.record"),
    ],
)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["blocks.1.layer", ""])
def test_forward_hooks_are_refused(register: str, hook: Any, name: str, place: str) -> None:
    model, x = Model(nothing), torch.randn(4, 6)
    handle = getattr(model.get_submodule(place), register)(hook)
    owner = f"module '{place}'" if place else "the model"
    with pytest.raises(ValueError, match=f"{owner} has a forward hook, {name}, .*; remove it, and do its work in"):
        dtrp.split(model, num_stages=2, example=x)
    handle.remove()
    dtrp.split(model, num_stages=2, example=x)


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_module_forward_hook", "forward"),
        ("register_module_forward_pre_hook", "forward"),
        ("register_module_full_backward_hook", "backward"),
        ("register_module_full_backward_pre_hook", "backward"),
    ],
)
def test_hooks_of_every_module_are_refused(register: str, kind: str) -> None:
    with (
        getattr(nn.modules.module, register)(recording),
        pytest.raises(ValueError, match=rf"every module \(torch.nn.modules.module\) has a {kind} hook"),
    ):
        dtrp.split(Model(nothing), num_stages=2, example=torch.randn(4, 6))


def test_hooks_of_torch_are_operations_of_the_stages() -> None:
    model, x = Model(nothing).eval(), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.blocks[0].layer)
    prune.l1_unstructured(model.blocks[1].layer, "weight", 0.5)
    want = model(x)
    stages = dtrp.split(model, num_stages=2, example=x)
    assert torch.equal(stages[1](stages[0](x)), want)
