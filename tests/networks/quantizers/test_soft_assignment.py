"""Soft assignment in bounded memory against every probability written out: values, gradients, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.memory import LargestTensor
from scipy.special import entr, softmax
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.soft_assignment import assignment_entropy, assignment_statistics, soft_codes

T = 0.3


def draw(n: int = 7, k: int = 5, d: int = 3, c: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((n, d), (k, d), (k, c))
    )


def test_by_hand() -> None:
    # Logits 0 and ln 3, so that p = (1/4, 3/4); then 0 and 0, p = (1/2, 1/2).
    latents = torch.tensor([[math.log(3) / 2], [0.0]], requires_grad=True)
    keys = torch.tensor([[0.0], [1.0]], requires_grad=True)
    values = torch.tensor([[8.0], [0.0]], requires_grad=True)
    mixture, index = soft_codes(latents, keys, values, temperature=0.5)
    assert mixture.flatten().tolist() == pytest.approx([2.0, 4.0])
    assert index.tolist() == [1, 0]
    to_latents, to_keys, to_values = torch.autograd.grad(mixture[0], (latents, keys, values))
    # d mixture / d logit_k = p_k (v_k - mixture): 1/4 * 6 and 3/4 * -2; the logit is z e / T.
    assert to_latents.flatten().tolist() == pytest.approx([-1.5 / 0.5, 0.0])
    assert to_keys.flatten().tolist() == pytest.approx([1.5 * math.log(3), -1.5 * math.log(3)])
    assert to_values.flatten().tolist() == pytest.approx([0.25, 0.75])
    entropy, mean = assignment_statistics(latents, keys, temperature=0.5)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy.tolist() == pytest.approx([quarter, math.log(2)])
    assert mean.tolist() == pytest.approx([0.375, 0.625])
    of_mean = -(0.375 * math.log(0.375) + 0.625 * math.log(0.625))
    loss = assignment_entropy(latents, keys, temperature=0.5)
    assert loss.item() == pytest.approx((quarter + math.log(2)) / 2 - of_mean, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 11, None])
def test_values_and_gradients_are_those_of_the_whole_matrix(chunk: int | None) -> None:
    latents, keys, values = draw()
    mixture, index = soft_codes(latents, keys, values, temperature=T, chunk_size=chunk)
    entropy, mean = assignment_statistics(latents, keys, temperature=T, chunk_size=chunk)
    expected = softmax((latents @ keys.T / T).detach().numpy(), axis=1)
    assert index.tolist() == expected.argmax(axis=1).tolist()
    torch.testing.assert_close(mixture.detach(), torch.from_numpy(expected @ values.detach().numpy()))
    torch.testing.assert_close(entropy.detach(), torch.from_numpy(entr(expected).sum(axis=1)))
    torch.testing.assert_close(mean.detach(), torch.from_numpy(expected.mean(axis=0)))

    whole = torch.softmax(latents @ keys.T / T, dim=1)
    total = assignment_entropy(latents, keys, temperature=T, chunk_size=chunk) + mixture.square().sum()
    reference = (
        torch.special.entr(whole).sum(dim=1).mean()
        - torch.special.entr(whole.mean(dim=0)).sum()
        + (whole @ values).square().sum()
    )
    torch.testing.assert_close(total, reference)
    found = torch.autograd.grad(total, (latents, keys, values))
    for own, other in zip(found, torch.autograd.grad(reference, (latents, keys, values)), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("chunk", [1, 11, None])
def test_gradients_are_those_of_finite_differences(chunk: int | None) -> None:
    options: dict[str, Any] = {"temperature": T, "chunk_size": chunk}
    latents, keys, values = draw()
    assert torch.autograd.gradcheck(lambda *x: soft_codes(*x, **options)[0], (latents, keys, values))
    assert torch.autograd.gradcheck(lambda *x: assignment_statistics(*x, **options), (latents, keys))
    for fixed in range(3):  # each gradient can be left out
        inputs = [x.detach() if i == fixed else x for i, x in enumerate((latents, keys, values))]
        assert torch.autograd.gradcheck(lambda *x: soft_codes(*x, **options)[0], inputs)
    assert torch.autograd.gradcheck(lambda x: assignment_entropy(x, keys.detach(), **options), (latents,))
    assert torch.autograd.gradcheck(lambda x: assignment_entropy(latents.detach(), x, **options), (keys,))


def test_sure_latents_have_finite_gradients() -> None:
    """At the published temperature most probabilities are 0 in fp32."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(20, 8, generator=generator).requires_grad_()
    keys = torch.randn(500, 8, generator=generator).requires_grad_()
    loss = assignment_entropy(latents, keys, temperature=0.01)
    gradients = torch.autograd.grad(loss, (latents, keys))
    assert loss.item() == pytest.approx(-math.log(20), abs=0.5)
    assert all(bool(g.isfinite().all()) and float(g.abs().sum()) > 0 for g in gradients)


def test_half_precision_is_widened_and_autocast_is_left() -> None:
    latents, keys, values = (x.detach().float() for x in draw())
    expected = soft_codes(latents, keys, values, temperature=0.01)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_codes(latents, keys, values, temperature=0.01)[0], expected)
    half = soft_codes(latents.bfloat16(), keys.bfloat16(), values.bfloat16(), temperature=0.01)[0]
    assert half.dtype == torch.float32
    again = soft_codes(latents.bfloat16().float(), keys.bfloat16().float(), values.bfloat16().float(), temperature=0.01)
    assert torch.equal(half, again[0])


def test_nothing_as_large_as_latents_times_codewords_is_held() -> None:
    generator = torch.Generator().manual_seed(0)
    n, k, d, chunk = 2048, 1024, 8, 2**15
    latents = torch.randn(n, d, generator=generator).requires_grad_()
    keys = torch.randn(k, d, generator=generator).requires_grad_()
    with LargestTensor() as largest:
        mixture, _ = soft_codes(latents, keys, keys, temperature=1.0, chunk_size=chunk)
        loss = assignment_entropy(latents, keys, temperature=1.0, chunk_size=chunk)
        (mixture.square().sum() + loss).backward()
    assert largest.elements == chunk
    assert chunk < n * k / 50
    assert latents.grad is not None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_gives_the_same() -> None:
    latents, keys, values = (x.detach() for x in draw())

    def everything(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *soft_codes(z, keys, values, temperature=T), *assignment_statistics(z, keys, temperature=T)

    traced = torch.jit.trace(everything, latents)
    for own, other in zip(traced(latents[:4]), everything(latents[:4]), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((2, 3), (4, 2), (4, 2)), {}, r"expected \[N, D\], \[K, D\] and \[K, C\]"),
        (((2, 3), (4, 3), (5, 3)), {}, r"expected \[N, D\], \[K, D\] and \[K, C\]"),
        (((2, 3), (0, 3), (0, 3)), {}, "no codeword"),
        (((2, 3), (4, 3), (4, 3)), {"temperature": 0.0}, "temperature is 0.0"),
        (((2, 3), (4, 3), (4, 3)), {"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        soft_codes(*(torch.zeros(shape) for shape in shapes), **{"temperature": 1.0, **options})


def test_the_entropys_gradient_keeps_its_digits_where_logits_are_large() -> None:
    """At T = 0.01 logits reach thousands; probabilities that do not sum to 1 would push every latent at random."""
    torch.manual_seed(0)
    latents, keys = torch.randn(128, 64), torch.randn(512, 64)

    def gradient(dtype: torch.dtype) -> Tensor:
        z = latents.to(dtype).requires_grad_()
        logs = torch.log_softmax(z @ keys.to(dtype).T / 0.01, dim=1)
        mean = logs.exp().mean(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        (-(logs.exp() * logs).sum(dim=1).mean() + (mean * mean.log()).sum()).backward()
        assert z.grad is not None
        return z.grad.double()

    z = latents.clone().requires_grad_()
    assignment_entropy(z, keys, temperature=0.01).backward()
    assert z.grad is not None
    exact, plain = gradient(torch.float64), gradient(torch.float32)
    error, rounding = (z.grad.double() - exact).norm(), (plain - exact).norm()
    assert float(error) < 3 * float(rounding)
