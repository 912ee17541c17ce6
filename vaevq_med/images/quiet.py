"""Silence what libraries in C write to the stderr of the process, beside the one line that says what is wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_STDERR = 2
_lock = threading.Lock()
_depth = 0
_kept = -1


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send the process's stderr, which ITK's readers write to past Python, nowhere for a while.

    Threads may be in it at the same time; the last one out brings the stream back.
    """
    global _depth, _kept
    with _lock:
        if _depth == 0:
            _kept = _to_nowhere()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _kept >= 0:
                os.dup2(_kept, _STDERR)
                os.close(_kept)


def _to_nowhere() -> int:
    """The descriptor that keeps the stream, or -1 where the process has none."""
    with contextlib.suppress(Exception):  # a stream that is closed, or that a test replaced
        sys.stderr.flush()
    try:
        kept = os.dup(_STDERR)
    except OSError:
        return -1
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDERR)
    os.close(nowhere)
    return kept
