"""Rates of one checkpoint: codewords chosen by distance plus what they cost in bits, or fewer of its codebooks.

Entropy-constrained assignment (Chou, Lookabaugh & Gray, IEEE Trans. ASSP 1989): a position takes the codeword with the
least ``d(z, e_k) + weight * bits_k``. The distance is the quantizer's own: ``sum_i ((e_ki - mu_i) / sigma_i)^2`` where
it weighs by the posterior, which is what quantizing costs the image to second order, and ``|z - e_k|^2`` elsewhere. A
larger weight chooses codewords that are expected, and the image pays for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.context_model import ContextModel, frequencies_of
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.neighbors import Neighborhood
from vaevq_med.codec.coders.range_coder import PRECISION
from vaevq_med.codec.errors import CodecError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.outputs import Posterior
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import CodebookQuantizer, deviations, rows
from vaevq_med.networks.quantizers.distances import Search

ITERATIONS = 2
"""Times that the frequencies are counted again and the codewords chosen again."""

_AT_ONCE = 2**22


@dataclass(frozen=True)
class Latents:
    """What is quantized, and how its distance to a codeword is measured.

    Attributes:
        grid: ``(B, *grid)``.
        nearest: int64 ``[N]``, the quantizer's own choice.
        search: latents and weights in float64, and the codebook.
    """

    grid: tuple[int, ...]
    nearest: NDArray[np.int64]
    search: Search

    def distances(self, part: NDArray[np.int64]) -> NDArray[np.float64]:
        """Squared distances ``[n, K]`` of some positions, less a number for each position."""
        chosen = self.search.of(torch.from_numpy(part))
        return 2 * chosen.scores(self.search.codebook).numpy()

    def chunks(self, positions: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The positions, so many at once that their distances fit the memory."""
        step = max(1, _AT_ONCE // len(self.search.codebook))
        return (positions[start : start + step] for start in range(0, len(positions), step))


def joined(parts: Sequence[Latents]) -> Latents:
    """The latents of several batches as those of one.

    Args:
        parts: of one network, at least one.
    """
    searches = [part.search for part in parts]
    weighs = [search.precision for search in searches if search.precision is not None]
    first = searches[0]
    return Latents(
        (sum(part.grid[0] for part in parts), *parts[0].grid[1:]),
        np.concatenate([part.nearest for part in parts]),
        Search(
            torch.cat([search.latents for search in searches]),
            first.codebook,
            torch.cat(weighs) if weighs else None,
            first.chunk_size,
        ),
    )


def chosen_indices(latents: Latents, layout: Layout, coder: IndexCoder, weight: float) -> NDArray[np.int64]:
    """Indices ``[N, *grid, 1]`` by distance and what a coder makes of them: by its context model, else by frequency.

    Args:
        latents: of one stream.
        layout: of it, with the reference as it will be coded.
        coder: of its indices.
        weight: squared distance that a bit is worth, 0 or more.

    Raises:
        CodecError: the weight is out of range, or there are several codebooks.
    """
    if coder.context_model is not None:
        return context_constrained_indices(latents, layout, coder.context_model, weight)
    return constrained_indices(latents, layout.live, weight)


def latents_of(network: Tokenizer, images: Tensor) -> Latents:
    """The latents of images ``[B, C, H, W]`` in [-1, 1].

    Raises:
        CodecError: as for :func:`latents_from`.
    """
    with torch.inference_mode():
        return latents_from(network, network.encode(images))


def latents_from(network: Tokenizer, encoded: DiagonalGaussian | Tensor) -> Latents:
    """The latents of what an encoder gives.

    Args:
        network: that it is of.
        encoded: the posterior, or, without one, the latent ``[B, D, *grid]``.

    Raises:
        CodecError: the quantizer does not choose the nearest codeword of one explicit codebook.
    """
    quantizer = network.quantizer
    if not isinstance(quantizer, CodebookQuantizer):
        more = "; --codebooks gives its rates" if quantizer.num_prefixes > 1 else ""
        raise CodecError(
            f"rate: found {type(quantizer).__name__}, which has no one explicit codebook; expected a quantizer that "
            f"chooses the nearest codeword of one{more}"
        )
    with torch.inference_mode():
        posterior = encoded if isinstance(encoded, DiagonalGaussian) else None
        latent = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
        nearest = network.quantize(latent, posterior).indices
        std = deviations(quantizer.assignment, cast(Posterior | None, posterior))
        precision = None if std is None else rows(std).double().square().reciprocal()
        codebook = quantizer.codebook().detach().double()
        # Chosen on the CPU, whatever the network runs on.
        weights = None if precision is None else precision.cpu()
        search = Search(rows(quantizer.compared(latent)).double().cpu(), codebook.cpu(), weights, _AT_ONCE)
    return Latents(tuple(nearest.shape[:-1]), nearest.flatten().cpu().numpy(), search)


def constrained_indices(
    latents: Latents, live: NDArray[np.bool_], weight: float, *, iterations: int = ITERATIONS
) -> NDArray[np.int64]:
    """Indices ``[B, *grid, 1]`` by distance and frequency.

    The code length of a codeword is that of how often it was chosen in the live positions before, half a time more.

    Args:
        latents: of one contrast.
        live: bool ``[B, *grid]``: what is coded; elsewhere the nearest codeword stays.
        weight: squared distance that a bit is worth, 0 or more.
        iterations: how often frequencies and choices follow each other.

    Raises:
        CodecError: the weight is out of range.
    """
    _check(weight)
    chosen = latents.nearest.copy()
    places = np.flatnonzero(live.ravel())
    size = len(latents.search.codebook)
    for _ in range(iterations if weight and len(places) else 0):
        counts = np.bincount(chosen[places], minlength=size) + 0.5
        cost = weight * np.log2(counts.sum() / counts)
        found = [(latents.distances(part) + cost).argmin(axis=1) for part in latents.chunks(places)]
        chosen[places] = np.concatenate(found)
    return chosen.reshape(*latents.grid, 1)


def context_constrained_indices(
    latents: Latents, layout: Layout, model: ContextModel, weight: float
) -> NDArray[np.int64]:
    """Indices ``[N, *grid, 1]`` by distance and the context model's own code length, decided in the order of coding.

    Each choice is what the positions after it see; that it makes them cheaper or dearer is not looked at.

    Args:
        latents: of one contrast.
        layout: of its stream, with the reference as it will be coded.
        model: of the tokenizer's indices.
        weight: squared distance that a bit is worth, 0 or more.

    Raises:
        CodecError: the weight is out of range, or there are several codebooks.
    """
    _check(weight)
    if layout.num_codebooks != 1 or model.num_codebooks != 1:
        raise CodecError(f"rate: found {layout.num_codebooks} codebooks, expected 1")
    chosen = latents.nearest.copy()
    if not weight:
        return chosen.reshape(*latents.grid, 1)
    hood = Neighborhood(layout)
    places = np.flatnonzero(layout.live.ravel())[hood.source]
    for start, end in zip(hood.starts[:-1], hood.starts[1:], strict=True):
        part = slice(int(start), int(end))
        seen, further = hood.around(part)
        own = np.zeros((end - start, 1), np.int64)
        hidden = model.hidden(seen, own, further, contrast=layout.contrast, codebook=0)
        bits = PRECISION - np.log2(frequencies_of(model.logits(hidden, 0)))
        found = (latents.distances(places[part]) + weight * bits).argmin(axis=1)
        chosen[places[part]] = found
        hood.symbols[hood.where[part], 0] = found
    return chosen.reshape(*latents.grid, 1)


def _check(weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise CodecError(f"weight is {weight}; expected 0 or more")
