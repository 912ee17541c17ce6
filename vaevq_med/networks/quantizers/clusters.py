"""Counts, sums and random draws of the latents of every process together, for codebooks that follow their latents.

Each function gives the same result on every process, the one that a single process would get with all the latents
in the order of the ranks. Draws come from torch's global CPU generator, whatever the device, so that a checkpoint of
its state makes a resumed run draw alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first_process(draw: Tensor) -> Tensor:
    """``draw`` of the first process; every process draws, which leaves their generators in step."""
    if _is_distributed():
        dist.broadcast(draw, src=0)
    return draw


def mean_of_processes(own: Tensor) -> Tensor:
    """Mean of every process's ``own``, with the gradient of this process's.

    Averaged over the processes, as DDP does, the gradient of a function of it is that of one process with everything.
    """
    if not _is_distributed():
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
    if _is_distributed():
        dist.all_reduce(totals)
    return totals[:, -1], totals[:, :-1]


@torch.no_grad()
def draw_replacements(latents: Tensor, expired: Tensor) -> tuple[Tensor, Tensor]:
    """A random latent for each expired codeword, none twice.

    Where the latents are fewer than the expired codewords, a random part of the codewords gets one.

    Args:
        latents: ``[N, D]`` of this process; N may differ from process to process.
        expired: which codewords to replace, boolean ``[K]``, the same on every process.

    Returns:
        Indices of the codewords ``[M]`` and their latents ``[M, D]``.
    """
    codewords = expired.nonzero().squeeze(1)
    sizes = [latents.shape[0]]
    if _is_distributed():
        every = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=latents.device)
        every[dist.get_rank()] = latents.shape[0]
        dist.all_reduce(every)
        sizes = every.tolist()
    if len(codewords) > sum(sizes):
        part = torch.randperm(len(codewords))[: sum(sizes)].sort().values
        codewords = codewords[from_first_process(part.to(latents.device))]
    if len(codewords) == 0:
        return codewords, latents[:0]
    positions = from_first_process(torch.randperm(sum(sizes))[: len(codewords)].to(latents.device))
    if not _is_distributed():
        return codewords, latents[positions]
    positions = positions - sum(sizes[: dist.get_rank()])
    here = (positions >= 0) & (positions < latents.shape[0])
    drawn = latents.new_zeros(len(codewords), latents.shape[1])
    drawn[here] = latents[positions[here]]
    dist.all_reduce(drawn)
    return codewords, drawn
