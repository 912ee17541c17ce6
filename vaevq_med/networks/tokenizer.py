"""The visual tokenizer: encoder, latent, quantizer, decoder.

VAEVQ (arXiv 2511.06863) is a tokenizer with ``variational=True`` and the loss terms ``kl``, ``rcs`` and ``dcr``; its
latent is variational (VLQ) whatever the quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.backbone import BaseDecoder, BaseEncoder
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.blocks import convolution
from vaevq_med.networks.outputs import Posterior, QuantizerOutput, TokenizerOutput
from vaevq_med.networks.packing import packed, unpacked
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.projector import Projector
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.ranges import check_choice, check_sizes
from vaevq_med.networks.rectifier import Rectifier
from vaevq_med.networks.slices import slices_of, stacked

ESTIMATORS = ("straight_through", "released")


def released_estimator(codes: Tensor, posterior: DiagonalGaussian) -> Tensor:
    """The quantized path's value as the authors' released code forms it (not in the paper).

    Its value is the code ``e``; its gradients are ``g`` for the mean, ``g * eps`` for the standard deviation with
    ``eps = (e - mean) / std``, and ``g`` for the code: the decoder's loss trains codebook, mean and deviation.

    Args:
        codes: ``e``, ``[B, D, *grid]``.
        posterior: of the same shape.

    Returns:
        ``[B, D, *grid]``.
    """
    eps = ((codes - posterior.mean) / posterior.std).detach()
    carried = posterior.mean + posterior.std * eps
    return codes + (carried - carried.detach())


class SliceContext(nn.Conv3d):
    """Features of each slice's codes and of its neighbors' codes: a convolution along z, which pads with zeros.

    The neighbors' weights start at zero, so that it begins as the 1x1 convolution of a tokenizer without a context.

    Args:
        in_channels: D, of the codes.
        out_channels: of the features.
        reach: neighbors on each side.
    """

    def __init__(self, in_channels: int, out_channels: int, reach: int) -> None:
        super().__init__(in_channels, out_channels, (2 * reach + 1, 1, 1), padding=(reach, 0, 0))
        with torch.no_grad():
            self.weight[:, :, [tap for tap in range(2 * reach + 1) if tap != reach]] = 0


class VisualTokenizer(Tokenizer):
    """Images to a grid of codebook indices and back.

    Calling it gives one tensor, the reconstruction through the codebook, whatever the options; training reads
    everything through :class:`TrainingForward`. It carries what MONAI's latent-diffusion and transformer inferers
    ask of a first stage.

    Args:
        encoder: images ``[B, C, H, W]`` to features ``[B, z_channels, *grid]``, the grid of ``spatial_dims`` axes, such
            as :class:`~vaevq_med.networks.Encoder` or :class:`~vaevq_med.networks.ViTEncoder`.
        decoder: features to images; any that enlarges as the encoder shrinks.
        quantizer: of latents with ``embedding_dim`` channels.
        embedding_dim: D, channels of the latent; with cells, of each position in them.
        variational: whether the encoder gives a Gaussian posterior (VLQ) or a point.
        quantize_from: in training, quantize a ``"sample"`` of the posterior (the paper, Eq. 2) or its ``"mean"``
            (the released code); evaluation always uses the mean.
        estimator: gradient through the quantizer: ``"straight_through"``, or ``"released"``, see
            :func:`released_estimator`.
        slice_context: of a 2D encoder and decoder, the slices above and below whose codes the decoder sees beside a
            slice's own; such a tokenizer takes volumes ``[B, C, d, H, W]`` of adjacent slices, which it encodes one by
            one to a grid ``d h w``. 0 is a tokenizer of single images.
        rectifier: of codes, before they are decoded, such as :class:`~vaevq_med.networks.Rectifier`; the continuous
            path does without.
        projector: of the latent or of the codes to the features of another network, see
            :class:`~vaevq_med.networks.Projector`; read by a loss alone.
        cell: positions along each axis that make one position of the latent, of the channels of all of them, for a
            quantizer of two levels; 1 leaves the encoder's grid as it is.

    Attributes:
        embedding_dim: channels of the latent.
        takes_volumes: whether it is given volumes ``[B, C, d, H, W]``.

    Raises:
        VaevqMedError: for options that do not fit together.
    """

    def __init__(
        self,
        *,
        encoder: BaseEncoder,
        decoder: BaseDecoder,
        quantizer: Quantizer,
        embedding_dim: int,
        variational: bool = True,
        quantize_from: str = "sample",
        estimator: str = "straight_through",
        slice_context: int = 0,
        rectifier: Rectifier | None = None,
        projector: Projector | None = None,
        cell: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(cell=cell)
        if slice_context < 0 or (slice_context and encoder.spatial_dims != 2):
            raise VaevqMedError(
                f"slice_context is {slice_context} with spatial_dims {encoder.spatial_dims}; expected slices from 0, "
                "or 0 but for spatial_dims 2"
            )
        check_choice("quantize_from", quantize_from, ("sample", "mean"))
        check_choice("estimator", estimator, ESTIMATORS)
        if estimator == "released" and not variational:
            raise VaevqMedError("estimator 'released' needs a posterior; found variational false, expected true")
        positions = cell**encoder.spatial_dims
        if quantizer.embedding_dim != positions * embedding_dim:
            of_cells = "" if cell == 1 else f" over the {positions} positions of a cell"
            raise VaevqMedError(
                f"embedding_dim is {embedding_dim}; expected the quantizer's, {quantizer.embedding_dim}{of_cells}"
            )
        if rectifier is not None and rectifier.spatial_dims != encoder.spatial_dims:
            raise VaevqMedError(
                f"the rectifier's spatial_dims is {rectifier.spatial_dims}; expected the encoder's, "
                f"{encoder.spatial_dims}"
            )
        if rectifier is not None and rectifier.embedding_dim != embedding_dim:
            raise VaevqMedError(f"the rectifier's embedding_dim is {rectifier.embedding_dim}; expected {embedding_dim}")
        if not encoder.patchwise and (rectifier is not None or cell != 1):
            found = f"cell {cell}" if rectifier is None else "a rectifier"
            raise VaevqMedError(f"found {found} with an encoder whose positions have no neighbors; expected none")
        if projector is not None and projector.embedding_dim != embedding_dim:
            raise VaevqMedError(f"the projector's embedding_dim is {projector.embedding_dim}; expected {embedding_dim}")
        if decoder.embedding_dim not in (None, embedding_dim):
            raise VaevqMedError(f"the decoder's embedding_dim is {decoder.embedding_dim}; expected {embedding_dim}")
        shrinks, enlarges = encoder.downsampling_factors, decoder.upsampling_factors
        if shrinks != enlarges:
            alike = len(set(shrinks)) == len(set(enlarges)) == 1 and len(shrinks) == len(enlarges)
            raise VaevqMedError(
                f"the decoder enlarges by {enlarges[0] if alike else enlarges}; expected "
                f"{shrinks[0] if alike else shrinks}, as the encoder shrinks by (channel_mult of both)"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.rectifier = rectifier
        self.projector = projector
        self.cell = cell
        self.embedding_dim = quantizer.embedding_dim
        self.variational = variational
        self.quantize_from = quantize_from
        self.estimator = estimator
        self.slice_context = slice_context
        axes = encoder.spatial_dims
        self.takes_volumes = axes == 3 or slice_context > 0
        self.quant_conv = convolution(axes, encoder.z_channels, embedding_dim * (2 if variational else 1), 1)
        self.post_quant_conv = (
            SliceContext(embedding_dim, decoder.z_channels, slice_context)
            if slice_context
            else convolution(axes, embedding_dim, decoder.z_channels, 1)
        )

    @property
    def factors(self) -> tuple[int, ...]:
        """Image sizes over those of the latent grid, an axis each."""
        factors = tuple(factor * self.cell for factor in self.encoder.downsampling_factors)
        return (1, *factors) if self.slice_context else factors

    @property
    def patchwise(self) -> bool:  # type: ignore[override]
        """As the encoder says."""
        return self.encoder.patchwise

    @property
    def num_prefixes(self) -> int:
        """Slots of a nested decoder, otherwise as the quantizer says."""
        slots = self.decoder.num_prefixes
        return slots if slots > 1 else super().num_prefixes

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Any number of slots of a nested decoder, otherwise as the quantizer says."""
        return tuple(range(1, self.num_prefixes + 1)) if self.decoder.num_prefixes > 1 else super().prefixes

    def first_indices(self, indices: Tensor, count: int) -> Tensor:
        """Of the first slots ``[B, 1, count, G]``, or as the base class."""
        return indices[..., :count, :] if self.decoder.num_prefixes > 1 else super().first_indices(indices, count)

    def _codes_of_prefix(self, quantized: QuantizerOutput, count: int) -> Tensor:
        if self.decoder.num_prefixes > 1:
            return quantized.quantized[..., :count]
        return super()._codes_of_prefix(quantized, count)

    @property
    def finest_channels(self) -> int:
        """Channels of the finest feature map."""
        return self.decoder.finest_channels

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer, for VQGAN's adaptive weight."""
        return self.decoder.last_layer

    @property
    def latent_layer(self) -> Tensor:
        """Weight of the last convolution before the latent, for the adaptive weight of a loss of the latent."""
        return cast(Tensor, self.quant_conv.weight)

    def encode(self, images: Tensor) -> DiagonalGaussian | Tensor:
        """The posterior of ``[B, C, H, W]``, or, without one, the latent ``[B, D, *grid]``."""
        features = self._slice_by_slice(lambda one: self.quant_conv(self.encoder(one)), images)
        if not self.variational:
            return self._packed(features)
        mean, logvar = features.chunk(2, dim=1)
        return DiagonalGaussian(self._packed(mean), self._packed(logvar))

    def _packed(self, features: Tensor) -> Tensor:
        return packed(features, self.cell, self.encoder.spatial_dims)

    def _unpacked(self, latent: Tensor) -> Tensor:
        return unpacked(latent, self.cell, self.encoder.spatial_dims)

    def decode(self, codes: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of codes ``[B, D, *grid]``."""
        return self.decode_latent(self.rectify(codes))

    def rectify(self, codes: Tensor) -> Tensor:
        """What is decoded in place of codes ``[B, D, *grid]``: they themselves without a rectifier.

        The rectifier is given the positions of each cell by themselves, on the encoder's grid.
        """
        if self.rectifier is None:
            return codes
        return self._packed(self._slice_by_slice(self.rectifier, self._unpacked(codes)))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` of a continuous latent, or of rectified codes, ``[B, D, *grid]``."""
        return self._slice_by_slice(self.decoder, *self.decoder_inputs(latent))

    def decoder_inputs(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder is given of a latent ``[B, D, *grid]``: its features, and what a modulated one reads."""
        latent = self._unpacked(latent)
        return self.post_quant_conv(latent), latent

    def _slice_by_slice(self, network: Callable[..., Tensor], *volumes: Tensor) -> Tensor:
        """Of a tokenizer with a context, what a 2D network makes of the slices of volumes; else of the images."""
        if not self.slice_context:
            return network(*volumes)
        if any(volume.ndim != 5 for volume in volumes):
            raise VaevqMedError(
                f"the image has shape {tuple(volumes[0].shape)}; expected volumes [B, C, d, H, W] of adjacent slices, "
                f"as slice_context is {self.slice_context}"
            )
        return stacked(network(*map(slices_of, volumes)), volumes[0].shape[0])

    def draw_noise(self, images: Tensor) -> Tensor | None:
        """Standard normal numbers for the posterior's sample of images ``[B, C, H, W]``; None without a posterior.

        Drawn for a whole batch, they do not depend on the parts that it is trained in.
        """
        if not self.variational:
            return None
        grid = (size // factor for size, factor in zip(images.shape[2:], self.factors, strict=False))
        return torch.randn(images.shape[0], self.embedding_dim, *grid, device=images.device)  # [B, D, *grid]

    def reconstruct_full(
        self, images: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> TokenizerOutput:
        """Everything that a training step reads; both paths go through the decoder in one call.

        Args:
            images: ``[B, C, H, W]`` in [-1, 1].
            generator: source of the posterior's noise; the global one when absent.
            noise: that noise itself, see :meth:`draw_noise`.
        """
        encoded = self.encode(images)
        if not isinstance(encoded, DiagonalGaussian):
            quantized = self.quantize(encoded, images=images)
            projected = self._projected(encoded, quantized.quantized)
            return TokenizerOutput(
                self.decode(quantized.quantized), None, encoded, None, quantized, projected=projected
            )
        sample = encoded.sample(generator, noise)
        latent = sample if self.quantize_from == "sample" else encoded.mean
        quantized = self.quantize(latent, encoded, images)
        fed = quantized.quantized
        if self.estimator == "released":
            fed = released_estimator(quantized.codes, encoded)
        reconstruction, continuous = self.decode_latent(torch.cat([self.rectify(fed), sample])).chunk(2)
        projected = self._projected(sample, fed)
        return TokenizerOutput(
            reconstruction, continuous, latent, cast(Posterior, encoded), quantized, projected=projected
        )

    def _projected(self, sample: Tensor, quantized: Tensor) -> Tensor | None:
        if self.projector is None:
            return None
        return self.projector(self._unpacked(sample if self.projector.reads == "sample" else quantized))


class TrainingForward(nn.Module):
    """The training form of a tokenizer's forward pass; what ``DistributedDataParallel`` wraps.

    Args:
        tokenizer: shares its parameters.
    """

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor, noise: Tensor | None = None) -> TokenizerOutput:
        """:meth:`VisualTokenizer.reconstruct_full` of ``[B, C, H, W]`` in [-1, 1]."""
        return cast(VisualTokenizer, self.tokenizer).reconstruct_full(images, noise=noise)
