"""Intraclass correlation: published values, a model with known variances, and where it is not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaevq_med.metrics.agreement import intraclass_correlation

SHROUT_AND_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
"""Table 2 of Shrout and Fleiss (Psychological Bulletin, 1979): six targets, four judges."""


def test_the_published_example() -> None:
    found = intraclass_correlation(SHROUT_AND_FLEISS)
    assert round(found.agreement, 2) == 0.29  # their ICC(2,1)
    assert round(found.consistency, 2) == 0.71  # their ICC(3,1)


def test_as_pingouin_has_it() -> None:
    # pingouin 0.7.0, intraclass_corr on the same table: ICC(A,1) and ICC(C,1).
    found = intraclass_correlation(SHROUT_AND_FLEISS)
    assert found.agreement == pytest.approx(0.289764, abs=1e-6)
    assert found.consistency == pytest.approx(0.714841, abs=1e-6)


def test_shares_of_variance_that_are_known() -> None:
    """Subjects of variance 4, a residual of variance 1: consistency 4 / 5; a shift of 2 takes 2 from the agreement.

    The variance of two columns that differ by 2 is 2, so that the agreement is 4 / (4 + 1 + 2).
    """
    rng = np.random.default_rng(0)
    subjects = 2 * rng.standard_normal((40_000, 1))
    values = subjects + rng.standard_normal((40_000, 2)) + [0, 2]
    found = intraclass_correlation(values)
    assert found.consistency == pytest.approx(4 / 5, abs=0.01)
    assert found.agreement == pytest.approx(4 / 7, abs=0.01)


@given(
    values=st.lists(st.floats(-10, 10), min_size=3, max_size=8, unique=True),
    scale=st.floats(0.1, 10),
    shift=st.floats(-5, 5),
)
@settings(max_examples=40, deadline=None)
def test_equal_measurements_agree_and_units_do_not_matter(values: list[float], scale: float, shift: float) -> None:
    column = np.array(values)
    if np.ptp(column) < 1e-3:
        return
    same = intraclass_correlation(np.stack([column, column], axis=1))
    assert same.agreement == same.consistency == pytest.approx(1)
    moved = intraclass_correlation(np.stack([column, column + shift], axis=1))
    assert moved.consistency == pytest.approx(1)
    assert moved.agreement <= 1 + 1e-9
    other = np.stack([column, column[::-1]], axis=1)
    one, two = intraclass_correlation(other), intraclass_correlation(scale * other + 3)
    assert one.agreement == pytest.approx(two.agreement, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0]],
        [[1.0], [2.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, math.nan], [2.0, 3.0]],
        [1.0, 2.0],
        [[0.1] * 2] * 3,
    ],
)
def test_without_a_spread_there_is_none(values: list[list[float]]) -> None:
    found = intraclass_correlation(values)
    assert math.isnan(found.agreement)
    assert math.isnan(found.consistency)
