"""A stage's module through `torch.compile`."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..typing import Tree

_MOST_VARIANTS = 64  # of a stage's code


def compiled(module: nn.Module, arguments: Mapping[str, Any]) -> Callable[[Tree], Tree]:
    """``module`` as compiled code, which reads the parameters that are in their places when it runs."""

    def run(x: Tree) -> Tree:
        return module(x)

    # The compiler keeps a limited number of variants of a code object and runs the rest uncompiled: no two stages may
    # share a code object, and a stage has variants for gradients or none, train or eval mode, autocast or not, before
    # and after sizes change.
    unshared = types.FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not in every torch
        arguments = {"recompile_limit": _MOST_VARIANTS, **arguments}
    code = torch.compile(unshared, **arguments)

    def call(x: Tree) -> Tree:
        with warnings.catch_warnings():  # the compiler reads .grad of the input, which is no leaf
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return code(x)

    return call
