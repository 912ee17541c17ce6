"""Metrics of generated images against scipy, torch-fidelity and brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.features import Pixels, brute_force
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import linregress
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics import inception_score, memorization, neighbors, statistics
from vaevq_med.metrics.generation import score_splits
from vaevq_med.metrics.memorization import Neighbors, PixelSearch, cosine_neighbors, summarize_distances, threshold_of
from vaevq_med.metrics.neighbors import NearestNeighbors, precision_recall
from vaevq_med.metrics.reference import ReferenceCache, ReferenceFeatures
from vaevq_med.metrics.statistics import (
    FeatureStatistics,
    FrechetDistance,
    extrapolate_frechet_distance,
    frechet_distance,
)
from vaevq_med.networks.features import feature_network


def draw(count: int, width: int, *, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(count, width, generator=generator)


# --- Frechet distance -------------------------------------------------------------------------------


def test_frechet_distance_equals_scipy_and_the_streamed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ROWS", 37)
    a, b = draw(150, 6, seed=0).double(), draw(130, 6, seed=1, mean=0.4, scale=1.5).double()
    x, y = FeatureStatistics.of(a), FeatureStatistics.of(b)
    np.testing.assert_allclose(x.mean.numpy(), a.numpy().mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(x.covariance.numpy(), np.cov(a.numpy().T), atol=1e-12)
    c, d = np.cov(a.numpy().T), np.cov(b.numpy().T)
    difference = a.numpy().mean(axis=0) - b.numpy().mean(axis=0)
    expected = difference @ difference + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    streamed = FrechetDistance(num_features=6)
    streamed.update(b, a[:130])
    assert frechet_distance(FeatureStatistics.of(a[:130]), y) == pytest.approx(streamed.compute(), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    # Two orthogonal lines: the covariances' product is 0, which leaves the traces and the means' difference.
    a, b = torch.zeros(3, 8), torch.zeros(3, 8)
    a[:, 0], b[:, 1] = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 2.0, 4.0])
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(4 + 1 + 4)
    assert frechet_distance(FeatureStatistics.of(b), FeatureStatistics.of(b)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_torch_finds_no_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", stops)
    test_frechet_distance_equals_scipy_and_the_streamed_one(monkeypatch)
    test_frechet_distance_of_fewer_images_than_features()


def test_frechet_distance_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(VaevqMedError, match="found 1 images, expected at least 2"):
        FeatureStatistics.of(torch.zeros(1, 4))
    with pytest.raises(VaevqMedError, match="found statistics of 3 features, expected 4"):
        frechet_distance(FeatureStatistics.of(draw(5, 3, seed=0)), FeatureStatistics.of(draw(5, 4, seed=0)))


def test_extrapolation_is_the_intercept_and_takes_the_bias_out() -> None:
    exact = FeatureStatistics(torch.zeros(8).double(), torch.eye(8).double(), 10**9)
    features = draw(400, 8, seed=3)
    line = extrapolate_frechet_distance(features, exact, num_points=8)
    assert list(line.counts) == np.linspace(40, 400, 8).round().astype(int).tolist()
    whole = frechet_distance(FeatureStatistics.of(features), exact)
    assert line.distances[-1] == pytest.approx(whole)
    fit = linregress(1 / np.array(line.counts), line.distances)
    assert (line.value, line.slope) == pytest.approx((fit.intercept, fit.slope))
    assert line.r_squared == pytest.approx(fit.rvalue**2)
    assert abs(line.value) < whole / 2
    assert line == extrapolate_frechet_distance(features, exact, num_points=8)
    with pytest.raises(VaevqMedError, match="found 99 images, expected at least 100"):
        extrapolate_frechet_distance(features[:99], exact)


# --- precision and recall ---------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_ROWS", 5)
    monkeypatch.setattr(neighbors, "_COLUMNS", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force_and_torch_fidelity(k: int) -> None:
    real, sample = draw(40, 4, seed=0), draw(33, 4, seed=1, mean=0.7, scale=0.6)
    found = precision_recall(sample, real, k=k)
    expected = brute_force(sample.double().numpy(), real.double().numpy(), k)
    assert (found.precision, found.recall) == expected
    assert 0.2 < min(expected)
    assert max(expected) < 1
    # torch-fidelity's releases disagree on which argument is the generated one.
    peer = prc_features_to_metric(sample.double(), real.double(), prc_neighborhood=k, prc_batch_size=10)
    assert sorted(expected) == pytest.approx(sorted((peer["precision"], peer["recall"])))


@pytest.mark.usefixtures("small_blocks")
def test_precision_and_recall_where_they_are_obvious() -> None:
    real = draw(20, 4, seed=0)
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1, 1)
    far = precision_recall(real + 100, real)
    assert (far.precision, far.recall) == (0, 0)
    # Many equal images far from the origin: balls of radius 0, whose centers rounding must not leave out.
    copies = (1000 + draw(1, 64, seed=1)).repeat(9, 1)
    equal = precision_recall(copies, copies.clone())
    assert (equal.precision, equal.recall) == (1, 1)
    # One mode of two: everything generated is real, half of what is real is generated.
    two = torch.cat([real, real + 100])
    half = precision_recall(real, two)
    assert (half.precision, half.recall) == (1, 0.5)


@pytest.mark.parametrize(("k", "message"), [(0, "k: found 0"), (3, "found 3 images, expected more than k = 3")])
def test_precision_and_recall_refuse_too_few_images(k: int, message: str) -> None:
    with pytest.raises(VaevqMedError, match=message):
        precision_recall(draw(3, 2, seed=0), draw(9, 2, seed=1), k=k)


# --- Inception score --------------------------------------------------------------------------------


def test_inception_score_by_hand_and_by_torch_fidelity() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    marginal = (0.7, 0.3)
    divergence = [sum(q * math.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in p.tolist()]
    value, deviation = inception_score(p.log(), splits=1)
    assert value == pytest.approx(math.exp(sum(divergence) / 2), rel=1e-6)
    assert deviation == 0
    logits = draw(45, 7, seed=0, scale=3)
    peer = isc_features_to_metric(logits, splits=4)
    expected = (peer["inception_score_mean"], peer["inception_score_std"])
    assert inception_score(logits, splits=4) == pytest.approx(expected)
    assert inception_score(torch.zeros(9, 5), splits=3) == pytest.approx((1, 0))
    assert [score_splits(count) for count in (9_999, 10_000)] == [1, 10]
    with pytest.raises(VaevqMedError, match="splits: found 3 for 2 images"):
        inception_score(p, splits=3)


def test_logits_are_those_of_the_whole_network() -> None:
    network = feature_network("efficientnet-lite0")
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    color = ((images.expand(-1, 3, -1, -1) + 1) / 2 - 0.498) / 0.502
    with torch.no_grad():
        expected = network.network(color)
        torch.testing.assert_close(network.logits(network.pooled(images)), expected)
    assert network.num_classes == expected.shape[1]
    with pytest.raises(
        VaevqMedError, match="'pixels': found no class logits, expected efficientnet-lite0 or inception"
    ):
        Pixels().logits(torch.zeros(1, 4))


# --- nearest neighbors ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
def test_nearest_neighbors_equal_brute_force() -> None:
    queries, references = draw(12, 5, seed=0), draw(31, 5, seed=1)
    search = NearestNeighbors(queries)
    for part in references.split(9):
        search.update(part)
    distances = cdist(queries.double().numpy(), references.double().numpy())
    assert search.indices.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(search.squared.sqrt().numpy(), distances.min(axis=1), rtol=1e-9)
    mirrored = draw(12, 5, seed=2)
    found = cosine_neighbors(queries, mirrored, references)
    plain, other = (cdist(x.double().numpy(), references.double().numpy(), "cosine") for x in (queries, mirrored))
    nearer = other.min(axis=1) < plain.min(axis=1)
    assert 0 < nearer.sum() < 12
    assert found.mirrored.tolist() == nearer.tolist()
    assert found.index.tolist() == np.where(nearer, other.argmin(axis=1), plain.argmin(axis=1)).tolist()
    np.testing.assert_allclose(found.distance.numpy(), np.minimum(plain, other).min(axis=1), atol=1e-12)
    assert not cosine_neighbors(queries, queries, references).mirrored.any()


def test_pixel_distances_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 255, (3, 128 * 128), dtype=torch.uint8, generator=generator)
    queries = images[[2, 0]].clone()
    queries[1, 77] += 1
    search = PixelSearch(queries, width=128)
    search.update(images)
    found = search.neighbors()
    assert found.index.tolist() == [2, 0]
    assert found.distance.tolist() == [0, math.sqrt(1 / 128**2) / 255]
    assert found.mirrored.tolist() == [False, False]


@pytest.mark.parametrize("block", [1, 5 * 2 * 24, 2**24])
def test_pixels_are_searched_either_way_round(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorization, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (11, 3, 2, 4), dtype=np.uint8)
    training[4, :, :, 2:] = training[4, :, :, 1::-1]  # its own mirror image
    queries = rng.integers(0, 256, (9, 3, 2, 4), dtype=np.uint8)
    queries[:3] = training[7, :, :, ::-1], training[6], training[4]
    search = PixelSearch(torch.from_numpy(queries).flatten(1), width=4)
    for first in range(0, 11, 3):
        search.update(torch.from_numpy(training[first : first + 3]).flatten(1))
    found = search.neighbors()
    flat = queries.reshape(9, -1) / 255
    plain, other = (cdist(flat, x.reshape(11, -1) / 255) / math.sqrt(24) for x in (training, training[..., ::-1]))
    assert found.mirrored.tolist() == (other.min(axis=1) < plain.min(axis=1)).tolist()
    assert found.mirrored[:3].tolist() == [True, False, False]
    assert found.index.tolist() == np.minimum(plain, other).argmin(axis=1).tolist()
    assert found.index[:3].tolist() == [7, 6, 4]
    np.testing.assert_allclose(found.distance.numpy(), np.minimum(plain, other).min(axis=1), rtol=1e-9)


def test_shares_by_hand() -> None:
    def at(*distances: float, mirrored: tuple[int, ...] = ()) -> Neighbors:
        turned = torch.tensor([i in mirrored for i in range(len(distances))])
        return Neighbors(torch.tensor(distances).double(), torch.zeros(len(distances), dtype=torch.int64), turned)

    held_out, sample = at(0.2, 0.3, 0.4, 0.6, 1.0), at(0.0, 0.1, 0.25, 0.9, mirrored=(1, 2, 3))
    assert threshold_of(held_out.distance, 0.1) == pytest.approx(np.quantile(held_out.distance.numpy(), 0.1))
    found = summarize_distances(sample, held_out, quantile=0.1)
    assert (found["threshold"], found["count"], found["share"]) == (pytest.approx(0.24), 2, 0.5)
    assert (found["mirrored"], found["count_mirrored"]) == (3, 1)
    assert (found["share_held_out"], found["n_held_out"], found["median_held_out"]) == (0.2, 5, pytest.approx(0.4))
    given = summarize_distances(sample, held_out, threshold=0.5)
    assert (given["count"], given["share_held_out"], given["threshold_from"]) == (3, 0.6, "given")
    assert "share" not in summarize_distances(sample, None)
    assert summarize_distances(sample, at(0, 0, 0, 0, 0))["count"] == 1
    with pytest.raises(VaevqMedError, match="found no held-out images"):
        threshold_of(held_out.distance[:0])


# --- the cache --------------------------------------------------------------------------------------


def test_the_cache_gives_back_what_it_got_and_nothing_damaged(tmp_path: Path) -> None:
    cache, key = ReferenceCache(tmp_path / "cache"), {"split": "test", "network": "flat", "content_hash": "a"}
    assert cache.load(key) is None
    stored = ReferenceFeatures.of(draw(9, 4, seed=0))
    cache.store(key, stored)
    found = cache.load(key)
    assert found is not None
    assert torch.equal(found.features, stored.features)
    assert torch.equal(found.statistics.covariance, stored.statistics.covariance)
    assert found.statistics.count == 9
    assert cache.load({**key, "content_hash": "b"}) is None
    whole = cache.path(key).read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        cache.path(key).write_bytes(damaged)
        assert cache.load(key) is None
    cache.path(key).write_bytes(whole)
    cache.path(key).rename(cache.path({**key, "content_hash": "b"}))
    assert cache.load({**key, "content_hash": "b"}) is None
    (tmp_path / "file").touch()
    with pytest.raises(VaevqMedError, match=r"not writable.*--cache-dir"):
        ReferenceCache(tmp_path / "file" / "cache").store(key, stored)
