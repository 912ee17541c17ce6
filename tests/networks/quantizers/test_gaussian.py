"""Gaussian Quant: by hand, its guarantee, refusals, losses of the continuous path alone, and the bundle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.bundles import evaluation_overrides, run_bundle
from scipy.stats import kstest, norm
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.adversarial import AdversarialTerm
from vaevq_med.losses.objective import TokenizerObjective
from vaevq_med.losses.perceptual import PerceptualLoss
from vaevq_med.losses.reconstruction import ReconstructionLoss
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import GaussianQuantizer


def with_codewords(*codewords: list[float], groups: int = 1, assignment: str = "posterior") -> GaussianQuantizer:
    """A quantizer whose draws are given."""
    width = len(codewords[0])
    quantizer = GaussianQuantizer(
        num_embeddings=len(codewords), embedding_dim=width * groups, dims_per_codebook=width, assignment=assignment
    )
    quantizer.embedding.copy_(torch.tensor(codewords))
    return quantizer


def posterior(means: list[float], deviations: list[float]) -> DiagonalGaussian:
    """At one position."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (means, deviations))
    return DiagonalGaussian(mean, 2 * std.log())


def test_by_hand() -> None:
    # From (0, 0), in units of (0.1, 1): (1, 0) is 10 away and (0, 2) 2; in units of (1, 0.1) they are 1 and 20 away.
    codewords = [[1.0, 0.0], [0.0, 2.0]]
    latent = posterior([0.0] * 4, [0.1, 1.0, 1.0, 0.1])
    output = with_codewords(*codewords, groups=2)(latent.mean, latent)
    assert output.indices.tolist() == [[[[1, 0]]]]
    assert output.codes.flatten().tolist() == [0.0, 2.0, 1.0, 0.0]
    assert output.codebook is not None
    assert output.codebook.tolist() == [codewords, codewords]
    assert output.losses == {}
    plain = with_codewords(*codewords, groups=2, assignment="euclidean")(latent.mean)
    assert plain.indices.tolist() == [[[[0, 0]]]]


def test_each_channel_by_itself() -> None:
    quantizer = with_codewords([-1.0], [0.0], [2.0], groups=3)
    mean = torch.tensor([0.9, -0.6, 1.1]).view(1, 3, 1, 1)
    # With one channel an index the deviation scales every distance alike.
    for deviation in (0.01, 1.0):
        output = quantizer(mean, DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(deviation))))
        assert output.indices.flatten().tolist() == [1, 0, 2]
    assert quantizer.bits_per_position == pytest.approx(3 * math.log2(3))


def test_groups_are_consecutive_channels_at_every_position() -> None:
    quantizer = GaussianQuantizer(num_embeddings=50, embedding_dim=6, dims_per_codebook=2)
    mean = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    latent = DiagonalGaussian(mean, torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)))
    indices = quantizer(mean, latent).indices
    for b, i, j, g in ((0, 0, 0, 0), (1, 2, 3, 2), (0, 1, 2, 1)):
        part = slice(2 * g, 2 * g + 2)
        distances = ((quantizer.embedding - mean[b, part, i, j]) / latent.std[b, part, i, j]).square().sum(dim=1)
        assert indices[b, i, j, g] == distances.argmin()


def test_the_draws_are_standard_normal_and_repeatable() -> None:
    first = GaussianQuantizer(num_embeddings=4000, embedding_dim=4, dims_per_codebook=4)
    assert kstest(first.embedding.flatten().numpy(), norm.cdf).pvalue > 0.01
    assert torch.equal(
        first.embedding, GaussianQuantizer(num_embeddings=4000, embedding_dim=4, dims_per_codebook=4).embedding
    )
    other = GaussianQuantizer(num_embeddings=4000, embedding_dim=4, dims_per_codebook=4, seed=1)
    assert not torch.equal(first.embedding, other.embedding)
    assert not list(first.parameters())


def test_codewords_stand_in_for_samples_once_log_k_exceeds_the_divergence() -> None:
    """Theorem of the paper, scalar: the share of codewords farther than std falls fast with log K."""
    torch.manual_seed(0)
    std = 0.01
    mean = math.sqrt(1 - std**2) * torch.randn(4, 1, 32, 32)
    latent = DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(std)))
    divergence = float(latent.kl().mean())
    far = []
    for excess in (-3, 0, 2):
        quantizer = GaussianQuantizer(num_embeddings=round(math.exp(divergence + excess)), embedding_dim=1)
        far.append(float(((quantizer(mean, latent).codes - mean).abs() > std).float().mean()))
    assert far[0] > 0.8
    assert far[0] > far[1] > far[2]
    assert far[2] < 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_embeddings": 0, "embedding_dim": 4}, "num_embeddings is 0"),
        ({"num_embeddings": 8, "embedding_dim": 4, "dims_per_codebook": 3}, "a multiple of dims_per_codebook"),
        ({"num_embeddings": 8, "embedding_dim": 4, "assignment": "cosine"}, "assignment is 'cosine'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        GaussianQuantizer(**options)


def test_a_latent_without_a_posterior_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="needs the encoder's posterior; found none"):
        GaussianQuantizer(num_embeddings=8, embedding_dim=2)(torch.zeros(1, 2, 1, 1))


def two_paths(quantized: float, continuous: float | None) -> TokenizerOutput:
    """Constant reconstructions, ``[1, 1, 32, 32]``, that take gradients."""
    image = torch.full((1, 1, 32, 32), quantized, requires_grad=True)
    other = None if continuous is None else torch.full((1, 1, 32, 32), continuous, requires_grad=True)
    z = torch.zeros(1, 1, 1, 1)
    return TokenizerOutput(image, other, z, None, QuantizerOutput(z, z, torch.zeros(1, 1, 1, 1, dtype=torch.int64)))


class Scale(nn.Module):
    """A discriminator whose logits are twice the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_the_losses_of_the_continuous_path_alone() -> None:
    target, output = torch.zeros(1, 1, 32, 32), two_paths(0.5, -0.3)
    assert ReconstructionLoss(paths="continuous")(target, output).item() == pytest.approx(0.09)
    assert ReconstructionLoss(paths="continuous", path_reduction="mean")(target, output).item() == pytest.approx(0.09)
    term = AdversarialTerm(paths="continuous")
    assert term.generator(output, Scale()).item() == pytest.approx(0.6)
    # Hinge: real logits 0, fake logits -0.6.
    assert term.discriminator(target, output, Scale())["loss"].item() == pytest.approx(0.5 * (1 + 0.4))
    perceptual = PerceptualLoss(paths="continuous")
    expected = perceptual.distance(target, torch.full_like(target, -0.3)).mean()
    torch.testing.assert_close(perceptual(target, output), expected)
    objective = TokenizerObjective(
        terms={"reconstruction": ReconstructionLoss(paths="continuous"), "perceptual": perceptual},
        weights={"reconstruction": 1.0, "perceptual": 1.0},
        adversarial=AdversarialTerm(paths="continuous", adaptive=False),
    )
    total = objective.generator(target, output, discriminator=Scale()).total
    of_quantized, of_continuous = torch.autograd.grad(
        total, [output.reconstruction, output.reconstruction_continuous], allow_unused=True
    )
    assert of_quantized is None
    assert float(of_continuous.abs().sum()) > 0


def test_a_continuous_path_that_is_not_there_is_refused() -> None:
    target, output = torch.zeros(1, 1, 32, 32), two_paths(0.5, None)
    for loss in (ReconstructionLoss(paths="continuous"), PerceptualLoss(paths="continuous")):
        with pytest.raises(VaevqMedError, match="variational false, expected true"):
            loss(target, output)
    with pytest.raises(VaevqMedError, match="variational false, expected true"):
        AdversarialTerm(paths="continuous").generator(output, Scale())
    with pytest.raises(VaevqMedError, match="paths is 'quantized'; expected one of both, continuous"):
        ReconstructionLoss(paths="quantized")


def test_the_overlay_trains_and_evaluates(toy_overrides: dict[str, Any]) -> None:
    overrides = {**toy_overrides, "num_embeddings": 64, "max_epochs": 1, "val_max_items": 4}
    parser = run_bundle("train.json", overrides, "gq", run_id="training")
    terms = parser.get_parsed_content("train#trainer").state.terms
    assert {"reconstruction", "perceptual", "kl", "kl_factor", "adversarial"} < set(terms)
    assert set(terms) & {"rcs", "dcr", "codebook", "commitment"} == set()
    # Four steps from 1, toward a divergence of log 64 nats.
    assert terms["kl_factor"] != 1
    quantizer = parser.get_parsed_content("network").quantizer
    assert (quantizer.num_codebooks, quantizer.bits_per_position) == (1, 6)
    evaluated = run_bundle("evaluate.json", evaluation_overrides(overrides), run_id="evaluating")
    again = evaluated.get_parsed_content("network").quantizer
    assert isinstance(again, GaussianQuantizer)
    assert torch.equal(again.embedding, quantizer.embedding)
