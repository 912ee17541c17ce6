"""Metrics against scikit-image, scipy and values worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.features import Pixels
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.pictures import reconstruction_grid, usage_histogram
from vaevq_med.evaluation.reconstruction import ReconstructionEvaluation
from vaevq_med.metrics.base import ImageMetric
from vaevq_med.metrics.codebook import CodebookUsage
from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.reconstruction import PSNR, psnr_per_image, region_mean, region_psnr, ssim_per_image, to_unit
from vaevq_med.metrics.statistics import FrechetDistance


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


def test_frechet_distance_of_a_process_that_saw_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    other, own = FrechetDistance(num_features=3), FrechetDistance(num_features=3)
    other.update(torch.randn(40, 3, generator=generator), torch.randn(40, 3, generator=generator))

    def reduce(tensor: Tensor) -> None:  # over two processes, of which this one has nothing
        tensor += torch.as_tensor(other.count) if tensor.ndim == 0 else other._sums

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    found = own.compute()
    monkeypatch.undo()
    assert found == other.compute() > 0
    assert own.count == 0


def test_frechet_distance_equals_torchmetrics() -> None:
    class Given(torch.nn.Module):
        num_features = 6

        def forward(self, features: Tensor) -> Tensor:
            return features

    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.normal(shift, scale, size=(300, 6))) for shift, scale in ((0, 1), (0.4, 1.7)))
    peer = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    peer.update(a, real=True)
    peer.update(b, real=False)
    own = FrechetDistance(num_features=6)
    own.update(a, b)
    assert own.compute() == pytest.approx(float(peer.compute()), rel=1e-6)


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


def test_what_is_absent_is_no_codeword() -> None:
    """Of K = 4: two used alike, and six positions without a code."""
    usage = CodebookUsage(num_embeddings=5, num_codewords=4)
    usage.update(torch.tensor([4, 4, 4, 4, 4, 4, 0, 2]).view(1, 2, 4, 1))
    assert (usage.utilization(), usage.dead_codes()) == (0.5, 2.0)
    assert usage.perplexity() == pytest.approx(2.0)
    assert usage.counts.tolist() == [[1, 0, 1, 0, 6]]


def test_codebook_usage_by_hand() -> None:
    usage = CodebookUsage(num_embeddings=8)
    usage.update(torch.tensor([0, 0, 0, 5]).view(1, 2, 2, 1))
    usage.update(torch.tensor([5, 5, 5, 7]).view(1, 2, 2, 1))
    assert usage.utilization() == 3 / 8
    assert usage.dead_codes() == 5
    p = np.array([3, 4, 1]) / 8
    assert usage.perplexity() == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    with pytest.raises(Exception, match="from 8 to 8; expected within 0 to 7"):
        usage.update(torch.tensor([8]).view(1, 1, 1, 1))


class Maps(Pixels):
    """A network that gives maps and vectors in one pass, and counts the images of each pass."""

    def _both(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return self._layers(images), self._pooled(images)

    def _layers(self, images: Tensor) -> list[Tensor]:
        return [images[:, :2], images[:, 1:, ::2, ::2]]


def test_one_network_for_lpips_and_rfid_sees_an_image_once() -> None:
    target, prediction = pair(6)
    rows = []
    for networks in ((Maps(), Maps()), (Maps(),) * 2):
        measured = ReconstructionEvaluation(num_embeddings=8, lpips=networks[0], fid=networks[1])
        measured.update(target, prediction, None, metadata={"index": range(6)})
        report = measured.compute()
        rows.append([row["lpips"] for row in report.per_image] + [report.overall()["rfid"]])
        assert networks[1].images == 12
    assert rows[0] == rows[1]


def test_figures_of_a_device_are_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is not finite is named then, by its own path."""
    target, prediction = pair(6)
    late, at_once = (ReconstructionEvaluation(num_embeddings=8) for _ in range(2))
    read = late._read
    monkeypatch.setattr(late, "_read", lambda: None)
    for measured in (late, at_once):
        for part in (slice(0, 4), slice(4, 6)):
            rows = {"index": [*range(6)][part], "path": [f"{i}.png" for i in range(6)][part]}
            measured.update(target[part], prediction[part], None, metadata=rows)
    monkeypatch.setattr(late, "_read", read)
    assert late._rows == []
    assert late.compute().per_image == at_once.compute().per_image
    bad = prediction.clone()
    bad[2, 0, 3, 3] = float("nan")
    monkeypatch.setattr(late, "_read", lambda: None)
    late.update(target, bad, None, metadata={"path": [f"{i}.png" for i in range(6)]})
    monkeypatch.setattr(late, "_read", read)
    with pytest.raises(VaevqMedError, match=r"2\.png: found NaN"):
        late.compute()


def test_an_update_on_a_device_never_makes_the_host_wait() -> None:
    """A fake tensor has no values: to ask for one would be an error here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    network = Maps()
    with FakeTensorMode(allow_non_fake_inputs=True):
        measured = ReconstructionEvaluation(num_embeddings=8, lpips=network, fid=network, device="cuda")
        images = torch.zeros(4, 1, 24, 24, device="cuda")
        mask = torch.ones(4, 24, 24, dtype=torch.bool, device="cuda")
        indices = torch.zeros(4, 3, 3, 1, dtype=torch.int64, device="cuda")
        for _ in range(2):
            measured.update(
                images,
                images,
                indices,
                metadata={"index": range(4), "modality": ["t1n", "t2w"] * 2},
                regions={"brain": mask},
                indices_sample=indices,
            )


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
            # The first channel says which image it is, the second nothing.
            posterior=(
                torch.tensor([[i, 0.05] for i in part]).view(-1, 2, 1, 1),
                torch.full((len(part), 2, 1, 1), 0.5),
            ),
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
    assert overall["active_channels"] == overall["active_channels_relative"] == {"value": 1, "n": 6}
    assert "0.01" in report.conventions["active_channels"]
    assert measured.channels.of_means().tolist() == pytest.approx([np.var(range(6)), 0])
    assert report.summary["modality"]["t1n"]["psnr"] == pytest.approx(
        {"value": np.mean(expected[1::2]), "std": np.std(expected[1::2], ddof=1), "n": 3}, abs=1e-3
    )
    inside = [10 * np.log10(1 / np.mean((a[i] - b[i])[4:9, 4:9] ** 2)) for i in range(2)]
    assert report.summary["region"]["lesion"]["psnr"]["value"] == pytest.approx(np.mean(inside), abs=1e-3)
    assert report.summary["region"]["lesion"]["psnr"]["n"] == 2
    assert report.provenance["fid_network"] == "pixels"


def test_a_record_of_a_tokenizer_without_a_posterior_counts_its_channels() -> None:
    """Variances 1, 0.04 and 0.0049 of values -a and a; 0.01 of their mean is 0.0035."""
    target, prediction = (2 * x - 1 for x in pair(4))
    measured = ReconstructionEvaluation(num_embeddings=8)
    latent = torch.tensor([1.0, 0.2, 0.07, 0.0]).view(4, 1, 1) * torch.tensor([[-1.0, 1.0]]) + 3
    for part in (slice(0, 1), slice(1, 4)):
        there = latent.expand(4, 4, 1, 2)[part]
        measured.update(target[part], prediction[part], None, metadata={}, posterior=(there, None))
    report = measured.compute()
    assert report.summary["overall"]["active_channels_relative"] == {"value": 3, "n": 4}
    assert "without a posterior" in report.conventions["active_channels_relative"]
    for table in (report.summary["overall"], report.conventions):
        assert "active_channels" not in table


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
    assert rfid["weights_sha256"] == "ab" * 32
    assert rfid["split_hash"] == "sha256:x"
    assert rfid["n"] == "6"
    assert len(list(csv.DictReader((tmp_path / "per_image.csv").open()))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json", "per_image.csv"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reconstruction_that_is_not_finite_is_no_figure(value: float) -> None:
    target = torch.zeros(2, 1, 16, 16)
    prediction = target.clone()
    prediction[1, 0, 3, 3] = value
    measured = ReconstructionEvaluation(num_embeddings=8)
    with pytest.raises(VaevqMedError, match=r"b\.png: found NaN or infinity"):
        measured.update(target, prediction, None, metadata={"modality": ["t1n"] * 2, "path": ["a.png", "b.png"]})


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


def test_ssim_counts_the_mirrored_border() -> None:
    target, prediction = (x.double() for x in pair())
    value, full = ssim_per_image(prediction, target)

    def smooth(array: np.ndarray) -> np.ndarray:
        return gaussian_filter(array, 1.5, truncate=3.5, mode="mirror")

    for i in range(len(target)):
        x, y = prediction[i, 0].numpy(), target[i, 0].numpy()
        mean_x, mean_y = smooth(x), smooth(y)
        variances = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        expected = luminance * (2 * (smooth(x * y) - mean_x * mean_y) + 0.03**2) / (variances + 0.03**2)
        np.testing.assert_allclose(full[i].numpy(), expected, atol=1e-6)
        assert value[i].item() == pytest.approx(expected.mean(), abs=1e-6)


def test_rounding_hides_an_error_below_half_a_level() -> None:
    target = torch.full((1, 1, 12, 12), 100 / 255 * 2 - 1)
    other = target + 0.4 / 255 * 2
    assert psnr_per_image(to_unit(other), to_unit(target)).item() == 100
    exact = psnr_per_image(to_unit(other, uint8=False), to_unit(target, uint8=False)).item()
    assert exact == pytest.approx(-20 * math.log10(0.4 / 255), abs=1e-2)


def test_several_codebooks_are_counted_apart_and_averaged() -> None:
    usage = CodebookUsage(num_embeddings=4, num_codebooks=2)
    usage.update(torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]]).view(1, 2, 2, 2))
    assert usage.counts.tolist() == [[4, 0, 0, 0], [1, 1, 1, 1]]
    assert usage.utilization() == pytest.approx((1 / 4 + 1) / 2)
    assert usage.dead_codes() == pytest.approx((3 + 0) / 2)
    assert usage.perplexity() == pytest.approx((1 + 4) / 2)
    with pytest.raises(VaevqMedError, match="found 1 indices a position, expected 2"):
        usage.update(torch.zeros(1, 2, 2, 1, dtype=torch.int64))


def test_perceptual_and_frechet_distances_by_modality() -> None:
    target, prediction = pair(6)
    network = Pixels()
    measured = ReconstructionEvaluation(num_embeddings=8, lpips=network, fid=network)
    modalities = ["t1n", "t2f"] * 3
    measured.update(2 * target - 1, 2 * prediction - 1, None, metadata={"modality": modalities})
    report = measured.compute()
    a, b = 2 * to_unit(2 * target - 1) - 1, 2 * to_unit(2 * prediction - 1) - 1
    real, fake = network.pooled(a).double().numpy(), network.pooled(b).double().numpy()
    lpips = network.distance(b, a).double().numpy()
    groups = {"t1n": slice(0, None, 2), "t2f": slice(1, None, 2)}
    tables = [(report.summary["modality"][name], part) for name, part in groups.items()]
    for table, part in [(report.summary["overall"], slice(None)), *tables]:
        assert table["lpips"]["value"] == pytest.approx(lpips[part].mean(), rel=1e-5)
        assert table["rfid"]["value"] == pytest.approx(frechet(real[part], fake[part]), abs=1e-4)
        assert table["rfid"]["n"] == table["lpips"]["n"] == len(lpips[part])
    assert "LPIPS-style" in report.conventions["lpips"]


def test_one_image_gives_null_where_nothing_can_be_said(tmp_path: Path) -> None:
    target, prediction = pair(1)
    measured = ReconstructionEvaluation(num_embeddings=8, fid=Pixels())
    empty = {"lesion": torch.zeros(1, 24, 24, dtype=torch.bool)}
    measured.update(2 * target - 1, 2 * prediction - 1, None, metadata={"modality": ["t1n"]}, regions=empty)
    report = measured.compute()
    report.save(tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    summary = json.loads(text)["summary"]
    assert summary["overall"]["rfid"] == {"value": None, "n": 1}
    assert summary["overall"]["psnr"]["std"] is None
    assert summary["region"] == {}
    assert set(report.overall()) == {"psnr", "ssim", "psnr_t1n", "ssim_t1n"}
    assert "biased upward: 1 images for 4 features" in report.conventions["rfid"]


class LargestDeviation(ImageMetric):
    """The largest error, which is no mean over pixels."""

    figure = Figure("largest_error", "Largest error", 3, higher_is_better=False, convention="of any pixel")

    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        return (target - reconstruction).abs().amax(dim=(1, 2, 3))


class Scalar(LargestDeviation):
    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        return (target - reconstruction).abs().max()


def test_a_metric_of_ones_own_is_measured_and_described(tmp_path: Path) -> None:
    evaluation = ReconstructionEvaluation(num_embeddings=4, metrics=[LargestDeviation(), PSNR()], uint8=False)
    target, reconstruction = pair()
    region = {"half": torch.arange(24).view(1, 1, 24).expand(4, 24, 24) < 12}
    metadata = {"index": [0, 1, 2, 3], "modality": ["t1n", "t2f"] * 2}
    evaluation.update(2 * target - 1, 2 * reconstruction - 1, None, metadata=metadata, regions=region)
    report = evaluation.compute()
    expected = np.abs(target.numpy() - reconstruction.numpy()).max(axis=(1, 2, 3))
    np.testing.assert_allclose([row["largest_error"] for row in report.per_image], expected, rtol=1e-6)
    assert report.summary["modality"]["t2f"]["largest_error"]["value"] == pytest.approx(expected[1::2].mean())
    assert set(report.summary["overall"]) == {"largest_error", "psnr"}
    # It has no figure of a region, where PSNR has one.
    half = peak_signal_noise_ratio(target[0, 0, :, :12].numpy(), reconstruction[0, 0, :, :12].numpy(), data_range=1)
    assert set(report.summary["region"]["half"]) == {"psnr"}
    assert report.per_image[0]["psnr_half"] == pytest.approx(half, rel=1e-5)
    report.save(tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["conventions"]["largest_error"] == "of any pixel"
    assert [figure["name"] for figure in record["figures"]] == ["largest_error", "psnr"]
    assert Figure.of({**record["figures"][0], "of_a_later_version": 1}) == LargestDeviation.figure


class Nameless(ImageMetric):
    def per_image(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        return target.mean(dim=(1, 2, 3))


class Taken(Nameless):
    figure = Figure("modality", "Modality")


class Listed(LargestDeviation):
    def per_image(self, target: Tensor, reconstruction: Tensor) -> Any:
        return [0.0] * len(target)


@pytest.mark.parametrize("name", ["largest error", "", "größe", "a,b", "1st"])
def test_a_figure_has_a_plain_name(name: str) -> None:
    with pytest.raises(VaevqMedError, match="expected letters, digits and '_'"):
        Figure(name, "Title")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([PSNR(), PSNR()], "psnr, psnr, expected each name once"),
        (["psnr"], "expected objects derived from ImageMetric"),
        ([Nameless()], "expected objects derived from ImageMetric, each with a figure"),
        ([Taken()], "found a figure called modality, which the record has already"),
    ],
)
def test_what_is_no_set_of_metrics_is_one_line(metrics: list[Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        ReconstructionEvaluation(num_embeddings=4, metrics=metrics)


def test_a_metric_that_is_not_one_of_images_is_one_line() -> None:
    evaluation = ReconstructionEvaluation(num_embeddings=4, metrics=[Scalar()])
    with pytest.raises(VaevqMedError, match=r"largest_error: found figures of shape \[\], expected \[4\]"):
        evaluation.update(*pair(), None, metadata={"index": [0, 1, 2, 3]})
    evaluation = ReconstructionEvaluation(num_embeddings=4, metrics=[Listed()])
    with pytest.raises(VaevqMedError, match=r"largest_error: found figures of shape list, expected \[4\]"):
        evaluation.update(*pair(), None, metadata={"index": [0, 1, 2, 3]})


def test_a_region_that_the_last_batch_lacks_is_kept() -> None:
    target, prediction = (2 * x - 1 for x in pair(4))
    measured = ReconstructionEvaluation(num_embeddings=8)
    metadata = {"modality": ["t1n"] * 2}
    lesion = torch.ones(2, 24, 24, dtype=torch.bool)
    measured.update(target[:2], prediction[:2], None, metadata=metadata, regions={"lesion": lesion})
    measured.update(target[2:], prediction[2:], None, metadata=metadata)
    assert measured.compute().summary["region"]["lesion"]["psnr"]["n"] == 2
