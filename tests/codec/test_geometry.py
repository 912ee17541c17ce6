"""Turning volumes to slices and back, and what of a token grid is live, against the reader and by brute force."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scans import affine_of, body, write_nifti
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from vaevq_med.codec.geometry import Turn, check_invertible, from_squares, live_positions, to_pixels
from vaevq_med.core.errors import DataError
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Volume
from vaevq_med.prepare.volumes.reading import CaseReader

AXES = [*permutations(("LR", "PA", "IS"))]
ORIENTATIONS = [
    "".join(p[i] for p, i in zip(axes, picks, strict=True)) for axes in AXES for picks in product((0, 1), repeat=3)
]


@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal"])
def test_all_48_orientations_come_back_exactly(view: str) -> None:
    volume = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    for codes in ORIENTATIONS:
        turn = Turn.of(affine_of(codes), view)
        assert np.array_equal(turn.volume(turn.stack(volume)), volume)


@pytest.mark.parametrize("view", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAL", "PIR"])
def test_the_stack_is_the_readers(view: str, codes: str, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", codes=codes)
    recipe = Recipe.load("brats24/axial_256").changed(axis=view)
    reader = CaseReader(recipe)
    stack = reader.contrast(Volume(path), accept=("background", "saturation")).stack.numpy()
    shape, affine = reader.grid
    import nibabel as nib

    voxels = np.asarray(nib.load(path).dataobj)
    assert voxels.shape == shape
    assert np.array_equal(Turn.of(affine, view).stack(voxels), stack)


@pytest.mark.parametrize("recipe", ["brats24/axial_256_n4"])
def test_a_recipe_that_cannot_be_undone_is_refused(recipe: str) -> None:
    with pytest.raises(DataError, match="cannot be undone"):
        check_invertible(Recipe.load(recipe))


@given(
    rows=st.integers(3, 30),
    columns=st.integers(3, 30),
    size=st.sampled_from([8, 16, 24, 32]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 1000),
)
def test_what_is_not_live_shows_nothing(rows: int, columns: int, size: int, interpolation: str, seed: int) -> None:
    """By brute force: each voxel alone is resized, and whatever patch it reaches has to be live."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((4, rows, columns), bool)
    for number in range(4):
        mask[number, rng.integers(rows), rng.integers(columns)] = True
    recipe = Recipe.load("brats24/axial_256").changed(size=size, interpolation=interpolation)
    squares = to_pixels(torch.from_numpy(mask).float(), recipe).numpy()
    patches = squares.reshape(4, size // 4, 4, size // 4, 4).max(axis=(2, 4)) > 0
    live = live_positions(mask, size=size, patch=4, interpolation=interpolation)
    assert live.shape == patches.shape
    assert not (patches & ~live).any()
    if max(rows, columns) == size:
        assert np.array_equal(live, patches)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_slices_of_a_data_set_are_live_where_the_codec_codes_them(interpolation: str) -> None:
    """Enlarged and in 8 bits, they show less than the voxels that they are made from; the rim is found all the same."""
    mask = np.moveaxis(body() > 0, 2, 0)  # [12, 28, 36]
    recipe = Recipe.load("brats24/axial_256").changed(size=40, interpolation=interpolation)
    # A body that is faint at its rim, as a brain is.
    faint = torch.from_numpy(np.where(mask, np.where(binary_erosion(mask), 1.0, 0.02), 0).astype(np.float32))
    stored = (to_pixels(faint, recipe) * 255).round() / 255
    codec = live_positions(mask, size=40, patch=4, interpolation=interpolation)
    shown = live_positions((stored > 0).numpy(), size=40, patch=4, interpolation=interpolation)
    again = live_positions((stored > 0).numpy(), size=40, patch=4, interpolation=interpolation, resized=True)
    lost, missed = (codec & ~shown).sum(), (codec & ~again).sum()
    assert missed < lost / 4
    assert (shown <= again).all()


@given(rows=st.integers(8, 40), columns=st.integers(8, 40))
def test_squares_of_the_own_size_come_back_exactly(rows: int, columns: int) -> None:
    slices = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(0))
    recipe = Recipe.load("brats24/axial_256").changed(size=max(rows, columns))
    assert torch.equal(from_squares(to_pixels(slices, recipe), (rows, columns), "bilinear"), slices)


def test_a_resized_slice_comes_back_in_its_place() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 48), indexing="ij")
    slices = (0.5 + 0.4 * torch.sin(5 * x + 3 * y))[None]
    recipe = Recipe.load("brats24/axial_256").changed(size=64)
    back = from_squares(to_pixels(slices, recipe), (60, 48), "bilinear")
    assert back.shape == slices.shape
    assert (back - slices)[:, :, 2:-2].abs().max() < 0.02
