"""Run as each of two processes: cluster latents of both, and save the centers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vaevq_med.training.codebook_start import CodebookStart


def latents(rank: int) -> torch.Tensor:
    """Eight points, of which each process has four, ten times each with a little noise."""
    points = torch.arange(8.0).view(8, 1).expand(8, 2)[rank::2].repeat(10, 1) * 10
    return points + 0.01 * torch.randn(points.shape, generator=torch.Generator().manual_seed(rank))


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    start = CodebookStart(init="kmeans", seed=3)
    centers = start._cluster(latents(rank), 8, torch.device("cpu"))
    torch.save({"centers": centers, "seen": start._latents}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
