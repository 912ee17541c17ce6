"""Which entropy coders there are: those that the modules of this folder define, by their names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaevq_med.codec import coders
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.errors import CodecError
from vaevq_med.core.discovery import classes_in

if TYPE_CHECKING:
    from vaevq_med.networks.base import Tokenizer


@functools.cache
def known_coders() -> Mapping[str, type[IndexCoder]]:
    """The coders by name.

    Examples:
        >>> known_coders()["fixed"].__name__
        'FixedLength'
    """
    found = {kind.name: kind for kind in classes_in(coders, IndexCoder)}  # type: ignore[type-abstract]
    return dict(sorted(found.items()))


def make_coder(
    name: str,
    tokenizer: Mapping[str, Any],
    model: Path | None = None,
    *,
    network: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> IndexCoder:
    """A coder by its name.

    Args:
        name: one of :func:`known_coders`.
        tokenizer: what a compressed file says of the tokenizer.
        model: file that the coder needs besides.
        network: the tokenizer, where indices are to be encoded.
        settings: what a compressed file says of the coder that made it, which this one has to have too.

    Raises:
        CodecError: there is none of this name, it needs a file or takes none, or has other settings.
    """
    known = known_coders()
    if name not in known:
        raise CodecError(f"coder: found {name!r}, expected one of {', '.join(known)}")
    coder = known[name].load(model, tokenizer, network=network, settings=settings)
    if settings is not None:
        for key in sorted({*settings, *coder.settings}):
            found, expected = coder.settings.get(key), settings.get(key)
            if found != expected:
                raise CodecError(f"coder {name}: found the {key} {found}, expected {expected}, with which it was coded")
    return coder
