"""Radiomics: the consensus values of IBSI's digital phantom, shapes that are known, and what survives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.agreement import intraclass_correlation
from vaevq_med.tasks.radiomics import (
    frechet_radiomics_distance,
    gray_levels,
    intensity_features,
    region_features,
    reproducibility,
    shape_features,
    texture_features,
)

PHANTOM = np.array(
    [
        [[1, 4, 4, 1, 1], [1, 4, 6, 1, 1], [4, 1, 6, 4, 1], [4, 4, 6, 4, 1]],
        [[1, 4, 4, 1, 1], [1, 1, 6, 1, 1], [0, 1, 3, 1, 1], [4, 4, 6, 1, 1]],
        [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 6, 1, 1]],
        [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 6, 1, 1]],
    ]
)
"""IBSI's digital phantom, voxels of 2 mm; 0 is outside of the region."""
INTENSITY = {
    **{"mean": 2.15, "variance": 3.05, "skewness": 1.08, "kurtosis": -0.355, "median": 1, "minimum": 1},
    **{"percentile_10": 1, "percentile_90": 4, "maximum": 6, "interquartile_range": 3, "range": 5},
    **{"mean_absolute_deviation": 1.55, "robust_mean_absolute_deviation": 1.11, "median_absolute_deviation": 1.15},
    **{"coefficient_of_variation": 0.812, "quartile_coefficient_of_dispersion": 0.6, "root_mean_square": 2.77},
}
"""Reference values, all of very strong consensus, to three digits."""
TEXTURE = {
    **{"histogram_entropy": 1.27, "histogram_uniformity": 0.512, "contrast": 5.29, "dissimilarity": 1.44},
    **{"angular_second_moment": 0.277, "joint_average": 4.41 / 2},
    # Of the published sum variance 7.65 and contrast 5.29, whose sum is four variances and difference four covariances.
    **{"joint_variance": (7.65 + 5.29) / 4, "correlation": (7.65 - 5.29) / (7.65 + 5.29)},
}
"""Likewise, of the matrix that is merged over slices and directions (2.5D)."""


def rounded(value: float, like: float) -> bool:
    return value == pytest.approx(like, abs=0.006 * max(1, abs(like)) if abs(like) >= 1 else 0.0006)


def test_the_digital_phantom() -> None:
    found = intensity_features(PHANTOM[PHANTOM > 0])
    assert found.keys() == INTENSITY.keys()
    assert {name: value for name, value in found.items() if not rounded(value, INTENSITY[name])} == {}
    texture = texture_features(PHANTOM)
    assert {name: texture[name] for name, value in TEXTURE.items() if not rounded(texture[name], value)} == {}
    assert 0 < texture["inverse_difference_moment"] < 1
    # The entropy of pairs lies between that of a voxel and twice that of a voxel.
    assert 1.27 < texture["joint_entropy"] < 2 * 1.6


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=40))
@settings(max_examples=30, deadline=None)
def test_intensities_as_scipy_has_them(values: list[float]) -> None:
    x = np.array(values)
    if np.ptp(x) < 1e-3:
        return
    found = intensity_features(x)
    assert found["skewness"] == pytest.approx(scipy.stats.skew(x), rel=1e-6, abs=1e-6)
    assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(x), rel=1e-6, abs=1e-6)
    assert found["interquartile_range"] == pytest.approx(scipy.stats.iqr(x), rel=1e-6, abs=1e-9)
    assert found["coefficient_of_variation"] == pytest.approx(scipy.stats.variation(x), rel=1e-6)


def test_a_texture_by_hand() -> None:
    # Two columns, 1 and 2: four pairs along rows (1, 2) and (2, 1) as pairs are symmetric, and so on the diagonals;
    # along columns equal ones. Of 3 rows: 3 x 2 across, 2 x 2 x 2 diagonal, 2 x 2 + 2 x 2 down, of both orders.
    levels = np.array([[[1, 2], [1, 2], [1, 2]]])
    unlike, alike = 3 * 2 + 4 * 2, 4 * 2
    found = texture_features(levels)
    assert found["contrast"] == pytest.approx(unlike / (unlike + alike))
    assert found["dissimilarity"] == found["contrast"]
    assert found["histogram_entropy"] == 1
    assert found["joint_average"] == pytest.approx(1.5)


def test_gray_levels_do_not_move_with_the_range() -> None:
    unit = np.linspace(0, 1, 65).reshape(1, 1, -1)
    inside = np.ones(unit.shape, bool)
    inside[..., -1] = False
    levels = gray_levels(unit, inside)
    assert levels[0, 0, :4].tolist() == [1, 1, 2, 2]
    assert levels.max() == 32
    assert levels[0, 0, -1] == 0
    half = inside & (unit < 0.5)
    assert (gray_levels(unit, half)[half] == levels[half]).all()


def test_regions_that_are_empty_small_or_flat() -> None:
    unit = np.zeros((3, 4, 5), np.float32)
    mask = np.zeros(unit.shape, bool)
    assert region_features(unit, mask) is None
    assert shape_features(mask, (1, 1, 1)) is None
    with pytest.raises(VaevqMedError, match="levels: found an empty region"):
        texture_features(np.zeros((2, 2, 2), int))
    mask[1, 2, 3] = True  # of one voxel, which has no neighbor
    found = region_features(unit, mask)
    assert found is not None
    assert "contrast" not in found
    assert all(math.isfinite(value) for value in found.values())
    assert (found["skewness"], found["coefficient_of_variation"]) == (0, 0)
    flat = region_features(np.full_like(unit, 0.3), np.ones(unit.shape, bool))
    assert flat is not None
    assert all(math.isfinite(value) for value in flat.values())
    assert (flat["contrast"], flat["histogram_entropy"], flat["correlation"]) == (0, 0, 1)


def test_shapes_of_known_size() -> None:
    z, y, x = np.meshgrid(*(np.arange(-15, 16) * s for s in (2.0, 1.0, 1.0)), indexing="ij")
    ball = shape_features(z**2 + y**2 + x**2 <= 12**2, (2, 1, 1))
    assert ball is not None
    assert ball["volume_voxel_counting"] == pytest.approx(4 / 3 * math.pi * 12**3, rel=0.02)
    assert ball["surface_area"] == pytest.approx(4 * math.pi * 12**2, rel=0.03)
    assert ball["sphericity"] == pytest.approx(1, abs=0.04)
    assert ball["maximum_3d_diameter"] == pytest.approx(24, abs=1.5)
    assert ball["elongation"] == pytest.approx(1, abs=0.02)
    # A box of 20, 10 and 5 mm: the second moments of an even line of length a are a^2 / 12.
    box = shape_features(np.ones((5, 5, 20), bool), (1, 2, 1))
    assert box is not None
    assert box["volume_voxel_counting"] == 1000
    assert box["major_axis_length"] == pytest.approx(4 * 20 / math.sqrt(12), rel=0.02)
    assert box["elongation"] == pytest.approx(0.5, abs=0.02)
    assert box["flatness"] == pytest.approx(0.25, abs=0.02)


def subjects(seed: int, count: int, **more: Any) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [{"a": rng.normal(), "b": rng.normal(5, 2), **more} for _ in range(count)]


def test_what_is_unchanged_is_reproduced_and_what_is_erased_is_not() -> None:
    originals = subjects(0, 8, same=1.0)
    assert reproducibility(originals, originals).share() == 1
    assert reproducibility(originals, originals).constant == ("same",)
    erased = [{"a": 0.0, "b": 5.0, "same": 1.0}] * 8
    found = reproducibility(originals, erased)
    assert found.share() == 0
    assert abs(found.correlations["a"].agreement) < 0.2
    shifted = [{**one, "a": one["a"] + 100} for one in originals]
    moved = reproducibility(originals, shifted)
    assert moved.share() == 0.5
    assert moved.share(kind="consistency") == 1


def test_a_feature_that_an_original_lacks_is_left_out_there() -> None:
    originals = [{"a": one["a"], **({"b": one["b"]} if n < 2 else {})} for n, one in enumerate(subjects(0, 5))]
    found = reproducibility(originals, [{**one, "b": 1.0} for one in originals])
    assert list(found.correlations) == ["a"]
    assert found.rare == ("b",)
    assert found.share() == 1
    assert math.isnan(reproducibility([], []).share())
    with pytest.raises(VaevqMedError, match="found 1 subjects, expected the 5"):
        reproducibility(originals, originals[:1])


def test_what_is_erased_is_not_reproduced() -> None:
    """A volume of nothing is 0, a sphericity of nothing is none, and neither drops out of the share."""
    volume, roundness = "tumor/volume_voxel_counting", "tumor/sphericity"
    originals = [{volume: one["b"], roundness: one["a"]} for one in subjects(0, 6)]
    gone = reproducibility(originals, [{}] * 6)
    assert gone.share() == gone.share(kind="consistency") == 0
    assert gone.lost == (roundness,)
    once = reproducibility(originals, [*originals[:5], {}])
    zeroed = reproducibility(originals, [*originals[:5], {volume: 0.0}])
    by_hand = intraclass_correlation([(one[volume], one[volume] if n < 5 else 0.0) for n, one in enumerate(originals)])
    assert once.correlations[volume] == zeroed.correlations[volume] == by_hand
    assert once.lost == (roundness,)
    alike = [{volume: 3.0}] * 4
    assert reproducibility(alike, [{}] * 4).share() == 0
    assert reproducibility(alike, alike).constant == (volume,)


def test_the_distance_by_hand() -> None:
    """Shifted by half a deviation in one of two features, 0.25; spread twice in one, (2 - 1)^2 in unbiased units."""
    originals = [{"a": x, "b": y, "same": 7.0} for x in (-1.0, 1.0) for y in (-3.0, 3.0)]
    assert frechet_radiomics_distance(originals, originals) == pytest.approx(0, abs=1e-9)
    shifted = [{**one, "b": one["b"] + 1.5} for one in originals]
    assert frechet_radiomics_distance(originals, shifted) == pytest.approx(0.25)
    wide = [{**one, "a": 2 * one["a"]} for one in originals]
    assert frechet_radiomics_distance(originals, wide) == pytest.approx(4 / 3)  # a variance of 4 / 3, of four values
    assert math.isnan(frechet_radiomics_distance(originals[:1], originals))
    assert math.isnan(frechet_radiomics_distance([{"a": 1.0}] * 3, [{"a": 2.0}] * 3))
    lacking = [*shifted, {"a": 100.0}]  # a region of one voxel has no texture
    assert frechet_radiomics_distance(originals, lacking) == pytest.approx(0.25)
    assert frechet_radiomics_distance([*originals, {"b": 100.0}], shifted) == pytest.approx(0.25)
