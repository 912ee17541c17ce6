"""A trained tokenizer as the codec uses it: squares to indices and back, in batches of one size on several threads.

Each batch, and each window of a volume, is computed by one thread, so that the number of threads changes no rounding,
and with it no byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.rate_control import Latents, joined, latents_from, latents_of
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.precision import full_precision
from vaevq_med.networks.slices import slices_of
from vaevq_med.tokens.volumes import Mapped, decode_codes, encode_latents, quantized, window_of
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

_BLOCK = 64
"""Slices that are resized at once, where each is encoded by itself."""

_OVERLAP = (0.5, 0.25, 0.25)
"""Share of a window of codes that the next one along each axis covers as well."""


class Model:
    """A tokenizer with what a file says of it.

    Squares are the slices of a case in order. A tokenizer of single slices takes any of them; one whose decoder sees
    neighbors takes a run without a gap, and one of volumes all of them, see :meth:`pieces`.

    Args:
        stored: the checkpoint.
        device: by name; None takes the GPU where there is one.
        batch_size: squares that go through the network at once; volumes go by windows of their own.
        threads: batches at once, on a CPU.
        codebooks: of a residual or nested quantizer, the first codebooks whose indices are coded; None takes all.

    Attributes:
        description: what a file says of it, as plain values.
        contrasts: that it was trained for; None where its checkpoint does not say it.
        stacked: whether one image of it has all the contrasts as channels.
        seconds: that its network took so far.

    Raises:
        VaevqMedError: the checkpoint is no tokenizer's, or has no indices that decode to its images.
    """

    def __init__(
        self,
        stored: StoredTokenizer,
        *,
        device: str | None = None,
        batch_size: int = 2,
        threads: int = 1,
        codebooks: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise CodecError(f"--batch-size: found {batch_size}, expected 1 or more")
        self.device = named_device(device)
        self.network: Tokenizer = stored.network().to(self.device)
        self.batch_size = batch_size
        self.threads = threads if self.device.type == "cpu" else 1
        self.description = describe(stored, self.network)
        if codebooks is not None:
            most = self.network.quantizer.num_prefixes
            if not 1 <= codebooks <= most:
                name = self.description["quantizer"]
                raise CodecError(f"--codebooks: found {codebooks}, expected 1 to {most} for {name} of {stored.path}")
            self.description["num_codebooks"] = codebooks
        named = stored.value("modalities", None)
        self.contrasts = None if named is None else tuple(map(str, named))
        self.stacked = bool(stored.value("stack_modalities", False))
        self.seconds = 0.0

    @property
    def in_channels(self) -> int:
        """Of an image."""
        return int(self.description["in_channels"])

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return int(self.description["image_size"])

    @property
    def patch(self) -> int:
        """Pixels of a position of the token grid along each axis."""
        return int(self.description["patch"])

    @property
    def of_volumes(self) -> bool:
        """Whether a position stands for a piece of a volume, and indices are a grid of three axes."""
        return "patch_depth" in self.description

    def pieces(self, slices: NDArray[np.int64]) -> list[slice]:
        """Which of the coded slices are encoded and decoded together.

        Args:
            slices: their numbers, rising.
        """
        if self.of_volumes:
            return [slice(0, len(slices))]
        if self.network.takes_volumes:
            bounds = np.r_[0, 1 + np.flatnonzero(np.diff(slices) != 1), len(slices)]
        else:
            bounds = np.r_[0, np.cumsum([len(part) for part in np.array_split(slices, -(-len(slices) // _BLOCK))])]
        return [slice(int(start), int(end)) for start, end in pairwise(bounds)]

    def encode(self, squares: Tensor) -> NDArray[np.int64]:
        """Indices of squares in [0, 1].

        Args:
            squares: ``[N, C, S, S]``; C is 1 or ``in_channels``.

        Returns:
            ``[N, h, w, G]``; of a tokenizer of volumes ``[1, d, h, w, G]``.
        """
        if self.network.takes_volumes:
            with self._running() as mapped, torch.inference_mode():
                volume = self._volume(squares)
                indices = quantized(self.network, self._encoded(volume, mapped), volume)
                found = indices[..., : int(self.description["num_codebooks"])].cpu().numpy()
            return found if self.of_volumes else found[0]
        grid = self.image_size // self.patch
        found = np.zeros((len(squares), grid, grid, int(self.description["num_codebooks"])), np.int64)

        def work(batch: slice) -> None:
            indices = self.network.encode_indices(self._images(squares[batch]))
            found[batch] = indices[..., : found.shape[-1]].cpu().numpy()

        self._run(work, len(squares))
        return found

    def latents(self, squares: Tensor) -> Latents:
        """What is quantized of squares ``[N, C, S, S]`` in [0, 1], for a choice of codewords by their bits.

        Raises:
            CodecError: the quantizer does not choose the nearest codeword of one explicit codebook.
        """
        if self.network.takes_volumes:
            with self._running() as mapped, torch.inference_mode():
                whole = latents_from(self.network, self._encoded(self._volume(squares), mapped))
            return whole if self.of_volumes else replace(whole, grid=whole.grid[1:])
        found: dict[int, Latents] = {}

        def work(batch: slice) -> None:
            found[batch.start] = latents_of(self.network, self._images(squares[batch]))

        self._run(work, len(squares))
        return joined([found[start] for start in sorted(found)])

    def _images(self, squares: Tensor) -> Tensor:
        """Squares ``[n, C, S, S]`` in [0, 1] as the network takes them."""
        return squares.mul(2).sub_(1).expand(-1, self.in_channels, -1, -1).to(self.device)

    def _volume(self, squares: Tensor) -> Tensor:
        """Squares ``[N, C, S, S]`` in [0, 1] as a network of volumes takes them, ``[1, C, N, S, S]``."""
        return self._images(squares).transpose(0, 1).unsqueeze(0)

    def _encoded(self, volume: Tensor, mapped: Mapped) -> DiagonalGaussian | Tensor:
        """What a tokenizer that takes volumes makes of one before it quantizes."""
        depth, side = self.description.get("patch_depth", 1), self.image_size // self.patch
        grid = -(-volume.shape[2] // depth), side, side
        tile, halo = [self.batch_size, side, side], [0, 0, 0]
        if self.of_volumes:
            window = window_of(self.network, grid)
            halo = [int(part < size) for part, size in zip(window, grid, strict=True)]
            tile = [part - 2 * margin for part, margin in zip(window, halo, strict=True)]
        return encode_latents(self.network, volume, tile=tile, halo=halo, mapped=mapped)

    def decode(self, indices: NDArray[np.int64], contrasts: int = 1) -> Tensor:
        """Squares ``[N, C, S, S]`` in [0, 1] of indices as :meth:`encode` gives them; of volumes, of all their slices.

        Args:
            indices: of squares of any number of positions; of all codebooks, or of the first ones of a quantizer that
                decodes those.
            contrasts: C, that an image has as its channels; of one contrast the channels' mean is taken.
        """
        if self.network.takes_volumes:
            return self._decoded_volume(indices if self.of_volumes else indices[None], contrasts)
        height, width = (length * self.patch for length in indices.shape[1:3])
        found = torch.zeros(len(indices), contrasts, height, width)

        def work(batch: slice) -> None:
            images = self.network.decode_indices(torch.from_numpy(indices[batch]).to(self.device))
            found[batch] = _as_squares(images, contrasts)

        self._run(work, len(indices))
        return found

    def _decoded_volume(self, indices: NDArray[np.int64], contrasts: int) -> Tensor:
        """Squares ``[N, C, S, S]`` of indices ``[1, d, h, w, G]``; see :meth:`decode`."""
        grid, network = indices.shape[1:4], self.network
        tile = window_of(network, grid) if self.of_volumes else (self.batch_size, *grid[1:])
        size = [length * factor for length, factor in zip(grid, network.factors, strict=True)]
        with self._running() as mapped, torch.inference_mode():
            codes = network.quantizer.first_codes(torch.from_numpy(indices).to(self.device))
            volume = decode_codes(
                network, codes, size=size, tile=tile, overlap=_OVERLAP, mapped=mapped, at_once=self.threads
            )
            return _as_squares(slices_of(volume), contrasts)

    def _run(self, work: Callable[[slice], None], count: int) -> None:
        """Do a work for each batch of ``count`` squares."""
        with self._running() as mapped:
            for _ in mapped(
                work, [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]
            ):
                pass

    @contextmanager
    def _running(self) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]]:
        """A ``map`` that does each work by one thread of its own, so many at once as there are; time is taken."""

        def alone(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def done(item: Any) -> Any:
                with torch.inference_mode():
                    return work(item)

            return done

        start = time.monotonic()
        with full_precision(self.device.type, convolutions=True), _one_thread(self.device.type):
            if self.threads > 1:
                with ThreadPoolExecutor(self.threads, initializer=lambda: torch.set_num_threads(1)) as pool:
                    yield lambda work, items: pool.map(alone(work), items)
            else:
                yield lambda work, items: map(alone(work), items)
        self.seconds += time.monotonic() - start


def _as_squares(images: Tensor, contrasts: int) -> Tensor:
    """Squares ``[N, C, S, S]`` in [0, 1] on the CPU of a network's images; of one contrast the channels' mean."""
    squares = images.float().add(1).div(2).clamp(0, 1)
    return (squares if contrasts > 1 else squares.mean(1, keepdim=True)).cpu()


@contextmanager
def _one_thread(device_type: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if device_type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(stored: StoredTokenizer, network: Tokenizer) -> dict[str, Any]:
    """What a file says of the tokenizer that made it, enough to tell which one is wanted.

    Args:
        stored: its checkpoint.
        network: of it.

    Raises:
        CodecError: it is no tokenizer whose indices decode to its images, or not one of square positions.
    """
    quantizer, factors, factor = network.quantizer, network.factors, network.factors[-1]
    size = int(stored.value("image_size"))
    if not network.patchwise:
        raise CodecError(f"{stored.path}: found tokens that stand for no place, expected one for each patch of a slice")
    if len(set(factors[-2:])) > 1:
        raise CodecError(f"{stored.path}: found positions of {factors} pixels, expected as many rows as columns")
    if not quantizer.is_discrete:
        other = "; --readout hard selects such a read-out" if "hard" in quantizer.readouts else ""
        raise CodecError(
            f"{stored.path}: found {type(quantizer).__name__}, whose images are not decoded from indices, expected a "
            f"quantizer whose are{other}"
        )
    if size % factor:
        raise CodecError(f"{stored.path}: found image_size {size}, expected a multiple of {factor}")
    return {
        "hash": stored.content_hash,
        "file": stored.path.name,
        "quantizer": type(quantizer).__name__,
        "readout": quantizer.readout,
        "num_embeddings": int(quantizer.num_embeddings),
        "num_codebooks": int(quantizer.num_codebooks),
        "image_size": size,
        "in_channels": int(stored.value("in_channels")),
        "patch": int(factor),
        **({"patch_depth": int(factors[0])} if network.of_volumes else {}),
    }


def wanted(described: Mapping[str, Any], checkpoint: Path) -> StoredTokenizer:
    """The tokenizer that a file was made with.

    Args:
        described: what the file says of it.
        checkpoint: to take it from.

    Raises:
        CodecError: the checkpoint is of another one.
        VaevqMedError: the checkpoint cannot be read.
    """
    found = StoredTokenizer.of_hash(checkpoint, described["hash"], described["readout"])
    if found is None:
        other = StoredTokenizer(checkpoint)
        other.check_target()
        raise CodecError(
            f"found the tokenizer {other.content_hash} in {checkpoint.name}, expected {described['hash']}, with which "
            f"it was made (of a file called {described['file']})"
        )
    return found
