"""Refusal of what an argument cannot be: sizes, choices, and integers out of range without waiting for a device."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``, or raise a VaevqMedError that names the choices."""
    if value not in choices:
        raise VaevqMedError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    return value


def check_sizes(**sizes: int) -> None:
    """Raise a VaevqMedError that names the first of the sizes that is no whole number, or below 1.

    >>> check_sizes(num_embeddings=8, embedding_dim=4)
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise VaevqMedError(f"{name} is {size!r}; expected a whole number")
        if size < 1:
            raise VaevqMedError(f"{name} is {size}; expected at least 1")


def check_range(what: str, values: Tensor, last: int) -> None:
    """Refuse what is not within 0 to ``last``; nothing is looked at while a graph is exported.

    On the CPU the error says what was found. A device checks on its own while the host goes on, and ends the process'
    work there with a device-side assertion: reading the range would make the host wait at every call.

    Args:
        what: the values' name in the message, in the plural.
        values: integers of any shape.
        last: the largest that is allowed.

    Raises:
        VaevqMedError: the values are on the CPU, and one of them is out of range.

    >>> check_range("labels", torch.tensor([0, 2]), 2)
    """
    if values.numel() == 0 or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return
    low, high = values.aminmax()
    if values.device.type != "cpu":
        torch._assert_async((low >= 0) & (high <= last), f"{what} are out of range; expected within 0 to {last}")
    elif int(low) < 0 or int(high) > last:
        raise VaevqMedError(f"{what} range from {int(low)} to {int(high)}; expected within 0 to {last}")
