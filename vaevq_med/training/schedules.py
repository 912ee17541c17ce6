"""Learning-rate schedules, stepped once an iteration."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vaevq_med.core.errors import VaevqMedError


def cosine_with_warmup(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up from 0 to the base rate, then half a cosine down to ``final_ratio`` of it.

    Args:
        optimizer: its learning rates are the peak rates.
        total_steps: iterations of the whole run; the rate stays at its end value beyond.
        warmup_steps: iterations of the linear rise; cut to ``total_steps``.
        final_ratio: last rate over peak rate, in [0, 1]; 1 gives a constant rate.

    Returns:
        A scheduler to step once an iteration.
    """
    if total_steps < 1 or warmup_steps < 0 or not 0.0 <= final_ratio <= 1.0:
        raise VaevqMedError(
            f"found total_steps {total_steps}, warmup_steps {warmup_steps}, final_ratio {final_ratio}; "
            "expected total_steps >= 1, warmup_steps >= 0 and final_ratio in [0, 1]"
        )
    warmup = min(warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
