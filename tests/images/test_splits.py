"""A data set remembers who stands in which of its splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vaevq_med.core.errors import DataError
from vaevq_med.images.splits import SplitRule, remembered_splits

RULE = SplitRule(training=0.5, validation=0.25)
STANDING = {"anna": "training", "bo": "test"}


def data_set(folder: Path, rule: object = None, splits: object = None) -> Path:
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"split": RULE.to_dict() if rule is None else rule}))
    if splits is not None:
        (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def test_it_remembers_by_its_own_rule_alone(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data", splits=STANDING)
    assert remembered_splits(folder, RULE) == STANDING
    assert remembered_splits(folder, RULE.changed(seed=1)) == {}
    assert remembered_splits(tmp_path / "none", RULE) == {}


def test_one_from_before_is_read_from_its_datalist(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data")
    assert remembered_splits(folder, RULE) == {}  # a run that was broken off before there was a datalist
    lists = {split: [{"image": f"{name}.png", "patient": name}] for name, split in STANDING.items()}
    (folder / "dataset.json").write_text(json.dumps({"validation": [], **lists}))
    assert remembered_splits(folder, RULE) == STANDING


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"split": 3}', '{"split": {"training": "most"}}'])
def test_a_damaged_recipe_moves_nobody_in_silence(text: str, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data", splits=STANDING)
    (folder / "recipe.json").write_text(text)
    with pytest.raises(DataError, match=r"recipe\.json: found it damaged .*patients would be dealt anew") as stopped:
        remembered_splits(folder, RULE)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["splits.json", "dataset.json"])
def test_a_damaged_list_moves_nobody_in_silence(name: str, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "data")
    (folder / name).write_text("{")
    with pytest.raises(DataError, match=name):
        remembered_splits(folder, RULE)
