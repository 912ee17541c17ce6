"""Process group, device and rank for single- and multi-process runs (torchrun)."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from vaevq_med.errors import VaevqMedError


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


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


def start_process_group() -> None:
    """Join torchrun's process group: NCCL with GPUs, gloo without; nothing outside torchrun."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(default_device())
        dist.init_process_group("nccl", device_id=default_device())
    else:
        dist.init_process_group("gloo")


def stop_process_group() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def synchronized(module: nn.Module) -> nn.Module:
    """``module`` with batch norms that share their statistics over GPUs; as it is on the CPU, which has none."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if torch.cuda.is_available() else module
