"""Forward and backward of every quantizer, beside its peers and the form that holds N x K distances.

All run in this process on the same latents, a method and its peers one after the other in each round; the middle of
``--repeats`` rounds counts. A row is printed and stored when its method is done. A step quantizes ``[B, D, h, w]`` in
training mode, adds the mean square of what the decoder would see and the quantizer's own losses, and differentiates.
Peers are ``vector-quantize-pytorch`` and MONAI; one that needs more memory than there is is left out and says so::

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
from collections.abc import Callable, Iterator
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
        "vqgan_ema_revival": lambda: ours.VectorQuantizerEMA(**free, revival_share=0.1, revival_count=0.5),
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


def measure_each(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure one method after the other, each together with its peers, one after the other in each round.

    Args:
        arguments: ``images``, ``tokens`` along a side, ``embedding_dim``, ``num_embeddings``, ``repeats``, ``only``
            (overlay names, or None for all) and ``device``.

    Yields:
        ``name`` and ``method`` (its overlay), then ``ms``, ``over_ours`` for a peer, ``peak_mib`` and the ``seconds``
        of each round; or ``not_run``, why.
    """
    device = torch.device(arguments.device)
    k, d = arguments.num_embeddings, arguments.embedding_dim
    runner = Runner(arguments)
    matrix = arguments.images * arguments.tokens**2 * k * 4
    torch.manual_seed(0)
    others = peers(k, d, device)
    for method, make in own(k, d).items():
        if arguments.only and method.split(",")[0] not in arguments.only:
            continue
        steps = {method: runner.own(make().to(device))}
        left_out: list[str] = []
        for name, (overlay, make_peer, kind) in others.items():
            if overlay != method:
                continue
            if kind not in ("sequence", "exact") and _PEER_MATRICES * matrix > 0.9 * free_memory(device):
                left_out.append(name)
            else:
                steps[name] = runner.peer(make_peer().to(device), d, kind)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        memory = dict.fromkeys(steps, 0.0)
        for number in range(arguments.repeats + 1):  # the first round warms up
            for name, step in steps.items():
                elapsed, mib = measure(step, device)
                if number:
                    seconds[name].append(elapsed)
                    memory[name] = max(memory[name], mib)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        for name in steps:
            yield {
                "name": name,
                "method": method,
                "ms": 1e3 * middle[name],
                "over_ours": None if name == method else middle[name] / middle[method],
                "peak_mib": memory[name],
                "seconds": seconds[name],
            }
        for name in left_out:
            reason = f"holds up to {_PEER_MATRICES} matrices of {matrix / 2**20:,.0f} MiB"
            yield {"name": name, "method": method, "not_run": reason}


def main() -> None:
    """Measure and print a table, row by row."""
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
    k, d = arguments.num_embeddings, arguments.embedding_dim
    table = arguments.images * arguments.tokens**2 * k * 4 / 2**20
    print(
        f"B = {arguments.images}, {arguments.tokens}x{arguments.tokens} tokens, K = {k:,}, D = {d}, "
        f"{arguments.device}; one N x K matrix: {table:,.0f} MiB\n"
    )
    print("| quantizer | ms | peer's time over ours | peak MiB | N x K over it |\n| --- | ---: | ---: | ---: | ---: |")
    record: dict[str, Any] = {"seconds": {}, "peak_mib": {}, "left_out": [], "method": {}}
    for row in measure_each(arguments):
        name = row["name"]
        if "not_run" in row:
            print(f"| {name} | not run: {row['not_run']} | | | |", flush=True)
            record["left_out"].append(name)
            continue
        ratio = "" if row["over_ours"] is None else f"{row['over_ours']:.2f}"
        mib = row["peak_mib"]
        print(f"| {name} | {row['ms']:.1f} | {ratio} | {mib:.0f} | {table / max(mib, 1):.0f} |", flush=True)
        record["seconds"][name], record["peak_mib"][name] = row["seconds"], mib
        record["method"][name] = row["method"]
        if arguments.output:
            arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
