"""Old addresses of what is now in ``images`` and ``tokens``."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "LoadPhotograph": "vaevq_med.images.transforms",
        "LoadSliced": "vaevq_med.images.transforms",
        "REGIONS": "vaevq_med.images.transforms",
        "RandResizedCropd": "vaevq_med.images.transforms",
        "ResizeShortSided": "vaevq_med.images.transforms",
        "ResumableBatchSampler": "vaevq_med.images.dataset",
        "SliceDataset": "vaevq_med.images.dataset",
        "TokenDataset": "vaevq_med.tokens.store",
        "TokenStore": "vaevq_med.tokens.store",
        "load_token_store": "vaevq_med.tokens.store",
        "read_image": "vaevq_med.images.pixels",
        "training_loader": "vaevq_med.images.loading",
    },
)
