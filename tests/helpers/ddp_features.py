"""Run as each of two processes: the distance of a part of the features to a codebook, and its gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vaevq_med.losses.wasserstein import wasserstein2_to_features

COUNT = 20


def distances(part: slice) -> list[torch.Tensor]:
    """For several kinds of features, of which this process has a part: the distance and both gradients."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for groups, width, rank in (((), 3, 3), ((2,), 3, 3), ((), 8, 2)):
        points = torch.randn(*groups, COUNT, rank, generator=draws, dtype=torch.float64)
        points = points @ torch.randn(rank, width, generator=draws, dtype=torch.float64) + 2
        # Processes with means of their own.
        points = points + torch.linspace(0, 3, COUNT, dtype=torch.float64).unsqueeze(1) * points[..., :1, :]
        codebook = torch.randn(*groups, 12, width, generator=draws, dtype=torch.float64).requires_grad_()
        own = points[..., part, :].clone().requires_grad_()
        value = wasserstein2_to_features(own, codebook)
        found += [value.detach(), *torch.autograd.grad(value, (own, codebook))]
    return found


if __name__ == "__main__":
    rank, folder, of_first = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(distances(slice(of_first, None) if rank else slice(of_first)), folder / f"{rank}.pt")
    dist.destroy_process_group()
