"""Which of many items are looked at, where not all are."""

from __future__ import annotations

import numpy as np

from vaevq_med.core.errors import DataError


def evenly_spaced(num_items: int, max_items: int | None) -> list[int]:
    """At most ``max_items`` of the numbers below ``num_items``, evenly spaced; all of them where it is None.

    Raises:
        DataError: ``max_items`` is below 1.

    >>> evenly_spaced(9, 3)
    [0, 4, 8]
    """
    if max_items is not None and max_items < 1:
        raise DataError(f"max_items: found {max_items}, expected 1 or more, or null for all")
    count = num_items if max_items is None else min(max_items, num_items)
    return np.linspace(0, num_items - 1, count).round().astype(int).tolist()
