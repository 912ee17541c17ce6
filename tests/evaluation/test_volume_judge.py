"""Volumes against their originals: every figure by another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vaevq_med.evaluation.volumes import FIGURES, VolumeJudge
from vaevq_med.metrics.reconstruction import ssim_per_image


def scan(seed: int = 0, shape: tuple[int, int, int] = (6, 30, 26)) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    brain = np.zeros(shape, bool)
    brain[1:-1, 4:-5, 3:-6] = True
    return np.where(brain, rng.random(shape), 0).astype(np.float32), brain


def test_psnr_is_over_the_voxels_of_a_region() -> None:
    unit, brain = scan()
    tumor = brain & (unit > 0.8)
    result = np.clip(unit + 0.1 * (unit > 0.5) + 0.3 * ~brain, 0, 1).astype(np.float32)
    found = VolumeJudge(unit, brain, tumor).figures(result)
    for name, region in (("brain", brain), ("tumor", tumor)):
        expected = -10 * np.log10(np.mean((result.astype(float) - unit)[region] ** 2))
        assert found[f"psnr_{name}"] == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 99), noise=st.floats(0.001, 0.5))
@settings(max_examples=10, deadline=None)
def test_ssim_is_that_of_torchmetrics(seed: int, noise: float) -> None:
    unit, brain = scan(seed)
    tumor = brain & (unit > 0.7)
    result = np.clip(unit + noise * np.random.default_rng(seed).standard_normal(unit.shape), 0, 1).astype(np.float32)
    found = VolumeJudge(unit, brain, tumor).figures(result)
    live = brain.any(axis=(1, 2))
    values, maps = ssim_per_image(*(torch.from_numpy(volume[live])[:, None] for volume in (result, unit)))
    assert found["ssim"] == pytest.approx(float(values.mean()), abs=2e-4)
    assert found["ssim_brain"] == pytest.approx(float(maps.numpy()[brain[live]].mean()), abs=2e-4)
    assert found["ssim_tumor"] == pytest.approx(float(maps.numpy()[tumor[live]].mean()), abs=2e-4)


def test_flicker_is_what_changes_from_slice_to_slice() -> None:
    unit, brain = scan()
    still = (unit + np.where(brain, 0.25, 0)).astype(np.float32)
    turns = (unit + np.where(brain, 0.25, 0) * np.array([1, -1, 1, -1, 1, -1])[:, None, None]).astype(np.float32)
    judge = VolumeJudge(unit, brain)
    assert judge.figures(still)["flicker"] == pytest.approx(0, abs=1e-6)
    assert judge.figures(turns)["flicker"] == pytest.approx(0.5, rel=1e-5)


def test_the_same_volume_is_the_best_there_is() -> None:
    from vaevq_med.networks.features import feature_network

    unit, brain = scan(shape=(4, 64, 64))
    judge = VolumeJudge(unit, brain, None, network=feature_network("efficientnet-lite0"), slices=2, seen=1)
    found = judge.figures(unit)
    assert found == {
        "psnr_brain": 100,
        "ssim": pytest.approx(1),
        "ssim_brain": pytest.approx(1),
        "perceptual": pytest.approx(0, abs=1e-6),
        "flicker": 0,
    }
    worse = [judge.figures(np.clip(unit + step * brain, 0, 1).astype(np.float32))["perceptual"] for step in (0.1, 0.5)]
    assert 0 < worse[0] < worse[1]


def test_every_figure_says_how_it_is_computed() -> None:
    unit, brain = scan()
    found = VolumeJudge(unit, brain, brain).figures(unit)
    assert {*found, "perceptual"} == {figure.name for figure in FIGURES}
    assert all(figure.convention and figure.higher_is_better is not None for figure in FIGURES)
