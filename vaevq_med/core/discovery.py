"""Finding the classes that the modules of a folder define, so that adding one is writing a file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar, cast

_T = TypeVar("_T")


def classes_in(package: ModuleType, base: type[_T]) -> Iterator[type[_T]]:
    """The classes derived from a base that can be made, each from the module of the package that defines it.

    Examples:
        >>> from vaevq_med.codec import coders
        >>> from vaevq_med.codec.coders.base import IndexCoder
        >>> "FixedLength" in {kind.__name__ for kind in classes_in(coders, IndexCoder)}
        True
    """
    for module in pkgutil.iter_modules(package.__path__):
        content = importlib.import_module(f"{package.__name__}.{module.name}")
        for kind in vars(content).values():
            is_one = isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)
            if is_one and kind.__module__ == content.__name__:
                yield cast("type[_T]", kind)
