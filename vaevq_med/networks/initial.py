"""Whether the weights of the networks that are being built come from a checkpoint, so that no file starts them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_FOLLOW: ContextVar[bool] = ContextVar("weights_follow", default=False)


@contextlib.contextmanager
def built_for_weights() -> Iterator[None]:
    """Networks built within are given all their weights afterwards: files of values for a start need not be there."""
    token = _FOLLOW.set(True)
    try:
        yield
    finally:
        _FOLLOW.reset(token)


def weights_follow() -> bool:
    """Whether a network that is built now is given its weights afterwards.

    >>> with built_for_weights():
    ...     weights_follow()
    True
    """
    return _FOLLOW.get()
