"""Counts, sums and random draws of the latents of every process together, for codebooks that follow their latents.

Each function gives the same result on every process, the one that a single process would get with all the latents
in the order of the ranks. Draws come from torch's global CPU generator, whatever the device, so that a checkpoint of
its state makes a resumed run draw alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first_process(draw: Tensor) -> Tensor:
    """``draw`` of the first process; every process draws, which leaves their generators in step."""
    if is_distributed():
        dist.broadcast(draw, src=0)
    return draw


def number_from_first_process(draw: Tensor, device: torch.device) -> float:
    """The number that the first process drew ``[1]`` on the CPU; one process alone needs no device for it."""
    return float(from_first_process(draw.to(device)) if is_distributed() else draw)


def mean_of_processes(own: Tensor) -> Tensor:
    """Mean of every process's ``own``, with the gradient of this process's.

    Averaged over the processes, as DDP does, the gradient of a function of it is that of one process with everything.
    """
    if not is_distributed():
        return own
    overall = own.detach().clone()
    dist.all_reduce(overall)
    return own + (overall / dist.get_world_size() - own).detach()


@torch.no_grad()
def assignment_totals(latents: Tensor, indices: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """How many latents each codeword was assigned, and their sum, over every process.

    Args:
        latents: ``[N, D]`` in fp32.
        indices: int64 ``[N]`` in [0, K).
        num_embeddings: K.

    Returns:
        Counts ``[K]`` and sums ``[K, D]``, in fp32.

    >>> counts, sums = assignment_totals(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 2]), 3)
    >>> counts.tolist(), sums.flatten().tolist()
    ([2.0, 0.0, 1.0], [3.0, 0.0, 5.0])
    """
    ones = torch.ones_like(latents[:, :1])
    totals = latents.new_zeros(num_embeddings, latents.shape[1] + 1)
    totals.index_add_(0, indices, torch.cat([latents, ones], dim=1))
    if is_distributed():
        dist.all_reduce(totals)
    return totals[:, -1], totals[:, :-1]


@torch.no_grad()
def draw_replacements(latents: Tensor, expired: Tensor) -> tuple[Tensor, Tensor]:
    """A random latent for each expired codeword, none twice.

    Where the latents are fewer than the expired codewords, a random part of the codewords gets one. The shapes do not
    depend on how many have expired, which a GPU's host would have to wait for.

    Args:
        latents: ``[N, D]`` of this process; N may differ from process to process.
        expired: which codewords to replace, boolean ``[K]``, the same on every process.

    Returns:
        Which codewords get a latent, boolean ``[K]``, and the latents ``[K, D]``, of use at those codewords alone.
    """
    sizes = _rows_of_each_process(latents)
    total, device = sum(sizes), latents.device
    if len(expired) > total:  # the first expired ones of a random order, as many as there are latents
        shuffled = from_first_process(torch.randperm(len(expired)).to(device, non_blocking=True))
        expired = expired[shuffled]
        expired = torch.empty_like(expired).scatter_(0, shuffled, expired & (expired.cumsum(dim=0) <= total))
    positions = from_first_process(torch.randperm(total).to(device, non_blocking=True))
    place = (expired.cumsum(dim=0) - 1).clamp(0, total - 1)  # of each codeword among the expired ones
    positions = positions[place] - sum(sizes[: _rank()])  # [K]
    drawn = latents[positions.clamp(0, len(latents) - 1)]  # [K, D]
    if len(sizes) > 1:
        here = (positions >= 0) & (positions < len(latents))
        drawn = torch.where(here.unsqueeze(1), drawn, torch.zeros_like(drawn))
        dist.all_reduce(drawn)
    return expired, drawn


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def _rows_of_each_process(latents: Tensor) -> list[int]:
    """N of every process; to know that of the others, this one waits for them."""
    if not is_distributed():
        return [latents.shape[0]]
    every = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=latents.device)
    every[dist.get_rank()] = latents.shape[0]
    dist.all_reduce(every)
    return [int(size) for size in every.tolist()]
