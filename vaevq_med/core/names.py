"""Names that users write: what a misspelt one is nearest to, an odd one in a line, one for a list, one for a file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import VaevqMedError


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that is most like a misspelt one; empty where none is.

    Args:
        name: as it was written.
        known: the names that there are.
        cutoff: how much alike the two have to be, from 0 to 1.

    >>> nearest("sise", ["size", "seed"])
    'size'
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), "")


def did_you_mean(name: object, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """The end of a message about a misspelt name.

    Args:
        name: as it was written.
        known: the names that there are.
        otherwise: what the message ends with where none of them is alike.
        cutoff: how much alike the two have to be, from 0 to 1.

    >>> did_you_mean("sise", ["size", "seed"], "expected size or seed")
    "did you mean 'size'?"
    """
    close = nearest(name, known, cutoff)
    return f"did you mean {close!r}?" if close else otherwise


def in_one_line(name: str) -> str:
    """A name as it stands, or as JSON has it where it would break a line."""
    return name if name.isprintable() else json.dumps(name)


def listed(value: Any) -> list[Any]:
    """What is given where a list is expected: a word, a number or a mapping is one item, a word with commas several.

    Args:
        value: a list or a tuple, or one item.

    Examples:
        >>> listed("t1n"), listed("t1n, t2f"), listed(("t1n", "t2f")), listed(2)
        (['t1n'], ['t1n', 't2f'], ['t1n', 't2f'], [2])
    """
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()] or [value]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else [value]


def names_of(checkpoints: Sequence[Path]) -> list[str]:
    """A name for each checkpoint: that of a run's folder where it stands in its ``checkpoints``.

    All are paths where two are alike.

    Raises:
        VaevqMedError: one is named twice.

    >>> names_of([Path("runs/rvq/checkpoints/best.pt"), Path("packed/mgvq")])
    ['rvq', 'mgvq']
    """
    places = [path.resolve() for path in checkpoints]
    twice = next((path for path, place in zip(checkpoints, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise VaevqMedError(f"checkpoint {twice}: found it twice, expected each once")
    short = [
        p.parent.parent.name if p.parent.name == "checkpoints" else p.name if p.is_dir() else p.stem for p in places
    ]
    return short if len(set(short)) == len(short) else [str(path) for path in checkpoints]
