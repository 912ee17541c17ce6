"""Notes on cases without a segmentation, which a search or a table may have overlooked."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vaevq_med.prepare.job import Search
from vaevq_med.prepare.volumes.case import Case, all_volumes, listed, relative, strip_suffix

_MASK_LIKE = re.compile("seg|mask|label", re.IGNORECASE)


def volumes_beside(cases: Sequence[Case]) -> list[Path]:
    """Volumes that no case names, in the folders of those without a segmentation."""
    used = {volume.path for case in cases for volume in all_volumes(case)}
    folders = {volume.path.parent for case in cases if case.segmentation is None for volume in case.images.values()}
    found = []
    for folder in sorted(folders):
        with contextlib.suppress(OSError):  # the case itself says so
            found += sorted(
                path for path in folder.iterdir() if path not in used and strip_suffix(path.name) is not None
            )
    return found


def note_missing_masks(search: Search[Case], strangers: Sequence[Path], root: Path) -> None:
    """Name the cases without a segmentation, where others have one or a file beside their images looks like one."""
    bare = [case for case in search.units if case.segmentation is None]
    owners: dict[Path, set[str]] = defaultdict(set)
    for case in search.units:
        for volume in all_volumes(case):
            owners[volume.path.parent].add(case.name)
    alike: dict[str, Path] = {}
    for path in strangers:
        if _MASK_LIKE.search(path.name) and path.parent in owners:
            alone = len(owners[path.parent]) == 1
            for name in (case.name for case in bare if case.name in owners[path.parent]):
                if alone or re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", path.name):
                    alike.setdefault(name, path)
    if bare and (alike or len(bare) < len(search.units)):
        search.notes.append(
            f"{len(bare)} of {len(search.units)} cases have no segmentation: {listed([c.name for c in bare])}"
        )
    if alike:
        shown = listed([relative(path, root) for path in alike.values()])
        search.notes.append(f"files beside cases without a segmentation look like one: {shown}; name them with --cases")
