"""What every tokenizer is, whoever built it: images to a grid of codebook indices and back."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import QuantizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer


class Tokenizer(nn.Module, ABC):
    """What evaluation, token stores, the codec, the tasks and the generators ask of a tokenizer.

    A subclass says how images become latents and codes become images; the quantizer between them is one of this
    package, and all that follows from the three stands here. ``networks.VisualTokenizer`` is the one that is trained;
    those of ``networks/adapters`` hold a network of another package.

    Attributes:
        quantizer: of latents with ``embedding_dim`` channels.
        embedding_dim: D, channels of the latent.
        variational: whether :meth:`encode` gives a posterior.
        gives_latent: whether what :meth:`encode` gives is not quantized yet; false of one whose network quantizes.
        takes_volumes: whether it is given volumes ``[B, C, d, H, W]``.
        slice_context: slices above and below that the decoder of single slices sees; 0 for any other tokenizer.
        patchwise: whether a position of the grid stands for the patch of the image at its place.
    """

    quantizer: Quantizer
    embedding_dim: int
    variational: bool = False
    gives_latent: bool = True
    takes_volumes: bool = False
    slice_context: int = 0
    patchwise: bool = True

    @abstractmethod
    def encode(self, images: Tensor) -> DiagonalGaussian | Tensor:
        """The posterior of ``[B, C, H, W]`` in [-1, 1], or, without one, the latent ``[B, D, *grid]``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Images ``[B, C, H, W]``, nominally in [-1, 1], of codes or of a continuous latent, ``[B, D, *grid]``."""

    def rectify(self, codes: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]`` as :meth:`decode_latent` takes them; where there is no rectifier, as they are."""
        return codes

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images of a continuous latent, or of rectified codes; without a rectifier, what :meth:`decode` does."""
        return self.decode(latent)

    @property
    @abstractmethod
    def factors(self) -> tuple[int, ...]:
        """Image sizes over those of the latent grid, an axis each."""

    @property
    @abstractmethod
    def finest_channels(self) -> int:
        """Channels of the finest feature map, by which the memory of a window of a volume is foreseen."""

    @property
    def num_embeddings(self) -> int:
        """K, codewords of the codebook."""
        return self.quantizer.num_embeddings

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def of_volumes(self) -> bool:
        """Whether a position stands for a piece of a volume, and not for one of a slice."""
        return self.takes_volumes and not self.slice_context

    def bits(self) -> dict[str, float]:
        """``bits_per_position`` and ``bits_per_pixel`` of the indices; empty of a continuous latent, which has none."""
        bits = self.quantizer.bits_per_position
        if bits is None:
            return {}
        return {"bits_per_position": bits, "bits_per_pixel": bits / math.prod(self.factors)}

    def grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """The latent grid of images of a spatial size.

        Raises:
            VaevqMedError: the size has other axes, or is no multiple of the factors.
        """
        factors = self.factors
        if len(size) != len(factors) or any(one % factor for one, factor in zip(size, factors, strict=True)):
            raise VaevqMedError(f"the size is {tuple(size)}; expected multiples of {factors}")
        return tuple(one // factor for one, factor in zip(size, factors, strict=True))

    def quantize(
        self, latent: Tensor, posterior: DiagonalGaussian | None = None, images: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize ``[B, D, *grid]``.

        Args:
            latent: what is quantized.
            posterior: what it came from, where there is one.
            images: ``[B, C, H, W]`` in [-1, 1], of which it is, for a quantizer that looks at them.
        """
        if self.quantizer.sees_images:
            return self.quantizer(latent, posterior, images)
        return self.quantizer(latent, posterior)

    def _mode(self, images: Tensor) -> tuple[Tensor, DiagonalGaussian | None]:
        encoded = self.encode(images)
        if isinstance(encoded, DiagonalGaussian):
            return encoded.mode(), encoded
        return encoded, None

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct ``[B, C, H, W]`` through the codebook, from the posterior's mean."""
        return self._decode_alike(self.quantize_images(images).quantized)

    def quantize_images(self, images: Tensor) -> QuantizerOutput:
        """What images ``[B, C, H, W]`` are quantized to, from the posterior's mean."""
        return self.quantize(*self._mode(images), images)

    def encode_indices(self, images: Tensor) -> Tensor:
        """Indices ``[B, *grid, G]`` of images ``[B, C, H, W]``, from the posterior's mean."""
        return self.quantize_images(images).indices

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of indices ``[B, *grid, G]``, to the bit those that :meth:`forward` decodes.

        The indices may be those of the first codebooks alone, see :meth:`Quantizer.first_codes`, or, of a nested
        decoder, those of the first slots.
        """
        return self._decode_alike(self.quantizer.first_codes(indices))

    @property
    def num_prefixes(self) -> int:
        """In how many parts a code can be cut so that any first ones make an image: codebooks or slots, else 1."""
        return self.quantizer.num_prefixes

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The numbers of first parts that mean an image, ascending, all parts the last; see :attr:`num_prefixes`."""
        return self.quantizer.prefixes

    def first_indices(self, indices: Tensor, count: int) -> Tensor:
        """What is kept of indices ``[B, *grid, G]`` in the first ``count`` parts of a code: ``[B, *grid, count]``.

        All indices of all parts; of a nested decoder those of the first positions.
        """
        return indices if count == self.num_prefixes else indices[..., :count]

    def decode_prefix(self, quantized: QuantizerOutput, count: int) -> Tensor:
        """Images ``[B, C, H, W]`` of the first ``count`` parts of a code; :meth:`first_indices` are what they take.

        Args:
            quantized: what :meth:`quantize` gave.
            count: codebooks of a residual or nested quantizer, or slots of a nested decoder.

        Raises:
            VaevqMedError: it is not from 1 to :attr:`num_prefixes`.
        """
        if not 1 <= count <= self.num_prefixes:
            raise VaevqMedError(f"count is {count}; expected 1 to {self.num_prefixes}")
        return self._decode_alike(
            quantized.quantized if count == self.num_prefixes else self._codes_of_prefix(quantized, count)
        )

    def _codes_of_prefix(self, quantized: QuantizerOutput, count: int) -> Tensor:
        return self.quantizer.first_codes(self.first_indices(quantized.indices, count))

    def decode_soft(self, probabilities: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of probabilities of codewords, ``[B, *grid, K]``; see :meth:`Quantizer.mean_codes`.

        A generator that gives probabilities is decoded by the mean of the codewords instead of by one that is drawn.
        Where one codeword has probability 1, the image is that of :meth:`decode_indices`, to the bit where codes are
        looked up.
        """
        return self._decode_alike(self.quantizer.mean_codes(probabilities))

    def _decode_alike(self, codes: Tensor) -> Tensor:
        """Decode in one memory layout: convolutions round differently in another, and look-ups differ in theirs."""
        return self.decode(codes.contiguous())

    # --- MONAI's first-stage interface ---

    def encode_stage_2_inputs(self, x: Tensor) -> Tensor:
        """The latent before quantization, ``[B, D, *grid]``: what a diffusion model learns."""
        return self._mode(x)[0]

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        """Quantize a generated latent ``[B, D, *grid]`` by its nearest codewords and decode it."""
        if getattr(self.quantizer, "assignment", "euclidean") == "posterior":
            # A generated latent has no posterior: unit deviations make the rule Euclidean.
            unit = DiagonalGaussian(z, torch.zeros_like(z))
            return self._decode_alike(self.quantize(z, unit).quantized)
        return self._decode_alike(self.quantize(z).quantized)

    def index_quantize(self, images: Tensor) -> Tensor:
        """Indices ``[B, *grid]`` of a tokenizer with one codebook.

        Raises:
            VaevqMedError: there are several codebooks.
        """
        return self._only_codebook(self.encode_indices(images))

    def decode_samples(self, embedding_indices: Tensor) -> Tensor:
        """Images of indices ``[B, *grid]`` of a tokenizer with one codebook."""
        return self.decode_indices(embedding_indices.unsqueeze(-1))

    def _only_codebook(self, indices: Tensor) -> Tensor:
        if indices.shape[-1] != 1:
            raise VaevqMedError(
                f"the tokenizer has {indices.shape[-1]} codebooks; expected 1 for MONAI's transformer inferer"
            )
        return indices.squeeze(-1)
