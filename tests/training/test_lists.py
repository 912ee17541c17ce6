"""One item where a list is expected, in every id of every bundle that takes a list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import BUNDLE, toy_config
from monai.bundle import ConfigParser

from vaevq_med.images.dataset import SliceDataset
from vaevq_med.training.lists import as_lists, put_lists

FILES = sorted(
    path for bundle in (BUNDLE, BUNDLE.parent / "imagenet") for path in bundle.glob("*.json") if path.stem != "metadata"
)
RUNS = {"imports", "initialize", "run", "training", "evaluating", "generating", "finalize"}
"""Lists of expressions, which MONAI itself takes one of."""
PAIRS = {"betas"}
"""Always two, so that one is no list of them."""


def lists_of(config: Any, path: str = "") -> dict[str, list[Any]]:
    """Every list of plain values of a file, by its id."""
    found: dict[str, list[Any]] = {}
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        name = f"{path}#{key}" if path else str(key)
        if isinstance(value, list) and value and not isinstance(value[0], dict) and key not in RUNS | PAIRS:
            found[name] = value
        elif isinstance(value, dict | list) and key not in RUNS:
            found |= lists_of(value, name)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_list_of_a_bundle_takes_one_item(file: Path) -> None:
    own = json.loads(file.read_text())
    for name, value in lists_of(own).items():
        if isinstance(value[0], str) and value[0].startswith("@"):
            continue  # handlers
        parser = ConfigParser(json.loads(file.read_text()))
        parser[name] = value[0]
        assert as_lists(parser.get(), own) == {name: [value[0]]}, name
        parser[name] = tuple(value)
        assert as_lists(parser.get(), own) == {name: value}, name
    assert as_lists(json.loads(file.read_text()), own) == {}


@pytest.mark.parametrize("file", ["train.json", "evaluate.json", "inference.json"])
@pytest.mark.parametrize(
    ("given", "taken"), [("t1n", ["t1n"]), ("t1n,t2f", ["t1n", "t2f"]), (("t1n", "t2f"), ["t1n", "t2f"])]
)
def test_lists_that_are_null_by_default_take_a_word(file: str, given: Any, taken: list[str]) -> None:
    config = {**json.loads((BUNDLE / file).read_text()), "modalities": given}
    assert as_lists(config) == {"modalities": taken}
    assert as_lists({**config, "modalities": "$['t1n']"}) == {}


def test_what_takes_an_item_too_is_left_alone() -> None:
    crop = {"_target_": "monai.transforms.CenterSpatialCropd", "keys": "image", "roi_size": 3}
    config = {
        "transforms": [crop],
        "levels": 8,
        "quantizer": {"_target_": "vaevq_med.networks.FSQ", "levels": "@levels"},
    }
    assert as_lists({"crop": crop}) == {}
    quantizer = {"_target_": "vaevq_med.networks.quantizers.FSQ", "levels": "@levels", "embedding_dim": 1}
    assert as_lists({**config, "quantizer": quantizer}) == {"levels": [8]}
    metric = {"_target_": "vaevq_med.metrics.PSNR"}
    assert as_lists({**json.loads((BUNDLE / "evaluate.json").read_text()), "metrics": metric}) == {"metrics": [metric]}


def test_what_was_evaluated_before_is_not_forgotten() -> None:
    own = {"write": ["png"], "made": "$[]", "both": "$(@write, @made)"}
    parser = ConfigParser({**own, "write": "npz"})
    made = parser.get_parsed_content("made")
    put_lists(parser, own)
    written, same = parser.get_parsed_content("both")
    assert written == ["npz"]
    assert same is made


def test_a_run_takes_a_contrast_as_a_word(slice_dataset: Path, tmp_path: Path) -> None:
    overrides = {**toy_config(slice_dataset, tmp_path), "modalities": "t1n"}
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "train.json"))
    parser.update(overrides)
    put_lists(parser)
    assert {item["modality"] for item in parser.get_parsed_content("train#dataset").data} == {"t1n"}
    data = SliceDataset(dataset_dir=slice_dataset, split="test", modalities="t1n, t2f").data
    assert {item["modality"] for item in data} == {"t1n", "t2f"}
