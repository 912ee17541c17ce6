"""Which kinds of foreign tokenizers there are: those that the modules of this room define, and those of packages."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points

from vaevq_med import foreign
from vaevq_med.core.discovery import classes_in
from vaevq_med.core.names import did_you_mean
from vaevq_med.foreign.base import Kind
from vaevq_med.foreign.errors import ForeignError

GROUP = "vaevq_med.foreign"


@functools.cache
def known_kinds() -> Mapping[str, type[Kind]]:
    """The kinds by name; those that an installed package publishes in the entry-point group ``vaevq_med.foreign`` too.

    Examples:
        >>> known_kinds()["taming"].source
        'a checkpoint (.ckpt, .pt, .safetensors)'
    """
    found = {kind.name: kind for kind in classes_in(foreign, Kind) if _is_kind(kind)}  # type: ignore[type-abstract]
    for entry in entry_points(group=GROUP):
        kind = entry.load()
        if not _is_kind(kind):
            raise ForeignError(
                f"entry point {entry.name} of {GROUP}: found {kind!r}, expected a class derived from Kind"
            )
        found.setdefault(kind.name, kind)
    return dict(sorted(found.items()))


def _is_kind(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Kind) and hasattr(kind, "name") and not inspect.isabstract(kind)


def kind_of(name: str) -> type[Kind]:
    """A kind by its name.

    Raises:
        ForeignError: there is none.
    """
    known = known_kinds()
    if name not in known:
        raise ForeignError(
            f"kind: found {name!r}, expected one of {', '.join(known)}; {did_you_mean(name, known, 'adopt --list')}"
        )
    return known[name]
