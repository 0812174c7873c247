"""A run's settings, the facts of its data, and its weights, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data.source import DataFacts
from ...saving import CheckpointError
from ...saving.manifest import glance
from ...saving.portable import read_model
from ...splitting.stages import stage_of
from ...typing import Tree
from .. import build
from ..config import TrainConfig, read_settings
from ..run_folder import DATA_FACTS


@dataclass(frozen=True)
class TrainedRun:
    """A run of `dtrp train`, finished or not, with its weights of some update.

    Attributes:
        folder: folder of the run.
        config: settings of the run.
        facts: what is known of the run's data.
        weights: state dict of the model, on the CPU.
        update: number of updates made.
        within_epoch: whether the weights are of a save within an epoch, which has a tied parameter once, and buffers that
            no state dict has.
    """

    folder: Path
    config: TrainConfig
    facts: DataFacts
    weights: dict[str, Any]
    update: int
    within_epoch: bool = False

    @classmethod
    def open(cls, path: str, at: str = "last") -> TrainedRun:
        """The run in a folder.

        Args:
            path: the folder.
            at: ``last``: the newest weights that were written; ``best``: those of the best epoch; or a number of updates.

        Raises:
            ValueError: no run, one that has written no weights yet, or not those.
        """
        folder = Path(path).expanduser()
        config = config_in(folder)
        places = _places(folder)
        if not places:
            raise ValueError(f"{path} has no weights yet: no epoch is through, and nothing is saved")
        update = _chosen(path, folder, places, at, config)
        place = places[update]
        exact = place.is_dir() and glance(place).kind == "exact"
        return cls(folder, config, _facts(folder, config), _weights(place), update, exact)

    def model(self, device: torch.device | str = "cpu") -> Model:
        """The network of the run with its weights, in eval mode.

        Raises:
            ValueError: the network is another one by now.
        """
        torch.manual_seed(self.config.seed)
        made = build.make_model(self.config, self.facts)
        network = made if isinstance(made, nn.Module) else nn.Sequential(*made)
        if isinstance(network, nn.Sequential):
            network = stage_of(network.named_children())
        self._load_into(network)
        return Model(network.to(device).eval(), self.config)

    def _load_into(self, network: nn.Module) -> None:
        """Put the weights into a network.

        Raises:
            ValueError: they are another network's.
        """
        weights = self.weights
        if self.within_epoch:
            tied: dict[int, list[str]] = {}
            for name, p in network.named_parameters(remove_duplicate=False):
                tied.setdefault(id(p), []).append(name)
            known = {name: n for names in tied.values() for name in names for n in names if n in weights}
            weights = {
                name: weights[known.get(name, name)]
                for name in network.state_dict()
                if known.get(name, name) in weights
            }
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split()[:40])
            raise ValueError(
                f"the weights in {self.folder} are not those of --model {self.config.model} as it is now: {reason}"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the plain model."""
        if not self.within_epoch:
            return self.weights
        return {name: value.detach().clone() for name, value in self.model().network.state_dict().items()}


class Model:
    """A network in eval mode, which takes inputs as a pipeline's first stage does.

    Args:
        network: the network.
        config: settings of its run.
    """

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.network, self._autocasts = network, config.dtype == "bfloat16"

    @torch.inference_mode()
    def __call__(self, x: Tree) -> Any:
        """The outputs of a mini-batch."""
        device = next((p.device.type for p in self.network.parameters()), "cpu")
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self._autocasts):
            if isinstance(self.network, nn.Sequential) or not isinstance(x, (tuple, dict)):
                return self.network(x)
            return self.network(**x) if isinstance(x, dict) else self.network(*x)


def config_in(folder: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        ValueError: there is no run, or one of another version.
    """
    try:
        settings = read_settings((folder / "config").read_text())
    except (OSError, UnicodeDecodeError):
        settings = None
    if settings is None:
        raise ValueError(f"{folder} is no run; name the folder that 'dtrp train --out' has written")
    values: dict[str, Any] = {
        name.replace("-", "_"): tuple(v) if isinstance(v, list) else v for name, v in settings.items()
    }
    if strange := sorted(values.keys() - {entry.name for entry in fields(TrainConfig)}):
        raise ValueError(f"{folder / 'config'} has the setting {strange[0]}, which this version of dtrp does not know")
    return TrainConfig(**values)


def _places(folder: Path) -> dict[int, Path]:
    """Where weights are, by the number of updates: ``model.pt``, else saves whose manifest is whole."""
    places: dict[int, Path] = {}
    for path in sorted(folder.glob("saves/update-*")):
        try:
            places[glance(path).num_updates] = path
        except CheckpointError:
            continue
    if (folder / "model.pt").is_file() and (lines := _metrics(folder)):
        places[int(lines[-1]["update"])] = folder / "model.pt"
    return places


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _chosen(path: str, folder: Path, places: Mapping[int, Path], at: str, config: TrainConfig) -> int:
    if at == "last":
        return max(places)
    if at == "best":
        lines = _metrics(folder)
        if not lines:
            raise ValueError(f"{path} has no epoch yet of which one could be the best; pass --at last")
        sign = -1 if config.best == "lowest" else 1
        update = int(max(lines, key=lambda line: sign * line["test_accuracy"])["update"])
    elif at.isdecimal():
        update = int(at)
    else:
        raise ValueError(f"--at {at}: last, best, or a number of updates")
    if update not in places:
        there = ", ".join(map(str, sorted(places)))
        raise ValueError(f"{path} has no weights after {update} updates; there are those after {there}")
    return update


def _weights(place: Path) -> dict[str, Any]:
    if place.is_dir():
        return read_model(place)
    try:
        weights: dict[str, Any] = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{place} cannot be read ({type(error).__name__}); take a save: --at with its updates"
        ) from error
    return weights


def _facts(folder: Path, config: TrainConfig) -> DataFacts:
    """The facts that a run has written; those of its data where it is of an older version."""
    try:
        return DataFacts.of(json.loads((folder / DATA_FACTS).read_text()))
    except (OSError, ValueError, TypeError):
        source = build.open_source(config, lambda note: None)
        source.close()
        return DataFacts.of(source.facts())
