"""The two bundles are one bundle, but for what images need; what differs is named here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import BUNDLE
from monai.bundle import ConfigParser

from vaevq_med.training.config import check_config

BRATS, IMAGENET = BUNDLE, BUNDLE.parent / "imagenet"
MAKEFILE = BUNDLE.parents[1] / "Makefile"
BRATS_ONLY = {"demo"}
IMAGENET_ONLY = {"random_resized_crop"}
SHARED = {"bundle_root", "dataset_dir", "output_dir"}
GENERATION = {"bundle_root", "dataset_dir", "output_dir", "experiment"}
DIFFERENT = {
    "train.json": SHARED | {"_notes_", "experiment", "in_channels"},
    "evaluate.json": SHARED | {"experiment", "split"},
    "train_autoregressive.json": GENERATION,
    "train_diffusion.json": GENERATION,
    "generate.json": {"bundle_root", "output_dir", "tokenizer_path"},
    "inference.json": SHARED | {"_notes_", "split"},
    "metadata.json": {
        *("changelog", "required_packages_version", "name", "task", "description", "data_source", "data_type"),
        *("image_classes", "pred_classes", "intended_use", "network_data_format"),
    },
}
"""Ids whose values differ, by file; everything below them may."""


def overlays(bundle: Path) -> set[str]:
    return {path.stem for path in (bundle / "overlays").glob("*.json")}


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """Each plain value by its id, lists included."""
    if isinstance(config, dict):
        items = {key: value for name, part in config.items() for key, value in flat(part, f"{path}#{name}").items()}
        return items or {path[1:]: {}}
    return {path[1:]: config}


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_the_files_differ_in_the_named_ids_only(name: str) -> None:
    brats, imagenet = (flat(json.loads((bundle / name).read_text())) for bundle in (BRATS, IMAGENET))
    different = {key for key in brats.keys() | imagenet.keys() if brats.get(key) != imagenet.get(key)}
    named = {key: next((n for n in DIFFERENT[name] if key == n or key.startswith(f"{n}#")), None) for key in different}
    assert [key for key, reason in named.items() if reason is None] == []
    assert set(named.values()) == DIFFERENT[name]


def test_the_folders_hold_the_same_files() -> None:
    def names(bundle: Path) -> set[str]:
        return {path.name for path in bundle.iterdir()}

    assert names(BRATS) == names(IMAGENET)
    assert (BRATS / "logging.conf").read_bytes() == (IMAGENET / "logging.conf").read_bytes()


def test_the_overlays_are_copies() -> None:
    assert overlays(BRATS) - overlays(IMAGENET) == BRATS_ONLY, "run: make overlays"
    assert overlays(IMAGENET) - overlays(BRATS) == IMAGENET_ONLY
    changed = [
        name
        for name in sorted(overlays(BRATS) & overlays(IMAGENET))
        if (BRATS / "overlays" / f"{name}.json").read_bytes() != (IMAGENET / "overlays" / f"{name}.json").read_bytes()
    ]
    assert changed == [], "run: make overlays"


def test_the_makefile_names_the_same_exceptions() -> None:
    (names,) = re.findall(r"^BRATS_ONLY := (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    assert set(names.split()) == BRATS_ONLY


def test_the_overlays_of_the_generators_are_copies() -> None:
    brats, imagenet = (
        {path.name: path.read_bytes() for path in (bundle / "overlays_generation").iterdir()}
        for bundle in (BRATS, IMAGENET)
    )
    assert brats == imagenet, "run: make overlays"


@pytest.mark.parametrize("name", sorted(overlays(IMAGENET)))
def test_every_overlay_is_read_by_the_imagenet_bundle(name: str) -> None:
    parser = ConfigParser()
    parser.read_config([str(IMAGENET / "train.json"), str(IMAGENET / "overlays" / f"{name}.json")])
    check_config(parser.get())
