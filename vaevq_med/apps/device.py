"""The device that a command's ``--device`` names."""

from __future__ import annotations

import torch

from vaevq_med.engines import default_device
from vaevq_med.errors import VaevqMedError


def named_device(name: str | None) -> torch.device:
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
