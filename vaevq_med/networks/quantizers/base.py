"""The interface of every quantizer, and what those with an explicit codebook share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior, QuantizerOutput
from vaevq_med.networks.precision import full_precision
from vaevq_med.networks.quantizers.nearest import nearest_codeword
from vaevq_med.networks.ranges import check_choice, check_range, check_sizes

ASSIGNMENTS = ("euclidean", "posterior")
Cluster = Callable[[Tensor, int], Tensor]
"""Of rows ``[N, C]`` and K, the centers ``[K, C]`` of K clusters of them."""


class FollowsLatents(ABC):
    """A codebook that moves after each batch by what the batch assigned to it, outside of any gradient.

    Attributes:
        parts: what :meth:`follow` was given since a batch began whose update is still to come; None outside of one.
        frozen: whether it stays as it is, whatever it is given.
    """

    parts: list[tuple[Tensor, ...]] | None = None
    frozen: bool = False

    def follow(self, *observed: Tensor) -> None:
        """Update by tensors that can be joined along their first dimension: now, or with the rest of the batch."""
        if self.frozen:
            return
        if self.parts is None:
            self.update(*observed)
        else:
            self.parts.append(observed)

    @abstractmethod
    def update(self, *observed: Tensor) -> None:
        """Move by what was observed."""


class Quantizer(nn.Module, ABC):
    """Turns a latent grid ``[B, D, *grid]`` into codebook indices ``[B, *grid, G]`` and back.

    The grid has one axis or more: a sequence ``n``, an image's ``h w``, a volume's ``d h w``. Positions count in
    row-major order, and what each becomes does not depend on how they are laid out.

    Attributes:
        num_embeddings: K, codewords a codebook.
        embedding_dim: D, channels of the latent.
        num_codebooks: G, indices a position; 0 without a codebook and without an alphabet.
        is_discrete: whether ``indices_to_codes(indices)`` gives what the decoder was fed.
        size_arguments: arguments that fix K; where there are several they change together, and no sweep can set one.
        initial_files: arguments that name a file, or None, of values for a new run's start; where the weights come
            from a checkpoint they are None, or ``networks.initial.weights_follow`` is true while the network is
            built, so that the file is not needed.
        first_argument: argument of ``indices_to_codes`` that decodes so many of the first codebooks, coarser; None
            where all of them are needed.
        sees_images: whether :meth:`forward` takes the images too, as a third argument.
        readouts: names of the ways to decode one trained quantizer, where there are several.
        readout: the one in use, or None where there is but one way.
    """

    size_arguments: ClassVar[tuple[str, ...]] = ("num_embeddings",)
    initial_files: ClassVar[tuple[str, ...]] = ()
    first_argument: ClassVar[str | None] = None
    readouts: ClassVar[tuple[str, ...]] = ()

    num_embeddings: int
    embedding_dim: int
    num_codebooks: int = 1
    is_discrete: bool = True
    sees_images: bool = False
    readout: str | None = None

    @abstractmethod
    def forward(self, z: Tensor, posterior: Posterior | None = None) -> QuantizerOutput:
        """Quantize ``[B, D, *grid]``; ``posterior`` is what ``z`` came from, where there is one."""

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]`` of int64 indices ``[B, *grid, G]``, in fp32.

        Raises:
            VaevqMedError: the indices have another shape, or one of them is not in [0, K).
        """
        self.check_indices(indices)
        with torch.autocast(indices.device.type, enabled=False):
            return self.codes_of(indices)

    @property
    def num_prefixes(self) -> int:
        """In how many of its codebooks its indices can be cut: G of a residual or a nested one, else 1."""
        return 1 if self.first_argument is None else self.num_codebooks

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The numbers of first codebooks that mean something by themselves, ascending, G the last: by default all."""
        return tuple(range(1, self.num_prefixes + 1))

    def bits_of_first(self, counts: Tensor) -> float | None:
        """Bits a position of the first n codebooks, before any entropy coding; None where there are no indices.

        Args:
            counts: how often each of their indices occurs in a split, int64 ``[n, K]``; where the rate differs from
                position to position, G codebooks take the ``mean_bits`` of :meth:`rate`.
        """
        if self.bits_per_position is None:
            return None
        if len(counts) < self.num_codebooks:
            return self.bits_per_position * len(counts) / self.num_codebooks
        return self.rate(counts).get("mean_bits", self.bits_per_position)

    def first_codes(self, indices: Tensor) -> Tensor:
        """Codes ``[B, D, *grid]`` of int64 indices ``[B, *grid, n]`` of the first n codebooks, or of all G.

        Raises:
            VaevqMedError: as :meth:`indices_to_codes`, or n is below G and all codebooks are needed.
        """
        missing = self.num_codebooks - indices.shape[-1]
        if self.first_argument is None or not 0 < missing < self.num_codebooks:
            return self.indices_to_codes(indices)
        padded = torch.cat([indices, indices.new_zeros(*indices.shape[:-1], missing)], dim=-1)
        return self.indices_to_codes(padded, **{self.first_argument: indices.shape[-1]})

    def mean_codes(self, probabilities: Tensor) -> Tensor:
        """The mean code of a distribution over the codewords of each position (soft tokens, arXiv 2301.02229).

        Args:
            probabilities: ``[B, *grid, K]``, of each position adding up to 1.

        Returns:
            ``sum_k p_k e_k``, ``[B, D, *grid]`` in fp32; of one codeword's probability 1, that code to the bit, where
            codes are looked up, and to rounding where they are computed (a projection's sums round by their number).

        Raises:
            VaevqMedError: the quantizer has more than one table of codewords, so that a distribution over K says not
                enough, or the probabilities have another shape.
        """
        codebook = self.codebook()
        if self.num_codebooks != 1 or (codebook is not None and codebook.ndim != 2):
            raise VaevqMedError(f"{type(self).__name__} has more than one table of codewords; expected one")
        if probabilities.ndim < 3 or probabilities.shape[-1] != self.num_embeddings:
            found = tuple(probabilities.shape)
            raise VaevqMedError(f"probabilities have shape {found}; expected [B, *grid, {self.num_embeddings}]")
        every = torch.arange(self.num_embeddings, device=probabilities.device).view(1, -1, 1)
        with full_precision(probabilities.device.type):
            table = self.indices_to_codes(every)[0].T  # [K, D]
            return (probabilities.float() @ table).movedim(-1, 1)

    def codes_of(self, indices: Tensor) -> Tensor:
        """What :meth:`indices_to_codes` looks up, of valid indices; by default in the one table ``[K, D]``."""
        codebook = self.codebook()
        assert codebook is not None
        return look_up(indices, codebook)

    @abstractmethod
    def codebook(self) -> Tensor | None:
        """The ``[K, D]`` table, differentiable and the only source of every look-up, or None without one.

        ``[G, K, D / G]`` where each of G codebooks quantizes channels of its own, ``[S, K, D]`` where each of S
        quantizes positions of its own.
        """

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Count the calls inside as parts of one batch: averages and revivals move once, at the end, from all of them.

        After an exception inside nothing has moved, so that the batch can be gone through again in other parts.
        """
        followers = [module for module in self.modules() if isinstance(module, FollowsLatents)]
        for follower in followers:
            follower.parts = []
        try:
            yield
            for follower in followers:
                parts, follower.parts = follower.parts, None
                if parts:
                    follower.update(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        finally:
            for follower in followers:
                follower.parts = None

    def start_codebook(self, latents: Tensor, cluster: Cluster) -> bool:
        """Put the codewords at centers of clusters of latents, before the first step.

        Args:
            latents: ``[B, D, *grid]``, posterior means where there are posteriors.
            cluster: finds the centers.

        Returns:
            Whether that was done; False, as here, of a quantizer without codewords that can be put anywhere.
        """
        return False

    def select_readout(self, readout: str) -> None:
        """Use another of ``readouts`` from now on.

        Raises:
            VaevqMedError: the quantizer has no such way.
        """
        if readout not in self.readouts:
            expected = f"one of {', '.join(self.readouts)}" if self.readouts else "None"
            raise VaevqMedError(f"readout is {readout!r}; expected {expected}, the quantizer is {type(self).__name__}")
        self.readout = readout

    @property
    def num_codewords(self) -> int:
        """Indices of a codebook that stand for a codeword: K, but for one that says that a code is absent, the last."""
        return self.num_embeddings

    @property
    def bits_per_position(self) -> float | None:
        """Bits that the indices of one latent position take, ``G log2 K``; None where there are no indices."""
        return self.num_codebooks * math.log2(self.num_embeddings)

    def rate(self, counts: Tensor) -> dict[str, float]:
        """Figures of a rate that differs from position to position; empty, as here, where it does not.

        Args:
            counts: how often each index occurs in a split, int64 ``[G, K]``.
        """
        return {}

    def check_latent(self, z: Tensor) -> None:
        """Refuse what is not ``[B, D, *grid]``.

        Raises:
            VaevqMedError: saying the shape found.
        """
        if z.ndim < 3 or z.shape[1] != self.embedding_dim:
            raise VaevqMedError(f"the latent has shape {tuple(z.shape)}; expected [B, {self.embedding_dim}, *grid]")

    def check_indices(self, indices: Tensor) -> None:
        """Refuse what is not ``[B, *grid, G]`` in [0, K); the range is not looked at while a graph is exported.

        Raises:
            VaevqMedError: saying the shape or range found.
        """
        if indices.ndim < 3 or indices.shape[-1] != self.num_codebooks:
            raise VaevqMedError(f"indices have shape {tuple(indices.shape)}; expected [B, *grid, {self.num_codebooks}]")
        check_range("indices", indices, self.num_embeddings - 1)


class CodebookQuantizer(Quantizer):
    """Nearest-codeword quantization with one explicit codebook; a subclass says what the codebook is.

    The losses are those of VQ-VAE (arXiv 1711.00937), unweighted, means over every element:
    ``codebook = mean((e - sg z)^2)`` and ``commitment = mean((sg e - z)^2)``.

    Args:
        num_embeddings: K.
        embedding_dim: D.
        assignment: ``"euclidean"``, ``argmin_k ||z - e_k||^2``; or ``"posterior"``, the codeword of highest
            posterior density, ``argmin_k sum_i ((e_ki - z_i) / std_i)^2``, with a variational tokenizer.

    Raises:
        VaevqMedError: for another assignment, or fewer than one codeword or dimension.
    """

    def __init__(self, *, num_embeddings: int, embedding_dim: int, assignment: str = "euclidean") -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.assignment = check_choice("assignment", assignment, ASSIGNMENTS)

    @abstractmethod
    def codebook(self) -> Tensor:
        """The ``[K, D]`` table of this step, differentiable."""

    def compared(self, z: Tensor) -> Tensor:
        """What of a latent ``[B, D, *grid]`` is compared with the codewords: all of it by default."""
        return z

    def assign(self, z: Tensor, codebook: Tensor, posterior: Posterior | None = None) -> Tensor:
        """Indices ``[B, *grid, 1]`` of ``z`` ``[B, D, *grid]``.

        Raises:
            VaevqMedError: the assignment needs a posterior and there is none.
        """
        std = deviations(self.assignment, posterior)
        precision = None if std is None else rows(std).square().reciprocal()
        with torch.autocast(z.device.type, enabled=False):
            flat = rows(z.detach().float())
            return on_grid(nearest_codeword(flat, codebook.detach().float(), precision=precision), z)

    def losses(self, z: Tensor, codes: Tensor, weight: Tensor | None = None) -> Mapping[str, Tensor]:
        """The method's losses of a latent and its codes ``[B, D, *grid]``, see :func:`vq_losses`."""
        return vq_losses(z, codes, weight)

    def forward(self, z: Tensor, posterior: Posterior | None = None, weight: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``z`` ``[B, D, *grid]`` by the nearest codeword, with a straight-through gradient.

        Args:
            z: the latent.
            posterior: what it came from.
            weight: of each position in the losses, 0 or 1, ``[B, *grid]``; by default all count.
        """
        self.check_latent(z)
        with torch.autocast(z.device.type, enabled=False):
            z = self.compared(z.float())
            codebook = self.codebook()
            indices = self.assign(z, codebook, posterior)
            codes = look_up(indices, codebook)
            return QuantizerOutput(
                quantized=straight_through(codes, z),
                codes=codes,
                indices=indices,
                losses=self.losses(z, codes, weight),
                codebook=codebook,
            )


def deviations(assignment: str, posterior: Posterior | None) -> Tensor | None:
    """The standard deviations ``[B, D, *grid]`` in units of which an assignment measures; None for the Euclidean one.

    Raises:
        VaevqMedError: the assignment needs a posterior and there is none.
    """
    if assignment == "euclidean":
        return None
    if posterior is None:
        raise VaevqMedError(
            "assignment 'posterior' needs the encoder's posterior; found none: set network_def#variational to true, or "
            "the assignment to 'euclidean'"
        )
    return posterior.std.detach().float()


def new_codewords(*shape: int, init: str, normalize: bool = False) -> nn.Parameter:
    """A table ``[..., K, D]`` to train, drawn from U(-1/K, 1/K) (``"uniform"``) or N(0, 1) (``"normal"``).

    Args:
        shape: of the table.
        init: which of the two.
        normalize: start with codewords of length 1: a step of the optimizer would turn short ones, of a large uniform
            start, at random.

    Raises:
        VaevqMedError: for another ``init``.
    """
    check_choice("init", init, ("uniform", "normal"))
    table = torch.empty(shape)
    if init == "uniform":
        nn.init.uniform_(table, -1 / shape[-2], 1 / shape[-2])
    else:
        nn.init.normal_(table)
    return nn.Parameter(F.normalize(table, dim=-1) if normalize else table)


@torch.no_grad()
def put_at_centers(table: Tensor, latents: Tensor, cluster: Cluster) -> bool:
    """Fill a table ``[K, C]`` by centers of latents ``[B, C, *grid]``; True, for :meth:`Quantizer.start_codebook`."""
    table.copy_(cluster(rows(latents.detach().float()), len(table)))
    return True


def straight_through(codes: Tensor, carrier: Tensor) -> Tensor:
    """The value of ``codes`` to the bit, as the difference is exactly zero, with the gradient of ``carrier``."""
    return codes.detach() + (carrier - carrier.detach())


def vq_losses(z: Tensor, codes: Tensor, weight: Tensor | None = None) -> Mapping[str, Tensor]:
    """The two halves of the VQ loss (arXiv 1711.00937, Eq. 3), unweighted means over every element.

    Args:
        z: ``[B, D, *grid]``.
        codes: of the same shape.
        weight: of each position in the means, ``[B, *grid]``; by default all count. Where none does, they are 0.
    """
    if weight is None:
        return {"codebook": F.mse_loss(codes, z.detach()), "commitment": F.mse_loss(z, codes.detach())}
    total = (z.shape[1] * weight.sum()).clamp_min(1)
    return {
        "codebook": ((codes - z.detach()).square() * weight.unsqueeze(1)).sum() / total,
        "commitment": ((z - codes.detach()).square() * weight.unsqueeze(1)).sum() / total,
    }


def channels_last(z: Tensor) -> Tensor:
    """``[B, D, *grid]`` as ``[B, *grid, D]``."""
    return z.movedim(1, -1)


def channels_first(values: Tensor) -> Tensor:
    """``[B, *grid, D]`` as ``[B, D, *grid]``."""
    return values.movedim(-1, 1)


def rows(z: Tensor) -> Tensor:
    """``[B, D, *grid]`` as ``[B n, D]``, n positions in row-major order."""
    return channels_last(z).reshape(-1, z.shape[1])


def on_grid(values: Tensor, z: Tensor, channels: int = 1) -> Tensor:
    """What was found for each row of ``z`` ``[B, D, *grid]``, ``[B n]`` or ``[B n, C]``, as ``[B, *grid, C]``."""
    return values.view(z.shape[0], *z.shape[2:], channels)


def look_up(indices: Tensor, codebook: Tensor) -> Tensor:
    """Codes ``[B, D, *grid]`` of indices ``[B, *grid, 1]`` in a table ``[K, D]``, differentiable."""
    return channels_first(F.embedding(indices.squeeze(-1), codebook))
