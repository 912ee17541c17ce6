"""The row of a study of downstream tasks that codes nothing: the originals, to which the others are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vaevq_med.study.rates.candidates import Candidate, Coded
from vaevq_med.study.rates.scans import Scan, ScanFile

ORIGINAL = "original"


@dataclass(frozen=True)
class Original(Candidate):
    """What comes back is what was given, through the window; its bytes are those of the files on the disk."""

    has_mask: ClassVar[bool] = True

    name: str = ORIGINAL
    title: str = "Original"
    settings: tuple[float, ...] = (0.0,)

    @property
    def slices_alone(self) -> bool:
        """Nothing is coded."""
        return False

    def made_of(self) -> Mapping[str, Any]:
        """Nothing else."""
        return {}

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        """The volume itself; of a file of several contrasts, its share of the bytes."""
        path = file.case.images[file.contrast].path
        sharing = sum(volume.path == path for volume in file.case.images.values())
        return Coded(path.stat().st_size // sharing, scan.unit, 0.0, 0.0)
