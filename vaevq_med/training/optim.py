"""What an optimizer is given: its rate and schedule, which parameters it decays, and whose they are."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import expect, is_number


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
            f"found total_steps {total_steps} (of all epochs), warmup_steps {warmup_steps}, final_ratio {final_ratio}; "
            "expected total_steps >= 1 (max_epochs above 0), warmup_steps >= 0 and final_ratio in [0, 1]"
        )
    warmup = min(warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def checked_learning_rate(learning_rate: float) -> float:
    """The rate.

    Raises:
        DataError: it is no finite number of at least 0.
    """
    expect(is_number(learning_rate, 0, sys.float_info.max), "learning_rate", learning_rate, "a number of at least 0")
    return learning_rate


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer that decays matrices and no vectors.

    Args:
        module: its trained parameters are dealt out.
        weight_decay: of those with two or more dimensions; 0 for biases and scales of norms.

    Returns:
        The groups that have parameters, the decayed ones first.

    Example:
        >>> [(len(group["params"]), group["weight_decay"]) for group in decay_groups(nn.Linear(2, 3), 0.05)]
        [(1, 0.05), (1, 0.0)]
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim >= 2) is large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_trained_parts(network: nn.Module, optimizer: Optimizer, loss: nn.Module, name: str) -> None:
    """Refuse trained parts outside the network: checkpoints, averages, clipping and processes follow the network alone.

    Args:
        network: what is stored and averaged.
        optimizer: whose parameters have to be the network's.
        loss: whose parameters have to be the network's or frozen.
        name: its id in the configuration.

    Raises:
        VaevqMedError: a parameter would be trained and lost with the run, or take gradients and never a step.
    """
    own = {id(parameter) for parameter in network.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in given)
    if foreign:
        raise VaevqMedError(
            f"optimizer: found {foreign} of {len(given)} parameters outside of the network, expected its own alone, "
            "since checkpoints keep no others; make what is trained a part of network_def"
        )
    lost = [key for key, one in loss.named_parameters() if one.requires_grad and id(one) not in own]
    if lost:
        raise VaevqMedError(
            f"{name}: found the trained parameter {lost[0]}, expected none outside of the network, since the optimizer "
            "takes no others; freeze it, or make it a part of network_def"
        )
