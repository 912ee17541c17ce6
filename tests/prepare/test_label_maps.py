"""Segmentations as images of a data set of their own, and the figures and losses of such images."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import toy_config
from helpers.bundles import evaluation_overrides, quick, run_bundle
from monai.losses import DiceLoss
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import load_manifest
from vaevq_med.images.reading import reader
from vaevq_med.images.transforms import REGIONS, LoadSliced
from vaevq_med.losses.reconstruction import ReconstructionLoss
from vaevq_med.metrics.labels import LabelDice
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.prepare.label_maps import LabelMaps


def damaged(source: Path, target: Path) -> Path:
    """A copy of a data set whose first segmentation is empty."""
    shutil.copytree(source, target)
    entry = next(entry for entry in load_manifest(target).entries("training") if entry.get("segmentation"))
    path = target / entry["segmentation"]
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    return target


def test_each_segmentation_is_an_image_once_and_keeps_its_split(slice_dataset: Path, tmp_path: Path) -> None:
    report = LabelMaps(slice_dataset, tmp_path / "labels").run()
    source, made = load_manifest(slice_dataset), load_manifest(tmp_path / "labels")
    for split in ("training", "validation", "test"):
        segmented = {entry["segmentation"]: entry for entry in source.entries(split) if entry.get("segmentation")}
        tumors = {
            path: entry
            for path, entry in segmented.items()
            if np.isin(np.asarray(Image.open(slice_dataset / path)), source.label_map["whole_tumor"]).any()
        }
        found = {(entry["case"], entry["slice"]): entry for entry in made.entries(split)}
        assert len(found) == report.images[split] == len(made.entries(split)) == len(tumors)
        for path, entry in tumors.items():
            values = np.asarray(Image.open(slice_dataset / path))
            own = found[entry["case"], entry["slice"]]
            assert own["patient"] == entry["patient"]
            picture = np.asarray(Image.open(tmp_path / "labels" / own["image"]))
            for channel, name in enumerate(REGIONS):
                np.testing.assert_array_equal(picture[..., channel] == 255, np.isin(values, source.label_map[name]))
    item = SliceDataset(
        dataset_dir=tmp_path / "labels",
        split="training",
        transform=reader(tmp_path / "labels", image_size=int(made.content["image_size"]), in_channels=3),
    )[0]
    assert set(item["image"].unique().tolist()) <= {-1.0, 1.0}


def test_what_was_made_of_other_images_is_replaced_on_demand_alone(slice_dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    first = LabelMaps(slice_dataset, output).run()
    again = LabelMaps(slice_dataset, output).run()
    assert again == first
    with pytest.raises(DataError, match="label maps of other images or options"):
        LabelMaps(slice_dataset, output, keep_empty=True).run()
    before = (output / "dataset.json").read_bytes()
    LabelMaps(slice_dataset, output, keep_empty=True, overwrite=True).run()
    LabelMaps(slice_dataset, output, overwrite=True).run()
    assert (output / "dataset.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(DataError, match="other things in it"):
        LabelMaps(slice_dataset, tmp_path / "full").run()


def test_slices_without_a_tumor_are_left_out_unless_wanted(slice_dataset: Path, tmp_path: Path) -> None:
    source = damaged(slice_dataset, tmp_path / "source")
    left = LabelMaps(source, tmp_path / "tumors").run()
    kept = LabelMaps(source, tmp_path / "all", keep_empty=True).run()
    assert sum(kept.images.values()) == sum(left.images.values()) + left.left_out["without a tumor"]
    assert left.left_out["without a tumor"] >= 1
    assert kept.left_out["without a tumor"] == 0


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
    """A data set beside another, whose entries are changed; None leaves one out."""
    shutil.copytree(source, target)
    content = json.loads((source / "dataset.json").read_text())
    for split in ("training", "validation", "test"):
        content[split] = [new for new in map(change, content[split]) if new is not None]
    (target / "dataset.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("case", ["../../evil", "/evil", "a/b", "..", ""])
def test_no_name_in_a_data_set_leads_out_of_the_output(case: str, slice_dataset: Path, tmp_path: Path) -> None:
    source = edited(slice_dataset, tmp_path / "in" / "source", lambda entry: {**entry, "case": case})
    before = {*tmp_path.rglob("*")}
    output = tmp_path / "in" / "out"
    LabelMaps(source, output).run()
    assert all(path.is_relative_to(output) for path in {*tmp_path.rglob("*")} - before)
    made = load_manifest(output)
    images = [entry["image"] for split in ("training", "validation", "test") for entry in made.entries(split)]
    assert images
    assert all((output / image).is_file() for image in images)


def test_slices_that_say_neither_case_nor_number_are_told_apart(slice_dataset: Path, tmp_path: Path) -> None:
    def plain(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key not in ("case", "slice")}

    source = edited(slice_dataset, tmp_path / "source", plain)
    report, usual = LabelMaps(source, tmp_path / "out").run(), LabelMaps(slice_dataset, tmp_path / "usual").run()
    assert (report.images, report.left_out["without a tumor"]) == (usual.images, usual.left_out["without a tumor"])
    made = load_manifest(tmp_path / "out")
    files = {entry["image"] for split in ("training", "validation", "test") for entry in made.entries(split)}
    assert len(files) == sum(report.images.values()) > 1
    assert {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/*.png")} == files


def test_contrasts_with_a_copy_each_of_a_segmentation_give_one_label_map(slice_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "source"

    def copied(entry: dict[str, Any]) -> dict[str, Any]:
        if not entry.get("segmentation"):
            return entry
        own = f"own/{entry['modality']}/{entry['segmentation']}"
        (root / own).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / entry["segmentation"], root / own)
        return {**entry, "segmentation": own}

    edited(slice_dataset, root, copied)
    report, usual = LabelMaps(root, tmp_path / "out").run(), LabelMaps(slice_dataset, tmp_path / "usual").run()
    assert (report.images, report.left_out) == (usual.images, usual.left_out)


@pytest.mark.parametrize(("mode", "told"), [("RGB", "mode RGB"), ("I;16", "mode I;16"), ("LA", "mode LA")])
def test_a_segmentation_of_more_than_labels_is_refused_in_a_line(
    mode: str, told: str, slice_dataset: Path, tmp_path: Path
) -> None:
    source = damaged(slice_dataset, tmp_path / "source")
    entry = next(entry for entry in load_manifest(source).entries("training") if entry.get("segmentation"))
    path = source / entry["segmentation"]
    size = Image.open(path).size
    values = np.full(size[::-1], 257, np.uint16)  # which 8 bit would wrap to the label 1
    (Image.fromarray(values) if mode == "I;16" else Image.new(mode, size)).save(path)
    with pytest.raises(
        DataError, match=rf"{path.name}: found an unreadable segmentation \({told}\), expected an 8-bit"
    ):
        LabelMaps(source, tmp_path / "out").run()
    item = {"image": str(source / entry["image"]), "segmentation": str(path)}
    labels = load_manifest(source).label_map
    with pytest.raises(DataError, match=f"unreadable segmentation .{told}"):
        LoadSliced(image_size=32, label_map=labels)(item)


def test_a_segmentation_in_the_colors_of_a_palette_is_read_by_its_labels(slice_dataset: Path, tmp_path: Path) -> None:
    source = damaged(slice_dataset, tmp_path / "source")
    usual = LabelMaps(source, tmp_path / "usual").run()
    for path in (source / "labels").rglob("*.png"):
        image = Image.fromarray(np.asarray(Image.open(path))).convert("P")
        image.putdata(list(np.asarray(Image.open(path)).flatten()))
        image.putpalette([9, 200, 7] * 256)
        image.save(path)
    assert LabelMaps(source, tmp_path / "out").run().images == usual.images
    same = [
        path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "usual")).read_bytes()
        for path in tmp_path.glob("usual/images/**/*.png")
    ]
    assert same
    assert all(same)


def test_images_without_segmentations_are_refused_in_a_line(slice_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    content = json.loads((slice_dataset / "dataset.json").read_text())
    for split in ("training", "validation", "test"):
        content[split] = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in content[split]]
    (copy / "dataset.json").write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["label-maps", str(copy), str(tmp_path / "out")])
    assert isinstance(done.exception, DataError)
    assert "no slice with a segmentation" in str(done.exception)
    content.pop("label_map")
    (copy / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="without a label map"):
        LabelMaps(copy, tmp_path / "out").run()


def test_dice_of_label_maps_is_the_f_score_of_their_pixels() -> None:
    draw = torch.Generator().manual_seed(0)
    target = (torch.rand(4, 3, 9, 7, generator=draw) > 0.6).float()
    found = (0.6 * target + 0.5 * torch.rand(4, 3, 9, 7, generator=draw)).clamp(0, 1)
    target[3, 2] = 0
    found[3, 2] = 0.5  # half of the range is not above it
    figures = LabelDice().measure(target, found, {})
    masks = found > 0.5
    for item in range(4):
        whole = f1_score(target[item].flatten().numpy(), masks[item].flatten().numpy())
        assert figures["dice"][item].item() == pytest.approx(whole)
        for channel in range(3):
            own = figures[f"dice_channel{channel}"][item].item()
            if (item, channel) == (3, 2):
                assert math.isnan(own)
            else:
                pair = target[item, channel].flatten().numpy(), masks[item, channel].flatten().numpy()
                assert own == pytest.approx(f1_score(*pair))
    assert torch.equal(LabelDice().per_image(target, target), torch.ones(4))


@pytest.mark.parametrize("kind", ["bce", "dice"])
def test_losses_of_masks_read_the_decoder_as_logits(kind: str) -> None:
    draw = torch.Generator().manual_seed(1)
    target = (torch.rand(2, 3, 6, 5, generator=draw) > 0.5).float() * 2 - 1
    logits = torch.randn(2, 3, 6, 5, generator=draw)
    quantizer = VectorQuantizer(num_embeddings=2, embedding_dim=1)
    output = TokenizerOutput(logits, None, torch.zeros(2, 1, 1, 1), None, quantizer(torch.zeros(2, 1, 1, 1)))
    masks = (target + 1) / 2
    expected = {
        "bce": nn.BCELoss()(logits.sigmoid(), masks),
        "dice": DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)(logits, masks),
    }
    assert ReconstructionLoss(kind=kind)(target, output).item() == pytest.approx(expected[kind].item(), rel=1e-5)


def test_what_is_found_in_a_channel_of_empty_masks_costs_something() -> None:
    """Dice with a pixel more: 1 - 1 / (S + 1) of S found, whose slope is 1 / (S + 1)^2 a share."""
    target = -torch.ones(2, 1, 4, 4)
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    quantizer = VectorQuantizer(num_embeddings=2, embedding_dim=1)
    output = TokenizerOutput(logits, None, torch.zeros(2, 1, 1, 1), None, quantizer(torch.zeros(2, 1, 1, 1)))
    loss = ReconstructionLoss(kind="dice")(target, output)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(1 - 1 / 17)  # 32 pixels of one half
    torch.testing.assert_close(gradient, torch.full_like(logits, 0.25 / 17**2))


def test_a_tokenizer_of_label_maps_is_trained_and_judged_by_dice(slice_dataset: Path, tmp_path: Path) -> None:
    LabelMaps(slice_dataset, tmp_path / "labels").run()
    toy = toy_config(tmp_path / "labels", tmp_path / "run")
    run_bundle("train.json", quick(toy) | {"max_epochs": 1}, "label_maps", run_id="training")
    figures = {
        "metrics": [{"_target_": "vaevq_med.metrics.LabelDice"}],
        "lpips_network": None,
        "fid_network": None,
        "split": "validation",
    }
    run_bundle("evaluate.json", {**evaluation_overrides(toy), **figures}, run_id="evaluating")
    record = json.loads((tmp_path / "run/evaluation/validation/metrics.json").read_text())
    summary = record["summary"]
    assert 0 <= summary["overall"]["dice"]["value"] <= 1
    with (tmp_path / "run/evaluation/validation/per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    for channel in range(3):
        name = f"dice_channel{channel}"
        values = np.array([float(row[name]) for row in rows])
        assert summary["overall"][name]["n"] == np.isfinite(values).sum() > 0
        assert summary["overall"][name]["value"] == pytest.approx(np.nanmean(values))
        assert summary["modality"]["labels"][name] == summary["overall"][name]
    assert summary["region"] == {}
