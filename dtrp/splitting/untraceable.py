"""What is said of a model that cannot be traced: where, why, and what to change."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
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
        if violated[1] == _samples(example, varying).__name__:
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
    reason = (text.splitlines()[0] if text else type(error).__name__).rstrip(".")
    hint = _hint(error, where, text)
    if hint:
        reason = f"{reason}. Here {hint}"
    return ValueError(
        f"the model cannot be traced{where}: {reason}. Where the way through a model depends on the data, or leaves torch, "
        "divide it by hand: pass a list of modules, one a stage, each taking what the one before returns"
    )


# What to do where torch's code looks at values, by the file and the name of its function.
_PADDED = (
    "a packed sequence has sizes that the data decide; run the module on the padded tensor, and leave out what it returns for "
    "the padding, with torch.where or a mask"
)
_VALIDATED = "a distribution looks whether the values are valid; pass validate_args=False to it"
_IN_TORCH = {
    ("rnn.py", "pack_padded_sequence"): _PADDED,
    ("rnn.py", "forward"): _PADDED,
    ("distribution.py", "__init__"): _VALIDATED,
    ("distribution.py", "_validate_sample"): _VALIDATED,
    ("functional.py", "gaussian_nll_loss"): (
        "F.gaussian_nll_loss looks whether variances are negative; compute the term by its formula, 0.5 * (var.log() + (mean - y) "
        "** 2 / var), or in loss_fn"
    ),
    ("adaptive.py", "forward"): (
        "nn.AdaptiveLogSoftmaxWithLoss chooses samples by their targets; take the loss of its log_prob(x), as "
        "F.nll_loss(self.adaptive.log_prob(x), y)"
    ),
}
# What to do where the caller's line looks at values.
_IN_THE_FORWARD = (
    (r"\bone_hot\(", "F.one_hot reads the largest class; pass num_classes to it"),
    (
        r"\bctc_loss\(|\bself\.ctc",
        "F.ctc_loss reads the lengths; compute the loss in loss_fn, of what the model returns",
    ),
    (r"\.numpy\(|\bnp\.|\bnumpy\.", "the forward leaves torch for NumPy; use torch's functions"),
    (r"\.tolist\(", "the forward makes a list of values of the data; keep them in a tensor, for gather or a mask"),
    (r"\bnested", "a nested tensor has sizes that the data decide; use a padded tensor and a mask"),
    (
        r"\bprint\(|\blog|\bf[\"']|%\.",
        "the forward writes values of the data as text; leave that out, or print what the model returns",
    ),
    (r"^assert\b", "the forward asserts something of the data; leave that out, or check the input before the step"),
    (
        r"^(if|elif|while)\b| if .* else ",
        "the forward branches by the data; compute both ways and take torch.where(condition, a, b), or branch by a number or by "
        "`is None`, which the trace fixes",
    ),
    (
        r"\bint\(|\.item\(|\brange\(|\[:",
        "the forward takes a size from the data; take it from a shape, or work at full size with a mask",
    ),
)


def _hint(error: BaseException, where: str, text: str) -> str:
    """What to do where the forward looks at values, which a trace does not know; empty where nothing is known."""
    functions = [(Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame) for frame in _frames(error)]
    for file, name, frame in reversed(functions):
        if (file, name) == ("regions.py", "_forward") and "output" not in frame.f_locals:
            return (
                f"the forward of {frame.f_locals['cls'].__name__}, a torch.autograd.Function, runs on tensors without data; make "
                "what it does outside of torch a torch.library.custom_op, with register_fake"
            )
        if (file, name) in _IN_TORCH and frame.f_globals.get("__name__", "").startswith("torch."):
            return _IN_TORCH[file, name]
    if not re.search("data-dependent|FakeTensor|subclass|^aten", text):
        return ""
    for line in [where.partition(": ")[2].removesuffix(")"), *reversed(_lines(error))]:
        hint = next((hint for pattern, hint in _IN_THE_FORWARD if re.search(pattern, line)), "")
        if hint:
            return hint
    return ""


def _lines(error: BaseException) -> list[str]:
    """The lines of the caller's code in the tracebacks of an error, outermost first."""
    return [code for each in _chain(error) for _, _, code in _callers(each)]


def _callers(error: BaseException) -> Iterator[tuple[FrameType, int, str]]:
    """The frames of the caller's code in the traceback of an error, each with the number and the text of its line."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.suffix and not any(folder in file.parents for folder in _NOT_THE_CALLERS):
            yield frame, line, linecache.getline(str(file), line, frame.f_globals).strip()


def _frames(error: BaseException) -> list[FrameType]:
    """The frames of an error and of those that caused it, outermost first."""
    return [frame for each in _chain(error) for frame, _ in traceback.walk_tb(each.__traceback__)]


def _chain(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    return seen


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost line of the caller's code, and the submodule that ran it, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    for each in _chain(error):
        found = ""
        for frame, line, code in _callers(each):
            module = next((frame.f_locals.get(name) for name in frame.f_code.co_varnames[:1]), None)
            if isinstance(module, nn.Module):
                label = names.get(id(module)) or type(module).__name__
                found = f" in {label} ({Path(frame.f_code.co_filename).name}, line {line}: {code})"
        if found:
            return found
    return ""


def with_other_bounds(text: str, example: Example, varying: Sequence[dict[int, Any]]) -> list[dict[int, Any]] | None:
    """What varies, within other bounds, if torch.export asks for nothing else: it takes 0 and 1 for constants, and so
    traces a size apart for which a tensor has one entry or none; and a forward may have room for so many samples (a
    table that it cuts to their number). A step refuses sizes out of bounds.

    Args:
        text: the message of torch.export.
        example: what the model was called with.
        varying: what was to vary.
    """
    dims = {size.__name__: size for dims in varying for size in dims.values() if is_named(size)}
    least, most = {name: dim.min for name, dim in dims.items()}, {name: dim.max for name, dim in dims.items()}
    samples = _samples(example, varying).__name__
    reasons, _, fixes = text.partition("Suggested fixes:")
    for line in [line.strip(" -") for line in reasons.splitlines() if line.startswith("  - ")]:
        found = re.match(r"Not all values of (\w+) = ", line)
        if found is None or found[1] not in dims:
            return None
        name = found[1]
        entries = re.search(r"guard \(\(-(\d+)\) \+ L\[\S+\]\.size\(\)\[\d+\]\) != ([01])\.?$", line)
        fix = re.search(rf"(?m)^  {name} = Dim\('\w+'(?:, min=([23]))?(?:, max=(\d+))?\)$", fixes)
        if entries is not None:
            least[name] = max(least[name], int(entries[1]) + int(entries[2]) + 1)
        elif fix is not None and (name == samples or not fix[2] or int(fix[2]) >= dims[name].max):
            least[name] = max(least[name], int(fix[1] or 0))
            most[name] = min(most[name], int(fix[2] or most[name]))
        else:
            return None
    bounds = {
        name: (least[name], most[name]) for name, dim in dims.items() if (least[name], most[name]) != (dim.min, dim.max)
    }
    if not bounds or any(low >= high for low, high in bounds.values()):
        return None
    other = {
        name: torch.export.Dim(name, min=int(low), max=int(high) if high < 2**62 else None)
        for name, (low, high) in bounds.items()
    }
    return [{dim: other.get(getattr(size, "__name__", ""), size) for dim, size in dims.items()} for dims in varying]


def _samples(example: Example, varying: Sequence[dict[int, Any]]) -> Any:
    """The Dim of the samples."""
    return next(dims[0] for leaf, dims in zip(example.leaves, varying, strict=True) if example.has_samples(leaf))


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
