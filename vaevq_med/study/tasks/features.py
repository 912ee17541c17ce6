"""What the network of the perceptual distance saw of a case, kept beside its record, and the distance of such features.

Kept are the pooled feature vectors themselves, since a Frechet distance is of all cases together: at half precision,
which rounds each number by 1/2048 of itself at most, 2.6 kB a slice of 1,280 features before they are deflated.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.files import atomic_write_bytes
from vaevq_med.metrics.statistics import FeatureStatistics, frechet_distance

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class KeptFeatures:
    """Where the features of a record are.

    Attributes:
        path: of the file.
        sha256: of its content.
    """

    path: Path
    sha256: str

    @classmethod
    def of(cls, folder: Path, noted: Any) -> KeptFeatures | None:
        """Those that a record notes.

        Args:
            folder: of the record.
            noted: what :meth:`write` gave; None, as in records of earlier versions, where nothing was kept.
        """
        return None if noted is None else cls(folder / noted["file"], noted["sha256"])

    @staticmethod
    def write(path: Path, pooled: Tensor) -> dict[str, str]:
        """Keep the feature vectors of a record.

        Args:
            path: of the file, beside the record.
            pooled: ``[N, F]``, of the slices of all contrasts.

        Returns:
            What the record notes of them.
        """
        values = pooled.float().cpu().numpy()
        if np.abs(values).max(initial=0) < _LARGEST:
            values = values.astype(np.float16)
        file = io.BytesIO()
        np.savez_compressed(file, pooled=values)
        atomic_write_bytes(path, file.getvalue())
        return {"file": path.name, "sha256": hashlib.sha256(file.getvalue()).hexdigest()}

    def read(self) -> Tensor | None:
        """The vectors ``[N, F]``; None where the file is gone or is another record's."""
        try:
            content = self.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.sha256:
                return None
            with np.load(io.BytesIO(content), allow_pickle=False) as parts:
                return torch.from_numpy(parts["pooled"]).float()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None


def feature_distance(results: Sequence[Tensor], originals: Sequence[Tensor]) -> float:
    """The Frechet distance of results and originals, all cases together (rFID).

    Args:
        results: ``[N, F]`` of each case.
        originals: likewise.

    Returns:
        NaN of fewer than two slices.
    """
    if sum(map(len, results)) < 2:
        return math.nan
    sides = [FeatureStatistics.of(torch.cat([*side])) for side in (results, originals)]
    return max(0.0, frechet_distance(*sides))  # rounding may lead below 0
