"""Volumes to slices, data sets of slices, and synthetic subjects."""

from vaevq_med.data.dataset import REGIONS, LoadSliced, ResumableBatchSampler, SliceDataset
from vaevq_med.data.images import LoadPhotograph, RandResizedCropd, ResizeShortSided, read_image
from vaevq_med.data.loading import training_loader
from vaevq_med.data.tokens import TokenDataset, TokenStore, load_token_store

__all__ = [
    "REGIONS",
    "LoadPhotograph",
    "LoadSliced",
    "RandResizedCropd",
    "ResizeShortSided",
    "ResumableBatchSampler",
    "SliceDataset",
    "TokenDataset",
    "TokenStore",
    "load_token_store",
    "read_image",
    "training_loader",
]
