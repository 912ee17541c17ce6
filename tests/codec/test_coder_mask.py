"""Masks of volumes, and the range coder under them, read by a second decoder."""

import numpy as np
import pytest
from helpers.range_by_the_page import RangeReader
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import maximum_filter

from vaevq_med.codec.coders.mask import decode_mask, encode_mask
from vaevq_med.codec.coders.range_coder import TOTAL, RangeDecoder, RangeEncoder, to_frequencies
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.masks import covering, decode_masks, encode_masks


def ball(shape: tuple[int, ...], radius: float) -> np.ndarray:
    axes = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    return sum(axis**2 for axis in axes) <= radius**2


@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([2, 3, 1024, 16_384]), count=st.integers(0, 200))
@settings(max_examples=20, deadline=None)
def test_frequencies_are_exact_and_streams_are_read_by_a_second_decoder(seed: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 2 ** int(rng.integers(1, 37)), (count if k < 2000 else min(count, 5), k))
    weights[:, 0] += 1
    rows = to_frequencies(weights)
    assert (rows >= 1).all()
    assert (rows.sum(1) == TOTAL).all()
    symbols = rng.integers(0, k, len(rows))
    encoder = RangeEncoder()
    encoder.encode(symbols, rows)
    data = encoder.finish()
    ideal = -np.log2(rows[np.arange(len(rows)), symbols] / TOTAL).sum()
    assert len(data) * 8 <= ideal + 64 + 0.01 * len(rows)
    decoder = RangeDecoder(data)
    assert decoder.decode(rows).tolist() == symbols.tolist()
    decoder.finish()
    reader = RangeReader(data)
    assert [reader.symbol(row) for row in rows.tolist()] == symbols.tolist()


def test_symbols_of_one_table_cost_what_those_of_many_equal_rows_cost() -> None:
    row = to_frequencies(np.array([[5, 1, 0, 9]]))
    symbols = np.array([0, 3, 3, 1, 2] * 50)
    alike, rows = RangeEncoder(), RangeEncoder()
    alike.encode_alike(symbols, row[0])
    rows.encode(symbols, row.repeat(len(symbols), 0))
    data = alike.finish()
    assert data == rows.finish()
    assert RangeDecoder(data).decode_alike(len(symbols), row[0]).tolist() == symbols.tolist()


@given(
    mask=st.one_of(
        hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=4, max_side=7)),
        hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.just(False)),
        hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.just(True)),
    )
)
@settings(max_examples=25, deadline=None)
def test_masks_come_back(mask: np.ndarray) -> None:
    data = encode_mask(mask)
    back = decode_mask(data, mask.shape)
    assert back.dtype == bool
    assert back.shape == mask.shape
    assert (back == mask).all()
    assert (data == b"") == (not mask.any())


def test_a_smooth_mask_costs_a_small_part_of_its_bits() -> None:
    mask = ball((40, 60, 60), 18)
    data = encode_mask(mask)
    assert (decode_mask(data, mask.shape) == mask).all()
    assert len(data) < np.packbits(mask).nbytes / 15


def test_no_axis_order_and_no_place_matters_to_losslessness() -> None:
    mask = np.zeros((9, 30, 21), bool)
    mask[2:7, 5:11, 20] = mask[8, 29, 0] = True
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        turned = mask.transpose(order)
        assert (decode_mask(encode_mask(turned), turned.shape) == turned).all()


@given(place=st.integers(0, 10_000), change=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=25, deadline=None)
def test_damage_is_refused_or_gives_another_mask(place: int, change: int, cut: bool) -> None:
    mask = ball((6, 12, 12), 5)
    data = bytearray(encode_mask(mask))
    place %= len(data)
    if cut:
        data = data[:place]
    else:
        data[place] ^= change
    try:
        back = decode_mask(bytes(data), mask.shape)
    except CodecError:
        return
    assert back.shape == mask.shape


def test_a_box_outside_the_volume_is_refused() -> None:
    data = encode_mask(np.ones((4, 4, 4), bool))
    with pytest.raises(CodecError, match="bounding box"):
        decode_mask(data, (4, 4, 3))
    with pytest.raises(CodecError, match="expected at least the 12"):
        decode_mask(data[:7], (4, 4, 4))


@given(
    masks=hnp.arrays(bool, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))),
    cell=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=25, deadline=None)
def test_a_coarse_mask_covers_the_foreground_and_little_more(masks: np.ndarray, cell: int) -> None:
    coarse = [covering(mask, cell) for mask in masks]
    for mask, cover in zip(masks, coarse, strict=True):
        assert not (mask & ~cover).any()
        # Nothing of it is further away, along a row or a column, than the other end of its cell.
        near = np.stack([maximum_filter(one, 2 * cell - 1, mode="constant") for one in mask])
        assert not (cover & ~near).any()
        assert np.array_equal(covering(cover, cell), cover)
    assert cell > 1 or np.array_equal(coarse, masks)
    data, entries = encode_masks(coarse, cell)
    assert np.array_equal(decode_masks(data, entries, masks.shape[1:], cell), coarse)


def test_cells_that_cannot_be_are_refused() -> None:
    data, entries = encode_masks([ball((4, 9, 9), 3)], 1)
    for cell in (0, 2.0, None, 65):
        with pytest.raises(CodecError, match=r"found masks of cells of .* voxels, expected 1 to 64"):
            decode_masks(data, entries, (4, 9, 9), cell)  # type: ignore[arg-type]
