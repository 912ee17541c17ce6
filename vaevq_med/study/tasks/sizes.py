"""Where small lesions end and large ones begin: said by the study's file, or by its split file's training patients."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.metrics.preservation import lesions_found, size_edges
from vaevq_med.metrics.segmentation import LEAST_ML
from vaevq_med.prepare.volumes.labels import label_map
from vaevq_med.prepare.volumes.reading import CaseReader
from vaevq_med.prepare.volumes.slices import fingerprint
from vaevq_med.study.rates.scans import stack_spacing
from vaevq_med.study.tasks.cases import CaseFile, find_case_files
from vaevq_med.study.tasks.file import TasksStudy

FILE_NAME = "lesion_sizes.json"
"""In the output folder, what was found and of which files."""

LESIONS_OF = "whole_tumor"
"""The region whose lesions are counted by their size."""

Edges = tuple[float, float]
"""In ml."""


def training_edges(study: TasksStudy, region: str) -> Edges:
    """The tertiles of the lesions of a region that experts marked in the split file's training patients.

    Segmentations alone are read, and not again as long as they are the same files.

    Args:
        study: with a split file.
        region: one of the nested regions.

    Raises:
        DataError: there are no such patients or no lesions, or a segmentation cannot be read.
    """
    # Neither other contrasts nor a tokenizer's have to be there: nothing is coded.
    changes = {"split": "training", "contrasts": study.contrasts[:1], "tokenizers": []}
    files = [file for file in find_case_files(study.model_copy(update=changes)) if file.case.segmentation is not None]
    key = _key(files, region)
    found = _noted(study, key)
    if found is None:
        volumes = [volume for file in files for volume in _lesions(file, region)]
        if not volumes:
            raise DataError(
                f"{study.split_file}: found no lesion in the segmentations of its {len(files)} training cases that "
                "have one, expected some whose sizes say what is small"
            )
        found = size_edges(volumes)
        study.output.mkdir(parents=True, exist_ok=True)
        atomic_write_text(study.output / FILE_NAME, json.dumps({"key": key, "edges_ml": found}) + "\n")
    return found


def _lesions(file: CaseFile, region: str) -> list[float]:
    """Volumes in ml of the lesions of a case."""
    source = file.case.segmentation
    assert source is not None, "of cases with a segmentation alone"
    reader = CaseReader(file.recipe)
    try:
        labels = reader.labels(source, file.case)[0].numpy()
    except DataError as error:
        raise DataError(f"training case {file.name}: {error}") from None
    mask = np.isin(labels, label_map(file.case.target_map).regions[region])
    return [volume for volume, _ in lesions_found(mask, mask, stack_spacing(reader.grid[1], file.recipe))]


def _key(files: Sequence[CaseFile], region: str) -> str:
    marks = [fingerprint(replace(file.case, images={}), file.recipe) for file in files]
    return hashlib.sha256(json.dumps([region, LEAST_ML, marks]).encode()).hexdigest()


def _noted(study: TasksStudy, key: str) -> Edges | None:
    """What an earlier call found of the same files; None where there is none, or the file is damaged."""
    try:
        content = json.loads((study.output / FILE_NAME).read_text(encoding="utf-8"))
        low, high = (float(edge) for edge in content["edges_ml"])
        same = content["key"] == key and 0 < low <= high and math.isfinite(high)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (low, high) if same else None
