"""In which precision a network is trained and evaluated, and what that comes to on a device."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.training import distributed

PRECISIONS = ("auto", "fp32", "bf16")
logger = logging.getLogger(__name__)


def autocast_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """The type that a precision casts to on a device: None for ``fp32``; ``auto`` is bf16 on a GPU that has it.

    A warning says, once, where torch's kernels for the CPU have no bf16: it is then many times slower than fp32.

    Raises:
        VaevqMedError: there is no such precision, or the GPU has no bf16.

    >>> autocast_dtype("auto", "cpu"), autocast_dtype("bf16", "cpu")
    (None, torch.bfloat16)
    """
    if precision not in PRECISIONS:
        raise VaevqMedError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")
    device = torch.device(device)
    # Ampere, of compute capability 8.0, is the first generation with it; older ones emulate it, slowly.
    capable = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bf16" and not capable:
        raise VaevqMedError(
            f"precision: found 'bf16' on {torch.cuda.get_device_name(device)}, which lacks it, expected auto or fp32"
        )
    if precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        _warn_of_slow_bf16()
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda" and capable)
    return torch.bfloat16 if wanted else None


def _cpu_has_bf16() -> bool:
    """Whether the library of torch's CPU kernels, oneDNN, has bf16 on this machine (on x86: with AVX-512)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


@functools.cache
def _warn_of_slow_bf16() -> None:
    if distributed.is_main():
        logger.warning(
            "precision: torch's kernels have no bf16 for this CPU, on which it takes many times as long as fp32; set "
            "precision to fp32"
        )


def precision_name(precision: str, device: torch.device | str) -> str:
    """What a precision comes to on a device, ``fp32`` or ``bf16``; errors as for :func:`autocast_dtype`.

    >>> precision_name("auto", "cpu")
    'fp32'
    """
    return "fp32" if autocast_dtype(precision, device) is None else "bf16"


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a type of ``PRECISIONS``, or nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
