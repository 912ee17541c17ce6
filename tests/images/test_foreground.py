"""The foreground: the background is found whatever its value, and nothing is found where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vaevq_med.images.foreground import BLACK, Background, corner_noise, find_background, foreground

SHAPE = (20, 24, 16)


def brain(touching: bool = False) -> np.ndarray:
    """An ellipsoid, which may reach the volume's faces."""
    axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    return (axes**2).sum(0) < (1.6 if touching else 0.7)


def scan(background: np.ndarray | float, *, touching: bool = False, dtype: type = np.float32) -> np.ndarray:
    """Intensities of 100 to 1000 in the brain, and something else around it."""
    values = np.random.default_rng(0).uniform(100, 1000, SHAPE)
    return np.where(brain(touching), values, background).astype(dtype)


def jitter(size: float) -> np.ndarray:
    return np.random.default_rng(1).uniform(-size, size, SHAPE)


@pytest.mark.parametrize("touching", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.004, -1.0, -1024.0, 4095.0])
def test_an_exact_background_is_found_exactly(value: float, touching: bool) -> None:
    for dtype in (np.float32, np.float64, *([np.int16] if value == round(value) else [])):
        volume = scan(value, touching=touching, dtype=dtype)
        found = find_background(volume)
        assert found == Background(float(dtype(value)), 0.0)
        np.testing.assert_array_equal(found.foreground(volume), brain(touching))


def test_a_background_of_floats_that_differ_a_little_is_found_with_a_tolerance() -> None:
    volume = scan(0.004 + jitter(1e-3))
    found = find_background(volume)
    assert found is not None
    assert 0 < found.tolerance < 1
    assert found.value == pytest.approx(0.004, abs=1e-3)
    np.testing.assert_array_equal(found.foreground(volume), brain())


def test_a_background_of_zero_within_a_scaled_brain_takes_only_what_is_zero() -> None:
    """A z-scored brain has values on both sides of its background."""
    volume = scan(0.0)
    volume[brain()] = (volume[brain()] - 550) / 260
    found = find_background(volume)
    assert found == BLACK
    np.testing.assert_array_equal(found.foreground(volume), brain())


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_scan_with_noise_around_the_head_has_no_background(dtype: type) -> None:
    assert find_background(scan(20 + jitter(20), dtype=dtype)) is None


def test_a_few_odd_voxels_at_the_border_change_nothing() -> None:
    volume = scan(0.0)
    volume[0, :3, 0] = (1e-9, -1e-9, 3)
    assert find_background(volume) == BLACK


@pytest.mark.parametrize("touching", [False, True])
def test_a_brain_leaves_the_corners_of_its_box_empty_and_noise_fills_them(touching: bool) -> None:
    volume = scan(0.0, touching=touching)
    assert corner_noise(volume, BLACK) == 0
    noise = np.random.default_rng(1).integers(0, 2, SHAPE)
    assert corner_noise(scan(noise, touching=touching), BLACK) == pytest.approx(0.5, abs=0.25)
    assert corner_noise(np.pad(scan(noise + 1), 9), BLACK) == 1
    assert corner_noise(np.pad(scan(-3.0 - noise), 9, constant_values=-3) - 1, Background(-4)) > 0.2
    assert corner_noise(np.zeros(SHAPE), BLACK) == 0


def test_a_body_that_fills_the_corners_is_no_noise() -> None:
    assert corner_noise(np.pad(scan(500.0), 9), BLACK) == 0


def test_of_slices_all_that_is_not_black_is_foreground() -> None:
    image = torch.tensor([[0.0, 1 / 255], [1.0, 0.0]])
    assert foreground(image).tolist() == [[False, True], [True, False]]
    np.testing.assert_array_equal(foreground(image.numpy()), image.numpy() > 0)
