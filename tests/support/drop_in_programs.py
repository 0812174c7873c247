"""What ranks run for `tests/pipelining/test_pipelining.py`: scripts for torch's schedules, with torch's and with ours."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline

import dtrp
from dtrp.pipelining import ScheduleDTRP

CPU = torch.device("cpu")
WIDTH, CLASSES, WORDS = 6, 3, 11
Result = dict[str, Any]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


# -- models, and what their stages are given ------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.linear(x)))


class Penalized(Block):
    """Adds a term to the loss, and counts first forwards and repetitions."""

    add: Callable[[Tensor], None] = staticmethod(dtrp.add_loss)
    calls: ClassVar[Counter[bool]] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        Penalized.calls[dtrp.recomputing()] += 1
        out = super().forward(x)
        self.add(0.1 * out.square().mean())
        return out


class Blocks(nn.Module):
    """Of which a rank deletes what is not its own."""

    def __init__(self, dropout: float = 0.0, block: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): block(dropout) for i in range(6)})
        self.head: nn.Module | None = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) if self.head is not None else x


class Transformer(nn.Module):
    """That of torch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings: nn.Module | None = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleDict({str(i): nn.TransformerDecoderLayer(WIDTH, 2, 12, 0.0) for i in range(6)})
        self.norm: nn.Module | None = nn.LayerNorm(WIDTH)
        self.output: nn.Module | None = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens) if self.tok_embeddings else tokens
        for layer in self.layers.values():
            h = layer(h, h)
        h = self.norm(h) if self.norm else h
        return self.output(h).clone() if self.output else h


class Pair(nn.Module):
    """Takes and returns several values, a list and integers among them."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.place = place

    def forward(self, x: Tensor, kept: Tensor, number: Tensor) -> Any:
        h = torch.tanh(self.linear(x)) + 0.1 * kept * number[:, None]
        return h if self.place == world_size() - 1 else [h, kept + h, number + 1]


class Masked(nn.Module):
    """Takes a keyword argument of its own on every rank."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.place = place

    def forward(self, x: Tensor, *, mask: Tensor, scale: float = 1.0) -> Tensor:
        return torch.tanh(self.linear(x)) * mask * scale


class Carried(nn.Module):
    """`Masked`, with all masks travelling along."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.inner = Masked(place)

    def forward(self, given: tuple[Tensor, list[Tensor]]) -> Any:
        x, masks = given
        out = self.inner(x, mask=masks[self.inner.place], scale=1.5)
        return out if self.inner.place == world_size() - 1 else (out, masks)


class Skip(nn.Module):
    """The last part reads what the first has made, and an input of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        return self.third(self.second(a) + a) + a


class Tied(nn.Module):
    """The embedding is the head, of the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(x))))


class Counts(nn.Module):
    """Calls a batch norm in both stages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.middle = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.middle(self.norm(x)))


def cross_entropy(output: Tensor, target: Tensor, **_: Any) -> Tensor:
    return nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def _layers(count: int) -> list[list[str]]:
    """The names of each rank's layers."""
    return [[str(i) for i in part.tolist()] for part in torch.arange(count).tensor_split(world_size())]


class Remembering(nn.Module):
    """Reads the last output's mean, in a buffer, and how many there were, which the first forward registers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("last", torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "count"):
            self.register_buffer("count", torch.zeros(()), persistent=False)
        self.count += 1
        out = torch.tanh(self.linear(x + self.last)) / self.count.sqrt()
        self.last = torch.cat([self.last, out.detach().mean(0, keepdim=True)])[-3:].sum(0, keepdim=True)
        return out


def blocks(dropout: float = 0.0, block: type[Block] = Block) -> nn.Module:
    model = Blocks(dropout, block)
    for name in [n for n in model.blocks if n not in _layers(6)[rank()]]:
        del model.blocks[name]
    if rank() < world_size() - 1:
        model.head = None
    return model


def transformer() -> nn.Module:
    model = Transformer()
    for name in [n for n in model.layers if n not in _layers(6)[rank()]]:
        del model.layers[name]
    if rank() > 0:
        model.tok_embeddings = None
    if rank() < world_size() - 1:
        model.norm = model.output = None
    return model


def by_hand(module: nn.Module) -> PipelineStage:
    return PipelineStage(module, rank(), world_size(), CPU)


def one_of(make: Callable[[int], nn.Module]) -> PipelineStage:
    """This rank's of a list of modules, all of which are made so that every rank draws the same values."""
    return by_hand([make(k) for k in range(world_size())][rank()])


def traced(model: nn.Module, example: Tensor, names: list[str]) -> Any:
    with warnings.catch_warnings():  # torch's tracer uses what torch has deprecated
        warnings.simplefilter("ignore")
        pipe = pipeline(model, mb_args=(example,), split_spec=dict.fromkeys(names, SplitPoint.BEGINNING))
    return pipe.build_stage(rank(), CPU)


def traced_blocks(dropout: float = 0.0) -> Any:
    return traced(Blocks(dropout), torch.randn(3, WIDTH), [f"blocks.{part[0]}" for part in _layers(6)[1:]])


def traced_transformer() -> Any:
    example = torch.zeros(3, 5, dtype=torch.long)
    return traced(Transformer(), example, [f"layers.{part[0]}" for part in _layers(6)[1:]])


def numbers(n: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    return (torch.randn(n, WIDTH),), {}, torch.randint(CLASSES, (n,))


def words(n: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    x = torch.randint(WORDS, (n, 5))
    return (x,), {}, (x + 1) % WORDS


def pairs(n: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    x = torch.randn(n, WIDTH)
    return (x, torch.randn(n, WIDTH), torch.arange(n)), {}, torch.randint(WIDTH, (n,))


def with_masks(n: int) -> tuple[Tensor, list[Tensor], Tensor]:
    masks = [torch.randint(2, (n, WIDTH)).to(torch.get_default_dtype()) for _ in range(world_size())]
    return torch.randn(n, WIDTH), masks, torch.randint(WIDTH, (n,))


def masked(n: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    x, masks, y = with_masks(n)
    return (x,), {"mask": masks[rank()], "scale": 1.5}, y


def skipping(n: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    return (torch.randn(n, WIDTH),), {}, torch.randint(WIDTH, (n,))


KINDS: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "blocks": (lambda: by_hand(blocks()), numbers),
    "terms": (lambda: by_hand(blocks(block=Penalized)), numbers),
    "traced blocks": (traced_blocks, numbers),
    "transformer": (lambda: by_hand(transformer()), words),
    "traced transformer": (traced_transformer, words),
    "several values": (lambda: one_of(Pair), pairs),
    "keyword arguments": (lambda: one_of(Masked), masked),
    "dropout": (lambda: by_hand(blocks(0.3)), numbers),
    "traced skip": (lambda: traced(Skip(), torch.randn(3, WIDTH), ["second", "third"]), skipping),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, weight_decay=0.01),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
}

# -- the script -----------------------------------------------------------------------------------------------


def script(
    kind: str,
    method: str,
    optimizer_name: str = "momentum",
    *,
    sizes: tuple[int, ...] = (12,) * 6,
    parts: int = 4,
    left_over: bool = True,
    given: str = "object",
    dtype: torch.dtype = torch.float64,
    scale_grads: bool | None = True,
    **options: Any,
) -> Result:
    """Training by ``Schedule1F1B`` (method "torch"), or by ScheduleDTRP with one line changed."""
    # None: the default. Torch's schedules have the argument since 2.7, and sum in 2.6.
    scaling = {} if scale_grads is None else {"scale_grads": scale_grads}
    if method == "torch" and "scale_grads" not in inspect.signature(Schedule1F1B).parameters:
        assert not scale_grads
        scaling = {}
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    make, data = KINDS[kind]
    stage = make()
    optimizer = OPTIMIZERS[optimizer_name](stage.submod.parameters())
    schedule: Any
    if method == "torch":
        schedule = Schedule1F1B(stage, n_microbatches=parts, loss_fn=cross_entropy, **scaling)
    else:
        update = optimizer if given == "object" else OPTIMIZERS[optimizer_name]
        schedule = ScheduleDTRP(
            stage, update, n_microbatches=parts, loss_fn=cross_entropy, method=method,
            **scaling, **{"timeout_s": 20.0, **options},
        )  # fmt: skip
    before = torch.get_rng_state()
    torch.manual_seed(1)
    seen, outputs = [], []
    for n in sizes:
        args, kwargs, y = data(n)
        losses: list[Tensor] = []
        if left_over:
            optimizer.zero_grad()
        last = {"target": y, "losses": losses} if rank() == world_size() - 1 else {}
        out = schedule.step(*(args if rank() == 0 else ()), **last, **kwargs)
        if left_over:
            if method != "torch":
                nn.utils.clip_grad_norm_(stage.submod.parameters(), 1e-3)
            optimizer.step()
        seen.append(list(losses))
        outputs.append(out)
    if method != "torch":
        schedule.flush()
    result = {
        "losses": [[loss.detach() for loss in each] for each in seen],
        "outputs": outputs,
        "weights": {name: t.detach().clone() for name, t in stage.submod.state_dict().items()},
        "gradients": [name for name, p in stage.submod.named_parameters() if p.grad is not None],
        "rng": before,
    }
    if method != "torch":
        result["delays"] = schedule.delays()
        result["graph"] = any(loss.requires_grad for each in seen for loss in each)
        schedule.close()
    return result


def sequential(kind: str, method: str, sizes: tuple[int, ...] = (12,) * 6, parts: int = 4, seed: int = 7) -> Result:
    """The same run by `dtrp.Pipeline`, of modules that are stages by hand: in one process, or on these ranks."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = Blocks(0.3 if kind == "dropout" else 0.0)
    layers = [[model.blocks[name] for name in part] for part in _stage_layers(3)]
    layers[-1].append(model.head)
    with dtrp.Pipeline(
        [nn.Sequential(*each) for each in layers],
        OPTIMIZERS["momentum"],
        cross_entropy,
        method=method,
        num_microbatches=parts,
        seed=seed,
    ) as pipe:
        torch.manual_seed(1)
        losses = []
        for n in sizes:
            (x,), _, y = numbers(n)
            losses.append(pipe.step(x if pipe.is_first else None, y if pipe.is_last else None))
        pipe.flush()
        result = {"losses": losses, "delays": pipe.delays()}
        names = [f"blocks.{name}" for part in _stage_layers(3) for name in part] + ["head"]
        flat = [layer for each in layers for layer in each]
        result["weights"] = {
            f"{name}.{key}": t.detach().clone()
            for name, layer in zip(names, flat, strict=True)
            for key, t in layer.named_parameters()  # its state dict would warn of what other ranks train
        }
        return result


def _keywords(method: str) -> Result:
    """Keyword arguments of every stage's own, and the same masks as values that travel through a `dtrp.Pipeline`."""
    result = script("keyword arguments", method, seed=7)
    torch.manual_seed(0)
    stages = [Carried(k) for k in range(world_size())]
    with dtrp.Pipeline(
        stages, OPTIMIZERS["momentum"], cross_entropy, method=method, num_microbatches=4, seed=7, timeout_s=20.0
    ) as pipe:
        torch.manual_seed(1)
        for _ in range(6):
            x, masks, y = with_masks(12)
            pipe.step((x, masks), y)
        pipe.flush()
        weights = {name: t.detach().clone() for name, t in stages[rank()].inner.state_dict().items()}
    return {**result, "carried": weights}


def _stage_layers(num_stages: int) -> list[list[str]]:
    return [[str(i) for i in part.tolist()] for part in torch.arange(6).tensor_split(num_stages)]


# -- cases ----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[int, Callable[[], Result]]] = {}


def case(name: str, num_ranks: int, run: Callable[[], Result]) -> None:
    CASES[name] = (num_ranks, run)


def both(kind: str, num_ranks: int, **options: Any) -> str:
    """A case of torch's schedule and ours, by method bp."""
    name = f"{kind}, {num_ranks} ranks" + "".join(f", {key}={value}" for key, value in options.items())
    options = {"scale_grads": None, **options}
    case(name, num_ranks, lambda: {"torch": script(kind, "torch", **options), "ours": script(kind, "bp", **options)})
    return name


# Of a value that several stages read torch makes no gradient, so a skip is compared with the whole model.
AS_TORCH = [
    both("blocks", 1),
    *(both(kind, 2) for kind in KINDS if kind not in ("dropout", "traced skip")),
    *(both(kind, 3) for kind in ("blocks", "traced transformer", "several values")),
    both("blocks", 2, parts=3, scale_grads=False, optimizer_name="adam"),
    both("transformer", 2, dtype=torch.float32),
    *(both("blocks", 2, optimizer_name=name) for name in OPTIMIZERS),
]

_TAKEN = [name for name in dtrp.list_methods() if not dtrp.get_method(name).local]  # a local one is refused
METHODS = [f"{kind}, {method}" for kind, method in itertools.product(("dropout",), _TAKEN)]
for _name in METHODS:
    _kind, _, _method = _name.partition(", ")
    case(
        _name,
        3,
        lambda kind=_kind, method=_method: {
            "ours": script(kind, method, seed=7), "pipeline": sequential(kind, method),
        },
    )  # fmt: skip

EVERY_KIND = [f"{kind} by {method}" for kind in KINDS if "skip" not in kind for method in ("dtrp", "fdg")]
for _name in EVERY_KIND:
    _kind, _, _method = _name.rpartition(" by ")
    case(_name, 2, lambda kind=_kind, method=_method: script(kind, method, seed=7))

KEYWORDS = [f"keywords, {method}" for method in ("dtrp", "fdg", "bp")]
for _name in KEYWORDS:
    _, _, _method = _name.partition(", ")
    case(_name, 2, lambda method=_method: _keywords(method))

LEFT_OVER = [
    f"left over, {method}, {name}" for method in ("dtrp", "fdg") for name in ("sgd", "momentum", "adam", "adamw")
]
LEFT_OVER += [f"left over, fdg, {name}" for name in ("rmsprop", "adagrad", "radam")]
for _name in LEFT_OVER:
    _, _method, _optimizer = _name.split(", ")
    case(
        _name,
        2,
        lambda method=_method, name=_optimizer: {
            "script": script("blocks", method, name, seed=7),
            "clean": script("blocks", method, name, left_over=False, given="function", seed=7),
        },
    )


def plain(model: nn.Module, data: Any, sizes: tuple[int, ...] = (12,) * 6) -> Result:
    """A plain loop, in which micro-batches weigh the same."""
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    terms: list[Tensor] = []
    for block in model.modules():
        if isinstance(block, Penalized):
            block.add = terms.append  # type: ignore[method-assign]
    torch.manual_seed(1)
    losses = []
    for n in sizes:
        (x,), _, y = data(n)
        each = []
        for a, b in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            each.append(cross_entropy(model(a), b) + sum(terms))
            terms.clear()
        optimizer.zero_grad()
        (sum(each) / 4).backward()
        optimizer.step()
        losses.append([loss.detach() for loss in each])
    return {"losses": losses, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def _skip() -> Result:
    """The whole model in a plain loop, and in stages."""
    result = {"ours": script("traced skip", "bp"), "dtrp": script("traced skip", "dtrp")}
    torch.manual_seed(0)
    return {**result, "plain": plain(Skip(), skipping)}


def _terms() -> Result:
    result = {"ours": script("terms", "bp")}
    Penalized.calls.clear()
    result["dtrp"] = script("terms", "dtrp")
    result["calls"] = dict(Penalized.calls)
    torch.manual_seed(0)
    return {**result, "plain": plain(Blocks(block=Penalized), numbers)}


case("terms of the loss", 3, _terms)


def _uneven() -> Result:
    """Parts of other sizes than each other, which torch's schedules do not take, and other mini-batches."""
    sizes = (10, 9, 7, 13, 4)
    result = {"ours": script("blocks", "bp", sizes=sizes), "dtrp": script("blocks", "dtrp", sizes=sizes)}
    torch.manual_seed(0)
    return {**result, "plain": plain(Blocks(), numbers, sizes)}


case("a value that skips a stage", 3, _skip)
case("uneven parts", 3, _uneven)


def _modes(name: str) -> Result:
    """Eval with batches in flight, several times, in and out of no_grad and inference mode."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    module = [nn.Sequential(Block(0.5), nn.BatchNorm1d(WIDTH)) for _ in range(world_size())][rank()]
    optimizer = OPTIMIZERS["momentum"](module.parameters())
    last = rank() == world_size() - 1
    found: Result = {}
    with ScheduleDTRP(by_hand(module), optimizer, 4, cross_entropy, method=name, seed=7, timeout_s=20.0) as schedule:
        for n in range(6):
            (x,), _, y = skipping(8)
            schedule.step(x, target=y)
            if n in (2, 5):
                losses: list[Tensor] = [torch.zeros(())]
                around = torch.inference_mode if n == 2 else contextlib.nullcontext
                with around():
                    out = schedule.eval(x, target=y, losses=losses)
                    again = schedule.eval(x)
                found[str(n)] = {
                    "x": x, "y": y, "out": out, "again": again, "losses": losses if last else None,
                    "module": {k: t.detach().clone() for k, t in module.state_dict().items()},
                    "training": [m.training for m in module.modules()], "in_flight": schedule.in_flight,
                }  # fmt: skip
        (x,), _, y = skipping(8)
        assert schedule.step(x, target=y, return_outputs=False) is None
        schedule.flush()
    return {"modes": found, "weights": {k: t.detach() for k, t in module.state_dict().items()}}


for _name in ("dtrp", "bp"):
    case(f"eval, {_name}", 2, lambda name=_name: _modes(name))


MOVING = {"buffers that move": (lambda: one_of(lambda k: Remembering()), skipping)}


def _saved(kind: str, method: str) -> Result:
    """Stopped with batches in flight and taken up by a schedule of new modules; and never stopped."""
    results: list[Any] = []
    for stops in ((), (2, 5)):
        torch.set_default_dtype(torch.float64)
        make, data = {**KINDS, **MOVING}[kind]
        torch.manual_seed(0)

        def fresh(make: Any = make) -> tuple[Any, ScheduleDTRP]:
            stage = make()
            optimizer = OPTIMIZERS["momentum"](stage.submod.parameters())
            return stage, ScheduleDTRP(stage, optimizer, 2, cross_entropy, method=method, seed=7, timeout_s=20.0)

        stage, schedule = fresh()
        generator = torch.Generator().manual_seed(1)
        seen = []
        for n in range(8):
            if n in stops:
                folder = Path(os.environ["SCRATCH"], f"{kind} {method}")
                assert n == 2 or schedule.in_flight or rank() == world_size() - 1
                schedule.save(folder, extra=n)
                schedule.close()
                torch.manual_seed(100 + n)
                stage, schedule = fresh()
                assert schedule.load(folder) == n
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            args, kwargs, y = data(6)
            losses: list[Tensor] = []
            last = {"target": y, "losses": losses} if rank() == world_size() - 1 else {}
            schedule.step(*args, **last, **kwargs)
            seen.append(losses)
        schedule.flush()
        results.append(
            {"losses": seen, "weights": {k: t.detach().clone() for k, t in stage.submod.state_dict().items()}}
        )
        schedule.close()
    return {"whole": results[0], "stopped": results[1]}


SAVED = [
    f"saved, {kind}, {method}"
    for kind, method in (
        ("keyword arguments", "dtrp"),
        ("several values", "fdg"),
        ("traced blocks", "dtrp"),
        *((kind, method) for kind in MOVING for method in ("dtrp", "fdg")),
    )
]
for _name in SAVED:
    _, _kind, _method = _name.split(", ")
    case(_name, 2, lambda kind=_kind, method=_method: _saved(kind, method))


def _whole_models() -> Result:
    """What puts the stages' names together."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    stage = by_hand(blocks())
    path = Path(os.environ["SCRATCH"], "model.pt")
    with ScheduleDTRP(stage, OPTIMIZERS["adamw"], 2, cross_entropy, seed=7, timeout_s=20.0) as schedule:
        for _ in range(4):
            (x,), _, y = numbers(8)
            schedule.step(x, target=y)
        schedule.flush()
        schedule.save_model(path)
        state = schedule.state_dict()
        schedule.save(path.with_name("portable"), portable=True)
        found = {
            "saved": torch.load(path),
            "state": state,
            "own": dict(stage.submod.state_dict()),
            "text": repr(schedule),
        }
    refused = []
    with ScheduleDTRP(one_of(Masked), OPTIMIZERS["sgd"], 2, cross_entropy, timeout_s=20.0) as schedule:
        for ask in (
            schedule.model_state_dict,
            schedule.state_dict,
            lambda: schedule.save_model("never.pt"),
            lambda: schedule.save("never", portable=True),
            lambda: schedule.load_state_dict(state),
            lambda: schedule.load(path.with_name("portable")),
        ):
            try:
                ask()
                refused.append("accepted")
            except RuntimeError as error:
                refused.append(str(error))
    return {**found, "refused": refused}


case("whole models", 2, _whole_models)


def _refusals() -> Result:
    """What is refused, on all ranks alike, and leaves the schedule usable."""
    said: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            said[name] = "accepted"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    stage = traced_blocks(0.1)
    first, last = rank() == 0, rank() == world_size() - 1
    (x,), _, y = numbers(6)
    with ScheduleDTRP(stage, OPTIMIZERS["sgd"], 2, cross_entropy, timeout_s=20.0) as schedule:
        attempt("traced eval", lambda: schedule.eval(x))
        schedule.step(*([x] if first else []), **({"target": y} if last else {}))
        attempt("closed", lambda: (schedule.flush(), schedule.close(), schedule.step(x, target=y)))
    return {"said": said}


case("refusals", 2, _refusals)

_LISTS = (AS_TORCH, METHODS, EVERY_KIND, LEFT_OVER)


def launched_with(name: str) -> tuple[str, list[str]]:
    """The launch that runs a case, and all that it runs."""
    num_ranks = CASES[name][0]
    place = next((i for i, names in enumerate(_LISTS) if name in names), len(_LISTS))
    names = _LISTS[place] if place < len(_LISTS) else [n for n in CASES if not any(n in other for other in _LISTS)]
    return f"drop-in-{num_ranks}-{place}", [n for n in names if CASES[n][0] == num_ranks]


def cases(folder: str, *names: str) -> None:
    """Run cases in one process group; results are written even if one fails."""
    os.environ["SCRATCH"] = folder
    run_cases(folder, {name: CASES[name][1] for name in names})


def run_cases(folder: str, runs: Mapping[str, Callable[[], Result]]) -> None:
    """Run what makes the results in one process group; those that there are are written even if one fails."""
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    try:
        for name, run in runs.items():
            print(name, flush=True)
            try:
                results[name] = run()
            except BaseException:
                results[name] = traceback.format_exc()
                raise
            finally:
                torch.set_default_dtype(torch.float32)
    finally:
        torch.save(results, Path(folder, f"results{rank()}.pt"))
        dist.destroy_process_group()


# -- what goes wrong ------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.linear, self.at, self.calls = nn.Linear(WIDTH, WIDTH), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ValueError("the sensor is on fire")
        return self.linear(x)


def with_forward_context(stage: Any) -> None:
    """A stage as that of torch 2.15 with a context registered."""
    if hasattr(stage, "register_forward_context"):
        stage.register_forward_context(lambda info: contextlib.nullcontext())
    else:
        stage._forward_contexts = {0: contextlib.nullcontext}


def goes_wrong(folder: str, what: str) -> None:
    """A script with one mistake, on one rank or on all."""
    del folder
    dist.init_process_group("gloo")
    first, last, size = rank() == 0, rank() == world_size() - 1, world_size()
    module: Any = Fails(5 if what == "a stage" and last else 0)
    options: dict[str, Any] = {"n_microbatches": 2, "loss_fn": cross_entropy, "timeout_s": 2.0}
    optimizer: Any = OPTIMIZERS["sgd"](module.parameters())
    index, number = rank(), size
    if what == "stage_index" and last:
        index = 0
    elif what == "num_stages":
        number = size + 1
    elif what == "method" and last:
        options["method"] = "fdg"
    elif what == "n_microbatches" and last:
        options["n_microbatches"] = 3
    elif what == "loss_fn" or (what == "loss_fn of one rank" and last):
        options["loss_fn"] = None
    elif what == "loss_fn is no function":
        options["loss_fn"] = "cross_entropy"
    elif what == "dgl":
        options["method"] = "dgl"
    elif what == "trained loss":
        options["loss_fn"] = nn.Linear(2, 2)
    elif what == "another's optimizer" and last:
        optimizer = OPTIMIZERS["sgd"](nn.Linear(2, 2).parameters())
    elif what == "no optimizer" and last:
        optimizer = None
    elif what == "lbfgs":
        optimizer = torch.optim.LBFGS(module.parameters())
    elif what == "frozen":
        module.requires_grad_(False)
    elif what == "wrapped" and last:
        module = nn.parallel.DistributedDataParallel(
            module, process_group=dist.new_group([rank()], use_local_synchronization=True)
        )
    elif what == "meta" and last:
        module = module.to("meta")
        optimizer = OPTIMIZERS["sgd"]
    builder = {"dw_builder": lambda: lambda: None} if what == "dw_builder" and last else {}
    stage: Any = PipelineStage(module, index, number, CPU, **builder)
    if what in ("tied", "counts"):
        stage = traced(*{"tied": (Tied(), words(3)[0][0]), "counts": (Counts(), numbers(3)[0][0])}[what], ["middle"])
        optimizer = OPTIMIZERS["sgd"](stage.submod.parameters())
    if what == "a list":
        stage = [stage]
    if what == "nobody" and not first:
        return
    schedule = ScheduleDTRP(stage, optimizer, **options)
    losses: list[Tensor] = []
    for n in range(6):
        x, y = torch.randn(8, WIDTH), torch.randint(WIDTH, (8,))
        given: dict[str, Any] = {"target": y, "losses": []} if last else {}
        if what == "target" and n == 3:
            given = {}
        elif what == "losses" and n == 3 and last:
            given["losses"] = ()
        elif what == "few samples" and n == 3:
            x = x[:1]
        elif what == "few targets" and n == 3 and last:
            given["target"] = y[:1]
        elif what == "loss_kwargs" and n == 3 and last:
            given["loss_kwargs"] = {"weight": object()}
        elif what == "stalls" and n == 3 and last:
            time.sleep(4)
        elif what in ("arg_mbs", "no tuples") and n == 3 and first:
            given["arg_mbs"] = [(part,) for part in x.tensor_split(3)] if what == "arg_mbs" else list(x.tensor_split(2))
        elif what == "both" and n == 3 and last:
            given["target_mbs"] = list(y.tensor_split(2))
        elif what == "finalize_gradients" and n == 3:
            given["finalize_gradients"] = False
        elif what == "gradients of inputs" and n == 3:
            x.requires_grad_()
        elif what == "gradients of targets" and n == 3:
            given["loss_kwargs"] = {"weight": torch.ones(WIDTH, requires_grad=True)}
        elif what == "freezes" and n == 3 and last:
            module.linear.bias.requires_grad_(False)
        elif what == "assigns" and n == 3 and last:
            module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()}, assign=True)
        elif what == "forward context" and n == 3 and last:
            with_forward_context(stage)
        elif what == "order" and n == 3 and last:
            print(schedule.pipeline_order)  # type: ignore[attr-defined]
        elif what == "graph" and n == 3 and last:
            losses[0].backward()
        losses = given.get("losses", [])
        takes = first and "arg_mbs" not in given and (what != "no input" or n < 3)
        schedule.step(*([x] if takes else []), **given)
    schedule.flush()
    schedule.close()


PROGRAMS: dict[str, Callable[..., None]] = {"drop_in_cases": cases, "goes_wrong": goes_wrong}
