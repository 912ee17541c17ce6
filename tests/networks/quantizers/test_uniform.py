"""Channels rounded to evenly spaced values, their own or those that another network rounded to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.quantizer_cases import Case
from hypothesis import given
from hypothesis import strategies as st

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import FSQ
from vaevq_med.networks.quantizers.levels import LevelQuantizer
from vaevq_med.networks.quantizers.uniform import UniformQuantizer

CASES = {
    "uniform": Case(
        lambda: UniformQuantizer(low=[-3.0, -2.0, -1.0], high=[3.0, 1.0, 4.0], num_embeddings=16),
        learns=False,
        random_start=False,
    ),
    "uniform-soft": Case(
        lambda: UniformQuantizer(low=[-3.0, -2.0], high=[3.0, 1.0], num_embeddings=256, readout="soft"),
        learns=False,
        random_start=False,
    ),
    "levels": Case(lambda: LevelQuantizer(levels=[8, 5, 4]), learns=False, random_start=False),
}


@given(low=st.floats(-10, 9), width=st.floats(0.1, 20), bits=st.integers(1, 8), value=st.floats(-40, 40))
def test_as_numpy_rounds(low: float, width: float, bits: int, value: float) -> None:
    """Against a search over the grid that ``linspace`` makes: no value is nearer, and half a step is the most."""
    grid = np.linspace(low, low + width, 2**bits)
    quantizer = UniformQuantizer(low=[0.0, low], high=[1.0, low + width], num_embeddings=2**bits)
    output = quantizer(torch.tensor([0.5, value]).view(1, 2, 1))
    code, index = float(output.codes[0, 1, 0]), int(output.indices[0, 0, 1])
    assert abs(code - grid[index]) < 1e-4 * (1 + abs(low) + width)
    assert abs(value - code) <= np.abs(grid - value).min() + 1e-4 * (1 + abs(low) + width)


def test_the_soft_readout_has_no_bits_that_hold_it() -> None:
    quantizer = UniformQuantizer(low=[-1.0], high=[1.0], num_embeddings=4)
    z = torch.tensor([[0.1, 5.0]]).unsqueeze(1)
    assert quantizer.is_discrete
    quantizer.select_readout("soft")
    assert not quantizer.is_discrete
    output = quantizer(z)
    assert torch.equal(output.quantized, z)
    assert output.indices.flatten().tolist() == [2, 3]
    with pytest.raises(VaevqMedError, match="readout is 'mean'; expected one of hard, soft"):
        quantizer.select_readout("mean")


def test_codes_of_fsq_keep_their_indices() -> None:
    fsq, levels = FSQ(levels=[8, 5, 4]), LevelQuantizer(levels=[8, 5, 4])
    output = fsq(torch.randn(1, 3, 40, 40))
    found = levels(output.codes)
    assert torch.equal(found.indices, output.indices)
    assert torch.equal(found.codes, output.codes)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(VaevqMedError, match=r"the ranges are \[1.0\] to \[1.0\]; expected a smaller and a larger"):
        UniformQuantizer(low=[1.0], high=[1.0])
    with pytest.raises(VaevqMedError, match="num_embeddings is 1; expected at least 2"):
        UniformQuantizer(low=[0.0], high=[1.0], num_embeddings=1)
    with pytest.raises(VaevqMedError, match=r"levels are \[8, 1\]; expected one or more, each at least 2"):
        LevelQuantizer(levels=[8, 1])
