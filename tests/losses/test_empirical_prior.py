"""KL to a prior with the latents' own variances: by hand, in a linear model, in parts of a batch and in processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ddp_prior
from helpers.processes import run_in_two
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses import KLLoss, TokenizerObjective
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian

IMAGE = torch.zeros(2, 1, 4, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_of(mean: Tensor, logvar: Tensor) -> TokenizerOutput:
    indices = torch.zeros(len(mean), *mean.shape[2:], 1, dtype=torch.int64)
    return TokenizerOutput(IMAGE, IMAGE, mean, DiagonalGaussian(mean, logvar), QuantizerOutput(mean, mean, indices))


def empirical(variance: list[float], **options: float) -> KLLoss:
    term = KLLoss(prior="empirical", embedding_dim=len(variance), **options)
    assert term.variance is not None
    term.variance.copy_(torch.tensor(variance))
    return term


def test_it_is_the_divergence_from_that_prior() -> None:
    mean, logvar, variance = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1), [0.25, 1.0, 7.0]
    prior = Normal(0.0, torch.tensor(variance).sqrt().view(3, 1, 1))
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), prior).sum(1).mean()
    found = empirical(variance).eval()(IMAGE, output_of(mean, logvar))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_at_1_it_is_the_standard_one_to_the_bit() -> None:
    found = []
    for term in (KLLoss(), empirical([1.0] * 16)):
        mean, logvar = random(2, 16, 4, 5).requires_grad_(), random(2, 16, 4, 5, seed=1).requires_grad_()
        value = term.eval()(IMAGE, output_of(mean, logvar))
        found.append((value, *torch.autograd.grad(value, (mean, logvar))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_channel_that_is_not_used_costs_nothing() -> None:
    term = empirical([0.37, 5.0, 1e-3]).eval()
    assert term.variance is not None
    logvar = term.variance.log().view(1, 3, 1, 1).expand(2, 3, 4, 5)
    mean = torch.zeros(2, 3, 4, 5).requires_grad_()
    value = term(IMAGE, output_of(mean, logvar))
    assert value.item() == 0.0
    assert not bool(torch.autograd.grad(value, mean)[0].any())


def test_the_variances_are_the_mean_squares() -> None:
    """Of samples, too: ``E z^2 = E[mu^2 + sigma^2]``."""
    term = empirical([1.0, 1.0, 1.0], momentum=0.0)
    mean = random(4, 3, 32, 32) * torch.tensor([3.0, 0.5, 0.0]).view(3, 1, 1)
    logvar = torch.tensor([-1.0, 0.0, -4.0]).view(1, 3, 1, 1).expand_as(mean)
    posterior = DiagonalGaussian(mean, logvar)
    term(IMAGE, output_of(mean, logvar))
    by_numpy = np.mean(mean.numpy() ** 2 + np.exp(logvar.numpy()), axis=(0, 2, 3))
    assert term.variance is not None
    np.testing.assert_allclose(term.variance.numpy(), by_numpy, rtol=1e-5)
    samples = posterior.sample(torch.Generator().manual_seed(1))
    np.testing.assert_allclose(term.variance.numpy(), np.mean(samples.numpy() ** 2, axis=(0, 2, 3)), rtol=0.05)


def test_the_average_moves_in_training_alone_and_after_the_batch() -> None:
    term = empirical([1.0, 4.0], momentum=0.75)
    assert term.variance is not None
    mean = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 1, 1)
    output = output_of(mean, torch.zeros(2, 2, 1, 1))
    # 1/2 (4 + 1 - 1) of the first channel, 1/2 (1/4 - 1 + log 4) of the second
    expected = 2 + 0.5 * (0.25 - 1 + math.log(4))
    assert term.eval()(IMAGE, output).item() == pytest.approx(expected, rel=1e-6)
    assert term.variance.tolist() == [1.0, 4.0]
    assert term.train()(IMAGE, output).item() == pytest.approx(expected, rel=1e-6)
    # 3/4 (1, 4) + 1/4 (5, 1)
    assert term.variance.tolist() == [2.0, 3.25]
    assert float(term.factor) == 1.0


def test_in_a_linear_model_at_its_optimum_as_many_channels_cost_as_there_are_directions() -> None:
    """Probabilistic PCA: data of covariance ``U diag(l) U^T`` with the decoder that maximizes their likelihood.

    With noise s^2 (the small eigenvalue), column i of the decoder is ``u_i sqrt((l_i - s^2) / v_i)`` under a prior
    of variance v_i, the posterior's variance ``v_i s^2 / l_i``, and the mean divergence ``1/2 log(l_i / s^2)``.
    """
    generator = np.random.default_rng(0)
    noise, eigenvalues, scales = 0.3, np.array([5.0, 2.0, 0.3, 0.3]), np.array([0.2, 3.0, 1.7, 1.0])
    axes = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    white = np.linalg.qr(generator.normal(size=(200, 4)))[0] * np.sqrt(200)  # of second moments I
    data = white * np.sqrt(eigenvalues) @ axes.T
    decoder = axes * np.sqrt((eigenvalues - noise) / scales)
    covariance = np.linalg.inv(decoder.T @ decoder / noise + np.diag(1 / scales))
    means = data @ decoder @ covariance / noise
    assert np.allclose(covariance, np.diag(np.diag(covariance)))
    mean = torch.tensor(means.T[None], dtype=torch.float32)
    logvar = torch.tensor(np.log(np.diag(covariance)), dtype=torch.float32).view(1, 4, 1).expand_as(mean)
    term = empirical([1.0] * 4, momentum=0.0)
    term(IMAGE, output_of(mean, logvar))
    # The aggregate of the posteriors is the prior whose optimum this is, and stays it.
    assert term.variance is not None
    np.testing.assert_allclose(term.variance.numpy(), scales, rtol=1e-4)
    value = term.eval()(IMAGE, output_of(mean, logvar)).item()
    assert value == pytest.approx(0.5 * np.log(np.array([5.0, 2.0]) / noise).sum(), rel=1e-4)
    for channel, expected in enumerate(0.5 * np.log(eigenvalues / noise)):
        alone = empirical([float(term.variance[channel])]).eval()
        part = output_of(mean[:, channel : channel + 1], logvar[:, channel : channel + 1])
        assert alone(IMAGE, part).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("grid", [(20,), (4, 5), (2, 2, 5)])
def test_parts_of_a_batch_on_any_grid_move_it_once(grid: tuple[int, ...]) -> None:
    mean, logvar = random(2, 4, 3, 20).unbind()
    states, values = [], []
    for parts in (1, 4):
        term = empirical([1.0, 2.0, 3.0], momentum=0.5, budget=1.0, num_embeddings=8)
        term.tokens = "all"
        with term.one_update():
            chunks = zip(mean.unflatten(-1, grid).chunk(parts), logvar.unflatten(-1, grid).chunk(parts), strict=True)
            values.append(sum(term(IMAGE, output_of(*chunk)).item() for chunk in chunks) / parts)
            assert term.control().tolist() == [1.0, 1.0, 2.0, 3.0]
        states.append(term.control())
    assert values[0] == pytest.approx(values[1])
    torch.testing.assert_close(*states)
    squares = mean.square() + logvar.exp()
    torch.testing.assert_close(states[0][1:], 0.5 * (torch.tensor([1.0, 2.0, 3.0]) + squares.mean(dim=(0, 2))))
    assert states[0][0].item() != 1.0


def test_a_batch_that_breaks_off_moves_nothing() -> None:
    term = empirical([1.0, 2.0], momentum=0.5)

    def broken_off() -> None:
        with term.one_update():
            term(IMAGE, output_of(random(2, 2, 3), random(2, 2, 3)))
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert term.control().tolist() == [1.0, 1.0, 2.0]


@pytest.mark.slow
def test_two_processes_have_the_prior_of_one(tmp_path: Path) -> None:
    first, second = run_in_two(ddp_prior, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, ddp_prior.train(slice(None)))


def objective(**options: object) -> TokenizerObjective:
    return TokenizerObjective(terms={"kl": KLLoss(**options)}, weights={"kl": 1.0})  # type: ignore[arg-type]


def test_checkpoints_carry_both_and_read_the_old_form() -> None:
    ard = {"prior": "empirical", "embedding_dim": 3, "momentum": 0.5}
    first, second = objective(**ard), objective(**ard)
    with first.one_update():
        first.generator(IMAGE, output_of(random(2, 3, 2, 2), random(2, 3, 2, 2)))
    state = first.control_state()
    second.load_control_state(state)
    assert state["kl"].shape == (4,)
    assert torch.equal(second.control_state()["kl"], state["kl"])
    assert state["kl"][1:].tolist() != [1.0, 1.0, 1.0]
    # What a checkpoint of the standard prior holds is a number, as before.
    plain = objective().control_state()
    assert plain == {"kl": torch.tensor(1.0)}
    assert plain["kl"].shape == ()
    third = objective(**ard)
    third.load_control_state({"kl": torch.tensor(0.5)})
    assert third.control_state()["kl"].tolist() == [0.5, 1.0, 1.0, 1.0]
    # The other way round the factor goes on alone.
    fourth = objective()
    fourth.load_control_state({"kl": torch.tensor([0.25, 3.0, 3.0, 3.0])})
    assert fourth.control_state() == {"kl": torch.tensor(0.25)}
    with pytest.raises(VaevqMedError, match="the checkpoint's prior has 2 channels; expected 3"):
        third.load_control_state({"kl": torch.ones(3)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prior": "learned"}, "prior is 'learned'; expected one of standard, empirical"),
        ({"prior": "empirical"}, "prior is 'empirical' with embedding_dim None; expected the number"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        KLLoss(**options)  # type: ignore[arg-type]


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="the posterior has 3 channels; expected 2, KLLoss's embedding_dim"):
        empirical([1.0, 1.0])(IMAGE, output_of(random(2, 3, 2, 2), random(2, 3, 2, 2)))
