"""The interface of every walk through a generator's tokens, and which ones there are."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vaevq_med.codec.coders import walks
from vaevq_med.core.discovery import classes_in
from vaevq_med.networks.generators.base import Generator
from vaevq_med.networks.generators.token_generator import TokenGenerator

_CACHE_BYTES = 2**28

_N = TypeVar("_N", bound=TokenGenerator)


Code = Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.int64]]
"""Codes symbols by their logits: an encoder writes those that it is given, a decoder reads them.

It is given logits in nats, ``[m, S]``, -inf where a symbol is impossible, and the symbols ``[m]`` from 0 to S - 1; of a
decoder, which does not know them yet, anything. It gives the symbols that a decoder will have.
"""


@dataclass(frozen=True)
class Slices:
    """What is coded together.

    Attributes:
        tokens: ``[n, h w, G]``; background where they are not live.
        live: ``[n, h w]``, with a live position in every slice.
        below: indices ``[n, h, w, G]`` of the slices below, -1 for none; None where the network does not see them.
    """

    tokens: NDArray[np.int64]
    live: NDArray[np.bool_]
    below: NDArray[np.int64] | None = None


class Walk(ABC, Generic[_N]):
    """The tokens of some slices in the order in which a generator predicts them, in float64 on the CPU.

    Args:
        network: the generator.
        label: class of the slices.

    Attributes:
        generator: the class of network that it is for, and for those that are derived from it.
    """

    generator: ClassVar[type[TokenGenerator]]

    def __init__(self, network: _N, label: int) -> None:
        self.network = network
        self.label = label

    @property
    def sees_below(self) -> bool:
        """Whether the network is given the slice below."""
        return False

    @property
    def slices_at_once(self) -> int:
        """Slices that are coded at once, part of the stream's definition.

        As many as have keys and values of at most 256 MiB in float64, at least 1; 1 where the slice below is seen.
        """
        if self.sees_below:
            return 1
        width = self.network.token_embedding.embedding_dim
        depth = len(cast(nn.ModuleList, self.network.blocks))
        return max(1, _CACHE_BYTES // (8 * 2 * depth * (self.network.sequence_length + 1) * width))

    @abstractmethod
    def run(self, slices: Slices, code: Code) -> None:
        """Code the live tokens, and put those that a decoder will have in their places.

        Args:
            slices: whose tokens are changed.
            code: what writes or reads them.
        """


@functools.cache
def known_walks() -> Mapping[type[TokenGenerator], type[Walk[Any]]]:
    """The walks by the class of their generators.

    Examples:
        >>> [kind.__name__ for kind in known_walks()]
        ['CoarseFirst', 'LlamaGen']
    """
    found = {kind.generator: kind for kind in classes_in(walks, Walk)}  # type: ignore[type-abstract]
    return dict(sorted(found.items(), key=lambda item: item[0].__name__))


def walk_for(network: Generator) -> type[Walk[Any]] | None:
    """The walk through a network's tokens, or None where there is none."""
    known = known_walks()
    return next((known[kind] for kind in type(network).__mro__ if kind in known), None)
