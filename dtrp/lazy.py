"""Names of a package that are imported on first use (PEP 562): ``dtrp --help`` need not wait for torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def lazy_names(
    package: str, modules: Mapping[str, str], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        modules: where each name is defined, relative to the package: ``{"Pipeline": ".pipeline"}``.
        submodules: modules of the package that its attributes give without an import of their own.
    """
    namespace = vars(sys.modules[package])

    def get(name: str) -> object:
        if name in submodules:
            return import_module(f".{name}", package)
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(modules[name], package)
        namespace[name] = value = getattr(module, name)
        return value

    return get, lambda: sorted({*namespace, *modules, *submodules})
