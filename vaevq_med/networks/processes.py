"""What several processes work out together: who they are, sums, means, and the draws of the first.

Each function gives the same result on every process. Draws come from torch's global CPU generator, whatever the device,
so that a checkpoint of its state makes a resumed run draw alike.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Own = TypeVar("_Own")


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_distributed() -> bool:
    """Whether there are several processes."""
    return world_size() > 1


def sum_in_place(own: Tensor) -> Tensor:
    """``own``, which becomes the sum of every process's."""
    if is_distributed():
        dist.all_reduce(own)
    return own


def least_of_processes(own: int, device: torch.device) -> int:
    """The least of every process's number; to know it, this one waits."""
    if not is_distributed():
        return own
    least = torch.tensor(own, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def mean_without_gradient(own: Tensor) -> Tensor:
    """Mean of every process's ``own``."""
    own = own.detach()
    return sum_in_place(own.clone()) / world_size() if is_distributed() else own


def mean_of_processes(own: Tensor) -> Tensor:
    """Mean of every process's ``own``, with the gradient of this process's.

    Averaged over the processes, as DDP does, the gradient of a function of it is that of one process with everything.
    """
    return own + (mean_without_gradient(own) - own).detach() if is_distributed() else own


def of_each_process(own: Tensor) -> Tensor:
    """Every process's ``own``, of one shape, stacked in the order of the ranks, ``[P, *shape]``; without a gradient."""
    every = torch.zeros(world_size(), *own.shape, dtype=own.dtype, device=own.device)
    every[rank()] = own.detach()
    return sum_in_place(every)


def objects_of_each_process(own: _Own) -> list[_Own]:
    """What every process has, of any size, in the order of the ranks; sent by the CPU."""
    if not is_distributed():
        return [own]
    every: list[_Own] = [own] * world_size()
    dist.all_gather_object(every, own)
    return every


def rows_of_each_process(values: Tensor) -> list[int]:
    """How many rows every process has, in the order of the ranks; to know those of the others, this one waits."""
    if not is_distributed():
        return [len(values)]
    return of_each_process(torch.tensor(len(values), device=values.device)).tolist()


def from_first_process(draw: Tensor) -> Tensor:
    """``draw`` of the first process; every process draws, which leaves their generators in step."""
    if is_distributed():
        dist.broadcast(draw, src=0)
    return draw


def number_from_first_process(draw: Tensor, device: torch.device) -> float:
    """The number that the first process drew ``[1]`` on the CPU; one process alone needs no device for it."""
    return float(from_first_process(draw.to(device)) if is_distributed() else draw)
