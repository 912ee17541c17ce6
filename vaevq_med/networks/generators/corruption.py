"""How tokens are corrupted step by step, and what the steps back cost: discrete diffusion over K codewords and a mask.

A token ``x_0`` is kept until step t of T with probability ``a_t``, is the mask ``m`` with ``c_t``, and each of the K
codewords with ``b_t = (1 - a_t - c_t) / K``; the mask stays one. Three processes differ in these:

- ``mask_replace`` (VQ-Diffusion, arXiv 2111.14822): linear, to ``c_T = 0.9`` and ``K b_T = 0.1``, as its text has it.
  Its released schedule keeps ``K b_t`` at 1e-6, so that it is ``absorbing`` in all but name.
- ``uniform`` (multinomial diffusion, arXiv 2102.05379; VQ-DDM, arXiv 2112.01799): no mask, ``a_t`` the squared cosine.
- ``absorbing`` (D3PM, arXiv 2107.03006; arXiv 2111.12701): ``c_t = t / T`` and no other codewords.

At T nothing is left of ``x_0`` (``a_T = 0``), so that no term of the prior is missing from the bound. The formulas are
those of 2111.14822 in a form without a table of K by K.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import is_int
from vaevq_med.networks.ranges import check_choice, check_sizes

PROCESSES = ("absorbing", "mask_replace", "uniform")

# A probability of the network is at least exp(-70), as the released code of VQ-Diffusion has it.
_LEAST_LOG = -70.0


class Corruption:
    """A process over K codewords and the mask, whose token is K.

    Args:
        process: one of :data:`PROCESSES`.
        num_embeddings: K.
        num_steps: T.

    Attributes:
        mask: the mask's token, K.
        kept: ``a`` of the times 0 to T, float64 ``[T + 1]``.
        masked: ``c``, likewise.

    Raises:
        VaevqMedError: there is no such process, or T is no whole number or below 2.

    Example:
        >>> Corruption("absorbing", num_embeddings=8, num_steps=4).masked.tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(self, process: str, *, num_embeddings: int, num_steps: int) -> None:
        check_choice("process", process, PROCESSES)
        check_sizes(num_embeddings=num_embeddings)
        if not is_int(num_steps, 0, sys.maxsize):
            raise VaevqMedError(f"num_steps is {num_steps!r}; expected a whole number, 2 or more")
        if num_steps < 2:
            raise VaevqMedError(f"num_steps is {num_steps}; expected 2 or more")
        self.process = process
        self.num_embeddings = num_embeddings
        self.num_steps = num_steps
        self.mask = num_embeddings
        share = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        if process == "uniform":
            self.kept = (share * math.pi / 2).cos().square()
            self.kept[-1] = 0.0
            self.masked = torch.zeros_like(share)
        else:
            self.kept = 1 - share
            self.masked = share if process == "absorbing" else 0.9 * share
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def has_mask(self) -> bool:
        """Whether tokens become masks at all."""
        return self.process != "uniform"

    @property
    def replaces(self) -> bool:
        """Whether tokens become other codewords."""
        return self.process != "absorbing"

    def _shares(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``a``, ``b`` and ``c`` of times, in float64 on their device."""
        kept, masked = (self._on(times.device)[name][times] for name in range(2))
        replaced = (1 - kept - masked) / self.num_embeddings if self.replaces else torch.zeros_like(kept)
        return kept, replaced.clamp_min(0.0), masked

    def _on(self, device: torch.device) -> Tensor:
        """The tables of ``a`` and ``c`` on a device, which are taken there once."""
        if device not in self._tables:
            self._tables[device] = torch.stack([self.kept, self.masked]).to(device)
        return self._tables[device]

    def corrupt(self, tokens: Tensor, times: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens at these times.

        Args:
            tokens: ``x_0``, integers ``[B, N]``.
            times: ``[B]``, from 0 to T.
            generator: of the draws; the global one of the tokens' device when absent.
        """
        device = tokens.device if generator is None else generator.device
        drawn = torch.rand(tokens.shape, generator=generator, device=device, dtype=torch.float64).to(tokens.device)
        others = torch.randint(self.num_embeddings, tokens.shape, generator=generator, device=device)
        kept, _, masked = self._shares(times)
        found = torch.where(drawn < (kept + masked)[:, None], self.mask, others.to(tokens.device))
        return torch.where(drawn < kept[:, None], tokens, found)

    def log_marginal(self, origin: Tensor, times: Tensor, like: Tensor) -> Tensor:
        """``log q(x_t | x_0)`` of the K codewords and the mask, ``[R, K + 1]``; at T the same for every ``x_0``.

        Args:
            origin: ``x_0``, ``[R]``.
            times: ``[R]``.
            like: of the type that is wanted.
        """
        kept, replaced, masked = self._shares(times)
        words = like.new_empty(len(origin), self.num_embeddings)
        return torch.cat([self._own_and_others(origin, kept + replaced, replaced, words), _column(masked, like)], dim=1)

    def log_evidence(self, tokens: Tensor, times: Tensor, like: Tensor) -> Tensor:
        """``log q(x_t | x_0)`` of every ``x_0``, up to what is the same for all of them.

        Args:
            tokens: ``x_t``, ``[R]``.
            times: ``[R]``, above 0.
            like: ``[R, K]``, whose type, device and shape the result has.

        Returns:
            The logarithm; 0 throughout where the token is a mask, and in the process ``absorbing``, which is asked for
            the ``x_0`` of masks alone.
        """
        if not self.replaces:
            return torch.zeros_like(like)
        kept, replaced, _ = self._shares(times)
        evidence = self._own_and_others(tokens, kept + replaced, replaced, like)
        return evidence.masked_fill((tokens == self.mask)[:, None], 0.0)

    def log_back(self, log_origin: Tensor, tokens: Tensor, times: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """The step back, ``p(x_s | x_t) = sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t)``.

        Args:
            log_origin: ``log p(x_0 | x_t)``, ``[R, K]``.
            tokens: ``x_t``, ``[R]``.
            times: t, ``[R]``.
            earlier: s below t, ``[R]``.

        Returns:
            ``log p(x_s | x_t)`` of the codewords, ``[R, K]``, and of the mask, ``[R]``; a token that is no mask stays
            what it is in the process ``absorbing``.
        """
        is_mask = tokens == self.mask
        kept, replaced, masked = self._shares(earlier)
        kept_now, _, masked_now = self._shares(times)
        into_mask = 1 - (1 - masked_now) / (1 - masked)
        still_masked = (masked / masked_now).log() if self.has_mask else torch.full_like(masked, -math.inf)
        still = torch.where(is_mask, still_masked, -math.inf).to(log_origin.dtype)
        share = into_mask / masked_now if self.has_mask else torch.zeros_like(masked)

        def mixed(log_values: Tensor, log_sum: Tensor | float) -> Tensor:
            return torch.logaddexp(_column(kept, log_origin) + log_values, _column(replaced, log_origin) + log_sum)

        unmasked = _column(share, log_origin) + mixed(log_origin, 0.0)
        if not self.replaces:
            ones = torch.ones_like(kept)
            stays = self._own_and_others(tokens, ones, torch.zeros_like(ones), log_origin)
            return torch.where(is_mask[:, None], unmasked, stays), still
        keep = kept_now / kept
        other = ((1 - keep - into_mask) / self.num_embeddings).clamp_min(0.0)
        step = self._own_and_others(tokens, keep + other, other, log_origin)  # log q(x_t | x_s)
        ratio = log_origin - self.log_evidence(tokens, times, log_origin)
        replaced_back = step + mixed(ratio, ratio.logsumexp(dim=1, keepdim=True))
        return torch.where(is_mask[:, None], unmasked, replaced_back), still

    def divergence(self, log_origin: Tensor, origin: Tensor, tokens: Tensor, times: Tensor) -> Tensor:
        """``KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))`` in nats, which at t = 1 is ``-log p(x_0 | x_1)``.

        Args:
            log_origin: ``log p(x_0 | x_t)`` as the network has it, ``[R, K]``.
            origin: ``x_0``, ``[R]``.
            tokens: ``x_t``, ``[R]``.
            times: t, ``[R]``, from 1.

        Returns:
            ``[R]``, at least 0 but for rounding; 0 where the token is no mask in the process ``absorbing``.
        """
        log_origin = log_origin.clamp_min(_LEAST_LOG)
        if not self.replaces:
            # 1/t times the cross-entropy of what is masked: what the step does not reveal costs nothing.
            picked = log_origin.gather(1, origin[:, None])[:, 0]
            return torch.where(tokens == self.mask, -picked / times, 0.0)
        with torch.no_grad():
            known = torch.full_like(log_origin, -math.inf).scatter_(1, origin[:, None], 0.0)
            true, _ = self.log_back(known, tokens, times, times - 1)
        model, _ = self.log_back(log_origin, tokens, times, times - 1)
        # What is given the probability 0 costs nothing; the mask is as likely in both.
        costs = torch.where(true == -math.inf, 0.0, true.exp() * (true - model))
        return costs.sum(dim=1)

    def _own_and_others(self, tokens: Tensor, own: Tensor, others: Tensor, like: Tensor) -> Tensor:
        """The logarithm of ``own`` at each row's token, and of ``others`` elsewhere; of a mask's row nothing useful."""
        table = _column(others, like).expand_as(like).clone()
        return table.scatter_(1, tokens.clamp_max(self.num_embeddings - 1)[:, None], _column(own, like))


def _column(shares: Tensor, like: Tensor) -> Tensor:
    """The logarithm of shares ``[R]`` as a column."""
    return shares.log().to(like.dtype)[:, None]
