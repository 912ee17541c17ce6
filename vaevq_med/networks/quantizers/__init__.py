"""Vector quantizers, one file a method."""

from vaevq_med.networks.quantizers.base import CodebookQuantizer, Quantizer, vq_losses
from vaevq_med.networks.quantizers.coherent import CoherentVQ
from vaevq_med.networks.quantizers.continuous import Continuous
from vaevq_med.networks.quantizers.ema import VectorQuantizerEMA
from vaevq_med.networks.quantizers.fsq import FSQ, IFSQ
from vaevq_med.networks.quantizers.gaussian import GaussianQuantizer
from vaevq_med.networks.quantizers.grouped import FactorizedQuantizer
from vaevq_med.networks.quantizers.ibq import IBQ
from vaevq_med.networks.quantizers.lfq import LFQ
from vaevq_med.networks.quantizers.mgvq import MGVQ
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.quantizers.residual import ResidualQuantizer
from vaevq_med.networks.quantizers.simvq import SimVQ
from vaevq_med.networks.quantizers.softvq import SoftVQ
from vaevq_med.networks.quantizers.sq_vae import SQVAE
from vaevq_med.networks.quantizers.tree import TreeQuantizer
from vaevq_med.networks.quantizers.two_level_learned import LearnedTwoLevel
from vaevq_med.networks.quantizers.two_level_residual import ResidualTwoLevel
from vaevq_med.networks.quantizers.vq import VectorQuantizer
from vaevq_med.networks.quantizers.vqbridge import FVQ
from vaevq_med.networks.quantizers.vqgan_lc import VQGANLC

__all__ = [
    "FSQ",
    "FVQ",
    "IBQ",
    "IFSQ",
    "LFQ",
    "MGVQ",
    "SQVAE",
    "VQGANLC",
    "CodebookQuantizer",
    "CoherentVQ",
    "Continuous",
    "FactorizedQuantizer",
    "GaussianQuantizer",
    "LearnedTwoLevel",
    "Quantizer",
    "ResidualQuantizer",
    "ResidualTwoLevel",
    "SimVQ",
    "SoftVQ",
    "TreeQuantizer",
    "VectorQuantizer",
    "VectorQuantizerEMA",
    "nearest_codeword",
    "vq_losses",
]
