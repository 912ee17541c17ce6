"""The nearest-codeword search beside the bare matrix product and the forms that hold N x K distances.

Those are the plain expansion, ``torch.cdist`` and ``vector-quantize-pytorch``. All run in this process on the same
latents, each after a call that warms up; the middle of ``--repeats`` rounds counts, and a row is printed and stored
when it is measured. Peak memory is what a call adds to the resident set (CPU) or the allocator's peak (GPU)::

    python benchmarks/nearest_codeword.py                       # 8 images of 32x32 tokens, D = 64, K = 16,384
    python benchmarks/nearest_codeword.py --num-embeddings 131072 --images 32    # forms that do not fit are left out
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _measure import PeakMemory, free_memory, synchronize
from torch import Tensor

from vaevq_med.networks.quantizers import nearest_codeword

_HOLD_MATRICES = ("N x K", "torch.cdist", "vector-quantize-pytorch")


def n_by_k(latents: Tensor, codebook: Tensor) -> Tensor:
    """The form of VQGAN's published code: every squared distance at once."""
    distances = (
        latents.square().sum(1, keepdim=True)
        + codebook.square().sum(1)
        - 2 * torch.einsum("nd,kd->nk", latents, codebook)
    )
    return distances.argmin(1)


def cdist(latents: Tensor, codebook: Tensor) -> Tensor:
    """``torch.cdist``."""
    return torch.cdist(latents, codebook).argmin(1)


def cdist_in_blocks(latents: Tensor, codebook: Tensor, block: int = 2**24) -> Tensor:
    """``torch.cdist`` of as many latents at once as have ``block`` distances."""
    return torch.cat([cdist(rows, codebook) for rows in latents.split(max(1, block // len(codebook)))])


def products(latents: Tensor, codebook: Tensor, chunk: int = 1024) -> Tensor:
    """Every inner product, a block of rows at a time into one buffer: the arithmetic that no exact search avoids."""
    buffer = latents.new_empty(min(chunk, len(latents)), len(codebook))
    transposed = codebook.t()
    for rows in latents.split(chunk):
        torch.mm(rows, transposed, out=buffer[: len(rows)])
    return buffer


def searches_of(latents: Tensor, codebook: Tensor, precision: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The searches by name, without the one whose package is missing; the bare product is the first."""
    searches: dict[str, Callable[[], Tensor]] = {
        "matrix product alone": lambda: products(latents, codebook),
        "nearest_codeword": lambda: nearest_codeword(latents, codebook),
        "nearest_codeword, posterior": lambda: nearest_codeword(latents, codebook, precision=precision),
        "N x K": lambda: n_by_k(latents, codebook),
        "torch.cdist": lambda: cdist(latents, codebook),
        "torch.cdist in blocks": lambda: cdist_in_blocks(latents, codebook),
    }
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        pass
    else:
        size, width = codebook.shape
        peer = VectorQuantize(dim=width, codebook_size=size).to(latents.device).eval()
        peer.codebook = codebook
        searches["vector-quantize-pytorch"] = lambda: peer(latents[None])[1][0]
    return searches


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure one search after the other, each for all its rounds.

    Args:
        arguments: ``images``, ``tokens``, ``embedding_dim``, ``num_embeddings``, ``repeats`` and ``device``.

    Yields:
        ``name``; ``ms``, ``over_the_product`` and ``peak_mib``, the ``seconds`` of each round, and
        ``exact``, how many of the first 256 are those that differences in float64 give; or ``not_run``, why.
    """
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    count, width, size = arguments.images * arguments.tokens, arguments.embedding_dim, arguments.num_embeddings
    latents = torch.randn(count, width, generator=generator).to(device)
    codebook = torch.randn(size, width, generator=generator).to(device)
    precision = (torch.rand(count, width, generator=generator) + 0.5).to(device)
    differences = "donot_use_mm_for_euclid_dist"
    exact = torch.cdist(latents[:256].double(), codebook.double(), compute_mode=differences).argmin(1)
    matrix, base = 4 * count * size, None
    for name, search in searches_of(latents, codebook, precision).items():
        if name in _HOLD_MATRICES and 4 * matrix > 0.9 * free_memory(device):
            yield {"name": name, "not_run": f"holds up to four matrices of {matrix / 2**20:,.0f} MiB"}
            continue
        search()  # warms up
        seconds, peak_mib = [], 0.0
        for _ in range(arguments.repeats):
            with PeakMemory(device) as peak:
                started = time.perf_counter()
                found = search()
                synchronize(device)
                seconds.append(time.perf_counter() - started)
            peak_mib = max(peak_mib, peak.mib)
        middle = statistics.median(seconds)
        base = middle if base is None else base
        scored = name != "matrix product alone" and "posterior" not in name
        yield {
            "name": name,
            "ms": 1e3 * middle,
            "over_the_product": middle / base,
            "peak_mib": peak_mib,
            "exact": f"{int((found[:256] == exact).sum())} of {len(exact)}" if scored else None,
            "seconds": seconds,
        }


def main() -> None:
    """Measure and print a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens an image")
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--num-embeddings", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    count = arguments.images * arguments.tokens
    matrix = f"{4 * count * arguments.num_embeddings / 2**20:,.0f} MiB"
    print(
        f"N = {count:,}, K = {arguments.num_embeddings:,}, D = {arguments.embedding_dim}, {arguments.device}; "
        f"N x K: {matrix}\n"
    )
    print("| search | ms | over the product | peak MiB | exact |\n| --- | ---: | ---: | ---: | ---: |")
    record: dict[str, dict[str, Any]] = {"seconds": {}, "peak_mib": {}}
    for row in measure(arguments):
        if "not_run" in row:
            print(f"| {row['name']} | not run: {row['not_run']} | | | |", flush=True)
            continue
        figures = f"{row['ms']:.2f} | {row['over_the_product']:.2f} | {row['peak_mib']:.0f}"
        print(f"| {row['name']} | {figures} | {row['exact'] or ''} |", flush=True)
        record["seconds"][row["name"]], record["peak_mib"][row["name"]] = row["seconds"], row["peak_mib"]
        if arguments.output:
            arguments.output.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
