"""The process group of a run with one or several processes (torchrun), and the networks that they share."""

from __future__ import annotations

import atexit
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import rank, world_size
from vaevq_med.trained.device import default_device


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def start_process_group() -> None:
    """Join torchrun's process group: NCCL with GPUs, gloo without; nothing outside torchrun."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    # A trainer and its DistributedDataParallel refer to each other, so that gloo's threads outlive the group until a
    # collection. One that asks for the interpreter while that is taken down aborts the process.
    atexit.register(gc.collect)
    if torch.cuda.is_available():
        torch.cuda.set_device(default_device())
        dist.init_process_group("nccl", device_id=default_device())
    else:
        dist.init_process_group("gloo")


def stop_process_group() -> None:
    """Leave the process group, if one was joined, when every process has come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def synchronized(module: nn.Module) -> nn.Module:
    """``module`` with batch norms that share their statistics over GPUs; as it is on the CPU, which has none."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if torch.cuda.is_available() else module


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the ``DistributedDataParallel`` that it may be in."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def require_ddp(module: nn.Module, name: str, overlay: str) -> None:
    """Refuse to train in several processes that would each go their own way.

    Args:
        module: what takes gradients.
        name: its id in the configuration.
        overlay: that wraps it.

    Raises:
        VaevqMedError: there are several processes, and it is not in a ``DistributedDataParallel``.
    """
    if world_size() > 1 and unwrapped(module) is module:
        raise VaevqMedError(
            f"{name}: found {type(module).__name__} in {world_size()} processes, expected it in a "
            f"DistributedDataParallel; pass the overlay {overlay}"
        )
