"""Soft assignment of latents to codewords, ``p_n = softmax_k(z_n . e_k / T)``, without the N x K probabilities.

Both the forward and the backward pass take a few latents at a time; the backward pass computes their probabilities
again, so that what is kept between the two is of size N x D and K x D. Of each latent's normalization the largest logit
and the logarithm of the rest are kept apart: their rounded sum would leave probabilities that do not sum to 1.
Everything runs outside autocast and TF32: at the temperatures in use (0.01 to 1) rounding of the products would be
multiplied by up to 100.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.compiling import outside_compiled_graphs
from vaevq_med.networks.precision import full_precision
from vaevq_med.networks.processes import mean_of_processes

# Probabilities held at once when the caller does not say; a backward pass holds two such tensors.
_DEFAULT_CHUNK = {"cpu": 2**21, "other": 2**24}
# A product with fewer rows wastes the processor.
_FEWEST_LATENTS = 64
# Log-probabilities below it count as it, 1e-26: a processor takes some thirty times as long over numbers near 0.
_FLOOR = -60.0


@outside_compiled_graphs
def soft_codes(
    latents: Tensor, keys: Tensor, values: Tensor, *, temperature: float, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mixture ``sum_k p_nk v_k`` with ``p_n = softmax_k(z_n . e_k / T)``, and the likeliest codeword.

    Differentiable once in each of the three tensors. ``keys`` and ``values`` are the same codebook, of which a method
    detaches the one through which its codewords do not learn.

    Args:
        latents: z, ``[N, D]``, any floating type; half precision is widened to fp32 first.
        keys: e, ``[K, D]``.
        values: v, ``[K, C]``.
        temperature: T, above 0.
        chunk_size: probabilities held at once; by default 2^21 on a CPU and 2^24 (64 MiB) elsewhere, and at least those
            of 64 latents; one given is kept to but for the probabilities of one latent.

    Returns:
        The mixture ``[N, C]`` and int64 ``[N]``, ``argmax_k p_nk``, each in [0, K); the largest product as computed,
        so that of codewords whose products differ by rounding alone it may be any.

    Raises:
        VaevqMedError: the shapes do not match, there is no codeword, or a number is out of its range.

    >>> mixture, index = soft_codes(torch.zeros(1, 2), torch.eye(2), torch.tensor([[1.0], [3.0]]), temperature=1.0)
    >>> mixture.item(), index.item()
    (2.0, 0)
    """
    latents, keys, values, step = prepare(latents, keys, values, temperature, chunk_size)
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        logits = latents @ keys.T
        return torch.softmax(logits, dim=1) @ values, logits.argmax(dim=1)
    mixture, indices = _Mixture.apply(latents, keys, values, step)
    return mixture, indices


@outside_compiled_graphs
def assignment_statistics(
    latents: Tensor, keys: Tensor, *, temperature: float, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Entropy of each ``p_n = softmax_k(z_n . e_k / T)``, and the mean of them all; NaN without latents.

    Differentiable once in both tensors; arguments as for :func:`soft_codes`.

    Returns:
        ``H(p_n)`` in nats, ``[N]``, and ``mean_n p_n``, ``[K]``.

    Raises:
        VaevqMedError: as :func:`soft_codes`.

    >>> entropy, mean = assignment_statistics(torch.zeros(3, 2), torch.ones(4, 2), temperature=1.0)
    >>> [round(value, 4) for value in entropy.tolist()], mean.tolist()
    ([1.3863, 1.3863, 1.3863], [0.25, 0.25, 0.25, 0.25])
    """
    latents, keys, _, step = prepare(latents, keys, keys, temperature, chunk_size)
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        logs = torch.log_softmax(latents @ keys.T, dim=1)
        return -(logs.exp() * logs).sum(dim=1), logs.exp().mean(dim=0)
    entropy, mean = _Statistics.apply(latents, keys, step)
    return entropy, mean


def assignment_entropy(
    latents: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    chunk_size: int | None = None,
    synchronize: bool = False,
) -> Tensor:
    """``mean_n H(p_n) - H(mean_n p_n)`` with ``p_n = softmax_k(z_n . e_k / T)``, a scalar in nats.

    It is least, ``-log K``, where each latent is sure of its codeword and all codewords are chosen alike.

    Args:
        latents: z, ``[N, D]``, at least one.
        keys: e, ``[K, D]``.
        temperature: T, above 0.
        chunk_size: as for :func:`soft_codes`.
        synchronize: take the mean over every process, each of which must have as many latents. The gradient is such
            that its average over the processes is that of one process with all the latents.

    Raises:
        VaevqMedError: as :func:`soft_codes`.

    >>> codebook = 9 * torch.eye(2)
    >>> round(assignment_entropy(codebook, codebook, temperature=1.0).item(), 4)
    -0.6931
    """
    entropy, mean = assignment_statistics(latents, keys, temperature=temperature, chunk_size=chunk_size)
    if synchronize:
        mean = mean_of_processes(mean)
    # The gradient of p log p is not finite at 0, where most of the codewords are when T is small.
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return entropy.mean() + (mean * mean.log()).sum()


def prepare(
    latents: Tensor, keys: Tensor, values: Tensor, temperature: float, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Latents divided by the temperature, keys and values in a common type, and latents a chunk."""
    if latents.ndim != 2 or keys.ndim != 2 or latents.shape[1] != keys.shape[1] or values.shape[0] != keys.shape[0]:
        raise VaevqMedError(
            f"latents have shape {tuple(latents.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}; "
            "expected [N, D], [K, D] and [K, C]"
        )
    if keys.shape[0] == 0:
        raise VaevqMedError("the codebook has no codeword; expected at least one")
    if not temperature > 0:
        raise VaevqMedError(f"temperature is {temperature}; expected above 0")
    if chunk_size is None:
        chunk_size = max(
            _DEFAULT_CHUNK.get(latents.device.type, _DEFAULT_CHUNK["other"]), _FEWEST_LATENTS * keys.shape[0]
        )
    if chunk_size < 1:
        raise VaevqMedError(f"chunk_size is {chunk_size}; expected at least 1")
    dtype = torch.promote_types(torch.promote_types(latents.dtype, keys.dtype), torch.float32)
    latents, keys, values = (tensor.to(dtype) for tensor in (latents, keys, values))
    if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):
        # MONAI's MetaTensor takes no sizes one by one.
        latents, keys, values = (tensor.as_subclass(Tensor) for tensor in (latents, keys, values))
    return latents / temperature, keys, values, max(1, chunk_size // keys.shape[0])


class _Mixture(torch.autograd.Function):
    """``softmax(latents @ keys.T) @ values`` and the argmax, ``step`` rows at a time in buffers that are used again."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, keys: Tensor, values: Tensor, step: int) -> tuple[Tensor, Tensor]:
        mixture = values.new_empty(len(latents), values.shape[1])
        index = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        norms = latents.new_empty(len(latents), 2)
        buffer = latents.new_empty(min(step, len(latents)), len(keys))
        with full_precision(latents.device.type):
            for chunk in _chunks(len(latents), step):
                part = latents[chunk]
                weights = torch.mm(part, keys.T, out=buffer[: len(part)])
                peak, best = weights.max(dim=1, keepdim=True)
                index[chunk] = best.squeeze(1)
                total = weights.sub_(peak).clamp_(min=_FLOOR).exp_().sum(dim=1, keepdim=True)
                torch.mm(weights, values, out=mixture[chunk]).div_(total)
                norms[chunk] = torch.cat([peak, total.log()], dim=1)
        ctx.save_for_backward(latents, keys, values, mixture, norms)
        ctx.step = step
        ctx.mark_non_differentiable(index)
        return mixture, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        latents, keys, values, mixture, norms = ctx.saved_tensors
        to_latents = torch.empty_like(latents) if ctx.needs_input_grad[0] else None
        to_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        to_values = torch.zeros_like(values) if ctx.needs_input_grad[2] else None
        shape = min(ctx.step, len(latents)), len(keys)
        first, second = latents.new_empty(shape), latents.new_empty(shape)
        with full_precision(latents.device.type):
            for chunk in _chunks(len(latents), ctx.step):
                part, outer = latents[chunk], gradient[chunk]
                probabilities = torch.mm(part, keys.T, out=first[: len(part)])
                probabilities.sub_(norms[chunk, :1]).sub_(norms[chunk, 1:]).clamp_(min=_FLOOR).exp_()
                if to_values is not None:
                    to_values.addmm_(probabilities.T, outer)
                if to_latents is None and to_keys is None:
                    continue
                # d p_k / d logit_j = p_k (1[j = k] - p_j)
                slope = torch.mm(outer, values.T, out=second[: len(part)])
                slope.sub_((outer * mixture[chunk]).sum(dim=1, keepdim=True)).mul_(probabilities)
                if to_latents is not None:
                    torch.mm(slope, keys, out=to_latents[chunk])
                if to_keys is not None:
                    to_keys.addmm_(slope.T, part)
        return to_latents, to_keys, to_values, None


class _Statistics(torch.autograd.Function):
    """Entropy of each row of ``softmax(latents @ keys.T)`` and their mean, ``step`` rows at a time in buffers."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, keys: Tensor, step: int) -> tuple[Tensor, Tensor]:
        entropy = latents.new_empty(len(latents))
        norms = latents.new_empty(len(latents), 2)
        total = keys.new_zeros(len(keys))
        shape = min(step, len(latents)), len(keys)
        first, second = latents.new_empty(shape), latents.new_empty(shape)
        with full_precision(latents.device.type):
            for chunk in _chunks(len(latents), step):
                part = latents[chunk]
                logs = torch.mm(part, keys.T, out=first[: len(part)])
                peak = logs.amax(dim=1, keepdim=True)
                probabilities = torch.clamp(logs.sub_(peak), min=_FLOOR, out=second[: len(part)]).exp_()
                mass = probabilities.sum(dim=1, keepdim=True)
                probabilities.div_(mass)
                total += probabilities.sum(dim=0)
                entropy[chunk] = -logs.sub_(mass.log()).mul_(probabilities).sum(dim=1)
                norms[chunk] = torch.cat([peak, mass.log()], dim=1)
        ctx.save_for_backward(latents, keys, norms)
        ctx.step = step
        return entropy, total / len(latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_entropy: Tensor, of_mean: Tensor) -> tuple[Tensor | None, ...]:
        latents, keys, norms = ctx.saved_tensors
        to_latents = torch.empty_like(latents) if ctx.needs_input_grad[0] else None
        to_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        shape = min(ctx.step, len(latents)), len(keys)
        first, second = latents.new_empty(shape), latents.new_empty(shape)
        with full_precision(latents.device.type):
            for chunk in _chunks(len(latents), ctx.step):
                part = latents[chunk]
                slope = torch.mm(part, keys.T, out=first[: len(part)])
                slope.sub_(norms[chunk, :1]).sub_(norms[chunk, 1:])
                probabilities = torch.clamp(slope, min=_FLOOR, out=second[: len(part)]).exp_()
                # With a = dL/dp, dropping what is the same for all k: d logit_k = p_k (a_k - sum_j p_j a_j).
                slope.mul_(-of_entropy[chunk].unsqueeze(1)).add_(of_mean / len(latents))
                slope.sub_(torch.linalg.vecdot(slope, probabilities).unsqueeze(1)).mul_(probabilities)
                if to_latents is not None:
                    torch.mm(slope, keys, out=to_latents[chunk])
                if to_keys is not None:
                    to_keys.addmm_(slope.T, part)
        return to_latents, to_keys, None


def _chunks(count: int, step: int) -> Iterator[slice]:
    """``[0, count)`` in parts of ``step``."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
