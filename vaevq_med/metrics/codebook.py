"""How much of a codebook is in use."""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.processes import sum_in_place
from vaevq_med.networks.ranges import check_range


class CodebookUsage:
    """Counts of each codeword over a split.

    Args:
        num_embeddings: K.
        num_codebooks: G; the figures are means over the codebooks.
        num_codewords: the first indices, which the figures are of; the others, such as one for a code that is absent,
            are counted alone. By default all K.
        device: where the counts are kept.

    Example:
        >>> usage = CodebookUsage(num_embeddings=4)
        >>> usage.update(torch.tensor([0, 0, 1, 1]).view(1, 2, 2, 1))
        >>> usage.utilization(), round(usage.perplexity(), 4), usage.dead_codes()
        (0.5, 2.0, 2.0)
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        num_codebooks: int = 1,
        num_codewords: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_embeddings = num_embeddings
        self.num_codebooks = num_codebooks
        self.num_codewords = num_embeddings if num_codewords is None else num_codewords
        self.counts = torch.zeros(num_codebooks, num_embeddings, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Count indices ``[B, *grid, G]``.

        Raises:
            VaevqMedError: for another number of codebooks, or an index not in [0, K).
        """
        if indices.shape[-1] != self.num_codebooks:
            raise VaevqMedError(f"found {indices.shape[-1]} indices a position, expected {self.num_codebooks}")
        flat = indices.reshape(-1, self.num_codebooks)
        check_range("indices", flat, self.num_embeddings - 1)
        # Not ``bincount``: a GPU's host would wait for the largest index.
        places = flat + self.num_embeddings * torch.arange(self.num_codebooks, device=flat.device)
        places = places.flatten()
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def reduce(self) -> None:
        """Add up the counts of all processes."""
        sum_in_place(self.counts)

    @property
    def _of_codewords(self) -> Tensor:
        return self.counts[:, : self.num_codewords]

    def utilization(self) -> float:
        """Share of the codewords used at least once."""
        return float((self._of_codewords > 0).double().mean())

    def dead_codes(self) -> float:
        """Entries never used, a codebook."""
        return float((self._of_codewords == 0).double().sum(dim=1).mean())

    def perplexity(self) -> float:
        """``exp`` of the entropy of the entries' frequencies: the number of entries if all were used alike."""
        counts = self._of_codewords
        frequencies = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
        entropy = -torch.special.xlogy(frequencies, frequencies).sum(dim=1)
        return float(entropy.exp().mean())
