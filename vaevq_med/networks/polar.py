"""The polar factor of a matrix by products of matrices alone, which a GPU's host does not wait for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The largest standard deviation for which a codebook counts as one point.
_MIN_SCALE = 1e-7
# Directions narrower than this share of the codebook's whole extent get less than their full gradient.
_MIN_SHARE = 1e-7
# Steps between looks at the matrix itself: what its square has lost to rounding grows by 2.5^2 a step.
_STEPS_A_PART = 6


def _polar_steps(least: float) -> list[tuple[float, float]]:
    """Factors (a, b) of ``s -> a s - b s^3``, which bring all s from ``least`` to 1 to 1 up to rounding.

    Newton and Schulz's step ``(3 s - s^3) / 2``, of ``r s`` in place of s: r is best where both ends of the interval
    go to the same place, ``r^2 = 3 / (1 + l + l^2)`` with l the lower end, but is kept where 1 does not go to 0.
    """
    steps = []
    while 1 - least > 1e-15:
        scale = min(1.67, math.sqrt(3 / (1 + least + least**2)))
        a, b = 1.5 * scale, 0.5 * scale**3
        steps.append((a, b))
        least = min(a * least - b * least**3, a - b)
    return steps


_STEPS = _polar_steps(_MIN_SHARE)


def polar_factor(points: Tensor) -> Tensor:
    """The polar factor U of ``X = U H``, H symmetric and positive, by a fixed number of products of matrices.

    Of a singular value decomposition it is the left vectors times the right ones. No decomposition is taken, and the
    host waits for nothing. Directions without extent stay 0 in U.

    Args:
        points: X, ``[..., K, D]`` in float64.
    """
    extent = torch.linalg.vector_norm(points, dim=(-2, -1), keepdim=True)
    found = points / extent.clamp_min(_MIN_SCALE)
    identity = torch.eye(points.shape[-1], dtype=points.dtype, device=points.device)
    for start in range(0, len(_STEPS), _STEPS_A_PART):
        square, product = found.mT @ found, identity  # [..., D, D], so that a step costs little whatever K is
        for a, b in _STEPS[start : start + _STEPS_A_PART]:
            step = a * identity - b * square
            product = product @ step
            square = step @ square @ step
        found = found @ product
    return found
