"""What is said of a model that cannot be traced: where, why, and what to change."""

from __future__ import annotations

import linecache
import math
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .example import Example, is_named

_NOT_THE_CALLERS = (Path(torch.__file__).parent, Path(__file__).parent)


def untraceable(model: nn.Module, error: Exception, example: Example, varying: Sequence[dict[int, Any]]) -> ValueError:
    where = _place(model, error)
    text = str(error).strip()
    violated = re.match(r"Constraints violated \((.*?)\)!", text)
    if violated is not None:
        samples = next(dims[0] for leaf, dims in zip(example.leaves, varying, strict=True) if example.has_samples(leaf))
        if violated[1] == samples.__name__:
            return ValueError(
                "the model cannot be traced for any number of samples: its forward works with that of the example alone (a "
                "view or a loop of that size?); take it from the input as x.shape[0], not len(x), or as -1 in a view. torch says: "
                + " ".join(line.strip(" -") for line in text.splitlines()[1:3])
            )
        return ValueError(fixed_sizes(text, violated[1], example, varying))
    unknown = re.match(r"Found <class '(?:.*\.)?(\w+)'> in output", text)
    if unknown is not None:
        return ValueError(
            f"the model cannot be traced: it returns a {unknown[1]}; a model in stages returns tensors, None, numbers and text, in "
            "tuples, lists and dicts (and a Hugging Face model no cache: use_cache=False)"
        )
    reason = text.splitlines()[0] if text else type(error).__name__
    return ValueError(
        f"the model cannot be traced{where}: {reason}. Where the way through a model depends on the data, or leaves torch, "
        "divide it by hand: pass a list of modules, one a stage, each taking what the one before returns"
    )


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost line of the caller's code, and the submodule that ran it, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    seen: list[BaseException] = []
    while error not in seen and not found:
        seen.append(error)
        for frame, line in traceback.walk_tb(error.__traceback__):
            file = Path(frame.f_code.co_filename)
            if not file.suffix or any(folder in file.parents for folder in _NOT_THE_CALLERS):
                continue
            module = next((frame.f_locals.get(name) for name in frame.f_code.co_varnames[:1]), None)
            if isinstance(module, nn.Module):
                code = linecache.getline(str(file), line, frame.f_globals).strip()
                label = names.get(id(module)) or type(module).__name__
                found = f" in {label} ({file.name}, line {line}: {code})"
        error = error.__cause__ or error.__context__ or error
    return found


def with_higher_minima(text: str, varying: Sequence[dict[int, Any]]) -> list[dict[int, Any]] | None:
    """What varies, with higher minima, if torch.export asks for nothing else: it takes 0 and 1 for constants, and so
    traces a size apart for which a tensor has one entry or none. A step refuses smaller sizes.

    Args:
        text: the message of torch.export.
        varying: what was to vary.
    """
    dims = {getattr(dim, "__name__", None): dim for dims in varying for dim in dims.values()}
    reasons, _, fixes = text.partition("Suggested fixes:")
    found = []
    for line in [line.strip(" -") for line in reasons.splitlines() if line.startswith("  - ")]:
        name = re.match(r"Not all values of (\w+) = ", line)
        entries = re.search(r"guard \(\(-(\d+)\) \+ L\[\S+\]\.size\(\)\[\d+\]\) != ([01])\.?$", line)
        fix = re.search(rf"(?m)^  {name[1]} = Dim\('\w+', min=([23])(?:, max=(\d+))?\)$", fixes) if name else None
        if name is None or name[1] not in dims:
            return None
        if entries is not None:
            found.append((name[1], int(entries[1]) + int(entries[2]) + 1))
        elif fix is not None and float(fix[2] or math.inf) >= dims[name[1]].max:
            found.append((name[1], int(fix[1])))
        else:
            return None
    higher = {}
    for asking, least in sorted(found):
        known = dims[asking]
        if known.min < least < known.max:
            higher[asking] = torch.export.Dim(asking, min=least, max=int(known.max) if known.max < 2**62 else None)
    if not higher:
        return None
    return [{dim: higher.get(getattr(size, "__name__", None), size) for dim, size in dims.items()} for dims in varying]


def fixed_sizes(text: str, names: str, example: Example, varying: Sequence[dict[int, Any]]) -> str:
    """The message where the forward does not work with all sizes that were to vary.

    Args:
        text: the message of torch.export.
        names: the names in it of these sizes.
        example: what the model was called with.
        varying: what was to vary.
    """
    places = [
        f"dimension {dim} of {path}" + (f" ({size.__name__})" if is_named(size) else "")
        for path, dims in zip(example.paths, varying, strict=True)
        for dim, size in dims.items()
        if getattr(size, "__name__", None) in names.split(", ") or (f".size()[{dim}]" in names and not is_named(size))
    ]
    reasons, _, fixes = text.partition("Suggested fixes:")
    first = next((line.strip(" -") for line in reasons.splitlines() if line.startswith("  - ")), "")
    first = first.partition(" If you're using")[0]  # what a caller of torch.export may do
    fix = "; ".join(line.strip() for line in fixes.splitlines() if line.startswith("  "))
    constant = re.search(r"constant \((\d+)\)", first)
    if constant is not None:
        rule = (
            f"its forward works with {constant[1]} alone (a view, a loop, a buffer or a constant of that size?); leave it out "
            f"of dynamic_shapes and pad every batch to {constant[1]}, or take the size from the input in the forward, as "
            "x.shape[1], not len(x), or as -1 in a view"
        )
    else:
        rule = "its forward takes another way for some sizes, or has no room for them; pass dynamic_shapes with " + (
            fix or "bounds, as torch.export.Dim('size', min=8, max=64)"
        )
    return f"the model cannot be traced for any size of {', '.join(places) or names}: {rule}. torch says: {first}"
