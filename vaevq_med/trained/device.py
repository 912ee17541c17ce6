"""Which device a command works on."""

from __future__ import annotations

import os

import torch

from vaevq_med.core.errors import VaevqMedError


def default_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def named_device(name: str | torch.device | None) -> torch.device:
    """A device by its name.

    Args:
        name: e.g. ``cpu`` or ``cuda:0``; None takes the GPU where there is one.

    Raises:
        VaevqMedError: there is no such device here.

    Examples:
        >>> named_device("cpu")
        device(type='cpu')
    """
    try:
        return default_device() if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise VaevqMedError(f"--device: found {name!r} ({reason}), expected e.g. cpu or cuda:0") from None
