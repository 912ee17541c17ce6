"""Computing in fp32 as it is written, whatever a GPU and autocast would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device_type: str, *, convolutions: bool = False) -> Iterator[None]:
    """No autocast, no TF32 and no bf16 inside fp32 products of matrices.

    Args:
        device_type: ``cpu``, ``cuda``, ...
        convolutions: nor inside convolutions, where torch allows TF32 unless told otherwise.
    """
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    if convolutions:
        backends += [torch.backends.cudnn.conv, torch.backends.mkldnn.conv]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
