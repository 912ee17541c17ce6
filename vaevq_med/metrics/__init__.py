"""Reconstruction, distribution, codebook and generation metrics."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CodebookUsage": "codebook",
        "FeatureStatistics": "statistics",
        "Figure": "figures",
        "FrechetDistance": "frechet",
        "ImageMetric": "base",
        "NearestNeighbors": "neighbors",
        "PSNR": "reconstruction",
        "PrecisionRecall": "neighbors",
        "ReferenceCache": "reference",
        "ReferenceFeatures": "reference",
        "SSIM": "reconstruction",
        "extrapolate_frechet_distance": "statistics",
        "frechet_distance": "statistics",
        "inception_score": "inception",
        "measure_generation": "generation",
        "precision_recall": "neighbors",
        "psnr_per_image": "reconstruction",
        "region_mean": "reconstruction",
        "region_psnr": "reconstruction",
        "ssim_per_image": "reconstruction",
        "to_unit": "reconstruction",
    },
)
