"""Metrics against scikit-image, SciPy and arithmetic by hand, and the record of an evaluation."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from vaevq_med.errors import VaevqMedError
from vaevq_med.metrics import (
    CodebookUsage,
    EvaluationReport,
    FrechetDistance,
    ReconstructionEvaluation,
    psnr_per_image,
    region_mean,
    region_psnr,
    ssim_per_image,
    to_unit,
)
from vaevq_med.metrics.pictures import reconstruction_grid, usage_histogram
from vaevq_med.networks.features import FeatureNetwork


class CornerFeatures(FeatureNetwork):
    """Means over the four quadrants: four features, cheap and easy to do again by hand."""

    name = "corners"
    weights_sha256 = "c0" * 32
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self._freeze()

    def _layers(self, images: Tensor) -> list[Tensor]:
        return [images]

    def _pooled(self, images: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)


def image_pair(
    batch: int = 4, channels: int = 1, size: int = 32, noise: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, size // 4, size // 4, generator=generator)
    target = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    return (target + noise * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def frechet_by_scipy(real: np.ndarray, fake: np.ndarray) -> float:
    root = sqrtm(np.cov(real, rowvar=False) @ np.cov(fake, rowvar=False)).real
    covariances = np.cov(real, rowvar=False) + np.cov(fake, rowvar=False) - 2 * root
    return float(((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(covariances))


class TestToUnit:
    def test_rounds_to_the_nearest_of_256_levels(self) -> None:
        levels = torch.tensor([0.0, 0.4, 0.6, 1.0, 127.4, 127.6, 254.4, 254.6, 255.0])
        found = to_unit((levels / 255 * 2 - 1).view(1, 1, 3, 3)) * 255
        torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 0, 1, 1, 127, 128, 254, 255, 255]))

    def test_clamps(self) -> None:
        images = torch.tensor([-7.0, -1.0, 1.0, 7.0]).view(1, 1, 2, 2)
        for uint8 in (True, False):
            assert to_unit(images, uint8=uint8).flatten().tolist() == [0, 0, 1, 1]

    def test_without_rounding_it_is_affine(self) -> None:
        images = torch.rand(2, 1, 5, 5) * 2 - 1
        torch.testing.assert_close(to_unit(images, uint8=False), (images + 1) / 2)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, 255), min_size=1, max_size=16))
    def test_images_of_256_levels_pass_unchanged(self, levels: list[int]) -> None:
        unit = torch.tensor(levels, dtype=torch.float64).view(1, 1, 1, -1) / 255
        found = to_unit((2 * unit - 1).float())
        assert (found * 255).round().flatten().int().tolist() == levels
        torch.testing.assert_close(found.double(), unit, atol=1e-6, rtol=0)

    def test_rounding_hides_an_error_of_less_than_half_a_level(self) -> None:
        target = torch.full((1, 1, 16, 16), 100 / 255 * 2 - 1)
        other = target + 0.4 / 255 * 2
        assert psnr_per_image(to_unit(other), to_unit(target)).item() == 100
        assert psnr_per_image(to_unit(other, uint8=False), to_unit(target, uint8=False)).item() < 60


class TestPSNR:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_equals_skimage_image_by_image(self, channels: int) -> None:
        prediction, target = image_pair(channels=channels)
        found = psnr_per_image(prediction, target)
        expected = [
            peak_signal_noise_ratio(t.numpy(), p.numpy(), data_range=1) for p, t in zip(prediction, target, strict=True)
        ]
        assert found.shape == (4,)
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_by_hand(self) -> None:
        target = torch.zeros(3, 1, 4, 4)
        prediction = torch.stack([torch.full((1, 4, 4), value) for value in (0.1, 0.01, 1.0)])
        torch.testing.assert_close(psnr_per_image(prediction, target), torch.tensor([20.0, 40.0, 0.0]))

    def test_identical_images_have_the_cap_and_leave_the_others_alone(self) -> None:
        prediction, target = image_pair(batch=2)
        prediction[0] = target[0]
        found = psnr_per_image(prediction, target)
        assert found[0] == 100
        assert 10 < found[1] < 40


class TestSSIM:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_equals_skimage_but_for_the_border_that_skimage_leaves_out(self, channels: int) -> None:
        prediction, target = image_pair(channels=channels, noise=0.05)
        _, full = ssim_per_image(prediction, target)
        assert full.shape == (4, 32, 32)
        inner = full[:, 5:-5, 5:-5]
        for i in range(4):
            expected, expected_map = structural_similarity(
                target[i].double().numpy(),
                prediction[i].double().numpy(),
                win_size=11,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1,
                channel_axis=0,
                full=True,
            )
            assert inner[i].mean().item() == pytest.approx(expected, abs=1e-5)
            np.testing.assert_allclose(inner[i], expected_map.mean(0)[5:-5, 5:-5], atol=1e-4)

    def test_the_border_counts_and_is_mirrored(self) -> None:
        prediction, target = image_pair(noise=0.05)
        value, full = ssim_per_image(prediction, target)

        def smooth(array: np.ndarray) -> np.ndarray:
            return gaussian_filter(array, 1.5, truncate=3.5, mode="mirror")

        for i in range(4):
            x, y = prediction[i, 0].double().numpy(), target[i, 0].double().numpy()
            mean_x, mean_y = smooth(x), smooth(y)
            var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
            covariance = smooth(x * y) - mean_x * mean_y
            luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
            expected = luminance * (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
            np.testing.assert_allclose(full[i], expected, atol=5e-4)
            assert value[i].item() == pytest.approx(expected.mean(), abs=1e-5)

    def test_identical_images_have_one(self) -> None:
        _, target = image_pair()
        value, full = ssim_per_image(target, target)
        torch.testing.assert_close(value, torch.ones(4))
        torch.testing.assert_close(full, torch.ones(4, 32, 32))

    def test_constant_images_by_hand(self) -> None:
        target, prediction = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.25)
        expected = (2 * 0.5 * 0.25 + 0.01**2) / (0.5**2 + 0.25**2 + 0.01**2)
        assert ssim_per_image(prediction, target)[0].item() == pytest.approx(expected, abs=1e-4)


class TestRegions:
    def test_psnr_counts_only_the_region(self) -> None:
        target = torch.zeros(1, 1, 8, 8)
        prediction = torch.ones(1, 1, 8, 8)
        mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        mask[0, 2:4, 2:4] = True
        prediction[0, 0, 2:4, 2:4] = torch.tensor([[0.1, 0.1], [0.3, 0.3]])
        expected = -10 * math.log10((0.01 + 0.01 + 0.09 + 0.09) / 4)
        assert region_psnr(prediction, target, mask).item() == pytest.approx(expected, abs=1e-4)

    def test_psnr_of_the_whole_image_is_psnr(self) -> None:
        prediction, target = image_pair(channels=3)
        torch.testing.assert_close(
            region_psnr(prediction, target, torch.ones(4, 32, 32, dtype=torch.bool)), psnr_per_image(prediction, target)
        )

    def test_a_perfect_region_has_the_cap_and_an_empty_one_nan(self) -> None:
        images = torch.rand(2, 1, 8, 8)
        mask = torch.zeros(2, 8, 8, dtype=torch.bool)
        mask[0, 0, 0] = True
        found = region_psnr(images, images, mask)
        assert found[0] == 100
        assert found[1].isnan()
        mean = region_mean(images[:, 0], mask)
        assert mean[0] == images[0, 0, 0, 0]
        assert mean[1].isnan()


class TestFrechet:
    def features(self, count: int, width: int = 6) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(0)
        mix = rng.normal(size=(width, width))
        real = rng.normal(size=(count, width)) @ mix
        fake = rng.normal(size=(count, width)) * 1.3 + 0.2
        return torch.from_numpy(real).float(), torch.from_numpy(fake).float()

    def test_equals_scipy(self) -> None:
        real, fake = self.features(300)
        distance = FrechetDistance(num_features=6)
        distance.update(real, fake)
        assert distance.compute() == pytest.approx(frechet_by_scipy(real.numpy(), fake.numpy()), rel=1e-4)
        assert distance.count == 300

    def test_gaussians_of_known_moments(self) -> None:
        rng = np.random.default_rng(1)
        white = rng.normal(size=(400, 3))
        white -= white.mean(0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
        scales, shift = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.0, -1.0])
        distance = FrechetDistance(num_features=3)
        distance.update(torch.from_numpy(white), torch.from_numpy(white * scales + shift))
        assert distance.compute() == pytest.approx(((scales - 1) ** 2).sum() + (shift**2).sum(), abs=1e-6)

    def test_chunks_give_what_all_at_once_gives(self) -> None:
        real, fake = self.features(101)
        whole, chunked = FrechetDistance(num_features=6), FrechetDistance(num_features=6)
        whole.update(real, fake)
        for start in range(0, 101, 7):
            chunked.update(real[start : start + 7], fake[start : start + 7])
        assert chunked.compute() == pytest.approx(whole.compute(), rel=1e-9)

    def test_the_same_features_have_none(self) -> None:
        real, _ = self.features(50)
        distance = FrechetDistance(num_features=6)
        distance.update(real, real)
        assert distance.compute() == pytest.approx(0, abs=1e-6)

    def test_far_from_the_origin_the_sums_stay_exact(self) -> None:
        real, fake = self.features(200)
        near, far = FrechetDistance(num_features=6), FrechetDistance(num_features=6)
        near.update(real.double(), fake.double())
        far.update(real.double() + 1000, fake.double() + 1000)
        assert far.compute() == pytest.approx(near.compute(), rel=1e-5)

    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two_images_give_nan(self, count: int) -> None:
        distance = FrechetDistance(num_features=6)
        if count:
            real, fake = self.features(1)
            distance.update(real, fake)
        assert math.isnan(distance.compute())


class TestCodebookUsage:
    def test_by_hand(self) -> None:
        usage = CodebookUsage(num_embeddings=8)
        usage.update(torch.tensor([0, 0, 0, 0, 1, 1, 5, 5]).view(1, 2, 4, 1))
        assert usage.counts.tolist() == [[4, 2, 0, 0, 0, 2, 0, 0]]
        assert usage.utilization() == 3 / 8
        assert usage.dead_codes() == 5
        assert usage.perplexity() == pytest.approx(math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4)))

    def test_extremes(self) -> None:
        uniform, single = CodebookUsage(num_embeddings=16), CodebookUsage(num_embeddings=16)
        uniform.update(torch.arange(16).view(1, 4, 4, 1))
        single.update(torch.full((1, 4, 4, 1), 3))
        assert uniform.perplexity() == pytest.approx(16)
        assert (uniform.utilization(), uniform.dead_codes()) == (1, 0)
        assert single.perplexity() == pytest.approx(1)
        assert (single.utilization(), single.dead_codes()) == (1 / 16, 15)

    def test_several_codebooks_are_counted_apart_and_averaged(self) -> None:
        usage = CodebookUsage(num_embeddings=4, num_codebooks=2)
        usage.update(torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]]).view(1, 2, 2, 2))
        assert usage.counts.tolist() == [[4, 0, 0, 0], [1, 1, 1, 1]]
        assert usage.utilization() == pytest.approx((1 / 4 + 1) / 2)
        assert usage.dead_codes() == pytest.approx((3 + 0) / 2)
        assert usage.perplexity() == pytest.approx((1 + 4) / 2)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 39))
    def test_batches_add_up_and_perplexity_is_bounded_by_the_used_codes(self, indices: list[int], cut: int) -> None:
        grid = torch.tensor(indices).view(-1, 1, 1, 1)
        whole, parts = CodebookUsage(num_embeddings=10), CodebookUsage(num_embeddings=10)
        whole.update(grid)
        parts.update(grid[:cut])
        parts.update(grid[cut:])
        assert torch.equal(whole.counts, parts.counts)
        used = len(set(indices))
        assert whole.utilization() * 10 + whole.dead_codes() == pytest.approx(10)
        assert 1 - 1e-9 <= whole.perplexity() <= used + 1e-9

    @pytest.mark.parametrize("indices", [[[4]], [[-1]], [[0, 0]]])
    def test_refuses_what_is_no_index(self, indices: list[list[int]]) -> None:
        with pytest.raises(VaevqMedError, match="expected"):
            CodebookUsage(num_embeddings=4).update(torch.tensor(indices).view(1, 1, 1, -1))


class TestReconstructionEvaluation:
    modalities = ("t1n", "t2f", "t1n", "t2f", "t1n", "t2f")
    order = (5, 3, 1, 0, 2, 4)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        prediction, target = image_pair(batch=6, seed=3)
        mask = torch.zeros(6, 32, 32, dtype=torch.bool)
        mask[:4, 8:20, 10:20] = True
        return 2 * target - 1, 2 * prediction - 1, mask

    def evaluate(self, *, step: int = 4, network: FeatureNetwork | None = None) -> EvaluationReport:
        target, prediction, mask = self.batch()
        indices = torch.arange(6 * 4).view(6, 2, 2, 1) % 5
        network = network or CornerFeatures()
        evaluation = ReconstructionEvaluation(
            num_embeddings=8,
            lpips=network,
            fid=network,
            provenance={"split_hash": "sha256:s", "checkpoint_sha256": "k"},
        )
        for start in range(0, 6, step):
            part = slice(start, start + step)
            evaluation.update(
                target[part],
                prediction[part],
                indices[part],
                metadata={"index": torch.tensor(self.order[part]), "modality": list(self.modalities[part])},
                regions={"spot": mask[part], "nowhere": torch.zeros_like(mask[part])},
                indices_sample=torch.zeros_like(indices[part]),
            )
        return evaluation.compute()

    def test_overall_and_each_modality_are_means_of_the_images_own_values(self) -> None:
        target, prediction, _ = self.batch()
        unit_target, unit = to_unit(target), to_unit(prediction)
        report = self.evaluate()
        psnr, ssim = psnr_per_image(unit, unit_target), ssim_per_image(unit, unit_target)[0]
        lpips = CornerFeatures().distance(2 * unit - 1, 2 * unit_target - 1)
        for name, values in (("psnr", psnr), ("ssim", ssim), ("lpips", lpips)):
            entry = report.summary["overall"][name]
            assert entry["value"] == pytest.approx(values.double().mean().item(), rel=1e-5)
            assert entry["std"] == pytest.approx(values.double().std().item(), rel=1e-4)
            assert entry["n"] == 6
            for offset, modality in enumerate(("t1n", "t2f")):
                group = report.summary["modality"][modality][name]
                assert group["value"] == pytest.approx(values[offset::2].double().mean().item(), rel=1e-5)
                assert group["n"] == 3

    def test_frechet_distance_overall_and_by_modality(self) -> None:
        target, prediction, _ = self.batch()
        network = CornerFeatures()
        real = network.pooled(2 * to_unit(target) - 1).numpy()
        fake = network.pooled(2 * to_unit(prediction) - 1).numpy()
        report = self.evaluate()
        assert report.summary["overall"]["rfid"]["value"] == pytest.approx(frechet_by_scipy(real, fake), rel=1e-3)
        for offset, modality in enumerate(("t1n", "t2f")):
            entry = report.summary["modality"][modality]["rfid"]
            assert entry["value"] == pytest.approx(frechet_by_scipy(real[offset::2], fake[offset::2]), abs=1e-4)
            assert entry["n"] == 3

    def test_features_of_a_batch_are_extracted_once(self) -> None:
        network = CornerFeatures()
        self.evaluate(step=3, network=network)
        assert network.calls == 2

    def test_a_region_leaves_out_the_images_without_it(self) -> None:
        target, prediction, mask = self.batch()
        report = self.evaluate()
        psnr = region_psnr(to_unit(prediction), to_unit(target), mask)[:4]
        entry = report.summary["region"]["spot"]["psnr"]
        assert entry["value"] == pytest.approx(psnr.double().mean().item(), rel=1e-5)
        assert entry["n"] == report.summary["region"]["spot"]["ssim"]["n"] == 4
        assert "nowhere" not in report.summary["region"]
        assert not any("nowhere" in name for name in report.overall())
        rows = {row["index"]: row for row in report.per_image}
        assert math.isnan(rows[self.order[5]]["psnr_spot"])
        assert rows[self.order[0]]["psnr_spot"] == pytest.approx(psnr[0].item(), rel=1e-5)

    def test_a_region_that_the_last_batch_lacks_is_kept(self) -> None:
        target, prediction, mask = self.batch()
        evaluation = ReconstructionEvaluation(num_embeddings=8)
        metadata = {"modality": ["t1n"] * 3}
        evaluation.update(target[:3], prediction[:3], None, metadata=metadata, regions={"spot": mask[:3]})
        evaluation.update(target[3:], prediction[3:], None, metadata=metadata)
        assert evaluation.compute().summary["region"]["spot"]["psnr"]["n"] == 3

    def test_rows_are_ordered_by_index(self) -> None:
        target, prediction, _ = self.batch()
        report = self.evaluate()
        assert [row["index"] for row in report.per_image] == [0, 1, 2, 3, 4, 5]
        values = psnr_per_image(to_unit(prediction), to_unit(target))
        for position, index in enumerate(self.order):
            assert report.per_image[index]["psnr"] == pytest.approx(values[position].item(), rel=1e-5)
            assert report.per_image[index]["modality"] == self.modalities[position]

    @pytest.mark.parametrize("step", [1, 6])
    def test_batches_do_not_matter(self, step: int) -> None:
        expected, found = self.evaluate().overall(), self.evaluate(step=step).overall()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name

    def test_codebook_figures(self) -> None:
        report = self.evaluate()
        overall = report.overall()
        assert overall["utilization"] == 5 / 8
        assert overall["dead_codes"] == 3
        assert overall["utilization_sample"] == 1 / 8
        assert overall["perplexity_sample"] == pytest.approx(1)
        assert report.usage_counts.tolist() == [[5, 5, 5, 5, 4, 0, 0, 0]]

    def test_without_indices_and_networks_there_are_no_such_figures(self) -> None:
        target, prediction, _ = self.batch()
        evaluation = ReconstructionEvaluation(num_embeddings=8)
        evaluation.update(target, prediction, None, metadata={"modality": list(self.modalities)})
        report = evaluation.compute()
        assert set(report.summary["overall"]) == {"psnr", "ssim"}
        assert report.provenance == {"n": 6}

    def test_provenance_names_count_networks_hashes_and_bias(self) -> None:
        report = self.evaluate()
        assert report.provenance == {
            "split_hash": "sha256:s",
            "checkpoint_sha256": "k",
            "n": 6,
            "lpips_network": "corners",
            "lpips_weights_sha256": "c0" * 32,
            "fid_network": "corners",
            "fid_weights_sha256": "c0" * 32,
        }
        assert "256 levels" in report.conventions["images"]
        assert "LPIPS-style" in report.conventions["lpips"]
        assert "biased" not in report.conventions["rfid"]

    def test_too_few_images_for_the_features_are_said_to_be_biased(self) -> None:
        target, prediction, _ = self.batch()
        evaluation = ReconstructionEvaluation(num_embeddings=8, fid=CornerFeatures())
        evaluation.update(target[:4], prediction[:4], None, metadata={"modality": ["t1n"] * 4})
        assert "biased upward: 4 images for 4 features" in evaluation.compute().conventions["rfid"]

    def test_one_image_gives_null_where_nothing_can_be_said(self, tmp_path: Path) -> None:
        target, prediction, _ = self.batch()
        evaluation = ReconstructionEvaluation(num_embeddings=8, fid=CornerFeatures())
        evaluation.update(target[:1], prediction[:1], None, metadata={"modality": ["t1n"]})
        report = evaluation.compute()
        report.save(tmp_path)
        overall = json.loads((tmp_path / "metrics.json").read_text())["summary"]["overall"]
        assert overall["rfid"] == {"value": None, "n": 1}
        assert overall["psnr"]["std"] is None
        assert overall["psnr"]["value"] > 0
        assert "rfid" not in report.overall()

    def test_json_holds_figures_provenance_and_conventions(self, tmp_path: Path) -> None:
        report = self.evaluate()
        report.save(tmp_path / "new" / "folder")
        text = (tmp_path / "new" / "folder" / "metrics.json").read_text()
        assert "NaN" not in text
        record = json.loads(text)
        assert record["summary"]["overall"]["psnr"]["value"] == report.summary["overall"]["psnr"]["value"]
        assert record["summary"]["overall"]["psnr"]["n"] == record["provenance"]["n"] == 6
        assert record["provenance"]["fid_network"] == "corners"
        assert record["provenance"]["fid_weights_sha256"] == "c0" * 32
        assert record["provenance"]["split_hash"] == "sha256:s"
        assert record["conventions"].keys() >= {"psnr", "ssim", "lpips", "rfid", "perplexity", "utilization"}

    def test_csv_has_a_line_a_figure_and_a_row_an_image(self, tmp_path: Path) -> None:
        report = self.evaluate()
        report.save(tmp_path)
        with (tmp_path / "metrics.csv").open(newline="") as file:
            lines = {(row["scope"], row["group"], row["metric"]): row for row in csv.DictReader(file)}
        tables = [("overall", "all", report.summary["overall"])]
        tables += [
            (scope, group, table) for scope in ("modality", "region") for group, table in report.summary[scope].items()
        ]
        expected = {(scope, group, name): entry for scope, group, table in tables for name, entry in table.items()}
        assert lines.keys() == expected.keys()
        for key, entry in expected.items():
            assert float(lines[key]["value"]) == entry["value"]
            assert int(lines[key]["n"]) == entry["n"]
            assert lines[key]["split_hash"] == "sha256:s"
            assert lines[key]["checkpoint"] == "k"
            assert lines[key]["feature_network"] == ("corners" if key[2] in ("lpips", "rfid") else "")
        with (tmp_path / "per_image.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["index"]) for row in rows] == [0, 1, 2, 3, 4, 5]
        assert [float(row["psnr"]) for row in rows] == [row["psnr"] for row in report.per_image]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json", "per_image.csv"]


class TestPictures:
    @pytest.mark.parametrize(("continuous", "channels", "width"), [(True, 1, 1000), (False, 3, 790)])
    def test_grid(self, tmp_path: Path, continuous: bool, channels: int, width: int) -> None:
        prediction, target = image_pair(batch=2, channels=channels)
        images, quantized = 2 * target - 1, 2 * prediction - 1
        path = tmp_path / "pictures" / "grid.png"
        reconstruction_grid(images, quantized, images if continuous else None, labels=["first", "second"], path=path)
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.size == (width, 480)
            assert np.asarray(picture.convert("L")).std() > 10
        assert [item.name for item in path.parent.iterdir()] == ["grid.png"]

    def test_grid_shows_the_images_it_is_given(self, tmp_path: Path) -> None:
        prediction, target = image_pair(batch=1)
        for name, noise in (("one", prediction), ("other", target)):
            reconstruction_grid(2 * target - 1, 2 * noise - 1, labels=["a"], path=tmp_path / f"{name}.png")
        one, other = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("one", "other"))
        assert not np.array_equal(one, other)

    @pytest.mark.parametrize("codebooks", [1, 2])
    def test_histogram(self, tmp_path: Path, codebooks: int) -> None:
        counts = torch.arange(16 * codebooks).view(codebooks, 16).flip(-1)
        path = tmp_path / "usage.png"
        usage_histogram(counts, path)
        with Image.open(path) as picture:
            assert picture.size == (600, 320)
            assert np.asarray(picture.convert("L")).std() > 5
        assert [item.name for item in tmp_path.iterdir()] == ["usage.png"]
