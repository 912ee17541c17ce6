"""How well a reconstruction follows the change from slice to slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vaevq_med.metrics.volumes import InterSliceError, inter_slice_error, inter_slice_errors


def test_by_hand() -> None:
    # Two pixels a slice; the second is background in all slices but the last.
    x = torch.tensor([[0.2, 0.0], [0.6, 0.0], [0.5, 0.1]]).view(1, 1, 3, 1, 2)
    y = torch.tensor([[0.1, 0.3], [0.7, 0.0], [0.5, 0.0]]).view(1, 1, 3, 1, 2)
    # First pair, one pixel: |0.4 - 0.6| = 0.2. Second, two: (|-0.1 - -0.2| + |0.1 - 0|) / 2 = 0.1.
    torch.testing.assert_close(inter_slice_errors(x, y), torch.tensor([[0.2, 0.1]]))
    # Over the three pixels at once: (0.2 + 0.1 + 0.1) / 3.
    torch.testing.assert_close(inter_slice_error(x, y), torch.tensor([0.4 / 3]))
    told = InterSliceError().per_slice(x, y)
    torch.testing.assert_close(told, torch.tensor([[0.2, 0.1, torch.nan]]), equal_nan=True)


def test_against_numpy_in_a_given_foreground() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.random((2, 3, 4, 5, 6)).astype(np.float32) for _ in range(2))
    inside = rng.random((2, 4, 5, 6)) < 0.4
    found = inter_slice_error(*(torch.from_numpy(one) for one in (x, y, inside)))
    for number in range(2):
        change = np.abs((x[number, :, 1:] - x[number, :, :-1]) - (y[number, :, 1:] - y[number, :, :-1])).mean(0)
        assert found[number].item() == pytest.approx(change[inside[number, 1:] | inside[number, :-1]].mean(), rel=1e-5)


def test_an_error_that_all_slices_share_is_none() -> None:
    x = torch.rand(1, 1, 4, 3, 3) + 0.1
    assert inter_slice_error(x, x + 0.25 * torch.rand(1, 1, 1, 3, 3)).item() == pytest.approx(0, abs=1e-6)
    flicker = 0.25 * torch.tensor([1.0, -1, 1, -1]).view(1, 1, 4, 1, 1)
    assert inter_slice_error(x, x + flicker).item() == pytest.approx(0.5, abs=1e-6)


def test_a_pair_without_a_foreground_has_no_figure() -> None:
    x = torch.tensor([0.0, 0.0, 0.5]).view(1, 1, 3, 1, 1)
    assert inter_slice_errors(x, x + 0.1).isnan().tolist() == [[True, False]]
    assert inter_slice_error(x, x + 0.1).item() == pytest.approx(0, abs=1e-6)
