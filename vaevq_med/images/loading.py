"""The training data loader."""

from __future__ import annotations

import torch
from monai.data import DataLoader

from vaevq_med.images.dataset import ResumableBatchSampler, SliceDataset


def training_loader(
    dataset: SliceDataset,
    sampler: ResumableBatchSampler,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 4,
) -> DataLoader:
    """An endless loader of shuffled batches; its workers stay alive from one epoch to the next.

    Args:
        dataset: what ``sampler`` indexes.
        sampler: yields the indices of each batch.
        num_workers: processes that read images; 0 reads in this one.
        pin_memory: put batches in page-locked memory, for a GPU.
        prefetch_factor: batches that each worker keeps ready.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers > 0 else None,
        # A generator of its own: making an iterator must not advance the generator that the model samples from.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
