"""Cut a model into stages.

A stage is an `nn.Sequential` of some of the model's layers under their names in the model, so that its parameters are
the model's objects and its state dict is a part of the model's. The same holds for a `TracedStage`, a stage of a model
that is no `nn.Sequential`.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..tensors.module_mode import in_mode
from ..tensors.torch_private import buffer_dict, forward_hooks, module_dict, parameter_dict
from ..typing import Tree
from ..validation import whole
from .points import check_known, check_order

# The functions of torch.cuda and its like that stages need.
_NEEDED = ("Stream", "stream", "current_stream", "synchronize", "device",
           "manual_seed", "get_rng_state", "set_rng_state")  # fmt: skip


class Stages(list[nn.Module]):
    """The stages of a model, in order: what `split` returns and `Pipeline` takes.

    Attributes:
        points: names of the submodules where stages 1..K-1 begin.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        points: Iterable[str] = (),
        trace: Callable[[list[str]], Stages] | None = None,
    ) -> None:
        super().__init__(modules)
        self.points = tuple(points)
        self._trace = trace  # the model again, with other points

    def cut(self, cuts: Sequence[int]) -> Stages:
        """The same model in fewer stages, each made of one or more of these.

        Args:
            cuts: indices of the stages with which stages 1..K-1 of the result begin.
        """
        cuts = _checked_cuts(cuts, len(self), None)
        points = [self.points[cut - 1] for cut in cuts]
        if len(cuts) == len(self) - 1:
            return self
        if self._trace is not None:
            return self._trace(points)
        layers = [[(name, layer) for name, layer in module_dict(stage).items() if layer is not None] for stage in self]
        bounds = itertools.pairwise([0, *cuts, len(self)])
        return Stages([stage_of(itertools.chain(*layers[start:end])) for start, end in bounds], points)

    def __repr__(self) -> str:
        return f"Stages({len(self)} stages, points={list(self.points)})"


def split(
    model: nn.Module | Sequence[nn.Module],
    *,
    num_stages: int | None = None,
    cuts: Sequence[int] | None = None,
    points: Sequence[str] | None = None,
    example: Tree = None,
    dynamic_shapes: Any = None,
) -> Stages:
    """Cut a model into stages, each a module with one value in and one value out.

    The parameters and buffers stay the model's objects, under their names in the model.

    - An `nn.Sequential` is cut between its layers, as `Pipeline` does: by ``num_stages``, ``cuts`` or ``points``,
      without an example.
    - A list of modules is divided already, by hand: one a stage. A module whose forward has several arguments without a
      default is given the entries of a tuple one by one, or those of a dict by keyword; any other takes one value,
      whatever it is. With an example it is tried whether each takes what the one before returns.
    - Any other module, and a Sequential with an example, is traced by `torch.export`, in train and in eval mode, for
      any number of samples, and cut at ``points``, or, by ``num_stages``, so that the slowest stage is as fast as
      it can be: between entries of the model's lists of blocks where that costs little, and where few values pass. What
      a later stage needs travels through those in between, the value of a parameter that has one name too; a buffer
      that nothing writes is in every stage that reads it. Everything but the number of samples, and the sizes that
      ``dynamic_shapes`` names, is as in the example: shapes, dtypes, constants, and what the forward decides by them.
      What the stages then make of the example is compared with what the model does, where the forward draws no random
      numbers. What the forward stores on its modules the stages do not store, which is warned of by name, and so is one
      stage that does nearly all of the work.

    Args:
        model: the model.
        num_stages: K.
        cuts: index of the first layer of stages 1..K-1, of a Sequential.
        points: names of the submodules where stages 1..K-1 begin, as in `named_modules`.
        example: what the model is called with: a tensor; a tuple of positional arguments; or a dict of keyword
            arguments. At least two samples along dimension 0 of every tensor (one of one sample beside them is for
            all). Its values do not matter if the model can take them, and `Pipeline.step` and `Pipeline.infer` take the
            like for x. (A Hugging Face model is traced without its cache, ``use_cache=False``.)
        dynamic_shapes: sizes that vary beside the number of samples (batches padded to the longest, images of several
            sizes), as `torch.export.export` takes them: nested like the example, with ``{dimension: size}`` or as many
            sizes as dimensions for a tensor, and None for what does not vary; a dict may leave names out, and may name
            the arguments of the forward where the example is positional. A size is a ``torch.export.Dim``, its name as
            text (equal names are equal sizes), ``Dim.AUTO``, ``Dim.DYNAMIC``, or None. Dimension 0 of every tensor with
            samples is given one ``Dim`` without bounds, the caller's name for it or another: it need not be named, and
            bounds there are dropped. A size that varies is 2 or more. `Pipeline.step` and `Pipeline.infer` refuse sizes
            out of bounds and sizes that do not fit each other.

    Returns:
        The stages, in order.

    Raises:
        TypeError: what cannot be cut, or an example that does not fit.
        ValueError: more than one way to cut, or none; an unknown name (with the nearest right one); a model that cannot
            be traced (with the place, and the way by hand), has hooks, or whose stages do something else; stages that
            do not fit each other.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(12, 2)
        ...     def forward(self, x):
        ...         return self.second(torch.cat([x, self.first(x).relu()], 1))
        >>> stages = split(Net(), points=["second"], example=torch.randn(2, 4))
        >>> [name for name, _ in stages[1].named_parameters()]
        ['second.weight', 'second.bias']
    """
    if not isinstance(model, nn.Module):
        stages = into_stages(model, num_stages, cuts)
        _check_untraced(dynamic_shapes)
        if points is not None:
            raise ValueError(
                f"points={list(points)} with a list of modules, which already is one module a stage; leave it out"
            )
        if example is not None:
            _try_in_turn(stages, example)
        return Stages(stages, map(str, range(1, len(stages))))
    ways = {"num_stages": num_stages, "cuts": cuts, "points": points}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'neither num_stages, cuts nor points'} given; say in one way where stages begin"
        )
    if points is not None:
        points = _listed(points)
    if cuts is not None or _is_between_layers(model, points, example):
        _check_untraced(dynamic_shapes)
        return _between_layers(model, num_stages, cuts, points)
    if example is None:
        raise ValueError(
            f"the model is a {type(model).__name__}, which is traced to be cut; pass example=, what it is called with (a "
            "tensor, a tuple of arguments or a dict of keyword arguments), or a list of modules, one a stage"
        )
    if num_stages is not None:
        num_stages = whole("num_stages", num_stages)
    stages, found = _traced(model, example, num_stages=num_stages, points=points, dynamic_shapes=dynamic_shapes)
    for warning in found:
        warnings.warn(warning, stacklevel=2)
    return stages


def _check_untraced(dynamic_shapes: Any) -> None:
    if dynamic_shapes is not None:
        raise ValueError(
            "dynamic_shapes with modules that are not traced, which take tensors of any size that their forward takes; leave it out"
        )


def _traced(
    model: nn.Module,
    example: Tree,
    *,
    num_stages: int | None = None,
    points: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> tuple[Stages, list[str]]:
    """Trace the model and cut it; the stages, and warnings."""
    from .traced_stage import trace_into_stages  # torch.export is slow to import

    if torch.__version__.startswith("2.6."):
        raise ValueError(
            f"dtrp.split does not trace models on torch {torch.__version__}, whose graphs of values that skip stages end in "
            "faults inside torch; install a newer torch, or pass a list of modules, one a stage"
        )
    traced, points, found = trace_into_stages(
        model, example, num_stages=num_stages, points=points, dynamic_shapes=dynamic_shapes
    )

    def again(points: list[str]) -> Stages:
        with traced[0]._autocast.region():
            return _traced(model, example, points=points, dynamic_shapes=dynamic_shapes)[0]

    return Stages(traced, points, again), found


def _is_between_layers(model: nn.Module, points: Sequence[str] | None, example: Tree) -> bool:
    """Whether to cut a Sequential between its layers."""
    if type(model).forward is not nn.Sequential.forward:
        return False
    if points is None:
        return example is None
    check_known(model, points)
    return all(point in module_dict(model) for point in points)


def _between_layers(
    model: nn.Module, num_stages: int | None, cuts: Sequence[int] | None, points: Sequence[str] | None
) -> Stages:
    """Cut a Sequential between its layers."""
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"cuts={cuts} number the layers of an nn.Sequential, and the model is a {type(model).__name__}; pass "
            "points=, the names of submodules where stages begin, or num_stages="
        )
    names = [name for name, _ in layers_of(model)]
    if points is not None:
        check_order(points, {name: place for place, name in enumerate(names)}, 0)
        cuts = [names.index(point) for point in points]
    stages = into_stages(model, num_stages, cuts)
    return Stages(stages, [names[bound] for bound in itertools.accumulate(map(len, stages[:-1]))])


def _listed(points: Any) -> list[str]:
    if isinstance(points, str):
        raise TypeError(f"points={points!r} is one name; pass a list of names, [{points!r}]")
    names = list(points) if isinstance(points, Iterable) else [points]
    strange = next((name for name in names if not isinstance(name, str)), None)
    if strange is not None:
        raise TypeError(
            f"points holds a {type(strange).__name__}; pass the names of submodules, as model.named_modules() has them"
        )
    return names


def _try_in_turn(stages: Sequence[nn.Module], example: Tree) -> None:
    """Run the example through the stages; raise where one does not take what the one before returns."""
    value = example
    for k, stage in enumerate(stages):
        giver = "the example" if k == 0 else f"stage {k - 1}"
        first = next(iter(stage.children()), stage)
        _check_values(first, value, f"stage {k}", giver)
        try:
            with in_mode(stage, training=False), torch.no_grad():
                value = stage(value)
        except Exception as error:
            raise ValueError(
                f"stage {k} ({type(first).__name__}) does not take what {giver} {'holds' if k == 0 else 'returns'}, "
                f"{_shown(value)}: {error}"
            ) from error


class Chain(nn.Sequential):
    """Layers of which some take several values: a tuple or list as arguments, a dict as keyword arguments."""

    def forward(self, value: Tree) -> Tree:
        for name, layer in module_dict(self).items():  # named_children() would leave out a layer's second call
            assert layer is not None
            value = called(layer, value, name)
        return value


def called(layer: nn.Module, value: Tree, name: str) -> Tree:
    """The output of a layer of a list, or of an `nn.Sequential`, for a value; ``name`` is for errors."""
    if len(_needed(layer)) < 2:
        return layer(value)
    _check_values(layer, value, f"layer {name}", "what comes before it")
    return layer(**value) if isinstance(value, dict) else layer(*value)


def stage_of(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    """Make a stage of layers with their names."""
    named = OrderedDict(layers)
    return (Chain if any(len(_needed(layer)) > 1 for layer in named.values()) else nn.Sequential)(named)


def _needed(layer: nn.Module) -> list[str]:
    """The arguments without which ``layer`` cannot be called."""
    try:
        parameters = inspect.signature(layer.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted module's
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]


def _check_values(layer: nn.Module, value: Tree, taker: str, giver: str) -> None:
    """Refuse too few values for a layer that takes several."""
    needed = _needed(layer)
    if len(needed) < 2:
        return
    num = len(value) if isinstance(value, (tuple, list, dict)) else 1
    lost = [name for name in needed if name not in value] if isinstance(value, dict) else needed[num:]
    if lost:
        raise ValueError(
            f"{taker} ({type(layer).__name__}) takes {len(needed)} values ({', '.join(needed)}) but {giver} gives {num}, without "
            f"{lost[0]}. A value cannot skip a stage: what a later one needs of an earlier one passes through those in between, "
            "which take it and return it along; or let dtrp.split trace the model whole"
        )


def _shown(value: Tree) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def equal_cuts(num_layers: int, num_stages: int) -> list[int]:
    """Cuts that give stages equal numbers of layers; the first stages take the remainder.

    >>> equal_cuts(11, 4)
    [3, 6, 9]
    """
    size, rest = divmod(num_layers, num_stages)
    return [k * size + min(k, rest) for k in range(1, num_stages)]


def into_stages(
    model: nn.Sequential | Sequence[nn.Module], num_stages: int | None = None, cuts: Sequence[int] | None = None
) -> list[Any]:
    """Cut a model into stages, each layer in exactly one of them.

    Args:
        model: an `nn.Sequential`, cut between its top-level layers; a list of modules, one a stage; or what `split`
            returned.
        num_stages: K. None: the length of the list, or of ``cuts`` plus 1, or 1.
        cuts: index of the first layer of stages 1..K-1, for a Sequential.

    Raises:
        TypeError: a model that is neither, or has a forward of its own.
        ValueError: stages without layers, cuts out of order or range.
    """
    if isinstance(model, Stages):
        if cuts is not None or num_stages not in (None, len(model)):
            raise ValueError(
                f"{f'num_stages={num_stages}' if cuts is None else f'cuts={list(cuts)}'} with {len(model)} stages that "
                "dtrp.split has made; leave it out, or split again"
            )
        return list(model)
    layers = layers_of(model)
    if isinstance(model, nn.Module):
        cuts = _cuts_for(len(layers), num_stages) if cuts is None else _checked_cuts(cuts, len(layers), num_stages)
    else:
        if cuts is not None:
            raise ValueError(
                f"cuts={list(cuts)} with a list of {len(layers)} modules, which already is one module a stage; "
                "pass nn.Sequential(*modules) to cut it elsewhere"
            )
        if num_stages not in (None, len(layers)):
            raise ValueError(
                f"num_stages={num_stages} but the list has {len(layers)} modules, one a stage; leave num_stages out, "
                "or pass nn.Sequential(*modules)"
            )
        cuts = range(1, len(layers))
    for layer, module in layers:
        if lazy := [name for name, t in module.named_parameters() if is_lazy(t)]:
            raise ValueError(
                f"{lazy[0]} of layer {layer} has no shape yet; run the model once on a few samples before it is cut"
            )
    return [stage_of(layers[start:end]) for start, end in itertools.pairwise([0, *cuts, len(layers)])]


def _sequential_of(modules: Sequence[nn.Module]) -> nn.Sequential:
    if not isinstance(modules, Sequence) or isinstance(modules, str):
        raise TypeError(
            f"model is a {type(modules).__name__}; pass an nn.Sequential, or a list of modules, one a stage"
        )
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"model[{index}] is a {type(module).__name__}; pass a list of modules, one a stage (a function is called in the "
                "forward of one)"
            )
    if not modules:
        raise ValueError("model is an empty list; pass at least one module")
    return nn.Sequential(*modules)


def layers_of(model: nn.Module | Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The layers between which a model can be cut, with their names."""
    if isinstance(model, Stages):
        return list(zip(["the beginning", *model.points], model, strict=True))
    if not isinstance(model, nn.Module):
        model = _sequential_of(model)
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise TypeError(
            f"model is a {type(model).__name__}, whose forward cannot be cut between layers; let dtrp.split trace it, or pass an "
            "nn.Sequential of its parts, or a list of modules, one a stage"
        )
    tensors = [*parameter_dict(model), *buffer_dict(model)]
    if tensors or forward_hooks(model):
        raise TypeError(
            f"the nn.Sequential itself has {', '.join(tensors) or 'hooks'}, which belongs to no layer; move it into a layer"
        )
    if not len(model):
        raise ValueError("model is an empty nn.Sequential; pass at least one layer")
    return list(module_dict(model).items())  # type: ignore[arg-type]  # a Sequential has no None


def _cuts_for(num_layers: int, num_stages: int | None) -> list[int]:
    num_stages = 1 if num_stages is None else whole("num_stages", num_stages)
    if num_stages > num_layers:
        raise ValueError(
            f"num_stages={num_stages} but the model has {num_layers} layers; pass num_stages<={num_layers}"
        )
    return equal_cuts(num_layers, num_stages)


def _checked_cuts(cuts: Sequence[int], num_layers: int, num_stages: int | None) -> list[int]:
    try:
        cuts = [operator.index(cut) for cut in cuts]
    except TypeError:
        raise ValueError(f"cuts={cuts!r}: pass whole numbers, the first layer of each stage but the first") from None
    if num_stages is not None and num_stages != len(cuts) + 1:
        raise ValueError(f"cuts={cuts} make {len(cuts) + 1} stages but num_stages={num_stages}; pass one of the two")
    for cut in cuts:
        if not 0 < cut < num_layers:
            raise ValueError(
                f"cuts={cuts}: {cut!r} is out of range; the model has {num_layers} layers, cut at 1..{num_layers - 1}"
            )
    if any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"cuts={cuts}: put them in rising order, each once; every stage has at least one layer")
    return cuts


def stage_device(stage: nn.Module) -> torch.device | None:
    """The device of a stage's parameters and buffers; None when it has none.

    Raises:
        ValueError: they are on several devices.
    """
    places = {t.device: name for name, t in [*stage.named_parameters(), *stage.named_buffers()]}
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"one stage has its tensors on several devices ({where}); pass devices=, one per stage")
    return next(iter(places), None)


def check_device(device: torch.device) -> torch.device:
    """The device, if stages can work there.

    Raises:
        ValueError: torch has no streams for it, or no random numbers that can be set and put back (Apple's GPUs, meta).
    """
    module = getattr(torch, device.type, None)
    missing = next((name for name in _NEEDED if not hasattr(module, name)), None)
    if device.type != "cpu" and missing is not None:
        raise ValueError(
            f"a stage cannot work on {device}: torch has no torch.{device.type}.{missing}; put the model on the CPU, or on CUDA "
            "or XPU devices"
        )
    return device
