"""One or more small instances of every quantizer, for the contract that all of them keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vaevq_med.networks.quantizers import SimVQ, VectorQuantizer
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
    """

    make: Callable[[], Quantizer]
    learns: bool = True
    straight_through: bool = True
    random_start: bool = True
    exact: bool = True


CASES: dict[str, Case] = {
    "vq": Case(lambda: VectorQuantizer(num_embeddings=32, embedding_dim=4)),
    "simvq": Case(lambda: SimVQ(num_embeddings=32, embedding_dim=4)),
}
