"""Vector quantizers, one file a method."""

from vaevq_med.networks.quantizers.base import CodebookQuantizer, Quantizer, vq_losses
from vaevq_med.networks.quantizers.ema import VectorQuantizerEMA
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.quantizers.residual import ResidualQuantizer
from vaevq_med.networks.quantizers.simvq import SimVQ
from vaevq_med.networks.quantizers.vq import VectorQuantizer

__all__ = [
    "CodebookQuantizer",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "VectorQuantizer",
    "VectorQuantizerEMA",
    "nearest_codeword",
    "vq_losses",
]
