"""What images are used for: downstream tasks, which show what a reconstruction keeps."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Segmenter": "segmentation",
        "load_segmenter": "segmentation",
    },
)
