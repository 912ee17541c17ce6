"""The nearest-codeword search beside the bare matrix product and the forms that hold N x K distances.

Those are the plain expansion, ``torch.cdist`` and ``vector-quantize-pytorch``. All run in this process on the same
latents; the middle of ``--repeats`` rounds counts. Peak memory is what a call adds to the resident set (CPU) or the
allocator's peak (GPU)::

    python benchmarks/nearest_codeword.py                       # 8 images of 32x32 tokens, D = 64, K = 16,384
    python benchmarks/nearest_codeword.py --num-embeddings 131072 --images 32    # forms that do not fit are left out
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import PeakMemory, free_memory, synchronize
from torch import Tensor

from vaevq_med.networks.quantizers import nearest_codeword


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


def products(latents: Tensor, codebook: Tensor, chunk: int = 1024) -> Tensor:
    """Every inner product, a block of rows at a time into one buffer: the arithmetic that no exact search avoids."""
    buffer = latents.new_empty(min(chunk, len(latents)), len(codebook))
    transposed = codebook.t()
    for rows in latents.split(chunk):
        torch.mm(rows, transposed, out=buffer[: len(rows)])
    return buffer


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens an image")
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--num-embeddings", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    count = arguments.images * arguments.tokens
    latents = torch.randn(count, arguments.embedding_dim, generator=generator).to(device)
    codebook = torch.randn(arguments.num_embeddings, arguments.embedding_dim, generator=generator).to(device)
    precision = (torch.rand(count, arguments.embedding_dim, generator=generator) + 0.5).to(device)
    searches: dict[str, Callable[[], Tensor]] = {
        "matrix product alone": lambda: products(latents, codebook),
        "nearest_codeword": lambda: nearest_codeword(latents, codebook),
        "nearest_codeword, posterior": lambda: nearest_codeword(latents, codebook, precision=precision),
        "N x K": lambda: n_by_k(latents, codebook),
        "torch.cdist": lambda: cdist(latents, codebook),
    }
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        pass
    else:
        peer = VectorQuantize(dim=arguments.embedding_dim, codebook_size=arguments.num_embeddings).to(device).eval()
        peer.codebook = codebook
        searches["vector-quantize-pytorch"] = lambda: peer(latents[None])[1][0]
    too_big = {}
    matrix = count * arguments.num_embeddings * 4
    for name in ("N x K", "torch.cdist", "vector-quantize-pytorch"):
        if name in searches and 4 * matrix > 0.9 * free_memory(device):  # each holds up to four such matrices at once
            too_big[name] = searches.pop(name)
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    memory: dict[str, float] = {}
    results: dict[str, Tensor] = {}
    with torch.no_grad():
        for _ in range(arguments.repeats):
            for name, search in searches.items():
                with PeakMemory(device) as peak:
                    started = time.perf_counter()
                    results[name] = search()
                    synchronize(device)
                    seconds[name].append(time.perf_counter() - started)
                memory[name] = max(memory.get(name, 0.0), peak.mib)
    wide_z, wide_e = latents[:256].double(), codebook.double()
    exact = torch.cdist(wide_z, wide_e, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    table = f"{matrix / 2**20:,.0f} MiB"
    print(f"N = {count:,}, K = {arguments.num_embeddings:,}, D = {arguments.embedding_dim}, {device}; N x K: {table}\n")
    print("| search | ms | over the product | peak MiB | exact of 256 |\n| --- | ---: | ---: | ---: | ---: |")
    base = statistics.median(seconds["matrix product alone"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        scored = name != "matrix product alone" and "posterior" not in name
        agree = int((results[name][:256] == exact).sum()) if scored else ""
        print(f"| {name} | {middle * 1e3:.0f} | {middle / base:.2f} | {memory[name]:.0f} | {agree} |")
    for name in too_big:
        print(f"| {name} | not run: holds up to four matrices of {table} | | | |")
    if arguments.output:
        arguments.output.write_text(json.dumps({"seconds": seconds, "peak_mib": memory}, indent=2))


if __name__ == "__main__":
    main()
