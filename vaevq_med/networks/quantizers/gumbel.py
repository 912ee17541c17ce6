"""Samples from a soft assignment that a gradient passes: Gumbel-softmax (arXiv 1611.01144, 1611.00712)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vaevq_med.networks.compiling import outside_compiled_graphs
from vaevq_med.networks.precision import full_precision
from vaevq_med.networks.quantizers.soft_assignment import prepare


@outside_compiled_graphs
def gumbel_codes(
    latents: Tensor, keys: Tensor, values: Tensor, *, temperature: Tensor, chunk_size: int | None = None
) -> Tensor:
    """The mixtures ``softmax_k((z_n . e_k + g_nk) / T) v_k``, with Gumbel noise g of torch's global generator.

    As T falls each becomes the value of a codeword that is drawn from ``softmax_k(z_n . e_k)``. Where all N x K
    products would be more than ``chunk_size``, some latents are taken at a time, and their noise is drawn again, the
    same, in the backward pass.

    Args:
        latents: z, ``[N, D]``, any floating type; half precision is widened to fp32 first.
        keys: e, ``[K, D]``.
        values: v, ``[K, C]``.
        temperature: T, a scalar above 0.
        chunk_size: probabilities held at once, as for
            :func:`~vaevq_med.networks.quantizers.soft_assignment.soft_codes`; a few tensors of that size are.

    Returns:
        ``[N, C]``, differentiable in the three tensors.

    Raises:
        VaevqMedError: the shapes do not match, or there is no codeword.
    """
    latents, keys, values, step = prepare(latents, keys, values, 1.0, chunk_size)
    if len(latents) <= step:
        return _mixtures(latents, keys, values, temperature)
    parts = latents.split(step)
    return torch.cat([checkpoint(_mixtures, part, keys, values, temperature, use_reentrant=False) for part in parts])


def _mixtures(latents: Tensor, keys: Tensor, values: Tensor, temperature: Tensor) -> Tensor:
    with full_precision(latents.device.type):
        logits = latents @ keys.T
        waits = torch.empty_like(logits).exponential_().clamp_min(torch.finfo(logits.dtype).tiny)
        return torch.softmax((logits - waits.log()) / temperature, dim=1) @ values
