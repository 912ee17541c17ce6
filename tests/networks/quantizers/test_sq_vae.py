"""Stochastic quantization: by hand, by brute force, its limit, its noise and its temperature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.memory import LargestTensor
from helpers.quantizer_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import SQVAE, VectorQuantizer, gumbel
from vaevq_med.networks.quantizers.gumbel import gumbel_codes

CASES = {"sq-vae": Case(lambda: SQVAE(num_embeddings=32, embedding_dim=4), straight_through=False)}


def quantizer_of(table: list[list[float]], **options: Any) -> SQVAE:
    quantizer = SQVAE(num_embeddings=len(table), embedding_dim=len(table[0]), **options)
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor(table))
    return quantizer


def test_two_codewords_by_hand() -> None:
    """Squared distances of 1 and 9 at s^2 = 2: logits -1/4 and -9/4, P = 1 / (1 + e^-2) of the nearer one."""
    quantizer = quantizer_of([[0.0], [4.0]], variance=2.0).eval()
    output = quantizer(torch.ones(1, 1, 1, 1))
    assert output.indices.item() == 0
    assert output.quantized.item() == 0.0
    p = 1 / (1 + math.exp(-2))
    expected = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert output.losses["kld_discrete"].item() == pytest.approx(expected, rel=1e-5)
    assert output.losses["kld_continuous"].item() == pytest.approx(1 / 4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), variance=st.floats(0.05, 20), num=st.integers(1, 40))
def test_the_entropy_by_brute_force(seed: int, variance: float, num: int) -> None:
    torch.manual_seed(seed)
    quantizer = SQVAE(num_embeddings=num, embedding_dim=3, variance=variance).eval()
    z = torch.randn(2, 3, 2, 4)
    flat, table = z.movedim(1, -1).reshape(-1, 3).double().numpy(), quantizer.embedding.detach().double().numpy()
    squared = cdist(flat, table, metric="sqeuclidean")
    chances = softmax(-squared / (2 * variance), axis=1)
    losses = quantizer(z).losses
    assert losses["kld_discrete"].item() == pytest.approx(math.log(num) - entropy(chances, axis=1).mean(), abs=1e-4)
    assert losses["kld_continuous"].item() == pytest.approx(squared.min(axis=1).mean() / (2 * variance), rel=1e-4)


def test_without_variance_it_is_plain_vq() -> None:
    torch.manual_seed(0)
    quantizer = SQVAE(num_embeddings=16, embedding_dim=4, variance=1e-6)
    plain = VectorQuantizer(num_embeddings=16, embedding_dim=4)
    plain.embedding.data = quantizer.embedding.data.clone()
    z = torch.randn(2, 4, 5, 5)
    expected = plain(z)
    for mode in (True, False):
        output = quantizer.train(mode)(z)
        torch.testing.assert_close(output.quantized, expected.quantized, atol=1e-5, rtol=1e-5)
        assert torch.equal(output.indices, expected.indices)
        assert output.losses["kld_discrete"].item() == pytest.approx(math.log(16), abs=1e-4)


def test_a_cold_draw_has_the_chances_of_the_assignment() -> None:
    """The Gumbel-max trick: of 4,000 draws each codeword has its share, within four standard errors."""
    torch.manual_seed(0)
    keys, count = torch.tensor([[0.0], [1.0], [-1.5]]), 4000
    drawn = gumbel_codes(torch.ones(count, 1), keys, torch.eye(3), temperature=torch.tensor(1e-3))
    shares, chances = drawn.round().mean(dim=0).numpy(), softmax([0.0, 1.0, -1.5])
    assert (drawn - drawn.round()).abs().mean() < 0.01
    assert np.all(np.abs(shares - chances) < 4 * np.sqrt(chances * (1 - chances) / count))


def test_a_warm_draw_is_a_mixture_whose_gradient_reaches_everything() -> None:
    torch.manual_seed(0)
    quantizer = SQVAE(num_embeddings=8, embedding_dim=4)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    output = quantizer(z)
    assert not torch.allclose(output.quantized, output.codes)
    for source in (z, quantizer.embedding, quantizer.log_variance):
        (gradient,) = torch.autograd.grad(output.quantized.square().sum(), source, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_noise_is_drawn_again_the_same_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((20, 3), (7, 3), (7, 5))]

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        found = gumbel_codes(*tensors, temperature=torch.tensor(0.5), chunk_size=4 * 7)
        torch.manual_seed(2)  # what others draw between the two passes
        return torch.autograd.grad(found.square().sum(), tensors)

    again = gradients()
    monkeypatch.setattr(gumbel, "checkpoint", lambda function, *args, **_: function(*args))
    for one, other in zip(again, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_no_tensor_is_of_all_pairs() -> None:
    latents, keys = torch.randn(1024, 4, requires_grad=True), torch.randn(64, 4)
    with LargestTensor() as largest:
        gumbel_codes(latents, keys, keys, temperature=torch.tensor(1.0), chunk_size=64 * 64).sum().backward()
    assert largest.elements <= 64 * 64


def test_it_cools_once_a_batch_and_goes_on_where_it_was() -> None:
    quantizer = SQVAE(num_embeddings=4, embedding_dim=2, temperature=2.0, temperature_decay=0.5)
    z = torch.randn(1, 2, 2, 2)
    assert quantizer.temperature.item() == 2.0
    quantizer(z)
    assert quantizer.temperature.item() == pytest.approx(2 * math.exp(-0.5))
    with quantizer.one_update():  # a batch in two parts
        quantizer(z)
        quantizer(z)
    assert quantizer.temperature.item() == pytest.approx(2 * math.exp(-1))
    quantizer.eval()(z)
    again = SQVAE(num_embeddings=4, embedding_dim=2, temperature=2.0, temperature_decay=0.5)
    again.load_state_dict(quantizer.state_dict())
    assert again.temperature.item() == pytest.approx(2 * math.exp(-1))
    again.steps += 1000
    assert again.temperature.item() == pytest.approx(1e-4)
    assert SQVAE(num_embeddings=4, embedding_dim=2, temperature=3.0, temperature_minimum=3.0).temperature.item() == 3.0


def test_the_variance_starts_as_published_for_64_channels() -> None:
    assert SQVAE(num_embeddings=4, embedding_dim=64).log_variance.item() == pytest.approx(math.log(20))


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_the_gradient_of_the_variance_by_hand(floor: float) -> None:
    """Logits of -1/4 and -9/4 at s^2 = 2; by log s^2 both they and 1 / (2 s^2) fall by themselves."""
    quantizer = quantizer_of([[0.0], [4.0]], variance=2.0, variance_floor=floor).eval()
    losses = quantizer(torch.ones(1, 1, 1, 1)).losses
    p, share = 1 / (1 + math.exp(-2)), (2 - floor) / 2  # what is learned is that share of s^2
    for name, expected in (("kld_continuous", -1 / 4), ("kld_discrete", -p * (1 - p) * 2**2)):  # less Var(logits)
        (gradient,) = torch.autograd.grad(losses[name], quantizer.log_variance, retain_graph=True)
        assert gradient.item() == pytest.approx(share * expected, rel=1e-4)


def test_the_variance_stays_above_its_floor() -> None:
    quantizer = quantizer_of([[0.0], [4.0]], variance_floor=1.0).eval()
    assert quantizer.log_variance.item() == pytest.approx(math.log(20 / 64))
    with torch.no_grad():
        quantizer.log_variance.fill_(-200)
    assert quantizer(torch.ones(1, 1, 1, 1)).losses["kld_continuous"].item() == pytest.approx(1 / 2)


REFUSED: list[tuple[dict[str, float], str]] = [
    ({"variance": 0.0}, r"variance is 0.0; expected above 0.0, and finite"),
    ({"variance": math.inf}, r"variance is inf; expected above 0.0, and finite"),
    ({"variance": 1.0, "variance_floor": 1.0}, r"variance is 1.0; expected above 1.0"),
    ({"variance_floor": -1.0}, r"variance_floor is -1.0; expected at least 0"),
    ({"temperature": 0.0}, r"temperature is 0.0; expected above 0"),
    ({"temperature": math.inf}, r"temperature is inf; expected above 0, and finite"),
    ({"temperature": math.nan}, r"temperature is nan; expected above 0"),
    ({"temperature_decay": -1.0}, r"temperature_decay is -1.0; expected at least 0"),
    ({"temperature_minimum": 2.0}, r"temperature_minimum is 2.0; expected at least 0 and at most temperature, 1.0"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_what_an_option_cannot_be_is_refused_in_a_line(options: dict[str, float], told: str) -> None:
    with pytest.raises(VaevqMedError, match=told):
        SQVAE(num_embeddings=4, embedding_dim=2, **options)
