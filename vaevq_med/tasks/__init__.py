"""What images are used for: downstream tasks, which show what a reconstruction keeps."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Segmenter": "segmentation",
        "detection": "detectability",
        "frechet_radiomics_distance": "radiomics",
        "load_segmenter": "segmentation",
        "region_features": "radiomics",
        "reproducibility": "radiomics",
        "shape_features": "radiomics",
        "to_masks": "segmentation",
    },
)
