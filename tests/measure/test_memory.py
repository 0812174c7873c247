"""What a stage holds, measured from outside: by hooks on its module, not from what the library says."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import assert_same, minibatches, network, pipeline, sgd, with_aux
from torch import Tensor, nn

import dtrp
from dtrp.models import cifar_resnet, get_model
from dtrp.schedule import lead
from dtrp.tensors.layout import aligned_room


class GraphMeter:
    """Counts the graphs, and the bytes of distinct storages in them, that a module's forwards leave alive."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
        self.weight_shapes = {t.shape for t in module.parameters()}
        self.alive: dict[int, tuple[int, int, int]] = {}  # packed tensor -> (graph, storage, bytes)
        self.graphs = self.peak_graphs = self.peak_bytes = 0
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.graphs += 1
        graph = self.graphs

        def pack(t: Tensor) -> Any:
            storage = t.untyped_storage()
            box = [t]
            if storage.data_ptr() not in self.own and t.shape not in self.weight_shapes:
                holder = Box(box)
                self.alive[id(holder)] = (graph, storage.data_ptr(), storage.nbytes())
                weakref.finalize(holder, self.alive.pop, id(holder), None)
                self.note()
                return holder
            return Box(box)

        self.context = torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.box[0])
        self.context.__enter__()

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.context.__exit__(None, None, None)
        self.note()

    def note(self) -> None:
        self.peak_graphs = max(self.peak_graphs, len({graph for graph, _, _ in self.alive.values()}))
        self.peak_bytes = max(self.peak_bytes, sum({place: size for _, place, size in self.alive.values()}.values()))


class Box:
    def __init__(self, box: list[Tensor]) -> None:
        self.box = box


def measure(name: str, num_stages: int, batch: int, *, depth: int = 110, cuts: list[int] | None = None) -> Any:
    """Run past the steady state; (meter of stage 0, the pipeline's own memory(), bytes of its input)."""
    model = cifar_resnet(depth, num_classes=10)
    size = {"num_microbatches": 1, **({"num_stages": num_stages} if cuts is None else {"cuts": cuts})}
    pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, method=name, seed=0, **size)  # type: ignore[arg-type]
    meter = GraphMeter(pipe.stages[0])
    # From a line's beginning: copies keep the distance from it, and have room for it.
    x = aligned_room(batch * 3 * 32 * 32 * 4).view(torch.float32).view(batch, 3, 32, 32).normal_()
    y = torch.randint(10, (batch,))
    for _ in range(2 * num_stages + 2):
        pipe.step(x, y)
    memory = pipe.memory()[0]
    pipe.close()
    return meter, memory, x.nbytes


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, pytest.param(128, marks=pytest.mark.full)])
def test_resnet110_on_eight_stages(batch: int) -> None:
    """fdg explodes with the depth of the pipeline; dtrp keeps one graph and its inputs."""
    num_stages = 8
    kept, memory, _ = measure("fdg", num_stages, batch)
    assert kept.peak_graphs in (2 * (num_stages - 1), 2 * (num_stages - 1) + 1)
    recomputed, memory, input_bytes = measure("dtrp", num_stages, batch)
    assert recomputed.peak_graphs == 1
    assert memory["stash"] == 2 * (num_stages - 1) * input_bytes
    assert memory["stash_peak"] == memory["stash"]
    total = recomputed.peak_bytes + memory["stash_peak"]
    assert total <= 0.1 * kept.peak_bytes, f"{total} of {kept.peak_bytes}"


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, pytest.param(128, marks=pytest.mark.full)])
def test_the_graph_does_not_grow_with_the_number_of_stages(batch: int) -> None:
    """The same stage 0 of three layers in pipelines of 4 and 16 stages."""
    peaks = []
    for num_stages in (4, 16):
        cuts = [3 + k for k in range(num_stages - 1)]
        meter, memory, input_bytes = measure("dtrp", num_stages, batch, depth=56, cuts=cuts)
        peaks.append(meter.peak_bytes)
        assert meter.peak_graphs == 1
        assert memory["stash_peak"] == 2 * (num_stages - 1) * input_bytes
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("name", dtrp.list_methods())
def test_declared_stash_is_measured_stash(name: str, num_microbatches: int) -> None:
    num_stages, count = 4, 12
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(num_stages)))
    pipe = dtrp.Pipeline(model, sgd, nn.functional.mse_loss, num_stages=num_stages, method=name,
                         num_microbatches=num_microbatches, **with_aux(name))  # fmt: skip
    meters = [GraphMeter(stage) for stage in pipe.stages]
    x = torch.randn(6, 5)
    held = [0] * num_stages
    for _ in range(count):
        pipe.step(x, x)
        held = [max(h, stage.in_flight) for h, stage in zip(held, pipe._engine.stages, strict=True)]
    peak = dtrp.Schedule.build(name, num_stages, count, num_microbatches).peak_stash()
    method = pipe.method
    micro_bytes = x.nbytes // num_microbatches
    for k, meter in enumerate(meters):
        recomputes = method.recomputes(num_stages, k)
        memory = pipe.memory()[k]
        if method.split_backward:  # the graph is gone after I, and what W needs of it stays
            assert meter.peak_graphs <= (1 if recomputes else peak[k]), f"stage {k}"
            assert memory["stash_peak"] > peak[k] * micro_bytes, "between I and W"
        else:
            assert meter.peak_graphs == (1 if recomputes else peak[k]), f"stage {k}"
        if recomputes and not method.split_backward:
            assert memory["stash_peak"] == peak[k] * micro_bytes, f"stage {k}"
            assert pipe.activations_peak()[k] >= memory["stash_peak"], "the graph under B comes on top"
        if not method.flush:
            after_a_slot = lead(method, num_stages, k)
            assert held[k] == after_a_slot, f"stage {k}"
        predicts = method.predict is not None and method.keep == "input" and k < num_stages - 1
        weights = sum(p.nbytes for p in pipe.stages[k].parameters())
        assert memory["predicted"] == (weights if predicts else 0), "one predicted copy"


def test_memory_adds_up() -> None:
    pipe = pipeline(network(), num_stages=3, method="dtrp")
    assert pipe.memory()[0]["optimizer"] == pipe.memory()[0]["stash"] == 0
    for x, y in minibatches(8, last=32):
        pipe.step(x, y)
    for k, stage in enumerate(pipe.stages):
        memory = pipe.memory()[k]
        weights = sum(p.nbytes for p in stage.parameters())
        assert memory["weights"] == weights + sum(b.nbytes for b in stage.buffers())
        assert memory["optimizer"] == weights, "one momentum buffer"
        assert memory["gradients"] in (0, weights), "those of the last update until the next work"
        assert memory["gradients_peak"] == weights
    pipe.flush()
    assert all(memory["stash"] == memory["gradients"] == 0 for memory in pipe.memory().values())
    pipe.close()


def test_kept_graphs_share_one_copy_per_live_version() -> None:
    """Four micro-batches of a mini-batch that read one version stand on one copy of it."""
    pipe = pipeline(nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3)), num_stages=4, method="adl",
                    num_microbatches=4)  # fmt: skip
    for x, y in minibatches(6, last=32):
        pipe.step(x, y)
    stage = pipe._engine.stages[0]
    copies = {id(held.weights) for held in stage.stash if held.weights is not None}
    delays = dtrp.Schedule.build("adl", 4, 6, 4).delays()[0][-len(stage.stash) :]
    versions = {
        b - d for b, d in zip([5 - (len(delays) - 1 - i) // 4 for i in range(len(delays))], delays, strict=True) if d
    }
    assert len(copies) == len(versions)


def test_the_first_stage_frees_the_callers_minibatch() -> None:
    """With micro-batches it keeps its own inputs, not the whole mini-batch that they were cut from."""
    pipe = pipeline(network(), num_stages=4, num_microbatches=4)
    freed: list[int] = []
    for index in range(6):
        x, y = minibatches(1, last=32)[0]
        weakref.finalize(x.untyped_storage(), freed.append, index)
        pipe.step(x, y)
        del x, y
    assert freed == [0, 1, 2, 3, 4, 5]


def test_closing_drops_what_is_in_flight() -> None:
    model = network()
    pipe = pipeline(model, num_stages=4, method="fdg")
    for x, y in minibatches(8):
        pipe.step(x, y)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pipe.close()
    pipe.close()
    assert all(memory["stash"] == 0 for memory in pipe.memory().values())
    assert_same({name: p.detach() for name, p in model.named_parameters()}, weights)
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        pipe.step(*minibatches(1)[0])


def test_models_of_the_zoo_run_at_every_kind_of_cut() -> None:
    for name, num_stages in [("resnet20", 5), ("vgg11", 3), ("mlp", 2)]:
        model = get_model(name, 3, 10)
        pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, num_stages=num_stages, num_microbatches=1)
        for _ in range(3):
            pipe.step(torch.randn(2, 3, 32, 32), torch.randint(10, (2,)))
        pipe.flush()
        assert pipe.infer(torch.randn(3, 3, 32, 32)).shape == (3, 10)
