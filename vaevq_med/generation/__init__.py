"""Images drawn by a trained generator."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ImageSampler": "sampling",
        "SamplePlan": "plan",
        "SampleWriter": "writer",
        "SamplingSettings": "sampling",
    },
)
