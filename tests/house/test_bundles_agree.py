"""The two bundles are one bundle, but for what images need; what differs is named here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import BUNDLE
from monai.bundle import ConfigParser

from vaevq_med.core.resources import overlay_files
from vaevq_med.training.config import check_config

BRATS, IMAGENET = BUNDLE, BUNDLE.parent / "imagenet"
SHARED = {"bundle_root", "dataset_dir", "output_dir"}
GENERATION = {"bundle_root", "dataset_dir", "output_dir", "experiment"}
DIFFERENT = {
    "train.json": SHARED | {"_notes_", "experiment", "in_channels"},
    "evaluate.json": SHARED | {"experiment", "metrics", "split"},
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

    assert names(BRATS) == names(IMAGENET) - {"overlays"}
    assert (BRATS / "logging.conf").read_bytes() == (IMAGENET / "logging.conf").read_bytes()


@pytest.mark.parametrize("name", list(overlay_files(IMAGENET)))
def test_every_overlay_is_read_by_the_imagenet_bundle(name: str) -> None:
    parser = ConfigParser()
    parser.read_config([str(IMAGENET / "train.json"), str(overlay_files(IMAGENET)[name])])
    check_config(parser.get())
