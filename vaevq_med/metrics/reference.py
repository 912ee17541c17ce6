"""Features of a split of real images with their moments, kept in a file between runs."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_binary_writer
from vaevq_med.metrics.statistics import FeatureStatistics

_FORMAT = 1


@dataclass(frozen=True)
class ReferenceFeatures:
    """What is known of the real images of a split.

    Attributes:
        statistics: mean and covariance in float64.
        features: float32 ``[N, F]``, in the order of the split.
    """

    statistics: FeatureStatistics
    features: Tensor

    @classmethod
    def of(cls, features: Tensor) -> ReferenceFeatures:
        """From the features themselves, ``[N, F]``."""
        return cls(FeatureStatistics.of(features), features.float())


def key_hash(key: Mapping[str, Any]) -> str:
    """SHA-256 of what determines features, as hexadecimal digits."""
    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class ReferenceCache:
    """A folder of files, each named by a hash of all that its contents depend on.

    Args:
        folder: made when the first file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file for a key, whether it is there or not."""
        return self.folder / f"{key['split']}-{key['network']}-{key_hash(key)[:32]}.npz"

    def load(self, key: Mapping[str, Any]) -> ReferenceFeatures | None:
        """What was stored for a key; None where nothing was, or the file is damaged."""
        try:
            with np.load(self.path(key), allow_pickle=False) as file:
                if str(file["key"]) != key_hash(key):
                    return None
                mean, covariance = torch.from_numpy(file["mean"]), torch.from_numpy(file["covariance"])
                features, count = torch.from_numpy(file["features"]), int(file["count"])
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return None
        width = mean.shape[0] if mean.ndim == 1 else -1
        fits = covariance.shape == (width, width) and features.shape == (count, width)
        if not fits or {mean.dtype, covariance.dtype} != {torch.float64} or features.dtype != torch.float32:
            return None
        return ReferenceFeatures(FeatureStatistics(mean, covariance, count), features)

    def store(self, key: Mapping[str, Any], reference: ReferenceFeatures) -> None:
        """Put the whole file in place, or nothing.

        Raises:
            DataError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_binary_writer(self.path(key)) as file:
                np.savez(
                    file,
                    key=np.array(key_hash(key)),
                    mean=reference.statistics.mean.cpu().numpy(),
                    covariance=reference.statistics.covariance.cpu().numpy(),
                    count=np.array(reference.statistics.count),
                    features=reference.features.cpu().numpy(),
                )
        except OSError as error:
            raise DataError(
                f"cache {self.folder}: found it not writable ({error.strerror}), expected a folder with room; name "
                "another with --cache-dir"
            ) from None
