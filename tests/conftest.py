"""Fixtures: a small slice data set written by hand, the real sample data, and the bundle at toy size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).resolve().parent / "fixtures"
BUNDLE = ROOT / "bundles" / "brats"
# A busy machine makes any example slow; the same examples each time, and others by --hypothesis-profile=explore.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeated", deadline=None, derandomize=True)
settings.load_profile("repeated")
OVERLAYS = BUNDLE.parent / "overlays"


def write_slice_dataset(root: Path, *, size: int = 32, slices: int = 4, seed: int = 0) -> Path:
    """Three patients of blurred disks with a bright spot, in the schema of ``slice-extract``."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-1, 1, size)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    splits: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
    for number, split in enumerate(splits):
        patient = f"BraTS-GLI-{number:05d}"
        case = f"{patient}-100"
        for folder in ("images", "labels"):
            (root / folder / case).mkdir(parents=True, exist_ok=True)
        for z in range(slices):
            radius = 0.6 + 0.05 * z
            spot = (x - 0.2) ** 2 + (y + 0.1 * number) ** 2 < 0.04
            labels = np.where(spot, 3, 0).astype(np.uint8)
            Image.fromarray(labels).save(root / "labels" / case / f"{case}-seg-z{z:03d}.png")
            for label, modality in enumerate(MODALITIES):
                brain = np.clip(1.5 * (radius**2 - x**2 - y**2), 0, 0.6) * (1 + 0.1 * label)
                image = np.clip(brain + 0.3 * spot * (label == 1) + 0.05 * rng.random((size, size)) * (brain > 0), 0, 1)
                name = f"images/{case}/{case}-{modality}-z{z:03d}.png"
                Image.fromarray((image * 255).round().astype(np.uint8)).save(root / name)
                splits[split].append(
                    {
                        "image": name,
                        "patient": patient,
                        "case": case,
                        "modality": modality,
                        "label": label,
                        "slice": z,
                        "intensity_window": [0.0, 100.0],
                        "foreground": float((image > 0).mean()),
                        "segmentation": f"labels/{case}/{case}-seg-z{z:03d}.png",
                        "region_area": {
                            name: int(spot.sum()) for name in ("whole_tumor", "tumor_core", "enhancing_tumor")
                        },
                    }
                )
    manifest = {
        "name": "toy",
        "description": "disks",
        "tensorImageSize": "2D",
        "modality": {str(i): name for i, name in enumerate(MODALITIES)},
        "channels_per_image": 1,
        "label_map": {"whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": [3]},
        "segmentation_labels": {"1": "NETC", "2": "SNFH", "3": "ET", "4": "RC"},
        "image_size": size,
        "format": "png",
        "recipe": {},
        "versions": {},
        "content_hash": "sha256:toy",
        "split_hash": "sha256:toy",
        **splits,
    }
    (root / "dataset.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="session")
def slice_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy slice data set, read only."""
    return write_slice_dataset(tmp_path_factory.mktemp("slices"))


def toy_config(dataset_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Overrides that make the BraTS bundle train on the toy data in seconds."""
    small = {
        "num_channels": 8,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "z_channels": 8,
    }
    overrides: dict[str, Any] = {
        "dataset_dir": str(dataset_dir),
        "output_dir": str(output_dir),
        "tracking_uri": "none",
        "device": "$torch.device('cpu')",
        "image_size": 32,
        "num_embeddings": 32,
        "embedding_dim": 4,
        "max_epochs": 2,
        "batch_size": 4,
        "num_workers": 0,
        "warmup_steps": 2,
        "checkpoint_interval": 3,
        "discriminator_def#num_channels": 8,
        "discriminator_def#num_layers": 1,
        "objective#adversarial#start_step": 2,
    }
    for part in ("encoder", "decoder"):
        overrides |= {f"network_def#{part}#{key}": value for key, value in small.items()}
    return overrides


def trainer_of(overrides: dict[str, Any], *overlays: str) -> Any:
    """The BraTS bundle's trainer of a tokenizer, ready to run."""
    from monai.bundle import ConfigWorkflow

    files = [str(BUNDLE / "train.json"), *(str(OVERLAYS / f"{name}.json") for name in overlays)]
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **overrides)
    workflow.initialize()
    return workflow.parser.get_parsed_content("train#trainer")


@pytest.fixture
def toy_overrides(slice_dataset: Path, tmp_path: Path) -> dict[str, Any]:
    """:func:`toy_config` on the toy data, into a fresh folder."""
    return toy_config(slice_dataset, tmp_path / "run")


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The real sample data; skips where it is absent."""
    folder = Path(os.environ.get("VAEVQ_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "brats-sample").is_dir():
        pytest.skip(f"no sample data in {folder}; set VAEVQ_SAMPLE_DATA")
    return folder
