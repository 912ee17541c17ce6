"""Forward and backward of every quantizer, beside its peers and the form that holds N x K distances.

All run in this process on the same latents, one after the other in each round; the middle of ``--repeats`` rounds
counts. A step quantizes ``[B, D, h, w]`` in training mode, adds the mean square of what the decoder would see and the
quantizer's own losses, and differentiates. Peers are ``vector-quantize-pytorch`` and MONAI; one that needs more memory
than there is is left out and says so::

    python benchmarks/quantizers.py                               # 8 images of 32x32 tokens, D = 64, K = 16,384
    python benchmarks/quantizers.py --num-embeddings 131072 --repeats 2
    python benchmarks/quantizers.py --only simvq fsq
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import PeakMemory, free_memory, synchronize
from torch import Tensor, nn

from vaevq_med.networks import quantizers as ours
from vaevq_med.networks.posterior import DiagonalGaussian

Step = Callable[[], None]
# Matrices of N x K that a peer's training step holds at once, at most, as its code reads.
_PEER_MATRICES = 5


def levels(num_embeddings: int) -> list[int]:
    """FSQ levels of about K codewords."""
    count = max(3, round(math.log2(num_embeddings) / 3))
    return [max(3, round(num_embeddings ** (1 / count)))] * count


def odd_levels(num_embeddings: int) -> list[int]:
    """Odd levels for iFSQ, of about K codewords."""
    return [level + 1 - level % 2 for level in levels(num_embeddings)]


def own(k: int, d: int) -> dict[str, Callable[[], nn.Module]]:
    """Every quantizer of the package at about K codewords in all, by the name of its overlay."""
    bits = round(math.log2(k))
    stage = 2 ** (bits // 2)
    square = 4 * round(math.sqrt(k) / 4)  # FVQ's codebook is a square of patches
    free = {"num_embeddings": k, "embedding_dim": d}
    stages = {"num_embeddings": stage, "embedding_dim": d}
    return {
        "vqgan": lambda: ours.VectorQuantizer(**free),
        "vqgan_ema": lambda: ours.VectorQuantizerEMA(**free),
        "vqgan_ema_revival": lambda: ours.VectorQuantizerEMA(**free, revival_threshold=0.2, revival_count=1.0),
        "simvq": lambda: ours.SimVQ(**free),
        "simvq, posterior": lambda: ours.SimVQ(**free, assignment="posterior"),
        "rvq": lambda: ours.ResidualQuantizer(stages=[ours.VectorQuantizer(**stages) for _ in range(2)]),
        "rvq, moving averages": lambda: ours.ResidualQuantizer(
            stages=[ours.VectorQuantizerEMA(**stages) for _ in range(2)]
        ),
        "fq": lambda: ours.FactorizedQuantizer(num_embeddings=k // 2, embedding_dim=d),
        "mgvq": lambda: ours.MGVQ(num_embeddings=k // 4, embedding_dim=d),
        "fvq": lambda: ours.FVQ(num_embeddings=square**2, embedding_dim=d),
        "vqgan_lc": lambda: ours.VQGANLC(**free, num_features=1280),
        "fsq": lambda: ours.FSQ(levels=levels(k), embedding_dim=d, projection=True),
        "ifsq": lambda: ours.IFSQ(levels=odd_levels(k), embedding_dim=d, projection=True),
        "lfq": lambda: ours.LFQ(num_embeddings=k, embedding_dim=d, projection=True),
        "gq": lambda: ours.GaussianQuantizer(**free, dims_per_codebook=d),
        "softvq": lambda: ours.SoftVQ(**free),
        "ibq": lambda: ours.IBQ(**free),
    }


def peers(k: int, d: int, device: torch.device) -> dict[str, tuple[str, Callable[[], nn.Module], str]]:
    """Other packages' quantizers: the overlay they belong to, how to make them, and how they are called."""
    found: dict[str, tuple[str, Callable[[], nn.Module], str]] = {}
    bits = round(math.log2(k))
    try:
        import vector_quantize_pytorch as vqp
    except ImportError:
        pass
    else:
        image = {"dim": d, "accept_image_fmap": True}
        common = {**image, "codebook_size": k, "rotation_trick": False}
        residual = {"dim": d, "codebook_size": 2 ** (bits // 2), "num_quantizers": 2, "rotation_trick": False}
        found |= {
            "vector-quantize-pytorch VectorQuantize, learned": (
                "vqgan",
                lambda: vqp.VectorQuantize(**common, ema_update=False, learnable_codebook=True),
                "vqp",
            ),
            "vector-quantize-pytorch VectorQuantize": ("vqgan_ema", lambda: vqp.VectorQuantize(**common), "vqp"),
            "vector-quantize-pytorch VectorQuantize, revival": (
                "vqgan_ema_revival",
                lambda: vqp.VectorQuantize(**common, threshold_ema_dead_code=2),
                "vqp",
            ),
            "vector-quantize-pytorch SimVQ": (
                "simvq",
                lambda: vqp.SimVQ(dim=d, codebook_size=k, channel_first=True, rotation_trick=False),
                "vqp",
            ),
            "vector-quantize-pytorch FSQ": ("fsq", lambda: vqp.FSQ(levels=levels(k), dim=d), "exact"),
            "vector-quantize-pytorch LFQ": (
                "lfq",
                lambda: vqp.LFQ(codebook_size=2**bits, dim=d, entropy_loss_weight=0.1, commitment_loss_weight=0.25),
                "vqp",
            ),
            "vector-quantize-pytorch ResidualVQ, learned": (
                "rvq",
                lambda: vqp.ResidualVQ(**residual, ema_update=False, learnable_codebook=True),
                "sequence",
            ),
            "vector-quantize-pytorch ResidualVQ": (
                "rvq, moving averages",
                lambda: vqp.ResidualVQ(**residual),
                "sequence",
            ),
        }
    try:
        from monai.networks.layers.vector_quantizer import EMAQuantizer, VectorQuantizer
    except ImportError:
        pass
    else:
        found["MONAI VectorQuantizer"] = (
            "vqgan_ema",
            lambda: VectorQuantizer(EMAQuantizer(spatial_dims=2, num_embeddings=k, embedding_dim=d)),
            "monai",
        )
    return found


class Runner:
    """Makes steps of quantizers on fixed latents."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.shape = (arguments.images, arguments.tokens, arguments.tokens)
        self.generator = torch.Generator().manual_seed(0)

    def latents(self, channels: int) -> Tensor:
        """``[B, channels, h, w]``."""
        generator = torch.Generator().manual_seed(0)
        batch, height, width = self.shape
        return torch.randn(batch, channels, height, width, generator=generator).to(self.device)

    def own(self, quantizer: nn.Module) -> Step:
        """A step of one of ours."""
        z = self.latents(quantizer.embedding_dim).requires_grad_()
        posterior = DiagonalGaussian(z.detach(), torch.zeros_like(z))

        def step() -> None:
            output = quantizer(z, posterior)
            (output.quantized.square().mean() + sum(output.losses.values())).backward()
            self.clear(quantizer, z)

        return step

    def peer(self, quantizer: nn.Module, channels: int, kind: str) -> Step:
        """A step of a peer, whose outputs are codes, indices and a loss, in the order of its package."""
        z = self.latents(channels)
        if kind == "sequence":
            z = z.flatten(2).transpose(1, 2).contiguous()
        z.requires_grad_()

        def step() -> None:
            output: Any = quantizer(z)
            tensors = [item for item in output if isinstance(item, Tensor) and item.is_floating_point()]
            codes = next(item for item in tensors if item.numel() == z.numel())
            loss = sum(
                (item.sum() for item in tensors if item is not codes and item.requires_grad), codes.new_zeros(())
            )
            (codes.square().mean() + loss).backward()
            self.clear(quantizer, z)

        return step

    @staticmethod
    def clear(quantizer: nn.Module, z: Tensor) -> None:
        """Drop the gradients."""
        quantizer.zero_grad(set_to_none=True)
        z.grad = None


def measure(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds and peak MiB of one step."""
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - started
    return seconds, peak.mib


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="tokens along a side")
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--num-embeddings", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="overlay names of the methods to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    k, d = arguments.num_embeddings, arguments.embedding_dim
    runner = Runner(arguments)
    matrix = arguments.images * arguments.tokens**2 * k * 4
    torch.manual_seed(0)

    steps: dict[str, Step] = {}
    method: dict[str, str] = {}
    left_out: list[str] = []
    for name, make in own(k, d).items():
        if not arguments.only or name.split(",")[0] in arguments.only:
            steps[name], method[name] = runner.own(make().to(device)), name
    for name, (overlay, make, kind) in peers(k, d, device).items():
        if overlay not in steps:
            continue
        if kind not in ("sequence", "exact") and _PEER_MATRICES * matrix > 0.9 * free_memory(device):
            left_out.append(name)
            continue
        steps[name], method[name] = runner.peer(make().to(device), d, kind), overlay

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, float] = {}
    for number in range(arguments.repeats + 1):  # the first round warms up
        for name, step in steps.items():
            elapsed, mib = measure(step, device)
            if number:
                seconds[name].append(elapsed)
                memory[name] = max(memory.get(name, 0.0), mib)

    table = matrix / 2**20
    print(
        f"B = {arguments.images}, {arguments.tokens}x{arguments.tokens} tokens, K = {k:,}, D = {d}, {device}; ", end=""
    )
    print(f"one N x K matrix: {table:,.0f} MiB\n")
    print("| quantizer | ms | peer's time over ours | peak MiB | N x K over it |\n| --- | ---: | ---: | ---: | ---: |")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name in steps:
        ratio = "" if method[name] == name else f"{middle[name] / middle[method[name]]:.2f}"
        print(
            f"| {name} | {middle[name] * 1e3:.0f} | {ratio} | {memory[name]:.0f} | {table / max(memory[name], 1):.0f} |"
        )
    for name in left_out:
        print(f"| {name} | not run: holds up to {_PEER_MATRICES} matrices of {table:,.0f} MiB | | | |")
    if arguments.output:
        record = {"seconds": seconds, "peak_mib": memory, "left_out": left_out, "method": method}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
