"""A stage's module through `torch.compile`."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_VARIANTS = 64  # of a stage, at most


def compiled(module: nn.Module, arguments: Mapping[str, Any]) -> Callable[[Any], Any]:
    """``module`` as compiled code, which reads the parameters that are in their places when it runs."""

    def run(x: Any) -> Any:
        return module(x)

    # The compiler keeps so many variants of a code object and runs the rest as it is: no two stages may share one, and a stage has
    # one for each of gradients or none, train or eval mode, autocast or not, before and after sizes change.
    own = types.FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in every torch
        arguments = {"recompile_limit": _VARIANTS, **arguments}
    code = torch.compile(own, **arguments)

    def call(x: Any) -> Any:
        with warnings.catch_warnings():  # the compiler looks at .grad of what the module is given, which is no leaf
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return code(x)

    return call
