"""Names of a package that are imported when they are asked for (PEP 562): a room opens in no time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package assigns to ``__getattr__``, ``__dir__`` and ``__all__``.

    Args:
        package: its name.
        modules: the module of each name, below the package, or in full where it lives in another one.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        full = module if module.startswith("vaevq_med.") else f"{package}.{module}"
        return getattr(importlib.import_module(full), name)

    return find, lambda: sorted(modules), sorted(modules)
