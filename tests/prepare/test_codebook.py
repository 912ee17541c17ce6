"""``vaevq-med feature-codebook``: clusters of features that come in portions, and the file that holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.transforms import LoadPhotograph
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.quantizers.vqgan_lc import read_features
from vaevq_med.prepare.codebook import FeatureCodebook, StreamingClusters


def test_clusters_are_found_in_portions_of_any_size() -> None:
    rng = np.random.default_rng(0)
    blobs = np.stack([np.arange(8) * 10.0, -np.arange(8) * 10.0], axis=1)
    points = (blobs[rng.integers(0, 8, 6000)] + 0.1 * rng.standard_normal((6000, 2))).astype(np.float32)
    clusters = StreamingClusters(8, seed=1)
    held = 0
    for portion in np.split(points, [1, 40, 900, 2000, 5990]):
        clusters.add(portion)
        held = max(held, sum(map(len, clusters.waiting)))
    assert held < 1024  # after each portion
    centers = clusters.centers()
    assert clusters.count == 6000
    np.testing.assert_allclose(centers[centers[:, 0].argsort()], blobs, atol=0.1)


def test_fewer_features_than_centers_are_refused() -> None:
    clusters = StreamingClusters(8)
    clusters.add(np.zeros((7, 2), np.float32))
    with pytest.raises(DataError, match="found 7 features, expected at least 8"):
        clusters.centers()


def command(dataset: Path, output: Path, **options: Any) -> FeatureCodebook:
    settings = {"num_embeddings": 16, "grid": 1, "image_size": 32, "workers": 0, "device": "cpu", "batch_size": 3}
    return FeatureCodebook(dataset, output, **{**settings, **options})


def test_a_file_that_is_there_is_replaced_on_demand_alone(slice_dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    path.write_text("another maker's")
    with pytest.raises(VaevqMedError, match="found something there, expected nothing; --overwrite replaces a file"):
        command(slice_dataset, path).run()
    assert path.read_text() == "another maker's"
    command(slice_dataset, path, overwrite=True).run()
    assert read_features(path).shape == (16, 320)


def test_as_many_codewords_as_features_are_the_features(slice_dataset: Path, tmp_path: Path) -> None:
    """The toy set has 4 training images of each of 4 contrasts; at 32 pixels the deepest map is one position."""
    seen: list[int] = []
    report = command(slice_dataset, tmp_path / "new" / "features.npz").run(on_start=seen.append, on_images=seen.append)
    assert seen == [16, 3, 3, 3, 3, 3, 1]
    assert report.classes == dict.fromkeys(("t1n", "t1c", "t2w", "t2f"), 4)
    assert (report.num_embeddings, report.num_features, report.features, report.distinct) == (16, 320, 16, 16)
    network = feature_network("efficientnet-lite0")
    images = SliceDataset(dataset_dir=slice_dataset, split="training", transform=LoadPhotograph(in_channels=3))
    batch = torch.stack([images[number]["image"] for number in range(16)])
    expected = network._layers(batch)[-1].mean(dim=(2, 3))
    found = read_features(report.output)
    nearest = torch.cdist(expected, found).min(dim=1)
    assert sorted(nearest.indices.tolist()) == list(range(16))
    torch.testing.assert_close(found[nearest.indices], expected, rtol=1e-3, atol=1e-3)
    # Codewords stand in the order of the classes.
    modalities = [images.data[number]["modality"] for number in range(16)]
    assert {(m, int(i) // 4) for m, i in zip(modalities, nearest.indices, strict=True)} == {
        (m, number) for number, m in enumerate(report.classes)
    }
    with np.load(report.output) as archive:
        provenance = json.loads(str(archive["provenance"]))
    assert provenance["content_hash"] == "sha256:toy"
    assert provenance["weights_sha256"] == network.weights_sha256
    assert {"network": "efficientnet-lite0", "seed": 0, "grid": 1, "images": 16}.items() <= provenance.items()
    assert [path.name for path in report.output.parent.iterdir()] == ["features.npz"]


def test_a_grid_of_features_and_the_same_file_for_the_same_seed(slice_dataset: Path, tmp_path: Path) -> None:
    options = {"num_embeddings": 6, "grid": 2, "image_size": 64, "per_class": False, "max_items": 5}
    first, second, other = (
        command(slice_dataset, tmp_path / f"{name}.npz", seed=seed, **options).run()
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    )
    assert first.features == 5 * 4
    assert first.classes == {}
    assert first.output.read_bytes() == second.output.read_bytes()
    assert not torch.equal(read_features(first.output), read_features(other.output))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_embeddings": 17}, r"found 4 features of class t1n .* expected at least 5 for --num-embeddings 17"),
        ({"num_embeddings": 17, "per_class": False}, r"found 16 features \("),
        ({"num_embeddings": 3}, "found 3 for 4 classes"),
        ({"num_embeddings": 0}, "--num-embeddings: found 0"),
        ({"grid": 2, "image_size": 32}, "--grid: found 2, expected at most 1"),
        ({"image_size": 16}, "--image-size: found 16"),
        ({"batch_size": 0}, "--batch-size: found 0"),
        ({"seed": -1}, "--seed: found -1"),
        ({"seed": 2**32}, "--seed: found 4294967296"),
        ({"network": "inception9"}, "found 'inception9'"),
        ({"device": "quantum"}, "--device: found 'quantum'"),
        ({"output": Path("features.txt")}, "suffix '.txt'"),
        ({"output": Path("/proc/nowhere/features.npz")}, "not writable"),
        ({"dataset": Path("nowhere")}, "found no data set"),
    ],
)
def test_what_cannot_be_clustered_is_refused_in_one_line(
    options: dict[str, Any], said: str, slice_dataset: Path, tmp_path: Path
) -> None:
    settings = {"dataset": slice_dataset, "output": tmp_path / "features.npz", **options}
    with pytest.raises(VaevqMedError, match=said) as error:
        command(**settings).run()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "features.npz").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_training_image_is_named_in_one_line(workers: int, slice_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(slice_dataset, tmp_path / "data")
    path = sorted((tmp_path / "data/images/BraTS-GLI-00000-100").glob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError) as stopped:
        command(tmp_path / "data", tmp_path / "features.npz", workers=workers).run()
    assert str(stopped.value).startswith(f"{path}: found an unreadable image (")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "features.npz").exists()
