"""What sampling token by token asks of a network: sizes of the sequence, memory for it, and a step."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from vaevq_med.networks.generators.llama_blocks import KeyValueCache, StaticCache
from vaevq_med.networks.generators.token_generator import TokenGenerator


class StepwiseGenerator(TokenGenerator):
    """A generator that gives the distribution of an index from those before it, in raster order."""

    @abstractmethod
    def new_cache(self, batch_size: int) -> KeyValueCache:
        """An empty cache for so many images, in the weights' type and on their device."""

    @abstractmethod
    def new_static_cache(self, batch_size: int) -> StaticCache:
        """The same for :meth:`static_step`."""

    @abstractmethod
    def step(self, inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits ``[B, K]`` of the next token; ``inputs`` ``[B]`` are the labels at first, then the last tokens.

        For evaluation mode without gradients; neither labels nor tokens are checked here.

        Raises:
            VaevqMedError: the cache is full.
        """

    @abstractmethod
    def static_step(self, inputs: Tensor, cache: StaticCache, *, codebook: int, end: int, first: bool) -> Tensor:
        """:meth:`step` at the place that the cache holds on the device, which stays as it is.

        The operations are the same at every place of a codebook below ``end``, and none of them waits for the device.

        Args:
            inputs: ``[B]``, as for :meth:`step`.
            cache: where the step writes.
            codebook: that of the token to predict, the place modulo G.
            end: places that attention reads, more than the place.
            first: whether the place is 0, so that the inputs are labels.

        Returns:
            Logits ``[B, K]``.
        """
