"""Which of the package's generators draw around indices that are given."""

from __future__ import annotations

import importlib
import inspect

from vaevq_med.networks.generators.base import Generator


def inpainting_generators() -> str:
    """The words of a message that expects one: ``one that inpaints (CoarseToFine, ...)``."""
    room = importlib.import_module("vaevq_med.networks")
    known = ((name, getattr(room, name)) for name in room.__all__)
    names = [name for name, one in known if inspect.isclass(one) and issubclass(one, Generator) and one.inpaints]
    return f"one that inpaints ({', '.join(names)})"
