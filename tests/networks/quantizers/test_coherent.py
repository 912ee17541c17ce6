"""The coherent codebook: its two steps by hand, against VQ-EMA, under a linear decoder, in parts and in processes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE
from helpers import ddp_codebook
from helpers.bundles import evaluation_overrides, run_bundle, states_equal
from helpers.processes import run_in_two
from helpers.quantizer_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.dcr import gaussian_wasserstein2_to_standard
from vaevq_med.losses.objective import TokenizerObjective
from vaevq_med.losses.rcs import representation_coherence
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.coherent import CoherentVQ
from vaevq_med.networks.quantizers.ema import VectorQuantizerEMA

CASES = {
    "coherent": Case(
        lambda: CoherentVQ(
            num_embeddings=32, embedding_dim=4, assignment="euclidean", weighting="plain", prior_step=0.1
        ),
        learns=False,
    ),
    # As it ships: assigned by the posterior, weighed by the precision.
    "coherent-default": Case(lambda: CoherentVQ(num_embeddings=32, embedding_dim=4), learns=False),
}


def posterior_of(mean: Tensor, std: Tensor | float) -> DiagonalGaussian:
    deviations = torch.as_tensor(std).expand_as(mean)
    return DiagonalGaussian(mean, 2 * deviations.log())


def with_codewords(table: Tensor, **options: Any) -> CoherentVQ:
    """A quantizer with these codewords, whose averages stand at them with count and weight 1."""
    quantizer = CoherentVQ(num_embeddings=len(table), embedding_dim=table.shape[1], **options)
    quantizer.embedding.copy_(table)
    quantizer.weighted_sum.copy_(table)
    return quantizer


def test_an_update_by_hand() -> None:
    quantizer = with_codewords(torch.tensor([[0.0], [10.0]]), decay=0.75, revival_share=None)
    mean = torch.tensor([1.0, 4.0, 8.0]).view(1, 1, 3)
    std = torch.tensor([1.0, 0.5, 2.0]).view(1, 1, 3)
    output = quantizer(mean, posterior_of(mean, std))
    assert output.indices.flatten().tolist() == [0, 0, 1]
    assert output.codes.flatten().tolist() == [0.0, 0.0, 10.0]  # of the codebook before the update
    # W = 3/4 + 1/4 (1 + 4), 3/4 + 1/4 (1/4); S = 0 + 1/4 (1 + 16), 7.5 + 1/4 (8/4)
    torch.testing.assert_close(quantizer.weight.flatten(), torch.tensor([2.0, 0.8125]))
    torch.testing.assert_close(quantizer.weighted_sum.flatten(), torch.tensor([4.25, 8.0]))
    torch.testing.assert_close(quantizer.codebook().flatten(), torch.tensor([2.125, 8.0 / 0.8125]))
    assert quantizer.cluster_size.tolist() == [1.25, 1.0]


def test_the_confident_coordinate_decides() -> None:
    """(3, 0) is nearer, but the second coordinate is known ten times as well as the first."""
    quantizer = with_codewords(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), revival_share=None).eval()
    mean = torch.tensor([3.0, 1.0]).view(1, 2, 1)
    std = torch.tensor([1.0, 0.1]).view(1, 2, 1)
    # (0 / 1)^2 + (1 / 0.1)^2 = 100 against (3 / 1)^2 + 0 = 9
    assert quantizer(mean, posterior_of(mean, std)).indices.item() == 1
    quantizer.assignment = "euclidean"
    assert quantizer(mean, posterior_of(mean, std)).indices.item() == 0


@pytest.mark.parametrize("std", [1.0, 0.3])
@pytest.mark.parametrize("weighting", ["precision", "plain"])
def test_with_one_confidence_it_is_vq_ema_of_the_means(std: float, weighting: str) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 3, generator=generator)
    ours = with_codewords(table, decay=0.9, weighting=weighting, revival_share=None)
    if weighting == "precision":  # a start of the same weight
        ours.weight.fill_(std**-2)
        ours.weighted_sum.copy_(table * std**-2)
    theirs = VectorQuantizerEMA(num_embeddings=12, embedding_dim=3, decay=0.9, epsilon=1e-12)
    theirs.embedding.copy_(table)
    theirs.embedding_sum.copy_(table)
    for _ in range(8):
        mean = torch.randn(2, 3, 4, 5, generator=generator)
        posterior = posterior_of(mean, std)
        found, expected = ours(mean, posterior), theirs(mean)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.codes, expected.codes)
    torch.testing.assert_close(ours.codebook(), theirs.codebook(), rtol=1e-5, atol=1e-5)


def test_a_sample_is_quantized_and_its_mean_averaged() -> None:
    quantizer = with_codewords(torch.tensor([[0.0], [10.0]]), decay=0.0, revival_share=None)
    mean = torch.tensor([4.0, 9.0]).view(1, 1, 2)
    quantizer(torch.tensor([6.0, 9.0]).view(1, 1, 2), posterior_of(mean, 1.0))
    assert quantizer.cluster_size.tolist() == [0.0, 2.0]
    torch.testing.assert_close(quantizer.codebook().flatten(), torch.tensor([0.0, 6.5]))


def default_objective() -> TokenizerObjective:
    """That of the bundle, with its terms and weights; without the perceptual loss and the GAN."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "train.json"))
    parser["objective#terms#perceptual"] = None
    parser["objective#weights#perceptual"] = 0.0
    parser["objective#adversarial"] = None
    return parser.get_parsed_content("objective")


def test_under_a_linear_decoder_it_is_lloyds_step_of_the_reconstruction() -> None:
    """``x = A z``, an A a token, under the default's own objective: the curvature is known, and so is all else.

    Of n pixels a token the mean squared error has the curvature ``H = 2 A^T A / n``, and the objective's weight of the
    KL a token is beta, so that the best deviations are ``1 / std^2 = 1 + H / beta``, others for each token. Deviations,
    assignment, what RCS says and the codewords are worked out by numpy from A and the weights alone.
    """
    generator = np.random.default_rng(0)
    tokens, codewords, pixels, width = 40, 6, 16, 3
    objective = default_objective()
    assert set(objective.weights) == {"reconstruction", "kl", "rcs"}
    beta = objective.weights["kl"] / objective.weights["reconstruction"]
    # Orthogonal columns, so that the diagonal is the curvature, of 0.3 to 300 times beta.
    ratios = 0.3 * 1000 ** generator.random((tokens, width))
    columns = np.stack([np.linalg.qr(generator.normal(size=(pixels, width)))[0] for _ in range(tokens)])
    decoders = columns * np.sqrt(beta * pixels / 2 * ratios)[:, None]  # [T, n, D]
    curvatures = 2 * np.einsum("tni,tnj->tij", decoders, decoders) / pixels
    std = (1 + np.diagonal(curvatures, axis1=1, axis2=2) / beta) ** -0.5  # [T, D]

    means, table = generator.normal(size=(tokens, width)), generator.normal(size=(codewords, width))
    # What quantizing mean to codeword costs the reconstruction, and beta / 2 times the squared step.
    steps = means[:, None] - table[None]
    error = np.mean(np.einsum("tni,tki->tkn", decoders, steps) ** 2, axis=-1)
    cost = error + 0.5 * beta * np.sum(steps**2, axis=-1)  # [T, K]
    nearest = cost.argmin(axis=1)
    # The nearest by itself would often be another codeword.
    assert (nearest != np.sum(steps**2, axis=-1).argmin(axis=1)).sum() > 5

    quantizer = with_codewords(torch.tensor(table, dtype=torch.float32), decay=0.0, revival_share=None)
    # All 8 combinations of signs as noise, whose mean is 0 and whose covariance is the identity: no chance is left.
    noise = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=width)))[..., None]  # [8, D, 1]
    mean = torch.tensor(means.T[None], dtype=torch.float32).expand(8, width, tokens)
    logvar = torch.tensor(2 * np.log(std).T[None], dtype=torch.float32).expand(8, width, tokens).clone()
    logvar.requires_grad_()
    posterior = DiagonalGaussian(mean, logvar)
    output = quantizer(mean, posterior)
    assert output.indices[0].flatten().tolist() == nearest.tolist()

    def decoded(latent: Tensor) -> Tensor:
        """One channel of n rows, a column a token."""
        return torch.einsum("tni,bit->bnt", torch.tensor(decoders, dtype=torch.float32), latent)[:, None]

    of = TokenizerOutput(decoded(output.codes), decoded(mean + posterior.std * noise), mean, posterior, output)
    loss = objective.generator(decoded(mean), of)
    # The total is strictly convex in each log variance: where its gradient is 0 the deviations are the best.
    (gradient,) = torch.autograd.grad(loss.total, logvar)
    of_kl = objective.weights["kl"] * 0.5 * (1 - std.T**2) / tokens
    assert float(np.abs(gradient.sum(dim=0).numpy() / of_kl).max()) < 1e-3

    # RCS at its weight is what quantizing costs: the quantized path's error, and the squared step at beta / 2.
    chosen = error[np.arange(tokens), nearest]
    variances = np.mean(np.einsum("tni,ti->tni", decoders, std) ** 2, axis=1).sum(axis=1)
    assert loss.terms["reconstruction"].item() == pytest.approx(chosen.mean() + variances.mean(), rel=1e-4)
    weighed = objective.weights["rcs"] / objective.weights["reconstruction"] * loss.terms["rcs"].item()
    assert weighed == pytest.approx(cost.min(axis=1).mean(), rel=1e-4)
    for k in set(nearest):
        # The codeword of least cost to its tokens: sum (H + beta) (e - mean) = 0.
        metrics = curvatures[nearest == k] + beta * np.eye(width)
        best = np.linalg.solve(metrics.sum(axis=0), np.einsum("tij,tj->i", metrics, means[nearest == k]))
        np.testing.assert_allclose(quantizer.codebook()[k], best, rtol=1e-3, atol=1e-4)
        if (nearest == k).sum() > 2:
            assert np.abs(best - means[nearest == k].mean(axis=0)).max() > 0.02


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), codewords=st.integers(1, 9), tokens=st.integers(1, 30))
def test_no_update_raises_the_coherence_loss(seed: int, codewords: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    quantizer = with_codewords(torch.randn(codewords, 3, generator=generator), decay=0.0, revival_share=None)
    mean = torch.randn(1, 3, tokens, generator=generator)
    posterior = posterior_of(mean, torch.rand(1, 3, tokens, generator=generator) + 0.05)
    losses = []
    for _ in range(4):
        output = quantizer(mean, posterior)  # assigns, then moves the codewords
        losses.append(representation_coherence(output.codes, posterior.mean, posterior.std).item())
    assert all(after <= before * (1 + 1e-5) + 1e-6 for before, after in itertools.pairwise(losses))


def test_an_unused_codeword_stays_where_it_is_for_ever() -> None:
    quantizer = with_codewords(torch.tensor([[0.0], [50.0]]), decay=0.01, revival_share=None)
    mean = torch.zeros(1, 1, 4)
    for _ in range(40):  # 0.01^40 is nothing in fp32
        quantizer(mean, posterior_of(mean, 1.0))
    assert quantizer.weight[1].item() == 0.0
    assert quantizer.codebook()[1].item() == pytest.approx(50.0, rel=1e-6)


@pytest.mark.parametrize("copies", [1, 8])
def test_revival_goes_by_shares_of_the_mean_count(copies: int) -> None:
    """A batch of eight times as many tokens revives the same codewords, and gives them eight times the count."""
    torch.manual_seed(0)
    quantizer = with_codewords(torch.tensor([[0.0], [10.0], [99.0]]), decay=0.5, revival_share=0.5, revival_count=0.75)
    quantizer.cluster_size.fill_(copies)
    quantizer.weight.fill_(copies)
    quantizer.weighted_sum.mul_(copies)
    values = torch.tensor([1.0, -1.0, 2.0, 11.0, 12.0, 9.0])
    mean = values.repeat(copies).view(1, 1, -1)
    quantizer(mean, posterior_of(mean, 0.5))
    # Counts 1/2 + 3/2, 1/2 + 3/2 and 1/2, times the copies, of mean 1.5: the third is below half of it.
    assert quantizer.cluster_size.tolist() == pytest.approx([2 * copies, 2 * copies, 0.75 * 1.5 * copies])
    assert quantizer.codebook()[2].item() in values.tolist()
    # Precision 4 of each of its tokens.
    assert quantizer.weight[2].item() == pytest.approx(4 * 0.75 * 1.5 * copies)
    assert quantizer.weighted_sum[2].item() == pytest.approx((quantizer.weight[2] * quantizer.codebook()[2]).item())


def test_revival_brings_a_collapsed_codebook_into_use() -> None:
    used = {}
    for share in (None, 0.1):
        torch.manual_seed(0)
        quantizer = CoherentVQ(num_embeddings=64, embedding_dim=4, decay=0.9, revival_share=share)
        mean = 20 + torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(40):
            quantizer(mean, posterior_of(mean, 0.2))
        used[share] = len(quantizer.eval()(mean, posterior_of(mean, 0.2)).indices.unique())
    assert used[None] <= 6
    assert used[0.1] >= 60


def test_the_step_to_the_prior_is_the_shortest_way() -> None:
    """At share s the codebook's moments are those of McCann's interpolation: the distance falls to (1 - s)^2 of it."""
    generator = torch.Generator().manual_seed(0)
    table = 2 + torch.randn(40, 3, generator=generator) @ torch.tensor([[2.0, 0.3, 0], [0, 0.5, 0.1], [0, 0, 1.0]])
    whole = gaussian_wasserstein2_to_standard(table).item()
    for share in (0.25, 1.0):
        quantizer = with_codewords(table, decay=0.0, prior_step=share, revival_share=None)
        mean = table.T[None]
        quantizer(mean, posterior_of(mean, 1.0))  # each codeword is the mean of its one token
        left = gaussian_wasserstein2_to_standard(quantizer.codebook()).item()
        assert left == pytest.approx((1 - share) ** 2 * whole, abs=1e-4 * whole)
        torch.testing.assert_close(quantizer.weighted_sum, quantizer.codebook() * quantizer.weight)
    moments = torch.cov(quantizer.codebook().T)
    torch.testing.assert_close(moments, torch.eye(3), atol=1e-4, rtol=0)


def test_parts_of_a_batch_move_it_once() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(6, 3, 4, generator=generator), torch.rand(6, 3, 4, generator=generator) + 0.1
    states = []
    for parts in (1, 3):
        torch.manual_seed(0)
        quantizer = CoherentVQ(num_embeddings=16, embedding_dim=3, prior_step=0.1)
        with quantizer.one_update():
            for m, s in zip(mean.chunk(parts), std.chunk(parts), strict=True):
                quantizer(m, posterior_of(m, s))
        states.append(quantizer.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)


@pytest.mark.slow
def test_two_processes_keep_the_codebook_of_one(tmp_path: Path) -> None:
    first, second = run_in_two(ddp_codebook, tmp_path, "coherent")
    one = ddp_codebook.train(0, slice(None), ddp_codebook.coherent())
    for name in one:
        assert states_equal(first[name], second[name]), name
        for key, value in one[name].items():
            torch.testing.assert_close(first[name][key], value, msg=lambda text, n=name, k=key: f"{n} {k}: {text}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 1.0}, r"decay is 1.0; expected a number in \[0, 1\)"),
        ({"revival_share": 0.6}, "revival_share is 0.6 and revival_count 0.5"),
        ({"revival_share": 0.0}, "revival_share is 0.0"),
        ({"prior_step": 1.5}, "prior_step is 1.5"),
        ({"prior_step": 0.5, "num_embeddings": 1}, "prior_step is 0.5 with one codeword"),
        ({"weighting": "variance"}, "weighting"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        CoherentVQ(**{"num_embeddings": 4, "embedding_dim": 2, **options})


def test_without_a_posterior_it_says_so() -> None:
    z = torch.zeros(1, 2, 3)
    with pytest.raises(VaevqMedError, match="assignment 'posterior' needs the encoder's posterior"):
        CoherentVQ(num_embeddings=4, embedding_dim=2)(z)
    with pytest.raises(VaevqMedError, match="weighting 'precision' needs the encoder's posterior"):
        CoherentVQ(num_embeddings=4, embedding_dim=2, assignment="euclidean")(z)


@pytest.mark.slow
def test_the_bundle_trains_and_evaluates_it(toy_overrides: dict[str, Any]) -> None:
    parser = run_bundle("train.json", toy_overrides, "coherent", run_id="training")
    trainer = parser.get_parsed_content("train#trainer")
    quantizer = trainer.network.quantizer
    assert isinstance(quantizer, CoherentVQ)
    assert quantizer.cluster_size.sum().item() > 0
    assert not torch.equal(quantizer.weight, torch.ones_like(quantizer.weight))
    assert float(trainer.state.terms["rcs"]) > 0
    evaluation = run_bundle("evaluate.json", evaluation_overrides(toy_overrides), run_id="evaluating")
    assert evaluation.get_parsed_content("evaluator").state.metrics["utilization"] > 0
