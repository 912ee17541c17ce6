"""Whole volumes through a segmentation network: stacks, the way to squares and back, nested regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.segmenters import CONTRASTS, small_segmenter, write_segmenter
from helpers.stores import write_checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.tasks import Segmenter, load_segmenter


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return load_segmenter(write_segmenter(tmp_path_factory.mktemp("segmenter") / "best.pt"), "cpu", batch_size=3)


def volume(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed))


def test_what_a_checkpoint_says(segmenter: Segmenter) -> None:
    assert segmenter.contrasts == tuple(CONTRASTS)
    assert segmenter.regions == ("whole_tumor", "tumor_core", "enhancing_tumor")
    assert segmenter.image_size == 32
    assert segmenter.content_hash.startswith("sha256:")


def test_at_the_network_s_own_size_it_is_the_network_on_each_stack(segmenter: Segmenter) -> None:
    whole = volume(5, 32, 32)
    found = segmenter.segment(whole)
    network = small_segmenter()
    for z in range(5):
        stack = whole[:, [max(z - 1, 0), z, min(z + 1, 4)]][None] * 2 - 1
        with torch.no_grad():
            p = network(stack).sigmoid()[0]
        expected = torch.stack([p[0], torch.minimum(p[0], p[1]), torch.minimum(torch.minimum(p[0], p[1]), p[2])])
        torch.testing.assert_close(found[:, z], expected)


@pytest.mark.parametrize("shape", [(1, 48, 40), (4, 21, 64), (7, 32, 30)])
def test_the_result_is_on_the_grid_that_was_given(segmenter: Segmenter, shape: tuple[int, int, int]) -> None:
    found = segmenter.segment(volume(*shape))
    assert found.shape == (3, *shape)
    assert found.dtype == torch.float32
    assert bool(((found >= 0) & (found <= 1)).all())
    assert bool((found[0] >= found[1]).all())
    assert bool((found[1] >= found[2]).all())


def test_padding_is_undone(segmenter: Segmenter) -> None:
    """Of a rectangle, the result is that of the square around it, cut."""
    whole = volume(2, 32, 32)
    whole[..., :6] = whole[..., 26:] = 0
    torch.testing.assert_close(segmenter.segment(whole[..., 6:26]), segmenter.segment(whole)[..., 6:26])


def test_a_place_stays_where_it_is(tmp_path: Path) -> None:
    """A bright spot in a large slice changes the probabilities around it the most."""
    large = load_segmenter(write_segmenter(tmp_path / "best.pt", seed=3), "cpu")
    dark, lit = torch.full((4, 3, 96, 64), 0.3), torch.full((4, 3, 96, 64), 0.3)
    lit[:, :, 60:72, 10:22] = 1.0
    change = (large.segment(lit) - large.segment(dark)).abs().sum(dim=(0, 1))
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(64.0), indexing="ij")
    center = [float((change * axis).sum() / change.sum()) for axis in (rows, columns)]
    assert center == pytest.approx([65.5, 15.5], abs=4)


def test_runs_of_a_volume_are_averaged(tmp_path: Path) -> None:
    path = write_segmenter(tmp_path / "best.pt", spatial_dims=3, depth=4)
    deep, network = load_segmenter(path, "cpu"), small_segmenter(spatial_dims=3, depth=4)
    whole = volume(6, 32, 32)
    with torch.no_grad():
        first, second = (network(whole[None, :, z : z + 4] * 2 - 1).sigmoid()[0] for z in (0, 2))
    expected = torch.cat([first[:, :2], (first[:, 2:] + second[:, :2]) / 2, second[:, 2:]], dim=1).cummin(0).values
    torch.testing.assert_close(deep.segment(whole), expected)
    assert deep.segment(volume(2, 32, 32)).shape == (3, 2, 32, 32)


def test_what_is_no_volume_or_no_segmenter_is_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    for wrong in (torch.zeros(3, 2, 8, 8), torch.zeros(4, 8, 8), torch.zeros(4, 0, 8, 8)):
        with pytest.raises(VaevqMedError, match=r"expected \[4, D, H, W\], the contrasts t1n, t1c, t2w, t2f"):
            segmenter.segment(wrong)
    with pytest.raises(VaevqMedError, match="found no checkpoint"):
        load_segmenter(tmp_path / "none.pt")
    with pytest.raises(VaevqMedError, match="batch-size: found 0"):
        load_segmenter(segmenter.stored.path, batch_size=0)
    tokenizer = write_checkpoint(tmp_path / "tokenizer.pt", modalities=CONTRASTS)
    with pytest.raises(VaevqMedError, match=r"expected that of vaevq_med\.networks\.SliceSegmenter"):
        load_segmenter(tokenizer)
