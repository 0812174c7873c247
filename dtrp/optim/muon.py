"""Muon for matrices and filters, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .factories import loss_of


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` on matrices, and on filters as matrices (out, -1); ``torch.optim.AdamW`` on the rest.

    What Muon updates: parameters of two and more dimensions, of real dtypes. Embeddings and the head of a language model
    are matrices too, and are better left to AdamW: give them in a group of their own with ``"muon": False``, or name
    them in ``skip``. State dicts hold one state for each parameter, in its shape, as those of any optimizer do.

    Source: Jordan, *Muon: an optimizer for hidden layers in neural networks*, 2024, as torch has it (since 2.9);
    ``match_rms_adamw``: Liu et al., *Muon is scalable for LLM training*, arXiv:2502.16982.

    Args:
        params: parameters, parameter groups, or (name, parameter) pairs.
        lr: learning rate of both. With ``adjust_lr_fn="match_rms_adamw"`` a rate that suits AdamW suits Muon.
        weight_decay: decoupled weight decay of both.
        betas, eps: of AdamW.
        momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: of Muon.
        skip: patterns, as of `fnmatch`; parameters whose name, or a part of it between dots, matches one of them go to
            AdamW: ``["*embed*", "head"]``. It needs (name, parameter) pairs.

    Raises:
        RuntimeError: torch has no Muon.
        ValueError: a setting that torch refuses, or ``skip`` without names.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        skip: Sequence[str] = (),
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"MuonAdamW needs torch.optim.Muon, and torch {torch.__version__} has none; use torch 2.9 or newer"
            )
        of_muon: dict[str, Any] = {
            "momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        blank = nn.Parameter(torch.zeros(1, 1))
        torch.optim.Muon([blank], lr=lr, weight_decay=weight_decay, **of_muon)  # both check their settings
        AdamW([blank], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, **of_muon, "muon": True}
        super().__init__(_with_skipped(params, skip), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns what ``closure`` returns, if there is one."""
        loss = loss_of(closure)
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in present if _is_matrix(p, group)]
            self._step_matrices(group, matrices)
            self._step_others(group, [p for p in present if not _is_matrix(p, group)])
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        flat = []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            matrix = nn.Parameter(p.detach().flatten(1))  # a copy only of a filter in channels-last order
            matrix.grad = p.grad.flatten(1)
            flat.append(matrix)
        names = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
        muon = torch.optim.Muon(flat, **{name: group[name] for name in names})
        for p, matrix in zip(parameters, flat, strict=True):
            muon.state[matrix]["momentum_buffer"] = self.state[p]["momentum_buffer"].flatten(1)
        muon.step()  # type: ignore[no-untyped-call]
        for p, matrix in zip(parameters, flat, strict=True):
            for mine, made in ((p, matrix), (self.state[p]["momentum_buffer"], muon.state[matrix]["momentum_buffer"])):
                if mine.data_ptr() != made.data_ptr():
                    mine.copy_(made.view(mine.shape))

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        adamw = AdamW(parameters, **{name: group[name] for name in ("lr", "weight_decay", "betas", "eps")})
        for p in parameters:
            if p in self.state:
                adamw.state[p] = self.state[p]
        adamw.step()
        for p in parameters:
            self.state[p] = adamw.state[p]


def _is_matrix(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["muon"]) and p.dim() >= 2 and not p.is_complex()


def _with_skipped(params: Any, skip: Sequence[str]) -> Any:
    """``params`` as groups, those that ``skip`` names in one of their own."""
    if isinstance(skip, str):
        raise ValueError(f"skip={skip!r}: pass a list of patterns, [{skip!r}]")
    params = list(params)
    if not skip:
        return params
    if not all(isinstance(item, tuple) and isinstance(item[0], str) for item in params):
        raise ValueError(
            "skip names parameters, and no names were given: pass (name, parameter) pairs, as named_parameters()"
        )
    pairs: Iterable[tuple[str, Tensor]] = params
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in pairs:
        named = [name, *name.split(".")]
        groups[not any(fnmatchcase(word, pattern) for word in named for pattern in skip)].append(p)
    return [{"params": members, "muon": muon} for muon, members in groups.items() if members]
