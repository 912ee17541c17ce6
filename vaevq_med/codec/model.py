"""A trained tokenizer as the codec uses it: squares to indices and back, in batches of one size on several threads.

Each batch is computed by one thread, so that the number of threads changes no rounding, and with it no byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.rate_control import Latents, joined, latents_of, num_rates
from vaevq_med.networks.precision import full_precision
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer


class Model:
    """A tokenizer with what a file says of it.

    Args:
        stored: the checkpoint.
        device: by name; None takes the GPU where there is one.
        batch_size: squares that go through the network at once.
        threads: batches at once, on a CPU.
        codebooks: of a residual or nested quantizer, the first codebooks whose indices are coded; None takes all.

    Attributes:
        description: what a file says of it, as plain values.
        contrasts: that it was trained for; None where its checkpoint does not say it.
        stacked: whether one image of it has all the contrasts as channels.
        seconds: that its network took so far.

    Raises:
        VaevqMedError: the checkpoint is no tokenizer's of slices, or has no indices that decode to its images.
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
        self.network: VisualTokenizer = stored.network().to(self.device)
        self.batch_size = batch_size
        self.threads = threads if self.device.type == "cpu" else 1
        self.description = describe(stored, self.network)
        if codebooks is not None:
            most = num_rates(self.network.quantizer)
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

    def encode(self, squares: Tensor) -> NDArray[np.int64]:
        """Indices ``[N, h, w, G]`` of squares ``[N, C, S, S]`` in [0, 1]; C is 1 or ``in_channels``."""
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
        found: dict[int, Latents] = {}

        def work(batch: slice) -> None:
            found[batch.start] = latents_of(self.network, self._images(squares[batch]))

        self._run(work, len(squares))
        return joined([found[start] for start in sorted(found)])

    def _images(self, squares: Tensor) -> Tensor:
        """Squares ``[n, C, S, S]`` in [0, 1] as the network takes them."""
        return squares.mul(2).sub_(1).expand(-1, self.in_channels, -1, -1).to(self.device)

    def decode(self, indices: NDArray[np.int64], contrasts: int = 1) -> Tensor:
        """Squares ``[N, C, S, S]`` in [0, 1] of indices ``[N, h, w, G]``.

        Args:
            indices: of squares of any number of positions; of all codebooks, or of the first ones of a quantizer that
                decodes those.
            contrasts: C, that an image has as its channels; of one contrast the channels' mean is taken.
        """
        height, width = (length * self.patch for length in indices.shape[1:3])
        found = torch.zeros(len(indices), contrasts, height, width)

        def work(batch: slice) -> None:
            images = self.network.decode_indices(torch.from_numpy(indices[batch]).to(self.device))
            squares = images.float().add(1).div(2).clamp(0, 1)
            found[batch] = (squares if contrasts > 1 else squares.mean(1, keepdim=True)).cpu()

        self._run(work, len(indices))
        return found

    def _run(self, work: Callable[[slice], None], count: int) -> None:
        """Do a work for each batch of ``count`` squares."""
        batches = [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

        def one(batch: slice) -> None:
            with torch.inference_mode():
                work(batch)

        start = time.monotonic()
        with full_precision(self.device.type, convolutions=True), _one_thread(self.device.type):
            if self.threads > 1 and len(batches) > 1:
                with ThreadPoolExecutor(self.threads, initializer=lambda: torch.set_num_threads(1)) as pool:
                    for _ in pool.map(one, batches):
                        pass
            else:
                for batch in batches:
                    one(batch)
        self.seconds += time.monotonic() - start


@contextmanager
def _one_thread(device_type: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if device_type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(stored: StoredTokenizer, network: VisualTokenizer) -> dict[str, Any]:
    """What a file says of the tokenizer that made it, enough to tell which one is wanted.

    Args:
        stored: its checkpoint.
        network: of it.

    Raises:
        CodecError: it is no tokenizer of slices whose indices decode to its images.
    """
    quantizer, factor = network.quantizer, network.encoder.downsampling_factor
    size = int(stored.value("image_size"))
    if network.takes_volumes:
        kind = "of volumes" if network.encoder.spatial_dims == 3 else "whose decoder sees neighboring slices"
        raise CodecError(f"{stored.path}: found a tokenizer {kind}, expected one of single slices")
    if not quantizer.is_discrete:
        raise CodecError(
            f"{stored.path}: found a {type(quantizer).__name__} whose indices do not decode to its images, expected "
            "one whose do; --readout hard selects such a read-out"
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
