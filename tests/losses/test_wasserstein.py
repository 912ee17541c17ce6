"""The distance between the Gaussians of two point sets: against scipy, in closed forms, and where it is hard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ddp_features
from helpers.processes import run_in_two
from scipy.linalg import sqrtm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses import gaussian_wasserstein2, gaussian_wasserstein2_to_standard


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(count: int, width: int, least: float, seed: int) -> Tensor:
    """Deviations from ``least`` to 1 along axes of their own."""
    turn = torch.linalg.qr(random(width, width, seed=seed + 100))[0]
    return random(count, width, seed=seed) * torch.logspace(math.log10(least), 0, width, dtype=torch.float64) @ turn


def by_scipy(first: Tensor, second: Tensor) -> float:
    """The formula with the square root of a matrix."""
    a, b = first.numpy(), second.numpy()
    of_a, of_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = sqrtm(of_a)
    cross = sqrtm(root @ of_b @ root)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(of_a + of_b - 2 * cross).real)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0.7 * random(50, 3) + 0.3, random(80, 3, seed=1)),
        (random(500, 16), 1e-3 * random(200, 16, seed=1)),
        (spread(300, 8, 1e-2, 0), spread(400, 8, 1e-2, 1)),
        (random(300, 1) + 2, 3 * random(40, 1, seed=1)),
        (spread(300, 8, 1e-3, 0), random(400, 8, seed=1)),
    ],
    ids=["plain", "tiny", "both narrow", "one", "narrow"],
)
def test_it_equals_the_formula_with_scipy(first: Tensor, second: Tensor) -> None:
    expected = by_scipy(first, second)
    assert gaussian_wasserstein2(first, second).item() == pytest.approx(expected, rel=1e-6)
    assert gaussian_wasserstein2(second, first).item() == pytest.approx(expected, rel=1e-6)


def test_equal_sets_are_at_0_and_shifted_ones_at_the_square_of_the_shift() -> None:
    points = spread(200, 6, 1e-3, 0)
    shift = random(6, seed=3)
    assert gaussian_wasserstein2(points, points.flip(0)).item() == pytest.approx(0, abs=1e-12)
    assert gaussian_wasserstein2(points, points + shift).item() == pytest.approx(shift.square().sum().item())


def test_of_commuting_covariances_the_deviations_count() -> None:
    """Corners of a cube have independent coordinates: ``sum (sqrt a - sqrt b)^2``, whatever axes they are turned to."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).double()
    corners = corners * math.sqrt(7 / 8)  # of unbiased covariance I
    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.25]).double()
    turn = torch.linalg.qr(random(3, 3))[0]
    found = gaussian_wasserstein2(corners * a @ turn, corners * b @ turn).item()
    assert found == pytest.approx((3 - 1) ** 2 + 0 + (0.5 - 0.25) ** 2)


def test_the_distance_to_the_prior_is_the_one_to_points_with_its_moments() -> None:
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).double()
    prior = corners * math.sqrt(7 / 8)
    codebook = (spread(40, 3, 0.1, 0) + 0.5).requires_grad_()
    values = gaussian_wasserstein2(prior, codebook), gaussian_wasserstein2_to_standard(codebook)
    assert values[0].item() == pytest.approx(values[1].item())
    gradients = [torch.autograd.grad(value, codebook)[0] for value in values]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shapes", [((12, 3), (9, 3)), ((5, 4), (4, 4)), ((2, 7, 3), (2, 6, 3))])
def test_its_gradients_are_those_of_finite_differences(shapes: tuple[tuple[int, ...], ...]) -> None:
    first, second = (random(*shape, seed=n).add(0.2 * n).requires_grad_() for n, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(gaussian_wasserstein2, (first, second))
    assert torch.autograd.gradcheck(lambda x: gaussian_wasserstein2(x, second.detach()), (first,))


def test_at_equality_nothing_moves() -> None:
    points = spread(100, 8, 1e-3, 0).requires_grad_()
    other = points.detach().clone().requires_grad_()
    for gradient in torch.autograd.grad(gaussian_wasserstein2(points, other), (points, other)):
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("equal", [True, False])
def test_without_full_rank_the_gradient_is_finite_and_the_value_right(equal: bool) -> None:
    flat = random(100, 3) @ random(3, 8, seed=1)
    first = flat.clone().requires_grad_()
    second = (flat if equal else random(60, 8, seed=2)).clone().requires_grad_()
    value = gaussian_wasserstein2(first, second)
    gradients = torch.autograd.grad(value, (first, second))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    # scipy's root of a matrix without full rank is of half the digits.
    assert value.item() == pytest.approx(by_scipy(flat, second.detach()), rel=1e-5, abs=1e-6)
    # The flat set stays in a plane of three dimensions, which may turn.
    moved = flat - gradients[0]
    assert torch.linalg.matrix_rank(moved - moved.mean(0), rtol=1e-9) == 3
    assert bool(gradients[1].abs().max() > 1e-6) != equal


def test_one_point_repeated_is_a_distance_of_the_whole_extent() -> None:
    points, cloud = torch.full((50, 4), 0.5).requires_grad_(), random(60, 4).requires_grad_()
    value = gaussian_wasserstein2(points, cloud)
    array = cloud.detach().numpy()
    assert value.item() == pytest.approx(np.sum((array.mean(0) - 0.5) ** 2) + np.trace(np.cov(array.T)))
    to_points, to_cloud = torch.autograd.grad(value, (points, cloud))
    assert bool(to_points.isfinite().all())
    # It shrinks to one point: 2 (x - m) / (N - 1), and its mean moves.
    centered = cloud.detach() - cloud.detach().mean(0)
    expected = 2 * centered / 59 + 2 * (cloud.detach().mean(0) - 0.5) / 60
    torch.testing.assert_close(to_cloud, expected)


def test_gradient_descent_brings_a_codebook_to_the_points() -> None:
    points = spread(400, 4, 0.1, 0) + 1
    codebook = (0.01 * random(64, 4, seed=1)).requires_grad_()
    optimizer = torch.optim.SGD([codebook], lr=6.0)
    for _ in range(200):
        optimizer.zero_grad()
        gaussian_wasserstein2(points, codebook).backward()
        optimizer.step()
    np.testing.assert_allclose(np.cov(codebook.detach().numpy().T), np.cov(points.numpy().T), atol=1e-4)


def test_several_pairs_are_summed() -> None:
    first, second = random(3, 20, 4), random(3, 15, 4, seed=1)
    alone = sum(gaussian_wasserstein2(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(gaussian_wasserstein2(first, second), alone)


def test_autocast_changes_nothing_and_a_device_is_not_waited_for() -> None:
    first, second = random(64, 8).float(), random(32, 8, seed=1).float()
    plain = gaussian_wasserstein2(first, second)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_wasserstein2(first, second), plain)
    with FakeTensorMode(), torch.device("cuda"):
        assert gaussian_wasserstein2(torch.zeros(64, 8), torch.zeros(5, 8)).device.type == "cuda"
    with torch.profiler.profile() as profile:
        gaussian_wasserstein2(first.requires_grad_(), second.requires_grad_()).backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::mm" in names
    assert not {name for name in names if "linalg_" in name.replace("vector_norm", "") or "local_scalar" in name} - {
        "aten::linalg_vector_norm"
    }


@pytest.mark.slow
@pytest.mark.parametrize("of_first", [13, 19])
def test_two_processes_have_the_distance_and_the_gradients_of_one(of_first: int, tmp_path: Path) -> None:
    """Averaged over the processes; one of them may have a single feature."""
    first, second = run_in_two(ddp_features, tmp_path, str(of_first))
    one = ddp_features.distances(slice(None))
    assert len(one) == 9
    for start in range(0, len(one), 3):
        (value, to_points, to_codebook), *both = (found[start : start + 3] for found in (one, first, second))
        for found, other, _ in both:
            assert other.shape != to_points.shape
            torch.testing.assert_close(found, value)
        torch.testing.assert_close(torch.cat([both[0][1], both[1][1]], dim=-2) / 2, to_points)
        torch.testing.assert_close((both[0][2] + both[1][2]) / 2, to_codebook)


def test_what_has_no_covariance_or_does_not_match_is_refused() -> None:
    for first, second in (((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5,), (5,))):
        with pytest.raises(VaevqMedError, match="N of 2 or more"):
            gaussian_wasserstein2(torch.zeros(first), torch.zeros(second))
    with pytest.raises(VaevqMedError, match=r"\(5, 3\) and \(5, 4\); expected two that differ in their number alone"):
        gaussian_wasserstein2(torch.zeros(5, 3), torch.zeros(5, 4))
