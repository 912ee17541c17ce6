"""A share of a split's patients: drawn by the seed, nested, at least one, and told by the checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_config, trainer_of, write_slice_dataset
from helpers.bundles import quick
from hypothesis import given
from hypothesis import strategies as st

from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.trained.file import read_checkpoint


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy images as those of ten training patients."""
    folder = write_slice_dataset(tmp_path_factory.mktemp("ten"), slices=5)
    content = json.loads((folder / "dataset.json").read_text())
    for number, entry in enumerate(content["training"]):
        entry["patient"] = f"patient-{number % 10}"
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def patients(folder: Path, share: float, seed: int = 0) -> set[str]:
    dataset = SliceDataset(dataset_dir=folder, split="training", patient_share=share, seed=seed)
    assert {entry["patient"] for entry in dataset.data} == set(dataset.patients)
    return set(dataset.patients)


@given(shares=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).map(sorted), seed=st.integers(0, 2**32))
def test_a_larger_share_holds_a_smaller_one(shares: list[float], seed: int, ten: Path) -> None:
    small, large = (patients(ten, share, seed) for share in shares)
    assert small <= large
    assert [len(small), len(large)] == [max(1, round(10 * share)) for share in shares]


def test_the_order_is_that_of_the_hashes_of_seed_and_name(ten: Path) -> None:
    names = sorted((hashlib.sha256(f"4:patient-{n}".encode()).hexdigest(), f"patient-{n}") for n in range(10))
    assert patients(ten, 0.3, seed=4) == {name for _, name in names[:3]}
    assert patients(ten, 0.3, seed=4) != patients(ten, 0.3, seed=5)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, "half", float("nan"), True])
def test_other_shares_are_refused(share: Any, ten: Path) -> None:
    with pytest.raises(DataError, match="patient_share"):
        patients(ten, share)


def test_images_without_patients_have_no_share(tmp_path: Path) -> None:
    folder = write_slice_dataset(tmp_path, slices=1)
    content = json.loads((folder / "dataset.json").read_text())
    for entry in content["training"]:
        del entry["patient"]
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"found images without a patient, expected one of each for patient_share 0\.5"):
        SliceDataset(dataset_dir=folder, split="training", patient_share=0.5)
    assert SliceDataset(dataset_dir=folder, split="training").patients == []


def test_a_checkpoint_names_whom_it_was_trained_on(ten: Path, tmp_path: Path) -> None:
    config = {**quick(toy_config(ten, tmp_path / "run")), "train_patients": 0.2, "epoch_length": 1}
    trainer = trainer_of(config)
    trainer.run()
    kept = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["data"]["patients"]
    assert set(kept) == patients(ten, 0.2)
    with pytest.raises(SystemExit):
        trainer_of({**config, "train_patients": 0.3})
