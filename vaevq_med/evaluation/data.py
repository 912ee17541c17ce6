"""What an evaluation asks of a data set: its split, its regions, and that no patient of it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.manifest import SPLITS, load_manifest
from vaevq_med.images.patients import person_of
from vaevq_med.trained.network import StoredNetwork, StoredTokenizer
from vaevq_med.trained.patients import TrainingPatients, trainings
from vaevq_med.training import distributed

logger = logging.getLogger(__name__)


def label_map(dataset_dir: str | Path) -> Mapping[str, Sequence[int]]:
    """Label values of each tumor region of a slice data set."""
    return load_manifest(dataset_dir).label_map


def validation_split(dataset_dir: str | Path) -> str:
    """``validation``, or, where no patient stands in it, ``training``, with a warning.

    Args:
        dataset_dir: slice data set.
    """
    manifest = load_manifest(dataset_dir)
    if manifest.entries("validation"):
        return "validation"
    if distributed.is_main():
        logger.warning(
            "%s: the validation split is empty, so training images are validated on; %s, or pass --val_split test",
            dataset_dir,
            manifest.splitting_advice(),
        )
    return "training"


def evaluation_split(dataset_dir: str | Path) -> str:
    """``test``, or, where nothing stands in it, ``validation``, as with ImageNet, whose test labels are not public.

    Args:
        dataset_dir: data set of slices or photographs.
    """
    return "test" if load_manifest(dataset_dir).entries("test") else "validation"


def check_data(dataset: Any, stored: StoredTokenizer | None, any_shape: bool) -> None:
    """Refuse to call a test what was trained on, or what is read in another way.

    Args:
        dataset: what is evaluated; of one without a ``manifest`` nothing is known.
        stored: the evaluated checkpoint; without one nothing is asked.
        any_shape: allow images that are brought to squares in another way.

    Raises:
        VaevqMedError: a patient of the evaluated split was in the training data, or the images have another shape.
    """
    manifest = getattr(dataset, "manifest", None)
    if stored is None or manifest is None:
        return
    if not any_shape:
        stored.check_shape(getattr(dataset, "shape", None), manifest.path.parent, "--any_shape True")
    check_unseen(dataset, stored)


def check_unseen(dataset: Any, stored: StoredNetwork) -> None:
    """Refuse to call a test what a network was trained on, or what it started from was.

    Args:
        dataset: what is evaluated, with a ``manifest``.
        stored: the evaluated checkpoint.

    Raises:
        VaevqMedError: a patient of the evaluated split was in the training data.
    """
    if dataset.split == "training":
        return
    for name, trained in trainings(stored.data, str(stored.path)):
        _check_training(dataset, trained, name)


def _check_training(dataset: Any, trained: Mapping[str, Any], name: str) -> None:
    """Refuse what one training has seen.

    Args:
        dataset: what is evaluated.
        trained: what a checkpoint says of its data.
        name: of the checkpoint, for the message.
    """
    manifest, split = dataset.manifest, dataset.split
    moved = trained.get("split_hash") != manifest.split_hash
    patients = TrainingPatients(trained, name)
    named = {str(entry["patient"]) for one in SPLITS for entry in manifest.entries(one) if "patient" in entry}
    known = patients.among(named)
    told_apart = known and len(known) == len(patients)
    if moved and trained.get("content_hash") == manifest.content_hash and not told_apart:
        raise VaevqMedError(
            f"split {split!r}: found the images that {name} was trained on dealt to other splits, "
            "expected the same split"
        )
    tested = {str(entry["patient"]) for entry in manifest.entries(split) if "patient" in entry}
    leaked = {patient for patient in tested if person_of(patient) in known}
    if leaked:
        raise VaevqMedError(
            f"split {split!r}: found patient {min(leaked)}, whom {name} was trained on, expected none; "
            "the data set's split has changed since"
        )
