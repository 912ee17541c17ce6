"""Reconstruction, distribution, codebook and generation metrics."""

from vaevq_med.metrics.codebook import CodebookUsage
from vaevq_med.metrics.frechet import FrechetDistance
from vaevq_med.metrics.generation import measure_generation
from vaevq_med.metrics.inception_score import inception_score
from vaevq_med.metrics.neighbors import NearestNeighbors, PrecisionRecall, precision_recall
from vaevq_med.metrics.reconstruction import psnr_per_image, region_mean, region_psnr, ssim_per_image, to_unit
from vaevq_med.metrics.reference import ReferenceCache, ReferenceFeatures
from vaevq_med.metrics.statistics import FeatureStatistics, extrapolate_frechet_distance, frechet_distance

__all__ = [
    "CodebookUsage",
    "FeatureStatistics",
    "FrechetDistance",
    "NearestNeighbors",
    "PrecisionRecall",
    "ReferenceCache",
    "ReferenceFeatures",
    "extrapolate_frechet_distance",
    "frechet_distance",
    "inception_score",
    "measure_generation",
    "precision_recall",
    "psnr_per_image",
    "region_mean",
    "region_psnr",
    "ssim_per_image",
    "to_unit",
]
