"""Run by test_mgvq.py as each of two processes: train MGVQ on a part of each batch and save its state."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vaevq_med.networks.quantizers import MGVQ

SIZES = (3, 1)


def quantizers() -> dict[str, MGVQ]:
    """Each starts alike on every process."""
    torch.manual_seed(0)
    sizes = {"num_embeddings": 16, "embedding_dim": 6, "num_codebooks": 3, "decay": 0.9}
    return {
        "published": MGVQ(**sizes, mask_probabilities=[0.0, 0.3, 0.6]),
        "plain": MGVQ(**sizes, normalize=False, init="normal"),
    }


def batches() -> list[torch.Tensor]:
    """The whole batches, ``[4, 6, 2, 3]`` each."""
    return list(torch.randn(5, sum(SIZES), 6, 2, 3, generator=torch.Generator().manual_seed(1)))


def train(rank: int, images: slice) -> dict[str, dict[str, torch.Tensor]]:
    """States after training on part of each batch, and what was masked; the generators of the processes differ."""
    states = {}
    for name, quantizer in quantizers().items():
        torch.manual_seed(10 + rank)
        masked = []
        for batch in batches():
            quantized = quantizer(batch[images]).quantized.detach()
            masked.append((quantized == 0).all(dim=0).all(dim=-1).all(dim=-1))
        states[name] = {**quantizer.state_dict(), "masked": torch.stack(masked)}
    return states


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(SIZES))
    start = sum(SIZES[:rank])
    torch.save(train(rank, slice(start, start + SIZES[rank])), folder / f"{rank}.pt")
    dist.destroy_process_group()
