"""``vaevq-med evaluate-samples`` on planted copies, mistakes and interrupted runs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.features import Pixels, brute_force
from helpers.stores import write_checkpoint
from ignite.engine import Engine
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn import functional as F

from vaevq_med.cli import app as cli
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.generation import EvaluateSamples, table
from vaevq_med.evaluation.neighbors import SampleNeighbors
from vaevq_med.generation.writer import SampleWriter
from vaevq_med.images.generated import find_samples, generation_record
from vaevq_med.trained.network import StoredTokenizer

SIZE = 32
COUNTS = {"training": 14, "validation": 6, "test": 6}


class Flat(Pixels):
    """Means over a finer grid of cells."""

    name = "flat"
    weights_sha256 = "cd" * 32
    num_features = 64
    cells = 8


class Classifying(Flat):
    """The same with two classes."""

    name = "classifying"
    num_classes = 2

    def logits(self, features: Tensor) -> Tensor:
        return features[:, :2]


def picture(rng: np.random.Generator) -> np.ndarray:
    smooth = gaussian_filter(rng.normal(size=(SIZE, SIZE)), 1.5)
    return np.round(255 * np.clip(0.5 + smooth / smooth.std() / 6, 0, 1)).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A data set, and samples of which one is a copy, one a copy with noise, and eight are new.

    Of new images, some are nearer than every one of so few held-out images by chance; with this seed none is.
    """
    rng = np.random.default_rng(3)
    data, samples = tmp_path / "data", tmp_path / "samples"
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, count in COUNTS.items():
        splits[split] = []
        for i in range(count):
            name = f"images/{split}/{i}.png"
            write(data / name, picture(rng))
            entry = {"image": name, "patient": f"{split}-{i // 2}", "modality": ("t1n", "t2f")[i % 2], "label": i % 2}
            splits[split].append(entry)
    content = {"name": "fields", "modality": {"0": "t1n", "1": "t2f"}, "channels_per_image": 1, "image_size": SIZE}
    content |= {"content_hash": "sha256:one", "split_hash": "sha256:two", **splits}
    (data / "dataset.json").write_text(json.dumps(content))
    for i in range(8):
        write(samples / f"new-{i}.png", picture(rng))
    pixels = [np.asarray(Image.open(data / f"images/training/{i}.png")) for i in (3, 10)]
    write(samples / "copy.png", pixels[0])
    write(samples / "noisy.png", np.clip(pixels[1] + rng.normal(0, 3, (SIZE, SIZE)), 0, 255).round().astype(np.uint8))
    return data, samples


Use = Callable[..., tuple[EvaluateSamples, Flat]]


@pytest.fixture
def command(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes the command with a stand-in for the feature network, which comes with it; it draws where asked."""

    def make(network: Flat | None = None, *, draw_pairs: bool = False, **options: Any) -> tuple[EvaluateSamples, Flat]:
        used = network or Flat()
        if not draw_pairs:
            monkeypatch.setattr(SampleNeighbors, "write_picture", lambda self, path, generated: path.touch())
        monkeypatch.setattr("vaevq_med.evaluation.generation.feature_network", lambda name, weights: used)
        data, samples = folders
        settings = {"samples": samples, "dataset": data, "output": tmp_path / "out", "workers": 0, "device": "cpu"}
        return EvaluateSamples(**{**settings, **options}), used

    return make


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    return {row["file"]: row for row in csv.DictReader((output / "memorization.csv").open())}


def test_planted_copies_are_found_and_new_images_are_not(command: Use) -> None:
    evaluate, network = command(draw_pairs=True, batch_size=5)
    report = evaluate.run()
    assert network.images == 2 * 10 + COUNTS["training"] + 2 * (COUNTS["validation"] + COUNTS["test"])
    rows = rows_of(report.output)
    assert list(rows)[:2] == ["copy.png", "noisy.png"]
    for name, i in (("copy.png", 3), ("noisy.png", 10)):
        for space in ("feature", "pixel"):
            assert rows[name][f"{space}_nearest"] == f"images/training/{i}.png"
            assert rows[name][f"{space}_patient"] == f"training-{i // 2}"
            assert rows[name][f"{space}_near"] == "1"
            assert rows[name][f"{space}_mirrored"] == "0"
    assert float(rows["copy.png"]["pixel_rmse"]) == 0
    assert float(rows["noisy.png"]["pixel_rmse"]) == pytest.approx(3 / 255, rel=0.1)
    assert {row["feature_near"] + row["pixel_near"] for name, row in rows.items() if "new" in name} == {"00"}
    record = json.loads((report.output / "metrics.json").read_text())
    assert record == report.record
    found = record["memorization"]
    assert found["n_training"] == 14
    assert found["pixel"]["identical"] == 1
    for space in ("feature", "pixel"):
        assert (found[space]["count"], found[space]["share"], found[space]["n_held_out"]) == (2, 0.2, 12)
    with Image.open(report.output / "memorization.png") as grid:
        assert np.asarray(grid).std() > 10


def test_mirrored_copies_are_found_and_shown_so(
    command: Use, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, samples = folders
    original = Image.open(data / "images/training/7.png")
    turned = original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned.save(samples / "turned.png")
    shown: dict[str, Any] = {}

    def keep(columns: dict[str, Tensor], *, titles: list[tuple[str, ...]], path: Path) -> None:
        path.touch()
        shown.update(columns=columns, titles=titles)

    monkeypatch.setattr("vaevq_med.evaluation.neighbors.neighbor_grid", keep)
    report = command(draw_pairs=True)[0].run()
    row = rows_of(report.output)["turned.png"]
    for space in ("feature", "pixel"):
        assert row[f"{space}_nearest"] == "images/training/7.png"
        assert (row[f"{space}_mirrored"], row[f"{space}_near"]) == ("1", "1")
        found = report.record["memorization"][space]
        assert (found["count"], found["count_mirrored"]) == (3, 1)
    assert (float(row["pixel_rmse"]), float(row["feature_distance"])) == (0, pytest.approx(0, abs=1e-6))
    pixel = report.record["memorization"]["pixel"]
    assert (pixel["identical"], pixel["identical_mirrored"]) == (2, 1)
    place = [lines[0] for lines in shown["titles"]].index("turned.png")
    assert all("7.png (mirrored)\n" in line for line in shown["titles"][place][1:])
    assert "mirrored" not in shown["titles"][[lines[0] for lines in shown["titles"]].index("copy.png")][1]
    for images in shown["columns"].values():
        np.testing.assert_allclose(images[place, 0].numpy(), np.asarray(turned) / 255, atol=1e-6)


class Blur(torch.nn.Module):
    """Stands in for a tokenizer: blocks of 4 x 4 pixels by their mean."""

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(images, 4), scale_factor=4)


def stored_blur(monkeypatch: pytest.MonkeyPatch, image_size: int = SIZE) -> None:
    stored = SimpleNamespace(
        check_target=lambda: None,
        value={"image_size": image_size, "in_channels": 1}.__getitem__,
        network=Blur,
        content_hash="sha256:blur",
        readout=None,
    )
    monkeypatch.setattr("vaevq_med.evaluation.generation.StoredTokenizer", lambda path: stored)


def test_copies_that_the_tokenizer_blurred_are_found(
    command: Use, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, samples = folders
    for i in (5, 6):
        pixels = np.asarray(Image.open(data / f"images/training/{i}.png")) / 255
        blocks = pixels.reshape(SIZE // 4, 4, SIZE // 4, 4).mean(axis=(1, 3))
        write(samples / f"tokens-{i}.png", np.round(255 * np.kron(blocks, np.ones((4, 4)))).astype(np.uint8))
    evaluate, network = command()
    rows = rows_of(evaluate.run().output)
    assert min(float(rows[f"tokens-{i}.png"]["pixel_rmse"]) for i in (5, 6)) > 10 / 255
    stored_blur(monkeypatch)
    evaluate, network = command(tokenizer=Path("best.pt"))
    report = evaluate.run()
    # The cache has the reference's own features, of which gFID is; the others are those of reconstructions.
    assert network.images == 2 * 12 + COUNTS["training"] + 2 * (COUNTS["validation"] + COUNTS["test"])
    rows = rows_of(report.output)
    for i in (5, 6):
        assert rows[f"tokens-{i}.png"]["pixel_nearest"] == f"images/training/{i}.png"
        assert float(rows[f"tokens-{i}.png"]["pixel_rmse"]) < 0.5 / 255
        assert rows[f"tokens-{i}.png"]["pixel_near"] == "1"
    assert report.record["provenance"]["tokenizer"] == "sha256:blur"
    assert "as the samples' tokenizer reconstructs them" in report.record["conventions"]["memorization"]


def test_a_tokenizer_that_does_not_fit_is_refused(command: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    stored_blur(monkeypatch, image_size=48)
    with pytest.raises(
        VaevqMedError, match=f"--tokenizer: found one of 48 pixels and 1 channels, expected {SIZE} and 1"
    ):
        command(tokenizer=Path("best.pt"))[0].run()
    with pytest.raises(VaevqMedError, match="--tokenizer: found it with --no-memorization"):
        command(tokenizer=Path("best.pt"), memorization=False)[0].run()


def list_samples(samples: Path) -> None:
    """The list that goes with a ``generation.json``."""
    names = "".join(f"{path.name},\n" for path in sorted(samples.glob("*.png")))
    (samples / "samples.csv").write_text("file,label\n" + names)


SOFTVQ = {"_target_": "vaevq_med.networks.quantizers.SoftVQ", "num_embeddings": 8, "embedding_dim": 4}


def test_samples_name_their_tokenizer_and_its_read_out(
    command: Use, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A sample of a training image's very indices, which SoftVQ decodes otherwise than what it trains on."""
    data, samples = folders
    ours = write_checkpoint(tmp_path / "ours.pt", SOFTVQ)
    image = 2 * torch.from_numpy(np.asarray(Image.open(data / "images/training/5.png")) / 255).float()[None, None] - 1
    decoded = {}
    for readout in ("soft", "hard"):
        with torch.no_grad():
            decoded[readout] = (StoredTokenizer(ours, readout=readout).network()(image)[0, 0] + 1) / 2
    assert (decoded["soft"] - decoded["hard"]).square().mean().sqrt() > 2 / 255
    write(samples / "tokens.png", (255 * decoded["hard"].clamp(0, 1)).round().numpy().astype(np.uint8))
    list_samples(samples)
    known = StoredTokenizer(ours).content_hash
    (samples / "generation.json").write_text(json.dumps({"tokenizer": known, "readout": "hard", "num_samples": 11}))
    report = command(tokenizer=ours)[0].run()
    assert float(rows_of(report.output)["tokens.png"]["pixel_rmse"]) < 1 / 255
    assert report.record["provenance"]["tokenizer"] == f"{known} hard"
    # Those of another read-out are in the cache beside them.
    (samples / "generation.json").write_text(json.dumps({"tokenizer": known, "readout": "soft"}))
    report = command(tokenizer=ours)[0].run()
    assert float(rows_of(report.output)["tokens.png"]["pixel_rmse"]) > 1 / 255
    other = write_checkpoint(
        tmp_path / "other.pt", SOFTVQ, change=lambda network: torch.nn.init.ones_([*network.decoder.parameters()][-1])
    )
    with pytest.raises(VaevqMedError, match=r"--tokenizer .*other\.pt: found sha256:.*, expected sha256:.*decoded the"):
        command(tokenizer=other)[0].run()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"trained_on": {"content_hash": "sha256:one", "split_hash": "sha256:two"}, "views": ["whole"]}, ""),
        ({"trained_on": {"content_hash": "sha256:one", "split_hash": "sha256:3"}}, "trained on other images or splits"),
        ({"views": ["1.1 top-left", "1.1 center flipped"]}, "trained on crops"),
        ({}, ""),
    ],
)
def test_what_the_generator_was_trained_on_is_noted(
    told: dict[str, Any], said: str, command: Use, folders: tuple[Path, Path]
) -> None:
    samples = folders[1]
    list_samples(samples)
    (samples / "generation.json").write_text(json.dumps(told))
    notes = [line for line in table(command()[0].run().record) if line.startswith("note: the generator")]
    assert len(notes) == bool(said)
    assert all(said in note for note in notes)


def test_copies_of_another_contrast_are_found(command: Use) -> None:
    evaluate, network = command(modality=["t1n"])
    report = evaluate.run()
    # Of t1n and without labels: all samples, half of each other split, but all training images beside the reference.
    assert network.images == 2 * 10 + 7 + 14 + 2 * 6
    found = report.record["memorization"]
    assert (found["n_training"], found["pixel"]["n_held_out"], found["pixel"]["identical"]) == (14, 6, 1)
    assert report.record["provenance"]["n_reference"] == 7
    row = rows_of(report.output)["copy.png"]  # of image 3, a t2f
    assert (row["pixel_nearest"], row["feature_nearest"]) == ("images/training/3.png",) * 2


def test_distances_and_figures_are_those_of_the_images(command: Use, folders: tuple[Path, Path]) -> None:
    data, samples = folders
    report = command()[0].run()

    def load(paths: list[Path]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(path)) / 255 for path in paths])

    names = sorted(path.name for path in samples.glob("*.png"))
    generated = load([samples / name for name in names])
    real = {split: load([data / f"images/{split}/{i}.png" for i in range(n)]) for split, n in COUNTS.items()}
    held_out = np.concatenate([real["validation"], real["test"]])

    def features(images: np.ndarray) -> np.ndarray:
        return (2 * images - 1).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64)

    rows = rows_of(report.output)

    def nearest_features(images: np.ndarray) -> np.ndarray:
        ways = [cdist(features(x), features(real["training"]), "cosine") for x in (images, images[..., ::-1])]
        return np.minimum(*ways).min(axis=1)

    both = np.concatenate([real["training"], real["training"][..., ::-1]])
    pixels = cdist(generated.reshape(len(names), -1), both.reshape(28, -1)) / SIZE
    cosine = nearest_features(generated)
    for i, name in enumerate(names):
        assert float(rows[name]["pixel_rmse"]) == pytest.approx(pixels[i].min(), rel=1e-7)
        assert float(rows[name]["feature_distance"]) == pytest.approx(cosine[i], abs=1e-6)
    reference = nearest_features(held_out)
    threshold = report.record["memorization"]["feature"]["threshold"]
    assert threshold == pytest.approx(np.quantile(reference, 0.01), abs=1e-6)
    overall = report.record["summary"]["overall"]
    a, b = features(generated), features(real["training"])
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert overall["gfid"] == {"value": pytest.approx(expected, abs=1e-4), "n": 10, "n_reference": 14}
    assert (overall["precision"]["value"], overall["recall"]["value"]) == brute_force(a, b, 3)
    told = report.record["provenance"]
    assert (told["feature_network"], told["feature_weights_sha256"]) == ("flat", "cd" * 32)
    assert (told["n"], told["n_reference"], told["image_size"], told["split"]) == (10, 14, SIZE, "training")
    assert "biased upward" in report.record["conventions"]["gfid"]
    assert "no more than the 64 features" in report.record["conventions"]["gfid"]


def test_the_cache_is_used_and_the_command_repeats_itself(command: Use, folders: tuple[Path, Path]) -> None:
    evaluate, network = command()
    first = evaluate.run()
    assert list(first.cached) == []
    before = {path.name: path.read_bytes() for path in first.output.iterdir()}
    assert sorted(before) == ["memorization.csv", "memorization.png", "metrics.json"]
    network.images = 0
    second = evaluate.run()
    assert network.images == 2 * 10
    assert sorted(second.cached) == sorted(COUNTS)
    assert {path.name: path.read_bytes() for path in second.output.iterdir()} == before
    # Other data, in the place of the former.
    path = folders[0] / "dataset.json"
    write(folders[0] / "images/training/0.png", picture(np.random.default_rng(9)))
    path.write_text(path.read_text().replace("sha256:one", "sha256:other"))
    network.images = 0
    third = evaluate.run()
    assert (network.images, list(third.cached)) == (2 * 10 + COUNTS["training"] + 2 * 12, [])
    assert third.record["summary"]["overall"]["gfid"] != second.record["summary"]["overall"]["gfid"]
    # A damaged file is made anew.
    files = folders[0].with_name("data.features").glob("training-*")
    training = max(files, key=lambda file: file.stat().st_mtime_ns)
    training.write_bytes(training.read_bytes()[:100])
    fourth = evaluate.run()
    assert sorted(fourth.cached) == ["test", "validation"]
    assert fourth.record == third.record


def test_features_of_other_settings_are_not_taken(command: Use) -> None:
    command()[0].run()
    for options in ({"image_size": 40}, {"max_items": 5}, {"network": Classifying()}):
        assert list(command(**options)[0].run().cached) == []
    # The copies are looked for among all contrasts, whose features are there; not so the reference's and the held-out.
    assert list(command(modality=["t1n"])[0].run().cached) == ["training"]
    # Features of images as they are do not stand for those of their mirror images.
    for path in (command()[0].dataset.with_name("data.features")).glob("test-*"):
        path.unlink()
    command(memorization=False, split="test")[0].run()
    assert sorted(command()[0].run().cached) == ["training", "validation"]


def test_without_memorization_only_the_reference_is_read(command: Use) -> None:
    evaluate, network = command()
    evaluate.run()
    network.images = 0
    other, network = command(memorization=False, split="test", cache_dir=evaluate.output / "cache")
    report = other.run()
    assert network.images == 10 + COUNTS["test"]
    assert sorted(path.name for path in report.output.iterdir()) == ["cache", "metrics.json"]
    assert "memorization" not in report.record
    assert report.record["provenance"]["split"] == "test"


def test_given_thresholds_and_no_held_out_images(command: Use, folders: tuple[Path, Path]) -> None:
    given = command(pixel_threshold=1.0)[0].run().record["memorization"]
    assert (given["pixel"]["share"], given["pixel"]["threshold_from"]) == (1, "given")
    path = folders[0] / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "validation": [], "test": []}))
    report = command()[0].run()
    assert "share" not in report.record["memorization"]["feature"]
    assert "no held-out images" in report.record["conventions"]["memorization"]
    assert rows_of(report.output)["copy.png"]["feature_near"] == ""


def test_labels_are_named_and_chosen_by(command: Use, folders: tuple[Path, Path]) -> None:
    names = [*(f"new-{i}.png" for i in range(8)), "copy.png"]
    lines = ["file,label", *(f"{name},{'t2f' if i % 2 else 0}" for i, name in enumerate(names))]
    (folders[1] / "samples.csv").write_text("\n".join(lines) + "\n")
    whole = command()[0].run()
    assert {name: row["label"] for name, row in rows_of(whole.output).items()} == {
        name: ("t1n", "t2f")[i % 2] for i, name in enumerate(names)
    }
    chosen = command(modality=["t1n"])[0].run().record["provenance"]
    assert (chosen["n"], chosen["n_reference"], chosen["modalities"]) == (5, 7, ["t1n"])


def test_the_score_where_there_are_classes(command: Use, folders: tuple[Path, Path]) -> None:
    assert "inception_score" not in command(Classifying())[0].run().record["summary"]["overall"]
    asked = command(Classifying(), inception_score=True)[0].run().record
    assert asked["summary"]["overall"]["inception_score"]["splits"] == 1
    assert "Inception-style score of classifying, 2 classes" in asked["conventions"]["inception_score"]
    path = folders[0] / "dataset.json"
    content = json.loads(path.read_text())
    content |= {"labels": content.pop("modality"), "channels_per_image": 3}
    path.write_text(json.dumps(content))
    photographs = command(Classifying())[0].run().record
    assert "inception_score" in photographs["summary"]["overall"]
    assert photographs["provenance"]["channels"] == 3
    assert photographs["memorization"]["pixel"]["identical"] == 1
    assert "inception_score" not in command(Flat())[0].run().record["summary"]["overall"]


def test_the_extrapolation_has_a_name_of_its_own(command: Use, folders: tuple[Path, Path]) -> None:
    rng = np.random.default_rng(5)
    for i in range(90):
        write(folders[1] / f"more-{i}.png", picture(rng))
    report = command(fid_infinity=True, memorization=False)[0].run()
    figures = report.record["summary"]["overall"]
    assert set(figures) == {"gfid", "precision", "recall", "fid_infinity"}
    assert figures["fid_infinity"]["value"] < figures["gfid"]["value"]
    assert "extrapolation, not gFID" in report.record["conventions"]["fid_infinity"]
    assert "do not rely on it" in report.record["conventions"]["fid_infinity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "--split: found 'train'"),
        ({"neighbors": 0}, "--neighbors: found 0"),
        ({"neighbors": 10}, "found 10 samples .* expected more than --neighbors 10"),
        ({"batch_size": 0}, "--batch-size: found 0"),
        ({"max_items": 0}, "--max-items: found 0"),
        ({"image_size": 8}, "--image-size: found 8, expected 32 to 4096"),
        ({"inception_score": True}, "'flat': found no class logits"),
        ({"fid_infinity": True}, "found 10 samples, expected at least 100 for --fid-infinity"),
        ({"pixel_threshold": -1.0}, "--pixel-threshold: found -1.0"),
        ({"feature_threshold": 0.1, "memorization": False}, "--feature-threshold: found it with --no-memorization"),
        ({"modality": ["flair"]}, "found no modality flair"),
        ({"device": "cuda:99"}, "--device: found 'cuda:99'"),
        ({"workers": -1}, "workers: found -1, expected 0 to 512"),
    ],
)
def test_bad_options_are_one_line(command: Use, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VaevqMedError, match=message) as caught:
        command(**options)[0].run()
    assert "\n" not in str(caught.value)


def test_bad_samples_are_one_line(command: Use, folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate, samples = command()[0], folders[1]
    listed = samples / "samples.csv"
    for text, message in (
        ("name\na.png\n", "found the columns name, expected file and label"),
        ("file,label\ngone.png,0\n", "line 2: found no file gone.png"),
        ("file,label\n../copy.png,0\n", r"line 2: found the file '../copy.png'"),
        ("file,label\ncopy.png,0\ncopy.png,1\n", "line 3: found copy.png a second time"),
        ("file,label\ncopy.png,7\n", "copy.png: found the label '7', expected a modality .* from 0 to 1"),
        ("file,label\n", "found no PNG files"),
    ):
        listed.write_text(text)
        with pytest.raises(VaevqMedError, match=message):
            evaluate.run()
    listed.unlink()
    (samples / "copy.png").rename(samples / "000000-channel0.png")
    for text in ("file,label\n000000-channel0.png,\n", None):
        if text:
            listed.write_text(text)
        with pytest.raises(
            VaevqMedError, match=r"found 000000-channel0\.png, one channel of stacked contrasts, expected"
        ):
            evaluate.run()
        listed.unlink(missing_ok=True)
    (samples / "000000-channel0.png").rename(samples / "copy.png")
    with pytest.raises(VaevqMedError, match="in the folder of the samples"):
        replace(evaluate, output=samples / "out").run()
    with pytest.raises(VaevqMedError, match="found no folder"):
        replace(evaluate, samples=tmp_path / "none").run()
    write(samples / "odd.png", np.zeros((SIZE, 48), dtype=np.uint8))
    with pytest.raises(VaevqMedError, match=r"48x32 \(odd.png\), expected squares of one size"):
        evaluate.run()
    (samples / "odd.png").write_bytes(b"no image")
    with pytest.raises(VaevqMedError, match=r"odd.png: found an unreadable image"):
        replace(evaluate, image_size=SIZE).run()


def test_color_against_gray_data_is_refused(command: Use, folders: tuple[Path, Path]) -> None:
    gray = np.asarray(Image.open(folders[1] / "new-0.png"))
    alike = np.stack([gray, np.clip(gray.astype(int) + 9, 0, 255).astype(np.uint8), gray], axis=-1)
    for pixels in (np.stack([gray] * 3, axis=-1), alike, np.zeros_like(alike) + np.array([0, 0, 9], np.uint8)):
        write(folders[1] / "new-0.png", pixels)
        assert command(memorization=False)[0].run().record["provenance"]["n"] == 10
    write(folders[1] / "new-0.png", np.stack([gray, gray[::-1], gray.T], axis=-1))
    with pytest.raises(VaevqMedError, match=r"new-0.png: found a color image \(saturation 0\.\d\d\), expected a gray"):
        command()[0].run()
    path = folders[0] / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channels_per_image": 3}))
    assert command()[0].run().record["provenance"]["channels"] == 3


def test_unfinished_samples_are_told_or_refused(command: Use, folders: tuple[Path, Path]) -> None:
    settings = folders[1] / "generation.json"
    settings.write_text(json.dumps({"seed": 0, "num_samples": 64}))
    with pytest.raises(VaevqMedError, match=r"found generation\.json without samples\.csv, expected both"):
        command()[0].run()
    names = [f"new-{i}.png" for i in range(8)]
    (folders[1] / "samples.csv").write_text("\n".join(["file,label", *(f"{name},{0}" for name in names)]) + "\n")
    for planned, notes in ((64, ["note: 8 of 64 samples are drawn; generate draws the others"]), (8, [])):
        settings.write_text(json.dumps({"seed": 0, "num_samples": planned}))
        record = command(max_items=5)[0].run().record
        told = record["provenance"]
        assert (told["n"], told["n_drawn"], told["n_planned"]) == (5, 8, planned)
        assert [line for line in table(record) if " drawn" in line] == notes
    settings.write_text("{")
    with pytest.raises(VaevqMedError, match=r"generation\.json: found an unreadable file"):
        command()[0].run()


class Plan:
    """The part of a plan that its writer reads: gray images without labels."""

    stored = SimpleNamespace(tokens={"in_channels": 1}, label_names=())
    labels = None

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def describe(self) -> dict[str, Any]:
        return {"seed": 0}

    def entry(self, number: int) -> dict[str, Any]:
        return {"number": number, "label": 0, "seed": number}

    __getitem__ = entry


def test_an_interrupted_run_says_how_many_samples_were_to_be_drawn(tmp_path: Path) -> None:
    def draw_images(num_samples: int, *, stop_after: int) -> None:
        writer = SampleWriter(output_dir=tmp_path, plan=Plan(num_samples), settings={}, provenance={})  # type: ignore[arg-type]

        def step(engine: Engine, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if engine.state.iteration > stop_after:
                raise KeyboardInterrupt
            return {"pred": torch.zeros(len(batch["number"]), 1, 4, 4)}

        engine = Engine(step)
        writer.attach(engine)
        engine.run(writer.loader(2))

    with pytest.raises(KeyboardInterrupt):
        draw_images(6, stop_after=1)
    assert (len(find_samples(tmp_path)), generation_record(tmp_path)["num_samples"]) == (2, 6)
    draw_images(6, stop_after=9)
    assert (len(find_samples(tmp_path)), generation_record(tmp_path)["num_samples"]) == (6, 6)
    with pytest.raises(KeyboardInterrupt):
        draw_images(12, stop_after=1)
    assert (len(find_samples(tmp_path)), generation_record(tmp_path)["num_samples"]) == (8, 12)


def test_on_the_command_line(
    command: Use,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command()
    arguments = ["vaevq-med", "evaluate-samples", str(folders[1]), str(folders[0]), "--output-dir"]
    arguments += [str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]

    def call(*more: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    code, out, _ = call()
    assert code == 0
    assert "10 samples" in out
    assert "2 samples (20.0%) below" in out
    assert "identical to a training image: 1, 0 of them in mirror image" in out
    assert "biased upward" in out
    code, out, _ = call("--json", "--no-memorization")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "metrics.json").read_text())
    code, out, err = call("--inception-score")
    assert (code, out) == (2, "")
    assert [line for line in err.splitlines() if line.startswith("vaevq-med:")] == [
        "vaevq-med: feature network 'flat': found no class logits, expected efficientnet-lite0 or inception for an "
        "Inception score"
    ]
