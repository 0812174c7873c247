"""Networks of timm and transformers, from a name or a configuration: nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..validation import unknown


class Logits(nn.Module):
    """A network of transformers as a function of its samples alone, which returns the logits.

    Args:
        network: a network whose output has ``logits``.
        argument: name of the argument that takes the samples.
    """

    def __init__(self, network: nn.Module, argument: str) -> None:
        super().__init__()
        self.network, self._argument = network, argument

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(**{self._argument: x}).logits
        return logits


def timm_network(name: str, data: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that ``timm.create_model`` makes, without trained weights, for the channels and classes of the data.

    Raises:
        ImportError: timm is not installed.
        ValueError: it has no such network, or the network does not take the arguments.
    """
    timm = _imported("timm", "timm", name)
    known = timm.list_models()
    _check_classes(f"timm:{name}", data)
    if name not in known:
        raise ValueError(_shortened(unknown("network of timm", name, known)))
    if len(data.sample_shape) != 3:
        raise ValueError(f"--model timm:{name} with --data {data.name}: it reads images")
    settings = {"num_classes": data.num_classes, "in_chans": data.sample_shape[0], **arguments}
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **settings)
    except Exception as error:
        raise ValueError(f"--model timm:{name} cannot be made with {settings}: {error}") from error
    return network


def hf_network(name: str, data: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """A network of transformers, without trained weights: a causal model of text, or a classifier of images.

    Args:
        name: a folder or file with a configuration (``config.json``), or a type of model (``llama``).
        data: the data of the run.
        arguments: settings of the configuration.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no such configuration, or no network of it for such data.
    """
    transformers = _imported("transformers", "hf", name)
    _check_classes(f"hf:{name}", data)
    transformers.logging.set_verbosity_error()  # it warns of token numbers of vocabularies that are not these
    is_text = data.is_text
    settings: dict[str, Any] = (
        {"vocab_size": data.num_classes}
        if is_text
        else {"num_labels": data.num_classes, "num_channels": data.sample_shape[0], "image_size": data.sample_shape[-1]}
    )
    settings |= arguments
    try:
        if Path(name).expanduser().exists():
            config = transformers.AutoConfig.from_pretrained(
                str(Path(name).expanduser()), local_files_only=True, **settings
            )
        elif name in transformers.CONFIG_MAPPING:
            config = transformers.AutoConfig.for_model(name, **settings)
        else:
            raise ValueError(_shortened(unknown("folder, or type of model,", name, list(transformers.CONFIG_MAPPING))))
        kind = "AutoModelForCausalLM" if is_text else "AutoModelForImageClassification"
        network = getattr(transformers, kind).from_config(config)
    except Exception as error:
        raise ValueError(f"--model hf:{name} cannot be made for --data {data.name}: {error}") from error
    return Logits(network, "input_ids" if is_text else "pixel_values")


LIBRARIES: dict[str, Callable[[str, Any, Mapping[str, Any]], nn.Module]] = {"timm": timm_network, "hf": hf_network}


def _check_classes(model: str, data: Any) -> None:
    if not data.num_classes:
        raise ValueError(
            f"--model {model} with --data {data.name}: the number of classes is not known; give the training data an attribute "
            "num_classes, or classes"
        )


def _imported(package: str, prefix: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"--model {prefix}:{name} needs {package}, which cannot be imported ({error}); pip install {package}"
        ) from error


def _shortened(text: str) -> str:
    """A message about an unknown name, without the long list of those that are known."""
    return text if len(text) < 400 else text.split(" known:")[0]
