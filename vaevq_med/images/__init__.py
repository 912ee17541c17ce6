"""Files to tensors: manifests, pixels, volumes, data sets, splits."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "LoadPhotograph": "transforms",
        "LoadSliced": "transforms",
        "REGIONS": "transforms",
        "RandResizedCropd": "transforms",
        "RegionDataset": "regions",
        "ResizeShortSided": "transforms",
        "ResumableBatchSampler": "dataset",
        "SliceDataset": "dataset",
        "read_image": "pixels",
        "reader": "reading",
        "region_reader": "regions",
        "training_loader": "loading",
    },
)
