"""What ranks run in the tests of saving; `rank_programs` has the rest, and `main`."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import WIDTH, adamw, minibatches, network, pipeline
from rank_programs import OPTIMIZERS, PROGRAMS, Batch, Result, join, rank, world_size
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from ways import of_pipelines, of_schedules, spread

import dtrp


def save_many(folder: str, target: str, seed: int) -> None:
    """Save again and again to one place that others save to."""
    torch.manual_seed(seed)
    pipe = pipeline(network(), num_stages=2)
    saved = 0
    for i in range(30):
        with contextlib.suppress(dtrp.CheckpointError):
            pipe.save(target, extra=[seed, i, pipe.model_state_dict()["head.bias"].tolist()])
            saved += 1
    print(f"saved {saved} times")


# Where runs are left and gone on with: (mini-batches, whether the pipeline is flushed then). Of ten, with a flush before the
# seventh: in start-up, with stages within a mini-batch, before and after the flush, in steady state again.
STOPS = [(1, False), (3, False), (5, False), (6, True), (7, False), (9, False)]
Cell = tuple[str, int, int, str]  # method, K, A, optimizer


def ten() -> list[Batch]:
    """One of them with unequal parts, another partial."""
    batches = minibatches(10)
    batches[3] = (batches[3][0][:11], batches[3][1][:11])
    return batches


def _made(cell: Cell) -> dtrp.Pipeline:
    method, num_stages, parts, optimizer = cell
    return pipeline(
        network(), OPTIMIZERS[optimizer], num_stages=num_stages, method=method, num_microbatches=parts, timeout_s=30.0
    )


def given(pipe: dtrp.Pipeline, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What this rank passes; where every stage has a loss of its own, the first hands the targets on."""
    takes_y = pipe.is_first if pipe.method.local else pipe.is_last
    return x if pipe.is_first else None, y if takes_y else None


def _end(pipe: dtrp.Pipeline, losses: list[Tensor | None], begin: int) -> Result:
    """From mini-batch ``begin`` on to the end."""
    for i, (x, y) in list(enumerate(ten()))[begin:]:
        if i == 6:
            pipe.flush()
        losses.append(pipe.step(*given(pipe, x, y)))
    pipe.flush()
    return {"losses": losses, "state": pipe.state_dict(), "delays": pipe.delays()}


def save_at_stops(folder: str, cells: list[Cell]) -> None:
    """Runs that are never broken off, and what they were at each of the stops."""
    done = []
    for number, cell in enumerate(cells):
        torch.manual_seed(0)
        with _made(cell) as pipe:
            losses: list[Tensor | None] = []
            kinds = []
            for i, (x, y) in enumerate(ten()):
                if i == 6:
                    pipe.flush()
                for n, flushed in STOPS:
                    if i == n and flushed == (i == 6):
                        pipe.save(Path(folder, f"{number}-{n}"), extra={"next": n})
                        held = [any(g is not None for g in stage.gradients) for stage in pipe._engine.stages]
                        kinds.append((n, pipe.in_flight, any(held)))
                losses.append(pipe.step(*given(pipe, x, y)))
            done.append({**_end(pipe, losses, 10), "kinds": kinds})
    torch.save(done, Path(folder, f"whole{rank()}.pt"))


def go_on_from_stops(folder: str, cells: list[Cell]) -> None:
    """In another process: from each of the stops to the end, to the bit."""
    for number, (cell, whole) in enumerate(
        zip(cells, torch.load(Path(folder, f"whole{rank()}.pt"), weights_only=False), strict=True)
    ):
        for n, _ in STOPS:
            torch.manual_seed(n + 5)
            with _made(cell) as pipe:
                assert pipe.load(Path(folder, f"{number}-{n}")) == {"next": n}
                own = _end(pipe, [], n)
            assert len(own["losses"]) == 10 - n
            for i, (a, b) in enumerate(zip(own["losses"], whole["losses"][n:], strict=True)):
                assert (a is None and b is None) or torch.equal(a, b), (cell, n, i)
            assert_same_values(own["state"], whole["state"], f"{cell} from {n}")
            assert own["delays"] == whole["delays"], (cell, n)
    print("all the same")


def assert_same_values(a: Any, b: Any, where: str) -> None:
    """Equal to the bit, however deep."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_values(a[key], b[key], f"{where}, {key}")
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, where


def train_from_a_loader(folder: str, stop: int, resumes: bool) -> None:
    """Two epochs from a loader with workers; save after ``stop`` steps, or go on from there."""
    data = [(torch.full((WIDTH,), float(i)), i % 3) for i in range(46)]
    sampler = dtrp.ResumableSampler(data, seed=4)
    loader = torch.utils.data.DataLoader(data, batch_size=6, sampler=sampler, num_workers=2)
    with pipeline(network(), num_stages=3, method="dtrp", num_microbatches=2) as pipe:
        seen: list[list[float]] = []
        losses = []
        if resumes:
            sampler.load_state_dict(pipe.load(Path(folder, "saved"))["sampler"])
        while sampler.epoch < 2:
            for x, y in loader:
                seen.append(x[:, 0].tolist())
                losses.append(pipe.step(x, y))
                sampler.advance(len(y))
                if len(seen) == stop and not resumes:
                    pipe.save(Path(folder, "saved"), extra={"sampler": sampler.state_dict()})
        pipe.flush()
        torch.save((seen, losses, pipe.model_state_dict()), Path(folder, f"loaded{resumes}.pt"))


def smooth() -> nn.Sequential:
    """Eight layers that draw nothing: what they compute does not depend on the stages."""
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(7)], nn.Linear(5, 3)
    )


def drain_and_save(folder: str, optimizer: str) -> None:
    """Five mini-batches of dtrp, drained; what it is then, as a checkpoint and as it is."""
    torch.set_default_dtype(torch.float64)
    with pipeline(
        smooth(), OPTIMIZERS[optimizer], num_stages=world_size(), method="dtrp", num_microbatches=2, timeout_s=30.0
    ) as pipe:
        for x, y in ten()[:5]:
            pipe.step(x if pipe.is_first else None, y if pipe.is_last else None)
        pipe.save(Path(folder, "saved"), portable=True)
        assert not pipe.in_flight
        state = pipe.state_dict()
        if pipe.is_first:
            torch.save(state, Path(folder, "drained.pt"))


def next_losses(folder: str, optimizer: str) -> None:
    """Those of a pipeline on these ranks that has loaded ``folder/saved``."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(9)
    with pipeline(
        smooth(), OPTIMIZERS[optimizer], num_stages=world_size(), method="dtrp", num_microbatches=2, timeout_s=30.0
    ) as pipe:
        pipe.load(Path(folder, "saved"))
        losses = [pipe.step(x if pipe.is_first else None, y if pipe.is_last else None) for x, y in ten()[5:]]
        if pipe.is_last:
            torch.save(losses, Path(folder, "losses.pt"))


def _in_replicas(method: str, model: nn.Sequential, **options: Any) -> dtrp.Pipeline:
    join()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
    return pipeline(model, adamw, num_stages=2, method=method, mesh=mesh, timeout_s=30.0, **options)


def save_replicas(folder: str, method: str, num_microbatches: int) -> None:
    """Two replicas of two stages, each with its own shards, saved and gone on with; and saved for any number of them."""
    replica = rank() // 2
    batches = [(x[replica::2], y[replica::2]) for x, y in ten()]

    def steps(pipe: dtrp.Pipeline, chosen: list[Batch]) -> list[Tensor | None]:
        return [pipe.step(x if pipe.is_first else None, y if pipe.is_last else None) for x, y in chosen]

    options = {"num_microbatches": num_microbatches}
    for stop in (1, 4):
        whole = _in_replicas(method, network(), **options)
        steps(whole, batches[:stop])
        whole.save(Path(folder, "saved"), extra=stop)
        want = [*steps(whole, batches[stop:]), whole.flush()]
        pipe = _in_replicas(method, network(), **options)
        assert pipe.load(Path(folder, "saved")) == stop
        own = [*steps(pipe, batches[stop:]), pipe.flush()]
        assert_same_values(dict(enumerate(own)), dict(enumerate(want)), f"losses from {stop}")
        assert_same_values(pipe.state_dict(), whole.state_dict(), f"state from {stop}")
        for stage, other in zip(pipe.stages, whole.stages, strict=True):  # each replica's own
            assert_same_values(dict(stage.named_buffers()), dict(other.named_buffers()), f"buffers from {stop}")
        whole.close()
        pipe.save(Path(folder, "portable"), portable=True)
        state = pipe.state_dict()
        if rank() == 0:
            torch.save(state, Path(folder, "state.pt"))
        pipe.close()


def load_in_replicas(folder: str) -> None:
    """A portable checkpoint of a run without replicas, in two."""
    torch.set_default_dtype(torch.float64)
    pipe = _in_replicas("bp", smooth())
    pipe.load(Path(folder, "alone"))
    state = pipe.state_dict()
    replica = rank() // 2
    # Each replica has all samples: the mean is that of one.
    losses = [pipe.step(x if pipe.is_first else None, y if pipe.is_last else None) for x, y in ten()[5:]]
    if pipe.is_last and replica == 0:
        torch.save((state, losses), Path(folder, "loaded.pt"))
    try:
        pipe.load(Path(folder, "exact"))
    except dtrp.CheckpointError as error:
        print(error)
    pipe.close()


def save_in_every_way(folder: str, kind: str, cells: list[tuple[str, int]]) -> None:
    """What `test_states` does in one process, on ranks."""
    for number, (method, parts) in enumerate(cells):
        place = Path(folder, str(number))
        found = (of_pipelines if kind == "Pipeline" else of_schedules)(method, parts, place, world_size())
        for i, chain in enumerate(spread(number, 16)):
            found.check(chain, portable=i % 3 == 2)
    print(f"{len(cells)} cells")


class Wide(nn.Module):
    """With a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = (
            nn.Linear(WIDTH, 6),
            nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.front(x))


def use_by_habit(folder: str, kind: str) -> None:
    """A model of which this rank trains a stage, used as if it trained the whole."""

    def told(job: Callable[[], Any]) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job()
        return "; ".join(str(warning.message) for warning in caught)

    x, file = ten()[0][0], Path(folder, f"model{rank()}.pt")
    for loads in (False, True):
        layers: Any = [nn.Linear(WIDTH, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)]
        if kind == "tied":
            layers = [nn.Linear(WIDTH, 3), nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh()), nn.Linear(WIDTH, 3)]
            layers[2].weight = layers[0].weight
        model = Wide() if kind == "split" else nn.Sequential(*layers)
        stages = (
            dtrp.split(model, points=["back", "back.2"], example=ten()[0][0])
            if kind == "split"
            else layers
            if kind == "list"
            else model
        )
        pipe = pipeline(stages, num_stages=3, method="bp" if kind == "tied" else "dtrp", timeout_s=30.0)
        hooked = [m for m in model.modules() if m._state_dict_pre_hooks]
        assert len(hooked) == 2
        for job in (model.state_dict, lambda model=model: copy.deepcopy(model), lambda model=model: model(x)):
            job()  # nothing has been trained: a warning would be an error here
        for mini in ten()[:4]:
            pipe.step(*given(pipe, *mini))
        pipe.flush()
        pipe.save(Path(folder, "saved"))
        pipe.save(Path(folder, "portable"), portable=True)
        pipe.load(Path(folder, "saved"))
        pipe.save_model(Path(folder, "whole.pt"))
        pipe.infer(x)
        pipe.load_state_dict(pipe.state_dict())
        pipe.stages[0].state_dict()
        copy.deepcopy(pipe.stages[0])
        if loads:
            model.load_state_dict(pipe.model_state_dict())
            model.state_dict()
            model(x)
            torch.save(model, file)
            pipe.step(*given(pipe, *ten()[0]))
            pipe.flush()
        mine = f"since this rank trains stage {rank()} alone; call pipe."
        said = told(lambda model=model: torch.save(model.state_dict(), file))
        assert said.startswith("model.state_dict() has old values of the stages that other ranks train"), said
        assert f"{mine}save_model(path) or pipe.model_state_dict(), on every rank" in said
        assert f"{mine}infer(x), on every rank" in told(lambda model=model: model(x))
        assert f"{mine}save_model(path), on every rank" in told(lambda model=model: torch.save(model, file))
        for again in (copy.deepcopy(model), torch.load(file, weights_only=False), model):
            again.state_dict()
            again(x)
            copy.deepcopy(again)
        pipe.close()
    ended_by_habit(Path(folder), told)
    print("told")


def ended_by_habit(folder: Path, told: Callable[[Callable[[], Any]], str]) -> None:
    """The commonest of all: trained in a function, saved after it, trained further."""

    def train(model: nn.Sequential) -> dict[str, Tensor]:
        with pipeline(model, num_stages=3, timeout_s=30.0) as pipe:
            for mini in ten()[:4]:
                pipe.step(*given(pipe, *mini))
            pipe.flush()
            return pipe.model_state_dict()

    for loads in (False, True):
        model = network()
        state = train(model)
        if loads:
            model.load_state_dict(state)
            job: Callable[[], Any] = model.state_dict
            job()
            model(ten()[0][0])
        else:
            said = told(lambda model=model: torch.save(model.state_dict(), folder / f"late{rank()}.pt"))
            assert said.startswith("model.state_dict() has old values of the stages that other ranks train"), said
            assert said.endswith("on every rank, before close()"), said
        again = told(lambda model=model: train(model))
        if rank() == 0 and not loads:
            assert again.startswith("The new pipeline begins with old values"), again
            assert "call model.load_state_dict(pipe.model_state_dict()), on every rank" in again
        else:
            assert not again, again
        assert "state_dict() has old values" in told(model.state_dict)
        assert all(len(m._state_dict_pre_hooks) < 2 for m in model.modules())


PROGRAMS.update(
    (function.__name__, function)
    for function in (
        drain_and_save,
        go_on_from_stops,
        load_in_replicas,
        next_losses,
        save_at_stops,
        save_in_every_way,
        save_many,
        save_replicas,
        train_from_a_loader,
        use_by_habit,
    )
)
