"""Reconstruction, distribution and codebook metrics."""

from vaevq_med.metrics.codebook import CodebookUsage
from vaevq_med.metrics.evaluation import ReconstructionEvaluation
from vaevq_med.metrics.frechet import FrechetDistance
from vaevq_med.metrics.reconstruction import psnr_per_image, region_mean, region_psnr, ssim_per_image, to_unit
from vaevq_med.metrics.report import EvaluationReport

__all__ = [
    "CodebookUsage",
    "EvaluationReport",
    "FrechetDistance",
    "ReconstructionEvaluation",
    "psnr_per_image",
    "region_mean",
    "region_psnr",
    "ssim_per_image",
    "to_unit",
]
