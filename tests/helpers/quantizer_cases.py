"""One or more small instances of every quantizer, for the contract that all of them keep."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vaevq_med.networks.quantizers import (
    FSQ,
    FVQ,
    IBQ,
    IFSQ,
    LFQ,
    MGVQ,
    VQGANLC,
    Continuous,
    FactorizedQuantizer,
    GaussianQuantizer,
    ResidualQuantizer,
    SimVQ,
    SoftVQ,
    VectorQuantizer,
    VectorQuantizerEMA,
)
from vaevq_med.networks.quantizers.base import Quantizer


@dataclass(frozen=True)
class Case:
    """A quantizer and what its method makes different from plain vector quantization.

    Attributes:
        make: a new instance, drawn from torch's global generator.
        learns: whether a gradient reaches its parameters through ``codes``.
        straight_through: whether a gradient passes ``quantized`` unchanged.
        random_start: whether two instances from different seeds differ.
        exact: whether ``quantized`` has the value of ``codes``.
        indexed: whether there are indices; what has none has tests of its own.
    """

    make: Callable[[], Quantizer]
    learns: bool = True
    straight_through: bool = True
    random_start: bool = True
    exact: bool = True
    indexed: bool = True


def unfolded_fvq() -> FVQ:
    """FVQ past its start, at which all its codewords are 0."""
    quantizer = FVQ(num_embeddings=64, embedding_dim=4, width=8, num_heads=2)
    nn.init.normal_(quantizer.head.weight)
    return quantizer


CASES: dict[str, Case] = {
    "vq": Case(lambda: VectorQuantizer(num_embeddings=32, embedding_dim=4)),
    "vq-ema": Case(lambda: VectorQuantizerEMA(num_embeddings=32, embedding_dim=4), learns=False),
    "vq-ema-revival": Case(
        lambda: VectorQuantizerEMA(num_embeddings=32, embedding_dim=4, revival_threshold=1.0, revival_count=2.0),
        learns=False,
    ),
    "vq-ema-revival-share": Case(
        lambda: VectorQuantizerEMA(num_embeddings=32, embedding_dim=4, revival_share=0.5, revival_count=1.0),
        learns=False,
    ),
    "residual": Case(
        lambda: ResidualQuantizer(
            stages=[VectorQuantizer(num_embeddings=16, embedding_dim=4, init="normal") for _ in range(3)], dropout=True
        )
    ),
    "residual-ema-shared": Case(
        lambda: ResidualQuantizer(
            stages=[VectorQuantizerEMA(num_embeddings=16, embedding_dim=4, revival_threshold=2.0)], num_codebooks=3
        ),
        learns=False,
    ),
    "simvq": Case(lambda: SimVQ(num_embeddings=32, embedding_dim=4)),
    "factorized": Case(
        lambda: FactorizedQuantizer(num_embeddings=32, embedding_dim=6, num_codebooks=3), straight_through=False
    ),
    "factorized-plain": Case(lambda: FactorizedQuantizer(num_embeddings=32, embedding_dim=4, normalize=False)),
    "mgvq": Case(
        lambda: MGVQ(
            num_embeddings=32, embedding_dim=8, num_codebooks=4, mask_probabilities=[0, 0.2, 0.3, 0.4], init="normal"
        ),
        straight_through=False,
    ),
    "mgvq-plain": Case(lambda: MGVQ(num_embeddings=32, embedding_dim=4, num_codebooks=2, normalize=False)),
    "fvq": Case(unfolded_fvq),
    "fsq": Case(lambda: FSQ(levels=[8, 5, 4]), learns=False, straight_through=False, random_start=False),
    "fsq-projection": Case(lambda: FSQ(levels=[8, 5, 5], embedding_dim=6, projection=True), straight_through=False),
    "ifsq": Case(lambda: IFSQ(levels=[7, 5, 3]), learns=False, straight_through=False, random_start=False),
    "lfq": Case(lambda: LFQ(num_embeddings=32, temperature=1.0), learns=False, random_start=False),
    "lfq-bits": Case(
        lambda: LFQ(num_embeddings=32, temperature=1.0, codebook_per_bit=True), learns=False, random_start=False
    ),
    "lfq-projection": Case(lambda: LFQ(num_embeddings=32, embedding_dim=8, projection=True), straight_through=False),
    "ibq": Case(lambda: IBQ(num_embeddings=32, embedding_dim=4), straight_through=False),
    "softvq": Case(lambda: SoftVQ(num_embeddings=32, embedding_dim=4), straight_through=False),
    "softvq-hard-plain": Case(
        lambda: SoftVQ(
            num_embeddings=32, embedding_dim=4, num_segments=1, readout="hard", normalize=False, init="normal"
        ),
        straight_through=False,
    ),
    "gaussian": Case(lambda: GaussianQuantizer(num_embeddings=64, embedding_dim=4), learns=False, random_start=False),
    "gaussian-grouped": Case(
        lambda: GaussianQuantizer(num_embeddings=64, embedding_dim=6, dims_per_codebook=3),
        learns=False,
        random_start=False,
    ),
    "continuous": Case(lambda: Continuous(embedding_dim=4), learns=False, random_start=False, indexed=False),
    "vqgan-lc": Case(lambda: VQGANLC(num_embeddings=32, embedding_dim=4, num_features=6)),
}


def all_cases(*, indexed: bool = True) -> dict[str, Case]:
    """Those above, and the ``CASES`` of every test file of a quantizer; of those with indices, or of all."""
    folder = Path(__file__).parents[1] / "networks" / "quantizers"
    found = dict(CASES)
    for path in sorted(folder.glob("test_*.py")):
        if re.search(r"^CASES\b", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            found |= importlib.import_module(path.stem).CASES
    return {name: case for name, case in found.items() if case.indexed or not indexed}
