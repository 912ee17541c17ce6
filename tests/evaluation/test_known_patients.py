"""An evaluation knows a patient that its checkpoint was trained on under the name of another year."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.data import check_data
from vaevq_med.images.manifest import load_manifest


def check(root: Path, trained: str, tested: str) -> None:
    entries = {"training": [], "validation": [], "test": [{"image": "a.png", "patient": tested}]}
    (root / "dataset.json").write_text(json.dumps(entries))
    dataset: Any = SimpleNamespace(manifest=load_manifest(root), split="test")
    stored: Any = SimpleNamespace(data={"patients": [trained], "split_hash": "another"}, path=Path("model.pt"))
    check_data(dataset, stored, any_shape=True)


def test_a_patient_of_another_year_is_known(tmp_path: Path) -> None:
    check(tmp_path, "Brats18_TCIA02_151", "Brats17_TCIA_171")
    with pytest.raises(VaevqMedError, match="Brats17_TCIA_151"):
        check(tmp_path, "Brats18_TCIA02_151", "Brats17_TCIA_151")
