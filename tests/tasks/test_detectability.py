"""Detectability: lesions of known size, an observer with known answers, and coders that keep or erase."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from vaevq_med.tasks.detectability import Lesion, detection, insert, place, response, smallest_detected

SHAPE, SPACING = (24, 60, 64), (2.0, 1.0, 1.0)


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A brain of smooth noise around 0.5, and a tumor in it."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    brain = z**2 + y**2 + x**2 < 0.9
    tumor = (y - 0.4) ** 2 + x**2 + z**2 < 0.05
    noise = gaussian_filter(rng.standard_normal(SHAPE), (1, 2, 2))
    unit = np.where(brain, 0.5 + 0.05 * noise / noise.std(), 0).astype(np.float32)
    return unit, brain, tumor


@pytest.mark.parametrize(("diameter", "axes"), [(6, (1, 1, 1)), (12, (1, 1, 1)), (10, (0.8, 1.0, 1.25))])
def test_a_lesion_has_the_volume_of_its_sphere(diameter: float, axes: tuple[float, float, float]) -> None:
    lesion = Lesion((12, 30, 32), diameter, 0.1, axes)
    box, weights, around = lesion.profile(SHAPE, (1, 1, 1))
    assert weights.sum() == pytest.approx(math.pi / 6 * diameter**3, rel=0.06)  # a smooth edge adds a little
    assert weights[tuple(c - s.start for c, s in zip(lesion.center, box, strict=True))] == 1
    assert not (around & (weights > 0)).any()
    places = np.argwhere(around) + [s.start for s in box]
    away = np.linalg.norm((places - lesion.center) / axes, axis=1) - diameter / 2
    assert away.min() > 1 - 1e-6
    assert away.max() <= 4 + 1e-6


def test_voxels_that_are_longer_along_z() -> None:
    _, weights, _ = Lesion((12, 30, 32), 12, 0.1).profile(SHAPE, SPACING)
    wide = (weights > 0.5).any(axis=(1, 2)).sum(), (weights > 0.5).any(axis=(0, 1)).sum()
    assert wide == (5, 11)  # within 6 mm: two slices of 2 mm to each side, five pixels of 1 mm


def test_the_observer_sees_the_contrast_that_was_put_in() -> None:
    lesion = Lesion((12, 30, 32), 9, 0.2)
    flat, brain = np.full(SHAPE, 0.4, np.float32), np.ones(SHAPE, bool)
    with_it = insert(flat, [lesion], SPACING)
    _, weights, _ = lesion.profile(SHAPE, SPACING)
    assert response(flat, lesion, SPACING, brain) == pytest.approx(0, abs=1e-6)
    expected = 0.2 * np.square(weights).sum() / weights.sum()
    assert response(with_it, lesion, SPACING, brain) == pytest.approx(expected, rel=1e-4)
    # A constant that is added, as by a coder that shifts everything, is no lesion.
    assert response(with_it + np.float32(0.1), lesion, SPACING, brain) == pytest.approx(expected, rel=1e-4)
    assert flat.max() == np.float32(0.4)  # a copy
    assert insert(np.ones(SHAPE, np.float32), [lesion], SPACING).max() == 1


def test_lesions_lie_in_healthy_tissue_apart_from_each_other() -> None:
    unit, brain, tumor = scene()
    kinds = [(size, contrast) for size in (3.0, 5.0, 8.0) for contrast in (0.1, 0.2)]
    lesions = place(unit, brain, tumor, SPACING, kinds, np.random.default_rng(1))
    assert lesions == place(unit, brain, tumor, SPACING, kinds, np.random.default_rng(1))
    assert lesions != place(unit, brain, tumor, SPACING, kinds, np.random.default_rng(2))
    assert sorted((one.diameter, one.contrast) for one in lesions) == sorted(kinds)
    border, mass = distance_transform_edt(brain, SPACING), distance_transform_edt(~tumor, SPACING)
    low, high = np.quantile(unit[brain], [0.1, 0.9])
    for number, one in enumerate(lesions):
        assert border[one.center] >= one.diameter / 2 + 1
        assert mass[one.center] >= one.diameter / 2 + 1
        assert low < unit[one.center] < high
        assert math.prod(one.axes) == pytest.approx(1)
        assert 0.8 - 1e-9 <= min(one.axes) <= max(one.axes) <= 1.25 + 1e-9
        for other in lesions[:number]:
            apart = np.linalg.norm(np.subtract(one.center, other.center) * SPACING)
            assert apart > (one.diameter + other.diameter) / 2 + 6


def test_without_room_there_is_no_lesion() -> None:
    unit, brain, tumor = scene()
    rng = np.random.default_rng(0)
    assert place(unit, brain, tumor, SPACING, [(80.0, 0.1)], rng) == []
    assert place(unit, brain, brain, SPACING, [(3.0, 0.1)], rng) == []
    nothing = np.zeros_like(brain)
    assert place(unit, nothing, nothing, SPACING, [(3.0, 0.1)], rng) == []


def responses(coder: str, contrast: float) -> tuple[list[float], list[float], list[str]]:
    """Of twelve scenes, with one of five coders."""
    coders = {
        "identity": lambda volume: volume,
        "blur": lambda volume: gaussian_filter(volume, (3, 6, 6)),
        "erase": lambda volume: np.full_like(volume, 0.5),
        "forget": lambda volume: None,
    }
    present, absent, patients = [], [], []
    for number in range(12):
        unit, brain, tumor = scene(number)
        (lesion,) = place(unit, brain, tumor, SPACING, [(5.0, contrast)], np.random.default_rng(number))
        with_it = insert(unit, [lesion], SPACING)
        # "forget" gives the volume without the lesion, whatever it was given.
        coded = [coders[coder](volume) if coder != "forget" else unit for volume in (with_it, unit)]
        present.append(response(coded[0], lesion, SPACING, brain))
        absent.append(response(coded[1], lesion, SPACING, brain))
        patients.append(f"patient {number // 2}")
    return present, absent, patients


def test_a_coder_that_keeps_it_and_two_that_do_not() -> None:
    kept = detection(*responses("identity", 0.4))
    assert kept.auc == 1
    assert (kept.low, kept.high, kept.n) == (1, 1, 12)
    assert detection(*responses("erase", 0.4)).auc == 0.5
    assert detection(*responses("forget", 0.4)).auc == 0.5
    faint = detection(*responses("identity", 0.06)).auc
    assert 0.5 < detection(*responses("blur", 0.06)).auc < faint < 1


def test_two_normal_distributions() -> None:
    """Responses of N(1.5, 1) against N(0, 1): an area of Phi(1.5 / sqrt(2)), and a d' of 1.5."""
    rng = np.random.default_rng(0)
    absent = rng.standard_normal(4000)
    present = 1.5 + rng.standard_normal(4000)
    found = detection(present.tolist(), absent.tolist(), ["a"] * 4000)
    assert found.auc == pytest.approx(norm.cdf(1.5 / math.sqrt(2)), abs=0.01)
    assert found.d_prime == pytest.approx(1.5, abs=0.05)
    assert math.isnan(found.low)  # of one patient


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from("abc")), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_the_area_as_scikit_learn_has_it(rows: list[tuple[int, int, str]]) -> None:
    present, absent, patients = (list(column) for column in zip(*rows, strict=True))
    found = detection(present, absent, patients)
    truth = [1] * len(present) + [0] * len(absent)
    assert found.auc == pytest.approx(roc_auc_score(truth, [*present, *absent]))
    if len(set(patients)) > 1:
        assert found.low <= found.high
        assert found.low - 1e-12 <= 1
    same = detection(present, present, patients)
    assert same.auc == 0.5


def test_the_interval_is_over_patients() -> None:
    # One patient's lesions are always seen, the other's never: whoever is drawn twice decides.
    found = detection([2.0] * 50 + [0.0] * 50, [1.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50)
    assert (found.auc, found.low, found.high) == (0.5, 0, 1)


def test_nothing_to_look_for() -> None:
    found = detection([], [], [])
    assert math.isnan(found.auc)
    assert found.n == 0
    assert math.isnan(detection([1.0], [1.0], ["a"]).d_prime)


def test_the_smallest_size() -> None:
    assert smallest_detected([(3, 0.5), (5, 0.9), (8, 1.0)]) == 5
    assert smallest_detected([(3, 0.95), (5, 0.89)]) is None
    assert smallest_detected([(3, math.nan), (5, 0.95)]) == 5
    assert smallest_detected([]) is None
