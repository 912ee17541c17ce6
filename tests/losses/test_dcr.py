"""The forms of DCR: to the prior or the latents, through the codebook or the assignments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses import DCRLoss, gaussian_wasserstein2, gaussian_wasserstein2_to_standard
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import FSQ, FactorizedQuantizer, SoftVQ, VectorQuantizer, VectorQuantizerEMA
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.quantizers.coherent import CoherentVQ

IMAGE = torch.zeros(2, 1, 4, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_of(quantizer: Quantizer, mean: Tensor, *, variational: bool = True) -> TokenizerOutput:
    """What a tokenizer gives whose posterior has this mean; a sample of it is quantized."""
    posterior = DiagonalGaussian(mean, torch.full_like(mean, -2.0)) if variational else None
    latent = mean if posterior is None else posterior.sample(torch.Generator().manual_seed(9))
    return TokenizerOutput(IMAGE, None, latent, posterior, quantizer(latent, posterior))


def with_codewords(*codewords: float) -> VectorQuantizerEMA:
    quantizer = VectorQuantizerEMA(num_embeddings=len(codewords), embedding_dim=1, decay=0.5)
    quantizer.embedding.copy_(torch.tensor(codewords).unsqueeze(1))
    return quantizer


@pytest.mark.parametrize("variational", [True, False])
@pytest.mark.parametrize("detached", [True, False])
def test_the_latents_are_the_target(variational: bool, detached: bool) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_embeddings=12, embedding_dim=3, init="normal")
    mean = (2 * random(2, 3, 4, 5) + 1).requires_grad_()
    output = output_of(quantizer, mean, variational=variational)
    value = DCRLoss(target="features", detach_features=detached)(IMAGE, output)
    points = mean.detach().permute(0, 2, 3, 1).reshape(-1, 3).requires_grad_()
    expected = gaussian_wasserstein2(points, quantizer.embedding)
    assert torch.equal(value, expected)
    found = torch.autograd.grad(value, (quantizer.embedding, mean), allow_unused=True)
    reference = torch.autograd.grad(expected, (quantizer.embedding, points))
    torch.testing.assert_close(found[0], reference[0])
    if detached:
        assert found[1] is None
    else:
        assert found[1] is not None
        torch.testing.assert_close(found[1].permute(0, 2, 3, 1).reshape(-1, 3), reference[1])


@pytest.mark.parametrize("grid", [(20,), (4, 5), (2, 2, 5)])
def test_the_latents_may_lie_on_any_grid(grid: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_embeddings=12, embedding_dim=3, init="normal")
    mean = random(2, 3, 20)
    laid, flat = (output_of(quantizer, value) for value in (mean.unflatten(-1, grid), mean))
    for term in (DCRLoss(target="features"), DCRLoss(through="assignments")):
        assert torch.equal(term(IMAGE, laid), term(IMAGE, flat))


def test_latents_on_a_prior_make_it_dcr() -> None:
    """Corners of a cube, scaled to the covariance I: the distance to them is Eq. 11."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    corners = corners * math.sqrt(7 / 8)
    torch.manual_seed(0)
    output = output_of(VectorQuantizer(num_embeddings=12, embedding_dim=3, init="normal"), corners.T[None])
    torch.testing.assert_close(DCRLoss(target="features")(IMAGE, output), DCRLoss()(IMAGE, output))


def test_codebooks_of_channels_of_their_own_have_their_part_of_the_latents() -> None:
    torch.manual_seed(0)
    quantizer = FactorizedQuantizer(num_embeddings=8, embedding_dim=6, num_codebooks=2, normalize=False)
    mean = random(2, 6, 4, 5)
    output = output_of(quantizer, mean)
    codebook = output.quantizer.codebook
    assert codebook is not None
    points = mean.permute(0, 2, 3, 1).reshape(-1, 6)
    expected = gaussian_wasserstein2(points[:, :3], codebook[0]) + gaussian_wasserstein2(points[:, 3:], codebook[1])
    torch.testing.assert_close(DCRLoss(target="features")(IMAGE, output), expected)


def test_codebooks_of_positions_of_their_own_are_refused() -> None:
    output = output_of(SoftVQ(num_embeddings=8, embedding_dim=4), random(2, 4, 4, 4))
    with pytest.raises(VaevqMedError, match=r"codebook of shape \(4, 8, 4\); expected \[K, D\] or \[G, K, D / G\]"):
        DCRLoss(target="features")(IMAGE, output)
    with pytest.raises(VaevqMedError, match=r"through is 'assignments' with 1 indices .* expected one index, and"):
        DCRLoss(through="assignments")(IMAGE, output)


def test_a_codebook_of_averages_pulls_the_latents_and_needs_them() -> None:
    torch.manual_seed(0)
    mean = random(2, 3, 4, 5).requires_grad_()
    output = output_of(VectorQuantizerEMA(num_embeddings=12, embedding_dim=3), mean)
    (gradient,) = torch.autograd.grad(DCRLoss(target="features")(IMAGE, output), mean)
    assert bool(gradient.any())
    detached = DCRLoss(target="features", detach_features=True)
    with pytest.raises(
        VaevqMedError, match="Set objective#weights#dcr to 0, or objective#terms#dcr#detach_features to false"
    ):
        detached(IMAGE, output)
    with torch.no_grad():
        assert bool(detached(IMAGE, output).isfinite())


def test_three_tokens_by_hand() -> None:
    """Codewords 1, 3 and 5; tokens 0 and 2 at the first, 7 at the last."""
    mean = torch.tensor([0.0, 1.9, 7.0]).view(1, 1, 3).requires_grad_()
    quantizer = with_codewords(1.0, 3.0, 5.0).eval()
    output = output_of(quantizer, mean, variational=False)
    assert output.quantizer.indices.flatten().tolist() == [0, 0, 2]
    value = DCRLoss(through="assignments")(IMAGE, output)
    # m = 3 and s = 2: 9 + (2 - 1)^2
    assert value.item() == pytest.approx(10.0)
    # dW/de_k = 2 m / K + 2 (1 - 1 / s) (e_k - m) / (K - 1) = 2 + (e_k - 3) / 2, and K / N = 1.
    (gradient,) = torch.autograd.grad(value, mean)
    assert gradient.flatten().tolist() == pytest.approx([1.0, 1.0, 3.0])


def test_a_step_of_the_tokens_is_a_step_of_their_average() -> None:
    """Plain averages at g = 0 go after the tokens' step to where a step of ``K / N`` times the rate takes them."""
    rate = 0.1
    mean = torch.tensor([0.0, 2.0, 7.0]).view(1, 1, 3)
    codewords = torch.tensor([[1.0], [7.0]])  # the averages of what they are assigned
    quantizer = CoherentVQ(num_embeddings=2, embedding_dim=1, decay=0.0, revival_share=None, weighting="plain").eval()
    quantizer.embedding.copy_(codewords)
    leaf = mean.clone().requires_grad_()
    output = output_of(quantizer, leaf)
    assert output.quantizer.indices.flatten().tolist() == [0, 0, 1]
    (to_tokens,) = torch.autograd.grad(DCRLoss(through="assignments")(IMAGE, output), leaf)
    moved = mean - rate * to_tokens
    quantizer.update(moved.view(3, 1), torch.ones(3, 1), output.quantizer.indices.flatten())
    # By hand: m = 4, s = sqrt(18); dW/de_k = 2 m / 2 + 2 (1 - 1 / s) (e_k - 4) / 1 = 4 -+ 6 (1 - 1 / sqrt(18))
    by_hand = [4 - 6 * (1 - 18**-0.5), 4 + 6 * (1 - 18**-0.5)]
    leaf = codewords.clone().requires_grad_()
    (to_codewords,) = torch.autograd.grad(gaussian_wasserstein2_to_standard(leaf), leaf)
    assert to_codewords.flatten().tolist() == pytest.approx(by_hand)
    torch.testing.assert_close(quantizer.codebook(), codewords - rate * 2 / 3 * to_codewords)


def test_through_the_assignments_does_not_depend_on_the_parts_of_a_batch() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizerEMA(num_embeddings=8, embedding_dim=3).eval()
    gradients = []
    for parts in (1, 4):
        mean = random(4, 3, 2, 5).requires_grad_()
        for part in mean.chunk(parts):
            (DCRLoss(through="assignments")(IMAGE, output_of(quantizer, part, variational=False)) / parts).backward()
        gradients.append(mean.grad)
    torch.testing.assert_close(*gradients)


def test_through_the_assignments_a_codebook_gets_nothing_and_the_value_is_dcr() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_embeddings=8, embedding_dim=3, init="normal")
    mean = random(2, 3, 4, 5).requires_grad_()
    output = output_of(quantizer, mean)
    plain, term = DCRLoss(), DCRLoss(through="assignments")
    value = term(IMAGE, output)
    assert torch.equal(value, plain(IMAGE, output))
    to_mean, to_codebook = torch.autograd.grad(value, (mean, quantizer.embedding), allow_unused=True)
    assert bool(to_mean.any())
    assert to_codebook is None
    with torch.no_grad():
        assert torch.equal(term(IMAGE, output), value)


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizerEMA(num_embeddings=8, embedding_dim=3).eval()
    for term in (DCRLoss(target="features"), DCRLoss(through="assignments")):
        found = []
        for enabled in (True, False):
            mean = random(2, 3, 4, 5).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = term(IMAGE, output_of(quantizer, mean))
            found.append((value, torch.autograd.grad(value, mean)[0]))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "data"}, "target is 'data'; expected one of prior, features"),
        ({"through": "tokens"}, "through is 'tokens'; expected one of codebook, assignments"),
        ({"target": "features", "through": "assignments"}, "target is 'features' with through 'assignments'"),
        ({"detach_features": True}, "detach_features is True with target 'prior'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said) as refused:
        DCRLoss(**options)
    assert "\n" not in str(refused.value)


def test_what_has_no_moments_or_no_codebook_is_refused() -> None:
    one = output_of(VectorQuantizer(num_embeddings=8, embedding_dim=3), random(1, 3, 1, 1))
    with pytest.raises(VaevqMedError, match=r"the points have shape \(1, 3\); .* N of 2 or more"):
        DCRLoss(target="features")(IMAGE, one)
    grouped = output_of(FactorizedQuantizer(num_embeddings=8, embedding_dim=6, num_codebooks=2), random(1, 6, 2, 2))
    with pytest.raises(VaevqMedError, match="with 2 indices a position"):
        DCRLoss(through="assignments")(IMAGE, grouped)
    none = output_of(FSQ(levels=[5, 5]), random(1, 2, 2, 2))
    for term in (DCRLoss(target="features"), DCRLoss(through="assignments")):
        with pytest.raises(VaevqMedError, match="DCRLoss needs an explicit codebook"):
            term(IMAGE, none)
