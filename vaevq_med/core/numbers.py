"""Numbers in messages: never so short that a message contradicts itself."""

from __future__ import annotations

_MOST_DECIMALS = 17


def told_apart(value: float, limit: float, decimals: int = 1) -> str:
    """A number in as many decimals as it takes to see on which side of a limit it lies.

    Args:
        value: what was found.
        limit: what it misses.
        decimals: at least so many.

    Examples:
        >>> told_apart(10, 1), told_apart(1.04, 1), told_apart(1.0000001, 1)
        ('10.0', '1.04', '1.0000001')
    """
    for places in range(decimals, _MOST_DECIMALS + 1):
        text = f"{value:.{places}f}"
        if (float(text) > limit, float(text) < limit) == (value > limit, value < limit):
            return text
    return repr(float(value))


def percent(share: float, limit: float | None = None) -> str:
    """A share in percent, told apart from a limit where there is one.

    Args:
        share: in [0, 1].
        limit: likewise.

    Examples:
        >>> percent(0.05), percent(0.0523), percent(0.05001, 0.05), percent(0.004)
        ('5%', '5.23%', '5.001%', '0.4%')
    """
    if limit is not None:
        return told_apart(100 * share, 100 * limit) + "%"
    return f"{100 * share:.3g}%"
