"""Dice, distances, lesions and volumes against scipy, by hand, and of empty masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.spatial.distance import dice as scipy_dice

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.segmentation import (
    bland_altman,
    dice,
    dice_of_counts,
    hausdorff95,
    lesion_scores,
    region_scores,
    summarize,
    volume_ml,
)

SHAPE, SPACING = (6, 10, 12), (3.0, 1.0, 0.5)


def box(*ends: tuple[int, int], shape: tuple[int, int, int] = SHAPE) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*end) for end in ends)] = True
    return mask


EMPTY, LESION = np.zeros(SHAPE, bool), box((1, 4), (2, 6), (3, 9))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_dice_is_that_of_scipy(seed: int, first: float, second: float) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(SHAPE) < share for share in (first, second)]
    expected = 1 - scipy_dice(masks[0].ravel(), masks[1].ravel())
    assert dice(*masks) == pytest.approx(expected)
    counts = torch.tensor([[int((masks[0] & masks[1]).sum())], [int(masks[0].sum())], [int(masks[1].sum())]])
    assert dice_of_counts(*counts).item() == pytest.approx(expected)


def surface(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Places in mm of the voxels with a neighbor outside, as MONAI has them."""
    inner = ndimage.binary_erosion(mask, ndimage.generate_binary_structure(3, 1))
    return np.argwhere(mask & ~inner) * np.array(SPACING)


@pytest.mark.parametrize("seed", range(4))
def test_the_distance_is_that_of_surfaces(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blurred = [ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5) for _ in range(2)]
    masks = [one > np.quantile(one, 0.8) for one in blurred]
    apart = cdist(surface(masks[0]), surface(masks[1]))
    expected = max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))
    assert hausdorff95(masks[0], masks[1], SPACING) == pytest.approx(expected, rel=1e-5)


def test_a_shift_by_two_slices_is_six_millimeters() -> None:
    assert hausdorff95(box((3, 4), (2, 3), (3, 4)), box((1, 2), (2, 3), (3, 4)), SPACING) == pytest.approx(6.0)


def test_what_is_the_original_scores_as_the_original_does() -> None:
    scores = region_scores(LESION, LESION, SPACING)
    perfect = ("dice", "lesion_f1", "lesion_iou", "panoptic_quality", "lesions_detected")
    assert [scores[name] for name in perfect] == [1.0] * 5
    assert (scores["hd95_mm"], scores["difference_ml"]) == (0.0, 0.0)
    assert scores["volume_ml"] == pytest.approx(3 * 4 * 6 * 1.5 / 1000)


def test_what_erases_the_lesion_scores_nothing() -> None:
    scores = region_scores(EMPTY, LESION, SPACING)
    nothing = ("dice", "lesion_f1", "lesion_iou", "panoptic_quality", "lesions_detected", "volume_ml", "lesions_found")
    assert [scores[name] for name in nothing] == [0] * 7
    assert scores["hd95_mm"] == pytest.approx(math.hypot(6 * 3, 10, 6))
    assert scores["difference_ml"] == -scores["reference_ml"] < 0


def test_what_is_empty_in_both_is_right() -> None:
    scores = region_scores(EMPTY, EMPTY, SPACING)
    assert (scores["dice"], scores["hd95_mm"], scores["lesion_f1"], scores["panoptic_quality"]) == (1, 0, 1, 1)
    assert (scores["lesions_detected"], scores["lesions"], scores["difference_ml"]) == (1, 0, 0)


def test_a_lesion_where_there_is_none_is_wrong() -> None:
    scores = region_scores(LESION, EMPTY, SPACING)
    assert (scores["dice"], scores["lesion_f1"], scores["panoptic_quality"]) == (0, 0, 0)
    assert scores["lesions_detected"] == 1  # of none


def test_the_diagonal_of_brats() -> None:
    shape = (155, 240, 240)
    reference = box((70, 80), (100, 110), (100, 110), shape=shape)
    assert hausdorff95(np.zeros(shape, bool), reference, (1, 1, 1)) == pytest.approx(373.128, abs=1e-3)


def test_a_single_slice_has_scores() -> None:
    one, other = LESION[1:2], box((1, 2), (2, 6), (3, 7))[1:2]
    scores = region_scores(other, one, SPACING)
    assert scores["dice"] == pytest.approx(2 * 16 / (16 + 24))
    assert scores["hd95_mm"] == pytest.approx(1.0)  # two columns of half a millimeter
    assert not any(math.isnan(value) for value in scores.values())


@pytest.mark.parametrize("axis", range(3))
def test_a_single_slice_is_as_far_as_its_outline_in_whichever_axis(axis: int) -> None:
    """A square within a square: 10 mm from one outline to the other, which the pixels between would make less."""
    wide, narrow = np.ones((42, 42), bool), np.zeros((42, 42), bool)
    wide[[0, -1]] = wide[:, [0, -1]] = False
    narrow[11:-11, 11:-11] = True
    masks = [np.expand_dims(mask, axis) for mask in (wide, narrow)]
    outlines = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) for mask in (wide, narrow)]
    apart = cdist(*outlines)
    expected = max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 5.0
    assert hausdorff95(masks[0], masks[1], spacing) == pytest.approx(expected, rel=1e-5)
    line = np.zeros((1, 1, 9), bool)
    line[..., 2] = True
    assert hausdorff95(line, np.roll(line, 3), (1, 1, 2)) == pytest.approx(6)


def test_small_parts_alone_are_lesions_by_the_largest() -> None:
    shape = (1, 20, 20)
    reference = box((0, 1), (1, 3), (1, 4), shape=shape) | box((0, 1), (8, 9), (8, 9), shape=shape)
    missed = lesion_scores(np.zeros(shape, bool), reference, (1, 1, 1))
    assert (missed.lesions, missed.lesion_f1, missed.lesions_detected) == (1, 0, 0)
    assert lesion_scores(reference, reference, (1, 1, 1)).lesion_f1 == 1
    twins = box((0, 1), (1, 3), (1, 4), shape=shape) | box((0, 1), (8, 10), (8, 11), shape=shape)
    assert lesion_scores(twins, reference, (1, 1, 1)).lesions_found == 1
    large = reference | box((0, 1), (12, 20), (12, 20), shape=shape)
    assert lesion_scores(large, large, (1, 1, 1)).lesions == 1  # 64 voxels, beside which the others are specks


def test_lesions_by_hand() -> None:
    """Of three lesions one is found with an IoU of 2/3, one is found by a third alone, and one is missed."""
    shape = (1, 20, 20)
    reference = box((0, 1), (1, 3), (1, 4), shape=shape) | box((0, 1), (8, 11), (8, 11), shape=shape)
    reference |= box((0, 1), (15, 17), (15, 17), shape=shape)
    prediction = box((0, 1), (1, 3), (1, 3), shape=shape) | box((0, 1), (8, 9), (8, 11), shape=shape)
    scores = lesion_scores(prediction, reference, (1, 1, 1), least_ml=0)
    assert (scores.lesions, scores.lesions_found, scores.lesions_matched) == (3, 2, 1)
    assert scores.lesion_f1 == pytest.approx(2 / 5)
    assert scores.lesion_iou == pytest.approx(4 / 6)
    assert scores.panoptic_quality == pytest.approx(2 / 5 * 4 / 6)
    assert scores.lesions_detected == pytest.approx(1 / 3)


def test_parts_that_touch_at_a_corner_are_one_lesion_and_specks_are_none() -> None:
    corner = box((0, 1), (0, 1), (0, 1)) | box((1, 2), (1, 2), (1, 2))
    assert lesion_scores(corner, corner, (1, 1, 1), least_ml=0).lesions == 1
    speck = lesion_scores(corner | LESION, LESION, (1, 1, 1))
    assert (speck.lesions_found, speck.lesion_f1) == (1, 1.0)


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(3))
def test_lesions_are_those_of_panoptica(seed: int) -> None:
    panoptica: Any = pytest.importorskip("panoptica")
    rng = np.random.default_rng(seed)
    blurred = ndimage.gaussian_filter(rng.standard_normal((12, 32, 32)), 2)
    reference = blurred > np.quantile(blurred, 0.85)
    prediction = ndimage.gaussian_filter(blurred + 0.02 * rng.standard_normal(blurred.shape), 1)
    found = prediction > np.quantile(prediction, 0.87)
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5 + 1e-9),
        verbose=False,
    )
    theirs = evaluator.evaluate(found.astype(np.uint8), reference.astype(np.uint8))["ungrouped"]
    scores = lesion_scores(found, reference, (1, 1, 1), least_ml=0)
    assert scores.lesions_matched == theirs.tp > 0
    assert scores.lesion_f1 == pytest.approx(theirs.rq)
    assert scores.lesion_iou == pytest.approx(theirs.sq)
    assert scores.panoptic_quality == pytest.approx(theirs.pq)


def test_volumes_and_their_agreement_by_hand() -> None:
    assert volume_ml(LESION, SPACING) == pytest.approx(0.108)
    found = bland_altman([1.0, 2.0, 6.0])
    assert found["bias"] == 3.0
    assert found["sd"] == pytest.approx(math.sqrt(7))
    assert (found["lower"], found["upper"]) == pytest.approx((3 - 1.96 * math.sqrt(7), 3 + 1.96 * math.sqrt(7)))
    assert bland_altman([5.0]) == {"bias": 5.0, "sd": 0.0, "lower": 5.0, "upper": 5.0, "n": 1}
    with pytest.raises(VaevqMedError, match="no differences"):
        bland_altman([])


def test_a_mean_is_over_patients_and_has_no_nan() -> None:
    """Two examinations of one patient count once; the patient without the region counts as right or wrong."""
    pairs = [("a", "a1", LESION, LESION), ("a", "a2", EMPTY, LESION), ("b", "b1", EMPTY, EMPTY)]
    rows = [
        {"case": case, "patient": patient, "region": "enhancing_tumor", **region_scores(found, wanted, SPACING)}
        for patient, case, found, wanted in pairs
    ]
    summary = summarize(rows)["enhancing_tumor"]
    assert summary["dice"] == {"value": 0.75, "std": pytest.approx(math.sqrt(0.125)), "n": 2}
    assert summary["volume_bias_ml"]["bias"] == pytest.approx(-0.108 / 4)
    assert all(value == value for found in summary.values() for value in found.values())


def test_masks_of_two_shapes_are_refused() -> None:
    with pytest.raises(VaevqMedError, match=r"found masks of \(6, 10, 12\) bool and \(5, 10, 12\) bool"):
        dice(LESION, LESION[:5])
    with pytest.raises(VaevqMedError, match="uint8"):
        hausdorff95(LESION.astype(np.uint8), LESION, SPACING)  # type: ignore[arg-type]
