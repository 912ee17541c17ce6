"""Reconstruction, distribution, codebook and generation metrics."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ChannelActivity": "channels",
        "CodebookUsage": "codebook",
        "FeatureStatistics": "statistics",
        "Figure": "figures",
        "FrechetDistance": "statistics",
        "ImageMetric": "base",
        "InterSliceError": "volumes",
        "LabelDice": "labels",
        "NearestNeighbors": "neighbors",
        "PSNR": "reconstruction",
        "PrecisionRecall": "neighbors",
        "ReferenceCache": "reference",
        "ReferenceFeatures": "reference",
        "SSIM": "reconstruction",
        "VolumeMetric": "volumes",
        "active_channels": "channels",
        "extrapolate_frechet_distance": "statistics",
        "frechet_distance": "statistics",
        "inception_score": "generation",
        "inter_slice_error": "volumes",
        "inter_slice_errors": "volumes",
        "measure_generation": "generation",
        "precision_recall": "neighbors",
        "psnr_per_image": "reconstruction",
        "region_mean": "reconstruction",
        "region_psnr": "reconstruction",
        "ssim_per_image": "reconstruction",
        "to_unit": "reconstruction",
    },
)
