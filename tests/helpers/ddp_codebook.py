"""Run as each of two processes: train codebooks on a part of each batch and save their state."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import ResidualQuantizer, ResidualTwoLevel, VectorQuantizerEMA
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.quantizers.coherent import CoherentVQ
from vaevq_med.networks.quantizers.gates import ThresholdGate

SIZES = (3, 1)


class Coherent(CoherentVQ):
    """Of latents alone: each one's confidence goes with its size."""

    def __init__(self, **options: Any) -> None:
        super().__init__(embedding_dim=3, decay=0.9, **options)

    def forward(self, z: torch.Tensor, posterior: Any = None) -> Any:
        """As given the posterior."""
        return super().forward(z, DiagonalGaussian(z, z.abs().log()))


class BySize(ThresholdGate):
    """Opens for large latents."""

    def score(self, z: torch.Tensor, posterior: Any, images: torch.Tensor | None) -> torch.Tensor:
        """Their length."""
        return z.norm(dim=1)


def quantizers() -> dict[str, Quantizer]:
    """Each starts alike on every process."""
    torch.manual_seed(0)

    def ema(codewords: int, **options: float) -> VectorQuantizerEMA:
        return VectorQuantizerEMA(num_embeddings=codewords, embedding_dim=3, decay=0.9, **options)

    revival = {"revival_threshold": 0.95, "revival_count": 1.2}
    return {
        "plain": ema(16),
        "revival": ema(16, **revival),
        "revival by share": ema(16, revival_share=0.9, revival_count=1.0),
        # More codewords than latents: a part of those expired is replaced.
        "crowded": ema(64, **revival),
        "residual": ResidualQuantizer(stages=[ema(8, **revival), ema(8, **revival)], dropout=True),
        "shared": ResidualQuantizer(stages=[ema(8, **revival)], num_codebooks=3, dropout=True),
        "gated": ResidualTwoLevel(top=ema(8), bottom=ema(8, **revival), cell_size=1, gate=BySize(share=0.4)),
    }


def coherent() -> dict[str, Coherent]:
    """The coherent codebook, whose posteriors are made of the latents themselves."""
    torch.manual_seed(0)
    return {
        "revival": Coherent(num_embeddings=16, revival_share=0.9, revival_count=1.0),
        "crowded": Coherent(num_embeddings=64, revival_share=0.9, revival_count=1.0, prior_step=0.1),
    }


def batches() -> list[torch.Tensor]:
    """The whole batches, ``[4, 3, 2, 3]`` each."""
    return list(torch.randn(5, sum(SIZES), 3, 2, 3, generator=torch.Generator().manual_seed(1)))


def train(
    rank: int, images: slice, chosen: Mapping[str, Quantizer] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """States after training on part of each batch; the generators of the processes differ."""
    states = {}
    for name, quantizer in (chosen or quantizers()).items():
        torch.manual_seed(10 + rank)
        for batch in batches():
            quantizer(batch[images])
        states[name] = quantizer.state_dict()
    return states


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(SIZES))
    start = sum(SIZES[:rank])
    torch.save(
        train(rank, slice(start, start + SIZES[rank]), coherent() if sys.argv[3:] else None), folder / f"{rank}.pt"
    )
    dist.destroy_process_group()
