"""Tokens per second of LlamaGen with the cache, without it, and of MONAI's transformer at the same size.

All run in this process on untrained weights. With the cache a whole image is sampled by ``generate_indices``. Without
it, and with ``DecoderOnlyTransformer`` under the unmodified ``VQVAETransformerInferer``, the time of a token grows with
the tokens before it: it is measured at ``--points`` prefix lengths and integrated over the image by Simpson's rule.
Each token is one draw from all K indices. Of MONAI's first stage nothing is measured: a stand-in returns the indices.

The bound is the time in which the device can read, for each token, the weights of the blocks and of the head and the
keys and values of half an image, at the rate of a large copy in memory (bytes read and written)::

    python benchmarks/sampling.py                                   # B, 32x32 tokens, K = 16,384, one image
    python benchmarks/sampling.py --dtype bfloat16 --device cuda
    python benchmarks/sampling.py --width 32 --depth 2 --num-heads 2 --tokens 16 --num-embeddings 64 --copy-mib 16
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.integrate
import torch
from _measure import copied_bytes_per_second, seconds_of
from torch import Tensor, nn

from vaevq_med.networks.generators.autoregressive import generate_indices
from vaevq_med.networks.generators.drawing import draw_indices
from vaevq_med.networks.generators.llamagen import PRESETS, LlamaGen
from vaevq_med.networks.generators.static_steps import StepStore


class StandIn:
    """A first stage that decodes to the indices themselves."""

    def __init__(self, num_embeddings: int) -> None:
        self.num_embeddings = num_embeddings

    def decode_samples(self, indices: Tensor) -> Tensor:
        """The indices."""
        return indices


def grid_of(tokens: int) -> tuple[int, int]:
    """The squarest grid of so many tokens."""
    height = max(side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0)
    return height, tokens // height


def integrated(
    token: Callable[[int], object], tokens: int, points: int, device: torch.device, repeats: int
) -> tuple[float, dict[int, float]]:
    """Seconds of a whole image from those of single tokens, and the latter by the length of what is fed."""
    lengths = sorted({round(length) for length in np.linspace(1, tokens, min(points, tokens))})
    measured = {length: seconds_of(lambda length=length: token(length), device, repeats) for length in lengths}
    if len(lengths) == 1:
        return tokens * measured[1], measured
    mean = scipy.integrate.simpson(list(measured.values()), x=lengths) / (lengths[-1] - lengths[0])
    return tokens * mean, measured


def bytes_per_token(network: LlamaGen, batch: int) -> float:
    """Weights and, on average over an image, keys and values that a token of the whole batch reads."""
    modules = [*network.blocks, network.norm, *network.heads]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    cache = network.new_cache(batch)
    mean_places = (cache.capacity + 1) / 2 / cache.capacity
    return weights + mean_places * 2 * cache.keys.numel() * cache.keys.element_size()


class Samplers:
    """Ways to sample ``--tokens`` tokens of ``--batch`` images with networks of one size."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device, self.dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        self.size = dict(PRESETS[arguments.preset])
        self.size |= {name: value for name in self.size if (value := getattr(arguments, name)) is not None}
        self.grid = grid_of(arguments.tokens)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.store = StepStore() if self.device.type == "cuda" else None
        network = LlamaGen(num_embeddings=arguments.num_embeddings, grid_size=self.grid, **self.size)
        self.network = network.to(self.device, self.dtype).eval()

    def cached(self) -> None:
        """A whole image with the cache; on a GPU the first call captures the graphs that further ones replay."""
        generate_indices(self.network, num_samples=self.arguments.batch, generator=self.generator, store=self.store)

    def uncached(self, length: int) -> Tensor:
        """The next token after a class token and ``length - 1`` tokens, everything computed again."""
        tokens = torch.zeros(self.arguments.batch, length, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            hidden = self.network.features(tokens)[:, -1]
            return draw_indices(self.network.heads[0](hidden).float(), self.generator)

    def monai(self, flash: bool) -> Callable[[int], Tensor]:
        """The next token after ``length`` tokens, the first of which is MONAI's start token."""
        from monai.inferers import VQVAETransformerInferer
        from monai.networks.nets import DecoderOnlyTransformer
        from monai.utils.ordering import Ordering

        codewords, batch = self.arguments.num_embeddings, self.arguments.batch
        transformer: nn.Module = DecoderOnlyTransformer(
            num_tokens=codewords + 1,
            max_seq_len=self.arguments.tokens,
            attn_layers_dim=self.size["width"],
            attn_layers_depth=self.size["depth"],
            attn_layers_heads=self.size["num_heads"],
            use_flash_attention=flash,
        )
        transformer = transformer.to(self.device, self.dtype).eval()
        ordering = Ordering("raster_scan", spatial_dims=2, dimensions=(1, 1, 1))
        inferer, first_stage = VQVAETransformerInferer(), StandIn(codewords)

        def token(length: int) -> Tensor:
            start = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
            start[:, 0] = codewords
            return inferer.sample((1, 1), start, first_stage, transformer, ordering, verbose=False)

        return token


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="B")
    parser.add_argument("--width", type=int, help="instead of the preset's")
    parser.add_argument("--depth", type=int, help="instead of the preset's")
    parser.add_argument("--num-heads", type=int, help="instead of the preset's")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens an image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-embeddings", type=int, default=16384)
    parser.add_argument("--points", type=int, default=5, help="prefix lengths of what is measured in parts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the copy that measures the memory's rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    samplers = Samplers(arguments)
    device, tokens = samplers.device, arguments.tokens

    rate = copied_bytes_per_second(device, arguments.copy_mib, arguments.repeats)
    needed = bytes_per_token(samplers.network, arguments.batch)
    seconds = {"LlamaGen, with the cache": seconds_of(samplers.cached, device, arguments.repeats)}
    parts: dict[str, dict[int, float]] = {}
    rows: dict[str, Callable[[int], object]] = {
        "LlamaGen, without": samplers.uncached,
        "MONAI DecoderOnlyTransformer": samplers.monai(flash=False),
        "MONAI DecoderOnlyTransformer, use_flash_attention": samplers.monai(flash=True),
    }
    for name, token in rows.items():
        seconds[name], parts[name] = integrated(token, tokens, arguments.points, device, arguments.repeats)

    size = ", ".join(f"{name} {value}" for name, value in samplers.size.items())
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    base = seconds["LlamaGen, with the cache"]
    bound = tokens * needed / rate
    print(
        f"{size}, K = {arguments.num_embeddings:,}, {tokens:,} tokens, batch {arguments.batch}, {arguments.dtype}, "
        f"{machine}, torch {torch.__version__}; {needed / 2**20:,.1f} MiB a token at {rate / 1e9:,.1f} GB/s\n"
    )
    print("| sampler | tokens/s | s an image | its time over ours | share of the bound | measured |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name, value in seconds.items():
        how = f"tokens after {', '.join(map(str, parts[name]))}, integrated" if name in parts else "whole image"
        print(
            f"| {name} | {arguments.batch * tokens / value:,.1f} | {value:,.2f} | {value / base:.2f} | "
            f"{bound / value:.1%} | {how} |"
        )
    print(
        f"| memory's bound | {arguments.batch * tokens / bound:,.1f} | {bound:,.2f} | {bound / base:.2f} | | a copy |"
    )
    if arguments.output:
        record = {
            "size": samplers.size,
            "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
            "machine": machine,
            "torch": torch.__version__,
            "seconds_an_image": seconds,
            "seconds_a_token_by_length": parts,
            "bytes_a_token": needed,
            "copied_bytes_a_second": rate,
            "bound_seconds_an_image": bound,
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
