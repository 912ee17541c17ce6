"""The segmentation bundle as MONAI runs it, at toy size: training, evaluation, inference, and a run taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, write_slice_dataset
from helpers.bundles import run_bundle, states_equal
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

from vaevq_med.tasks import load_segmenter
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.training.config import check_config

SEGMENTATION = BUNDLE.parent / "segmentation"
OVERLAYS = sorted(path.stem for path in (SEGMENTATION / "overlays").glob("*.json"))


def toy(dataset: Path, output: Path) -> dict[str, Any]:
    """Two epochs of three steps on images of 32 pixels."""
    return {
        "dataset_dir": str(dataset),
        "output_dir": str(output),
        "tracking_uri": "none",
        "device": "cpu",
        "image_size": 32,
        "depth": 3,
        "max_epochs": 2,
        "batch_size": 2,
        "epoch_length": 3,
        "num_workers": 0,
        "warmup_steps": 1,
        "final_learning_rate_ratio": 1.0,  # so that the schedule does not depend on the length of the run
        "checkpoint_interval": 2,
        "network_def#num_channels": 8,
        "network_def#blocks_down": [1, 1],
        "network_def#blocks_up": [1],
    }


def read(overrides: dict[str, Any], *further: str) -> dict[str, Any]:
    names = ("dataset_dir", "output_dir", "device", "num_workers", "batch_size", *further)
    return {name: overrides[name] for name in names}


def run(file: str, overrides: dict[str, Any], *overlays: str) -> ConfigParser:
    return run_bundle(file, overrides, *overlays, bundle=SEGMENTATION)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, slice_dataset: Path) -> dict[str, Any]:
    overrides = toy(slice_dataset, tmp_path_factory.mktemp("segmentation") / "run")
    run("train.json", overrides)
    return overrides


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_is_read(name: str) -> None:
    parser = ConfigParser()
    base = ["labeled_2"] if name.startswith("teacher") else []
    files = [SEGMENTATION / "overlays" / f"{one}.json" for one in (*base, name)]
    parser.read_config([str(SEGMENTATION / "train.json"), *map(str, files)])
    check_config(parser.get())
    for key in json.loads(files[-1].read_text()).keys() - {"_notes_", "_title_"}:
        parser[key]


@pytest.mark.parametrize("file", ["train.json", "evaluate.json", "inference.json"])
def test_monai_finds_every_property(file: str, trained: dict[str, Any]) -> None:
    workflow = ConfigWorkflow(
        config_file=str(SEGMENTATION / file),
        meta_file=str(SEGMENTATION / "metadata.json"),
        workflow_type="train" if file == "train.json" else "infer",
        **(trained if file == "train.json" else read(trained)),
    )
    workflow.initialize()
    assert not workflow.check_properties()


def test_a_run_leaves_what_a_segmenter_needs(trained: dict[str, Any]) -> None:
    folder = Path(trained["output_dir"])
    last = read_checkpoint(folder / "checkpoints" / "last.pt")
    assert last["iteration"] == 6
    assert last["best"]["metric"] == "dice"
    segmenter = load_segmenter(folder / "checkpoints" / "best.pt", "cpu")
    assert segmenter.segment(torch.rand(4, 2, 40, 36)).shape == (3, 2, 40, 36)
    assert json.loads((folder / "run.json").read_text())["iterations"] == 6


def test_the_evaluation_is_that_of_the_labels_that_inference_writes(trained: dict[str, Any]) -> None:
    overrides = {**read(trained), "split": "test"}
    run("evaluate.json", {**overrides, "tracking_uri": "none", "spacing": [2.0, 1.0, 1.0]})
    run("inference.json", overrides)
    folder = Path(trained["output_dir"])
    record = json.loads((folder / "evaluation" / "test" / "scores.json").read_text())
    case, dataset = "BraTS-GLI-00002-100", Path(trained["dataset_dir"])
    labels, reference = (
        np.stack([np.array(Image.open(path)) for path in sorted((root / "labels" / case).glob("*.png"))])
        for root in (folder / "predictions" / "test", dataset)
    )
    assert labels.shape == reference.shape == (4, 32, 32)
    for name, values in {"whole_tumor": (1, 2, 3), "enhancing_tumor": (3,)}.items():
        found, wanted = np.isin(labels, values), np.isin(reference, values)
        both, total = (found & wanted).sum(), found.sum() + wanted.sum()
        (row,) = (row for row in record["rows"] if row["region"] == name)
        assert row["dice"] == pytest.approx(2 * both / total)
        assert row["volume_ml"] == pytest.approx(found.sum() * 2 / 1000)
    assert record["provenance"]["spacing"] == [2.0, 1.0, 1.0]


def test_what_was_trained_on_is_no_test(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(trained["dataset_dir"]) / "dataset.json"
    content = json.loads(path.read_text())
    content["training"], content["test"] = content["test"], content["training"]
    moved = Path(trained["output_dir"]).parent / "moved"
    moved.mkdir()
    for folder in ("images", "labels"):
        (moved / folder).symlink_to(path.parent / folder)
    (moved / "dataset.json").write_text(json.dumps({**content, "split_hash": "sha256:moved"}))
    with pytest.raises(SystemExit):
        run("evaluate.json", {**read(trained), "tracking_uri": "none", "dataset_dir": str(moved)})
    assert "split 'test': found" in capsys.readouterr().err


def test_an_interrupted_run_ends_with_the_same_bits(trained: dict[str, Any], tmp_path: Path) -> None:
    overrides = {**trained, "output_dir": str(tmp_path / "run")}
    run("train.json", {**overrides, "max_epochs": 1})
    run("train.json", overrides)
    ended, whole = (
        read_checkpoint(Path(one["output_dir"]) / "checkpoints" / "last.pt") for one in (overrides, trained)
    )
    assert ended["iteration"] == whole["iteration"]
    for key in ("network", "ema", "optimizer", "rng"):
        assert states_equal(ended[key], whole[key])


@pytest.mark.parametrize("row", [name for name in OVERLAYS if name.startswith("teacher")])
def test_every_row_of_semi_supervised_training_runs(row: str, tmp_path: Path) -> None:
    """Of two patients one is labeled; the teacher's word counts from the first step, as it need not be sure."""
    dataset = write_slice_dataset(tmp_path / "slices", slices=2)
    content = json.loads((dataset / "dataset.json").read_text())
    content["training"] += content["validation"]
    (dataset / "dataset.json").write_text(json.dumps(content))
    overrides = {
        **toy(dataset, tmp_path / "run"),
        "max_epochs": 1,
        "labeled_patients": 1,
        "loss_def#confidence": 0.5,
        "network_def#quantizer#num_embeddings": 16,
    }
    trainer = run("train.json", overrides, "labeled_2", row).get_parsed_content("train#trainer")
    assert trainer.state.iteration == 3
    assert trainer.loss.weights["consistency"] == 1.0
    assert trainer.state.terms["consistency"] > 0
