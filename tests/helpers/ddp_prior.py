"""Run as each of two processes: one update of the KL term by a part of each batch, whose state is saved."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vaevq_med.losses import KLLoss
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian

SIZES = (3, 1)


def train(images: slice) -> torch.Tensor:
    """What steers the term after three batches, of which these images are this process's."""
    draws = torch.Generator().manual_seed(0)
    term = KLLoss(prior="empirical", embedding_dim=3, momentum=0.5, budget=1.0, num_embeddings=8, tokens="all")
    for _ in range(3):
        mean, logvar = torch.randn(2, sum(SIZES), 3, 2, 5, generator=draws)[:, images].unbind()
        zero = torch.zeros(len(mean), 1, 4, 4)
        quantizer = QuantizerOutput(mean, mean, torch.zeros(len(mean), 2, 5, 1, dtype=torch.int64))
        term(zero, TokenizerOutput(zero, zero, mean, DiagonalGaussian(mean, logvar), quantizer))
    return term.control()


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(SIZES))
    start = sum(SIZES[:rank])
    torch.save(train(slice(start, start + SIZES[rank])), folder / f"{rank}.pt")
    dist.destroy_process_group()
