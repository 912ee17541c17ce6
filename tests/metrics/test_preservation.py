"""What a reconstruction keeps: lesions by size, and the class of a picture."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.features import Pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.special import rel_entr, softmax

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics import (
    ClassAgreement,
    ClassDivergence,
    class_agreement,
    class_divergence,
    lesion_recall,
    lesions_found,
    preservation,
    size_edges,
)
from vaevq_med.metrics.preservation import KEPT
from vaevq_med.metrics.segmentation import dice

SPACING = (2.0, 1.0, 1.0)


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of some blobs each."""
    rng = np.random.default_rng(seed)
    first, second = (ndimage.gaussian_filter(rng.standard_normal((8, 24, 24)), 1.5) for _ in range(2))
    return first + second > 0.05, first > 0.05


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 200))
def test_components_are_those_of_scipy(seed: int) -> None:
    prediction, reference = masks(seed)
    numbers, count = ndimage.label(reference, structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(reference, numbers, range(1, count + 1))
    hits = ndimage.sum_labels(reference & prediction, numbers, range(1, count + 1))
    found = lesions_found(prediction, reference, SPACING, least_ml=0)
    expected = sorted(zip(sizes * 0.002, hits / sizes, strict=True))
    np.testing.assert_allclose(sorted(found), expected, rtol=1e-9)
    # Sizes named in another order leave what is kept of all of them.
    edges = size_edges(volume for volume, _ in found)
    by_size = lesion_recall(found, edges)
    ((kept, there),) = lesion_recall(found, ())
    assert (kept, there) == (sum(one for one, _ in by_size), sum(one for _, one in by_size))
    assert there == count
    assert kept == (hits / sizes >= KEPT).sum()


def test_a_part_of_too_little_is_no_lesion_and_the_largest_always_is() -> None:
    reference = np.zeros((1, 8, 8), bool)
    reference[0, 0, 0] = reference[0, 4:6, 4:6] = True
    assert lesions_found(reference, reference, SPACING, least_ml=0.003) == [(pytest.approx(0.008), 1.0)]
    assert len(lesions_found(reference, reference, SPACING, least_ml=1.0)) == 1
    assert lesions_found(reference, np.zeros_like(reference), SPACING) == []
    with pytest.raises(VaevqMedError, match="expected one shape"):
        lesions_found(reference[:, :4], reference, SPACING)
    with pytest.raises(VaevqMedError, match="found no lesions, expected some"):
        size_edges([])


def test_identity_keeps_everything() -> None:
    _, reference = masks(3)
    found = lesions_found(reference, reference, SPACING, least_ml=0)
    assert len(found) > 3
    assert all(share == 1.0 for _, share in found)
    assert dice(reference, reference) == 1.0
    edges = size_edges(volume for volume, _ in found)
    assert all(kept == there > 0 for kept, there in lesion_recall(found, edges))
    # One voxel less is not everything.
    less = reference.copy()
    less[tuple(np.argwhere(reference)[0])] = False
    count = int(reference.sum())
    assert dice(less, reference) == pytest.approx(2 * (count - 1) / (2 * count - 1))
    assert sorted(share for _, share in lesions_found(less, reference, SPACING, least_ml=0))[0] < 1.0


def test_a_blur_loses_small_lesions_before_large_ones() -> None:
    """Disks of radius 2, 4 and 8, found by a threshold in their picture after blurs of growing width."""
    rows, columns = np.mgrid[:64, :192]
    centers, radii = ((32, 24), (32, 76), (32, 146)), (2, 4, 8)
    disks = [np.hypot(rows - r, columns - c) <= radius for (r, c), radius in zip(centers, radii, strict=True)]
    reference = np.any(disks, axis=0)
    edges = size_edges(float(disk.sum()) / 1000 for disk in disks)
    kept: list[list[int]] = []
    for width in (0.0, 1.0, 2.0, 3.5, 6.0, 12.0):
        picture = ndimage.gaussian_filter(reference.astype(np.float64), width)
        found = lesions_found((picture > 0.5)[None], reference[None], (1.0, 1.0, 1.0), least_ml=0)
        kept.append([one for one, there in lesion_recall(found, edges)])
    assert kept[0] == [1, 1, 1]
    assert kept[-1] == [0, 0, 0]
    for small, medium, large in kept:
        assert small <= medium <= large
    assert [0, 1, 1] in kept
    assert [0, 0, 1] in kept
    for one, other in itertools.pairwise(kept):  # nothing comes back as the blur grows
        assert all(after <= before for before, after in zip(one, other, strict=True))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_agreement_and_divergence_by_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, 5, 7))
    agreed = class_agreement(torch.from_numpy(first), torch.from_numpy(second))
    assert agreed.tolist() == (first.argmax(1) == second.argmax(1)).astype(float).tolist()
    moved = class_divergence(torch.from_numpy(first), torch.from_numpy(second))
    expected = rel_entr(softmax(first, axis=1), softmax(second, axis=1)).sum(axis=1)
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-5)


def test_the_class_of_the_same_picture_is_the_same_to_the_bit() -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    agreement, divergence = ClassAgreement(), ClassDivergence()
    assert agreement.figure.convention.endswith("; by efficientnet-lite0")
    assert agreement.per_image(images, images).tolist() == [1.0] * 3
    assert divergence.per_image(images, images).tolist() == [0.0] * 3
    moved = divergence.measure(images, images.flip(2), {})
    assert set(moved) == {"class_kl"}
    assert bool((moved["class_kl"] > 0).all())
    assert divergence.per_image(images[:, :1], images[:, :1]).tolist() == [0.0] * 3


def test_a_network_without_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preservation, "feature_network", lambda *_: Pixels())
    with pytest.raises(VaevqMedError, match="network is 'squeeze', which has no classes; expected efficientnet-lite0"):
        ClassAgreement(network="squeeze")


def test_the_network_is_given_both_pictures_in_its_own_range(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sees(Pixels):
        num_classes = 2
        seen: list[torch.Tensor] = []  # noqa: RUF012

        def pooled(self, images: torch.Tensor) -> torch.Tensor:
            self.seen.append(images)
            return images.flatten(1)[:, :2]

        def logits(self, pooled: torch.Tensor) -> torch.Tensor:
            return pooled

    monkeypatch.setattr(preservation, "feature_network", lambda *_: Sees())
    target, found = torch.full((2, 1, 2, 2), 0.25), torch.full((2, 1, 2, 2), 1.0)
    assert ClassAgreement(network="sees").per_image(target, found).tolist() == [1.0, 1.0]
    first, second = Sees.seen
    assert torch.equal(first, torch.full_like(target, -0.5))
    assert torch.equal(second, torch.ones_like(found))


def test_a_picture_of_nan_agrees_with_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    damaged = torch.tensor([[1.0, 3.0], [1.0, math.nan], [1.0, 3.0]])
    for one, other in ((logits, damaged), (damaged, logits)):
        assert [str(value) for value in class_agreement(one, other).tolist()] == ["1.0", "nan", "0.0"]
