"""The processes of token diffusion beside products of their (K + 1) x (K + 1) matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.corruption import PROCESSES, Corruption

K, T = 4, 10


def cumulative(process: str, t: int) -> tuple[float, float]:
    """Share kept and share masked, by the definitions of the publications."""
    if process == "uniform":
        return (math.cos(math.pi / 2 * t / T) ** 2 if t < T else 0.0), 0.0
    return 1 - t / T, {"absorbing": 1.0, "mask_replace": 0.9}[process] * t / T


def step_matrix(process: str, t: int) -> np.ndarray:
    """Row: the token at t - 1; column: the token at t; the last of both is the mask."""
    (kept, masked), (kept_before, masked_before) = cumulative(process, t), cumulative(process, t - 1)
    keep, mask = kept / kept_before, 1 - (1 - masked) / (1 - masked_before)
    other = (1 - keep - mask) / K
    matrix = np.full((K + 1, K + 1), other)
    matrix[range(K), range(K)] += keep
    matrix[:K, K], matrix[K] = mask, 0.0
    matrix[K, K] = 1.0
    return matrix


def product(process: str, start: int, end: int) -> np.ndarray:
    found = np.eye(K + 1)
    for t in range(start + 1, end + 1):
        found = found @ step_matrix(process, t)
    return found


def posterior(process: str, s: int, t: int, origin: int, token: int) -> np.ndarray:
    """q(x_s | x_t, x_0) by Bayes' rule."""
    joint = product(process, 0, s)[origin] * product(process, s, t)[:, token]
    return joint / joint.sum()


def possible(process: str, t: int, origin: int, token: int) -> bool:
    return bool(product(process, 0, t)[origin, token] > 1e-12)


def rows(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_marginals_are_products_of_the_steps(process: str) -> None:
    corruption = Corruption(process, num_embeddings=K, num_steps=T)
    for t in range(T + 1):
        whole = product(process, 0, t)
        kept, masked = corruption.kept[t].item(), corruption.masked[t].item()
        replaced = (1 - kept - masked) / K
        np.testing.assert_allclose(whole[0, :K], [replaced + kept, *[replaced] * (K - 1)], atol=1e-12)
        assert whole[0, K] == pytest.approx(masked, abs=1e-12)
        np.testing.assert_allclose(whole.sum(axis=1), 1.0)
    assert corruption.kept[T].item() == 0.0


@pytest.mark.parametrize("process", PROCESSES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_steps_back_and_divergence_are_those_of_the_matrices(process: str, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, T))
    s = data.draw(st.integers(0, t - 1))
    seed = data.draw(st.integers(0, 2**16))
    origin, token = data.draw(st.integers(0, K - 1)), data.draw(st.integers(0, K))
    if not possible(process, t, origin, token):
        return
    corruption = Corruption(process, num_embeddings=K, num_steps=T)
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(K))
    if process == "absorbing" and token < K:
        probabilities = np.eye(K)[token]  # a token that was revealed is known
    log_origin = torch.tensor(probabilities).clamp_min(1e-300).log()[None]

    def mixture(earlier: int) -> np.ndarray:
        parts = (p * posterior(process, earlier, t, k, token) for k, p in enumerate(probabilities) if p > 0)
        return np.sum(list(parts), axis=0)

    words, mask = corruption.log_back(log_origin, rows(token), rows(t), rows(s))
    found = np.append(words.exp().numpy()[0], mask.exp().numpy())
    np.testing.assert_allclose(found, mixture(s), atol=1e-12)

    true, model = posterior(process, t - 1, t, origin, token), mixture(t - 1)
    some = true > 0
    expected = float((true[some] * np.log(true[some] / model[some])).sum())
    divergence = corruption.divergence(log_origin, rows(origin), rows(token), rows(t)).item()
    assert divergence == pytest.approx(expected, abs=1e-11)
    single = corruption.divergence(log_origin.float(), rows(origin), rows(token), rows(t))
    assert single.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("process", ["mask_replace", "uniform"])
@pytest.mark.parametrize("token", [0, 2])
def test_the_evidence_is_the_marginal(process: str, token: int) -> None:
    corruption = Corruption(process, num_embeddings=K, num_steps=T)
    for t in (1, 4, T):
        found = corruption.log_evidence(rows(token), rows(t), torch.zeros(1, K, dtype=torch.float64))
        np.testing.assert_allclose(found.exp().numpy()[0], product(process, 0, t)[:K, token], atol=1e-12)
    assert not bool(corruption.log_evidence(rows(K), rows(3), torch.zeros(1, K)).any())


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("t", [0, 3, T])
def test_draws_have_the_marginals(process: str, t: int) -> None:
    count, origin = 40_000, 2
    corruption = Corruption(process, num_embeddings=K, num_steps=T)
    tokens = torch.full((1, count), origin)
    drawn = corruption.corrupt(tokens, rows(t), torch.Generator().manual_seed(0))
    shares = np.bincount(drawn[0].numpy(), minlength=K + 1) / count
    np.testing.assert_allclose(shares, product(process, 0, t)[origin], atol=4 * 0.5 / count**0.5)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("t", [0, 6, T])
def test_the_marginals_in_logarithms(process: str, t: int) -> None:
    corruption = Corruption(process, num_embeddings=K, num_steps=T)
    found = corruption.log_marginal(torch.arange(K), torch.full((K,), t), torch.zeros(1, dtype=torch.float64))
    np.testing.assert_allclose(found.exp().numpy(), product(process, 0, t)[:K], atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_gradients_are_finite_and_those_of_differences(process: str) -> None:
    corruption = Corruption(process, num_embeddings=K, num_steps=T)
    tokens, times = torch.tensor([0, 1, K, K, 2]), torch.tensor([1, 5, 1, 6, T])
    if process == "uniform":
        tokens = tokens.clamp_max(K - 1)
    if process == "absorbing":
        tokens = torch.full_like(tokens, K)
    origin = torch.tensor([0, 2, 3, 0, 1])
    logits = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: corruption.divergence(x.log_softmax(dim=1), origin, tokens, times), (logits,)
    )


@pytest.mark.peer
def test_the_peer_has_the_same_posterior() -> None:
    """``diffusers``' scheduler of VQ-Diffusion, with constants whose replaced share is not lost to its fp32."""
    diffusers = pytest.importorskip("diffusers")
    peer_class = getattr(diffusers, "VQDiffusionScheduler", None)
    if peer_class is None:
        pytest.skip("this release of diffusers has no VQDiffusionScheduler")
    peer = peer_class(
        num_vec_classes=K + 1,
        num_train_timesteps=T,
        alpha_cum_start=0.9,
        alpha_cum_end=0.05,
        gamma_cum_start=0.05,
        gamma_cum_end=0.6,
    )
    corruption = Corruption("mask_replace", num_embeddings=K, num_steps=T)
    corruption.kept = torch.cat([torch.ones(1), peer.log_cumprod_at[:T].exp()]).double()
    corruption.masked = torch.cat([torch.zeros(1), peer.log_cumprod_ct[:T].exp()]).double()
    generator = torch.Generator().manual_seed(0)
    log_origin = torch.randn(1, K, 6, generator=generator).log_softmax(dim=1)
    tokens = torch.tensor([[0, 1, K, 3, K, 2]])
    for t in (2, 5, T):
        expected = peer.q_posterior(log_origin, tokens, torch.tensor(t - 1))[0].T.exp()
        times = torch.full((6,), t)
        words, mask = corruption.log_back(log_origin[0].T.double(), tokens[0], times, times - 1)
        found = torch.cat([words, mask[:, None]], dim=1).exp()
        torch.testing.assert_close(found.float(), expected, atol=2e-5, rtol=1e-3)


def test_what_is_no_process_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="process is 'gaussian'; expected one of absorbing, mask_replace, uniform"):
        Corruption("gaussian", num_embeddings=4, num_steps=10)
    with pytest.raises(VaevqMedError, match="num_steps is 1; expected 2 or more"):
        Corruption("uniform", num_embeddings=4, num_steps=1)
