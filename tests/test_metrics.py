"""Metrics against scikit-image, scipy and values worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from vaevq_med.metrics import CodebookUsage, FrechetDistance, ReconstructionEvaluation
from vaevq_med.metrics.pictures import reconstruction_grid, usage_histogram
from vaevq_med.metrics.reconstruction import psnr_per_image, region_mean, region_psnr, ssim_per_image, to_unit
from vaevq_med.networks.features import FeatureNetwork


def pair(count: int = 4, size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(count, 1, size, size, generator=generator)
    noise = torch.linspace(0.02, 0.3, count).view(-1, 1, 1, 1)
    return target, (target + noise * torch.randn(target.shape, generator=generator)).clamp(0, 1)


def test_psnr_and_ssim_equal_scikit_image() -> None:
    target, prediction = pair()
    ssim, ssim_map = ssim_per_image(prediction.double(), target.double())
    for i in range(len(target)):
        a, b = target[i, 0].double().numpy(), prediction[i, 0].double().numpy()
        assert psnr_per_image(prediction, target)[i].item() == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3
        )
        reference, full = structural_similarity(
            a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        # scikit-image leaves out the border, torchmetrics reflects the image there.
        assert ssim_map[i, 5:-5, 5:-5].mean().item() == pytest.approx(reference, abs=1e-6)
        assert ssim[i].item() == pytest.approx(ssim_map[i].mean().item())
        np.testing.assert_allclose(ssim_map[i, 5:-5, 5:-5].numpy(), full[5:-5, 5:-5], atol=1e-6)


def test_psnr_of_identical_images_is_capped() -> None:
    image = torch.rand(2, 1, 12, 12)
    assert psnr_per_image(image, image).tolist() == [100.0, 100.0]


def test_rounding_to_levels() -> None:
    unit = to_unit(torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 2.0]))
    assert (unit * 255).tolist() == pytest.approx([0, 0, 128, 255, 255, 255])
    assert to_unit(torch.tensor([0.1]), uint8=False).item() == pytest.approx(0.55)


def test_regions_by_hand() -> None:
    target = torch.zeros(2, 1, 4, 4)
    prediction = torch.full((2, 1, 4, 4), 0.5)
    prediction[:, :, 0, 0] = 0.1
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    value = region_psnr(prediction, target, mask)
    assert value[0].item() == pytest.approx(20.0, abs=1e-4)
    assert math.isnan(value[1].item())
    assert region_mean(torch.arange(32.0).view(2, 4, 4), mask)[0].item() == 0.0


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    difference = a.mean(0) - b.mean(0)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(difference @ difference + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def test_frechet_distance_equals_scipy_and_streams() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 6)), rng.normal(0.3, 1.5, size=(400, 6))
    whole, streamed = FrechetDistance(num_features=6), FrechetDistance(num_features=6)
    whole.update(torch.from_numpy(a), torch.from_numpy(b))
    for first in range(0, 400, 37):
        streamed.update(torch.from_numpy(a[first : first + 37]), torch.from_numpy(b[first : first + 37]))
    assert whole.compute() == pytest.approx(frechet(a, b), rel=1e-4)
    assert streamed.compute() == pytest.approx(whole.compute(), rel=1e-6)
    assert math.isnan(FrechetDistance(num_features=6).compute())


def test_codebook_usage_by_hand() -> None:
    usage = CodebookUsage(num_embeddings=8)
    usage.update(torch.tensor([0, 0, 0, 5]).view(1, 2, 2, 1))
    usage.update(torch.tensor([5, 5, 5, 7]).view(1, 2, 2, 1))
    assert usage.utilization() == 3 / 8
    assert usage.dead_codes() == 5
    p = np.array([3, 4, 1]) / 8
    assert usage.perplexity() == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    with pytest.raises(Exception, match="expected 0 to 7"):
        usage.update(torch.tensor([8]).view(1, 1, 1, 1))


class Pixels(FeatureNetwork):
    """Counts how often it is asked."""

    name = "pixels"
    weights_sha256 = "ab" * 32
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def _layers(self, images: Tensor) -> list[Tensor]:
        return [images]

    def _pooled(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images[:, :1], 2).flatten(1)


@pytest.fixture
def evaluation(tmp_path: Path) -> tuple[ReconstructionEvaluation, Tensor, Tensor]:
    target, prediction = pair(6)
    network = Pixels()
    measured = ReconstructionEvaluation(num_embeddings=8, fid=network, provenance={"split_hash": "sha256:x"})
    order = [3, 0, 5, 1, 4, 2]
    lesion = torch.zeros(6, 24, 24, dtype=torch.bool)
    lesion[:2, 4:9, 4:9] = True
    for part in (order[:4], order[4:]):
        measured.update(
            2 * target[part] - 1,
            2 * prediction[part] - 1,
            torch.tensor(part).view(-1, 1, 1, 1),
            metadata={"modality": ["t1n" if i % 2 else "t2f" for i in part], "index": part},
            regions={"lesion": lesion[part]},
            indices_sample=torch.zeros(len(part), 1, 1, 1, dtype=torch.int64),
        )
    assert network.images == 12
    return measured, target, prediction


def test_evaluation_groups_and_orders(evaluation: tuple[ReconstructionEvaluation, Tensor, Tensor]) -> None:
    measured, target, prediction = evaluation
    report = measured.compute()
    a, b = (np.round(x[:, 0].numpy() * 255) / 255 for x in (target, prediction))
    expected = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b, strict=True)]
    assert [row["index"] for row in report.per_image] == list(range(6))
    assert [row["psnr"] for row in report.per_image] == pytest.approx(expected, abs=1e-3)
    overall = report.summary["overall"]
    assert overall["psnr"]["value"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert overall["psnr"]["std"] == pytest.approx(np.std(expected, ddof=1), abs=1e-3)
    assert overall["utilization"]["value"] == 6 / 8
    assert overall["utilization_sample"]["value"] == 1 / 8
    assert report.summary["modality"]["t1n"]["psnr"] == pytest.approx(
        {"value": np.mean(expected[1::2]), "std": np.std(expected[1::2], ddof=1), "n": 3}, abs=1e-3
    )
    inside = [10 * np.log10(1 / np.mean((a[i] - b[i])[4:9, 4:9] ** 2)) for i in range(2)]
    assert report.summary["region"]["lesion"]["psnr"]["value"] == pytest.approx(np.mean(inside), abs=1e-3)
    assert report.summary["region"]["lesion"]["psnr"]["n"] == 2
    assert report.provenance["fid_network"] == "pixels"


def test_evaluation_record_is_complete(
    evaluation: tuple[ReconstructionEvaluation, Tensor, Tensor], tmp_path: Path
) -> None:
    report = evaluation[0].compute()
    report.save(tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["provenance"] == {
        "split_hash": "sha256:x",
        "n": 6,
        "fid_network": "pixels",
        "fid_weights_sha256": "ab" * 32,
    }
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    (rfid,) = (row for row in rows if row["metric"] == "rfid" and row["group"] == "all")
    assert rfid["feature_network"] == "pixels"
    assert rfid["split_hash"] == "sha256:x"
    assert rfid["n"] == "6"
    assert len(list(csv.DictReader((tmp_path / "per_image.csv").open()))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json", "per_image.csv"]


def test_pictures_show_what_they_are_given(tmp_path: Path) -> None:
    target, prediction = pair(3)
    reconstruction_grid(
        2 * target - 1, 2 * prediction - 1, 2 * target - 1, labels=["a", "b", "c"], path=tmp_path / "grid.png"
    )
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (1000, 700)
        assert np.asarray(grid).std() > 10
    usage_histogram(torch.tensor([[0, 5, 1, 100]]), tmp_path / "usage.png")
    with Image.open(tmp_path / "usage.png") as histogram:
        assert np.asarray(histogram).std() > 10
