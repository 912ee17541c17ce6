"""Functions that ``torch.compile`` is to leave as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_compiled_graphs(function: Function) -> Function:
    """Run a function as it is written, also where a compiled one calls it.

    ``torch.compiler.disable`` does so too, but loads the compiler when it decorates: two seconds of every import. Here
    it decorates when a function is compiled for the first time.
    """
    kept: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not kept:
            kept.append(torch.compiler.disable(function))
        return kept[0](*args, **kwargs)

    return wrapper  # type: ignore[return-value]
