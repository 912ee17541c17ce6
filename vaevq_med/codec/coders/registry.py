"""Which entropy coders there are: those that the modules of this folder define, by their names."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaevq_med.codec import coders
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.errors import CodecError

BEST = ("context", "adaptive", "fixed")
"""Those that need no further file, the best one first."""


@functools.cache
def known_coders() -> Mapping[str, type[IndexCoder]]:
    """The coders by name.

    Examples:
        >>> known_coders()["fixed"].__name__
        'FixedLength'
    """
    found: dict[str, type[IndexCoder]] = {}
    for module in pkgutil.iter_modules(coders.__path__):
        content = importlib.import_module(f"{coders.__name__}.{module.name}")
        for kind in vars(content).values():
            is_coder = isinstance(kind, type) and issubclass(kind, IndexCoder) and not inspect.isabstract(kind)
            if is_coder and kind.__module__ == content.__name__ and hasattr(kind, "name"):
                found[kind.name] = kind
    return dict(sorted(found.items()))


def default_coder() -> str:
    """Name of the best coder that needs no further file."""
    return next(name for name in BEST if name in known_coders())


def needs_model(kind: type[IndexCoder]) -> bool:
    """Whether a coder is made with a file of its own."""
    parameter = inspect.signature(kind).parameters.get("model")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def make_coder(name: str, model: Path | None = None, settings: Mapping[str, Any] | None = None) -> IndexCoder:
    """A coder by its name.

    Args:
        name: one of :func:`known_coders`.
        model: file that the coder needs besides.
        settings: what a compressed file says of the coder that made it, which this one has to have too.

    Raises:
        CodecError: there is none of this name, it needs a file or takes none, or has other settings.
    """
    known = known_coders()
    if name not in known:
        raise CodecError(f"coder: found {name!r}, expected one of {', '.join(known)}")
    takes = inspect.signature(known[name]).parameters
    if model is None and needs_model(known[name]):
        raise CodecError(f"coder {name}: found no file of its model, expected one; name it with --model")
    if model is not None and "model" not in takes:
        raise CodecError(f"coder {name}: found --model {model}, expected none, since this coder takes none")
    make: Any = known[name]
    coder: IndexCoder = make(model=model) if "model" in takes else make()
    if settings is not None:
        for key in sorted({*settings, *coder.settings}):
            found, expected = coder.settings.get(key), settings.get(key)
            if found != expected:
                raise CodecError(f"coder {name}: found {key} {found}, expected {expected}, as the file was made with")
    return coder
