"""Loss terms against scipy, torch.distributions and values worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.adversarial import AdversarialTerm, adaptive_weight, discriminator_loss, generator_loss
from vaevq_med.losses.base import LossTerm
from vaevq_med.losses.dcr import DCRLoss, gaussian_wasserstein2_to_standard
from vaevq_med.losses.kl import KLLoss, content_mask, kl_per_token, kl_to_standard_normal
from vaevq_med.losses.objective import TokenizerObjective
from vaevq_med.losses.quantizer import QuantizerLoss
from vaevq_med.losses.rcs import RCSLoss, representation_coherence
from vaevq_med.losses.reconstruction import ReconstructionLoss
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_output(
    *, variational: bool = True, codebook: bool = True, mean: Tensor | None = None, logvar: Tensor | None = None
) -> TokenizerOutput:
    """An output with two paths whose errors against a zero target are 0.04 and 0.09."""
    mean = random(2, 3, 2, 2) if mean is None else mean
    logvar = torch.zeros_like(mean) if logvar is None else logvar
    codes = mean + 0.5
    quantizer = QuantizerOutput(
        quantized=codes,
        codes=codes,
        indices=torch.zeros(2, 2, 2, 1, dtype=torch.int64),
        losses={"codebook": torch.tensor(3.0), "commitment": torch.tensor(5.0)},
        codebook=random(20, 3, seed=1) if codebook else None,
    )
    image = torch.full((2, 1, 4, 4), 0.2, requires_grad=True)
    continuous = torch.full((2, 1, 4, 4), -0.3) if variational else None
    posterior = DiagonalGaussian(mean, logvar) if variational else None
    return TokenizerOutput(image, continuous, mean, posterior, quantizer)


ZERO = torch.zeros(2, 1, 4, 4)


def test_kl_equals_torch_distributions() -> None:
    mean, logvar = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1)
    reference = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert kl_to_standard_normal(mean, logvar).item() == pytest.approx(reference.item(), rel=1e-5)


def test_kl_has_the_derivative_of_its_formula() -> None:
    mean, logvar = random(1, 2, 2, 2, dtype=torch.float64), random(1, 2, 2, 2, seed=1, dtype=torch.float64)
    mean.requires_grad_(), logvar.requires_grad_()
    gradients = torch.autograd.grad(kl_to_standard_normal(mean, logvar), (mean, logvar))
    torch.testing.assert_close(gradients[0], mean / 4, check_dtype=False, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients[1], 0.5 * (logvar.exp() - 1) / 4, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_rcs_by_hand() -> None:
    codes = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    mean = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1)
    std = torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    # 0.5 ((1 / 0.5)^2 + (-2 / 2)^2)
    assert representation_coherence(codes, mean, std).item() == pytest.approx(2.5)
    assert representation_coherence(codes, mean, std, reduction="mean_d").item() == pytest.approx(1.25)
    assert representation_coherence(codes, mean, std, min_std=1.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("detached", [True, False])
def test_rcs_gradients(detached: bool) -> None:
    codes, mean = random(1, 3, 2, 2).requires_grad_(), random(1, 3, 2, 2, seed=1).requires_grad_()
    std = (random(1, 3, 2, 2, seed=2).abs() + 0.5).requires_grad_()
    value = representation_coherence(codes, mean, std, detach_std=detached)
    to_codes, to_mean, to_std = torch.autograd.grad(value, (codes, mean, std), allow_unused=True)
    expected = (codes - mean) / std.square() / 4
    torch.testing.assert_close(to_codes, expected.detach())
    torch.testing.assert_close(to_mean, -expected.detach())
    assert (to_std is None) == detached
    if not detached:
        torch.testing.assert_close(to_std, (-(codes - mean).square() / std**3 / 4).detach())


def test_rcs_term_passes_its_options_on() -> None:
    # Codes stand 0.5 from the mean in each of 3 channels.
    output = make_output(logvar=torch.full((2, 3, 2, 2), 2 * math.log(0.25)))
    assert RCSLoss()(ZERO, output).item() == pytest.approx(0.5 * 3 * 4, rel=1e-5)
    assert RCSLoss(reduction="mean_d", scale=0.1)(ZERO, output).item() == pytest.approx(0.5 * 4 * 0.1, rel=1e-5)
    assert RCSLoss(min_std=0.5)(ZERO, output).item() == pytest.approx(0.5 * 3, rel=1e-5)
    with pytest.raises(VaevqMedError, match="expected one of sum_d, mean_d"):
        RCSLoss(reduction="sum")


@pytest.mark.parametrize("shape", [(50, 3), (1000, 16), (4, 8)])
def test_dcr_equals_the_formula_with_scipy(shape: tuple[int, int]) -> None:
    codebook = 0.7 * random(*shape, dtype=torch.float64) + 0.3
    array = codebook.numpy()
    covariance = np.atleast_2d(np.cov(array.T))
    reference = np.sum(array.mean(0) ** 2) + np.trace(covariance) - 2 * np.trace(sqrtm(covariance).real) + shape[1]
    assert gaussian_wasserstein2_to_standard(codebook).item() == pytest.approx(float(reference), abs=1e-5)


def test_dcr_of_several_codebooks_is_the_sum_of_theirs() -> None:
    codebooks = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0)).double()
    alone = sum(gaussian_wasserstein2_to_standard(codebook) for codebook in codebooks)
    torch.testing.assert_close(gaussian_wasserstein2_to_standard(codebooks), alone)


def test_dcr_is_least_at_the_prior_and_differentiable_there() -> None:
    # Corners of a cube, scaled so that the unbiased covariance is exactly the identity: eigenvalues coincide.
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    codebook = (corners * math.sqrt(7 / 8)).requires_grad_()
    value = gaussian_wasserstein2_to_standard(codebook)
    (gradient,) = torch.autograd.grad(value, codebook)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) < 1e-3


def test_dcr_refuses_what_has_no_covariance() -> None:
    for shape in ((1, 3), (5,)):
        with pytest.raises(VaevqMedError, match="K of 2 or more"):
            gaussian_wasserstein2_to_standard(torch.zeros(shape))


def test_dcr_falls_to_the_prior_under_gradient_descent() -> None:
    codebook = (0.1 * random(64, 4) + 2).requires_grad_()
    optimizer = torch.optim.SGD([codebook], lr=6.0)
    for _ in range(100):
        optimizer.zero_grad()
        gaussian_wasserstein2_to_standard(codebook).backward()
        optimizer.step()
    final = codebook.detach().numpy()
    np.testing.assert_allclose(final.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(final.T), np.eye(4), atol=0.05)


def test_dcr_gradcheck() -> None:
    codebook = random(12, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_wasserstein2_to_standard, (codebook,))


def by_singular_values(codebook: Tensor) -> tuple[float, Tensor]:
    """The distance and its gradient from a singular value decomposition; directions of no extent have no gradient."""
    mean = codebook.mean(0)
    count, width = codebook.shape
    left, values, right = np.linalg.svd((codebook - mean).numpy() / math.sqrt(count - 1), full_matrices=False)
    kept = values > 1e-9 * values.max()
    full = np.concatenate([values * kept, np.zeros(width - len(values))])
    gradient = 2 / math.sqrt(count - 1) * ((left * kept * (values - 1)) @ right)
    return float(mean.square().sum()) + float(np.sum((full - 1) ** 2)), torch.from_numpy(gradient) + 2 * mean / count


def ill_conditioned(count: int, width: int, least: float) -> Tensor:
    """Deviations from ``least`` to 1 along axes that are none of the coordinates'."""
    spread = torch.logspace(math.log10(least), 0, width, dtype=torch.float64)
    return random(count, width, dtype=torch.float64) * spread @ torch.linalg.qr(random(width, width).double())[0]


@pytest.mark.parametrize(
    ("codebook", "rtol"),
    [
        (random(500, 64, dtype=torch.float64), 1e-11),
        (1e-5 * random(500, 64, dtype=torch.float64), 1e-11),
        (1e3 * random(500, 64, dtype=torch.float64), 1e-11),
        (random(300, 1, dtype=torch.float64) + 2, 1e-11),
        (ill_conditioned(500, 32, 1e-3), 1e-10),
        (ill_conditioned(500, 32, 1e-5), 1e-8),
        (random(20, 64, dtype=torch.float64), 1e-11),
        (random(100, 8, dtype=torch.float64) @ random(8, 32, dtype=torch.float64), 1e-7),
        (random(100, 32, dtype=torch.float64) * (torch.arange(32) % 2), 1e-11),
        (random(100, 1, dtype=torch.float64) @ random(1, 16, dtype=torch.float64), 1e-7),
    ],
    ids=["prior", "tiny", "large", "one", "1e-3", "1e-5", "few", "rank", "zeros", "line"],
)
def test_dcr_and_its_gradient_equal_those_by_singular_values(codebook: Tensor, rtol: float) -> None:
    expected, expected_gradient = by_singular_values(codebook)
    codebook = codebook.clone().requires_grad_()
    value = gaussian_wasserstein2_to_standard(codebook)
    (gradient,) = torch.autograd.grad(value, codebook)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=rtol * float(expected_gradient.abs().max()))


def test_dcr_of_one_point_leaves_its_shape_alone() -> None:
    codebook = torch.full((200, 8), 0.3, requires_grad=True)
    value = gaussian_wasserstein2_to_standard(codebook)
    (gradient,) = torch.autograd.grad(value, codebook)
    assert value.item() == pytest.approx(8 * 0.3**2 + 8)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2 * 0.3 / 200))


def test_dcr_has_no_step_that_a_device_would_be_waited_for() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        for shape in ((64, 8), (3, 64, 8), (4, 8)):
            assert gaussian_wasserstein2_to_standard(torch.zeros(shape)).device.type == "cuda"
    with torch.profiler.profile() as profile:
        codebook = random(64, 8).requires_grad_()
        gaussian_wasserstein2_to_standard(codebook).backward()
    # A decomposition's error code, or a number that Python asks for, makes the host wait.
    names = {event.key for event in profile.key_averages()}
    assert "aten::mm" in names
    assert not {name for name in names if "linalg_eig" in name or "linalg_svd" in name or "local_scalar" in name}


@pytest.mark.parametrize("shape", [(3, 6, 2), (4, 6)], ids=["several", "few"])
def test_dcr_gradcheck_of_several_codebooks_and_of_few_codewords(shape: tuple[int, ...]) -> None:
    codebook = random(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_wasserstein2_to_standard, (codebook,))


def test_dcr_under_autocast_is_that_without() -> None:
    codebook = random(64, 16)
    plain = gaussian_wasserstein2_to_standard(codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_wasserstein2_to_standard(codebook), plain)


def test_terms_say_what_is_missing() -> None:
    with pytest.raises(VaevqMedError, match="Remove 'dcr'"):
        DCRLoss()(ZERO, make_output(codebook=False))
    for term in (KLLoss(), RCSLoss()):
        with pytest.raises(VaevqMedError, match="needs a posterior"):
            term(ZERO, make_output(variational=False))
    with pytest.raises(VaevqMedError, match="l3"):
        ReconstructionLoss(kind="l3")


@pytest.mark.parametrize(
    ("kind", "paths", "expected"),
    [
        ("l2", "sum", 0.13),
        ("l2", "mean", 0.065),
        ("l1", "sum", 0.5),
        ("calibrated", "sum", 0.5 * (math.log(0.04) + math.log(0.09))),
    ],
)
def test_reconstruction_by_hand(kind: str, paths: str, expected: float) -> None:
    value = ReconstructionLoss(kind=kind, path_reduction=paths)(ZERO, make_output())
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_reconstruction_summed_over_an_image() -> None:
    assert ReconstructionLoss(reduction="sum")(ZERO, make_output()).item() == pytest.approx(0.13 * 16, rel=1e-5)


def test_calibrated_gradient_is_that_of_half_log_mse() -> None:
    image = random(2, 1, 4, 4).requires_grad_()
    output = make_output(variational=False)
    output = TokenizerOutput(image, None, output.latent, None, output.quantizer)
    (gradient,) = torch.autograd.grad(ReconstructionLoss(kind="calibrated")(ZERO, output), image)
    (reference,) = torch.autograd.grad(0.5 * image.square().mean().log(), image)
    torch.testing.assert_close(gradient, reference)


def test_kl_budget_raises_the_factor_above_the_target_and_lowers_it_below() -> None:
    images = random(2, 1, 4, 4)
    target = 1.0 * math.log(8)
    for mean, up in ((torch.full((2, 3, 2, 2), 10.0), True), (torch.zeros(2, 3, 2, 2), False)):
        term = KLLoss(budget=1.0, num_embeddings=8, rate=0.1).train()
        output = make_output(mean=mean)
        before = float(term.factor)
        value = term(images, output)
        assert (float(term.factor) > before) is up
        kl = float(kl_to_standard_normal(mean, torch.zeros_like(mean)))
        assert float(term.factor) == pytest.approx(
            min(1.1, max(0.9, (max(kl, 1e-6 * target) / target) ** 0.1)), rel=1e-4
        )
        assert value.item() == pytest.approx(float(term.factor) * kl, rel=1e-5, abs=1e-9)
        held = float(term.factor)
        term.eval()(images, output)
        assert float(term.factor) == held


@pytest.mark.parametrize("grid", [(12,), (2, 3, 2)])
def test_terms_do_not_depend_on_how_positions_are_laid_out(grid: tuple[int, ...]) -> None:
    mean, logvar, codes = random(3, 2, 4, 12).unbind()
    laid = kl_per_token(mean.unflatten(-1, grid), logvar.unflatten(-1, grid))
    assert laid.shape == (2, *grid)
    torch.testing.assert_close(laid.flatten(1), kl_per_token(mean, logvar))
    std = (0.5 * logvar).exp()
    laid = representation_coherence(*(value.unflatten(-1, grid) for value in (codes, mean, std)))
    torch.testing.assert_close(laid, representation_coherence(codes, mean, std))


def test_kl_scale_without_a_budget() -> None:
    term = KLLoss(scale=0.25)
    # 3 channels of mean 2: 0.5 * 3 * 4 = 6 nats a token.
    assert term(ZERO, make_output(mean=torch.full((2, 3, 2, 2), 2.0))).item() == pytest.approx(1.5)
    assert float(term.factor) == 1.0


def test_kl_budget_stays_where_no_token_has_content() -> None:
    term = KLLoss(budget=1.0, num_embeddings=8)
    term(ZERO, make_output(mean=torch.full((2, 3, 2, 2), 9.0)))
    assert float(term.factor) == 1.0


@pytest.mark.parametrize("options", [{"budget": 1.0}, {"budget": 0.0, "num_embeddings": 8}, {"tokens": "some"}])
def test_kl_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(VaevqMedError, match="expected"):
        KLLoss(**options)


def test_content_mask_sees_any_channel() -> None:
    images = torch.zeros(2, 3, 4, 6)
    images[0, 2, 3, 5] = 1.0
    images[1] = 0.7
    assert content_mask(images, (2, 3)).nonzero().tolist() == [[0, 1, 2]]


def test_content_of_signals_and_volumes() -> None:
    volume = torch.zeros(1, 1, 2, 4, 6)
    volume[0, 0, 1, 3, 5] = 1.0
    assert content_mask(volume, (1, 2, 3)).nonzero().tolist() == [[0, 0, 1, 2]]
    assert content_mask(volume[:, 0, 0, 0].unsqueeze(1) + volume[:, 0, 1, 3].unsqueeze(1), (3,)).tolist() == [
        [False, False, True]
    ]


def test_tokens_without_a_patch_of_their_own_have_no_content() -> None:
    term = KLLoss(budget=1.0, num_embeddings=8)
    with pytest.raises(VaevqMedError, match=r"grid \[4\] of images \[4, 4\]; .* tokens 'all'"):
        term(torch.zeros(1, 1, 4, 4), make_output(mean=torch.zeros(1, 3, 4)))


def test_kl_budget_counts_content_only() -> None:
    images = torch.full((1, 1, 4, 4), -1.0)
    images[:, :, :2, :2] = random(1, 1, 2, 2)
    assert content_mask(images, (2, 2)).tolist() == [[[True, False], [False, False]]]
    mean = torch.zeros(1, 3, 2, 2)
    mean[..., 0, 0] = 10.0
    factors = {}
    for tokens in ("content", "all"):
        term = KLLoss(budget=1.0, num_embeddings=2**20, tokens=tokens, rate=0.01)
        term(images, make_output(mean=mean))
        factors[tokens] = float(term.factor)
    # 150 nats at the one content token, 37.5 on average; the target is 13.9.
    assert factors["content"] == pytest.approx((150 / (20 * math.log(2))) ** 0.01)
    assert factors["all"] == pytest.approx((37.5 / (20 * math.log(2))) ** 0.01)


def test_gan_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    softplus = [math.log1p(math.exp(v)) for v in (-2.0, -0.5, -3.0, 0.0)]
    expected = 0.5 * (np.mean(softplus[:2]) + np.mean(softplus[2:]))
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(float(expected), rel=1e-6)
    logits = torch.tensor([[4.0, 2.0], [-1.0, 1.0]]).view(2, 1, 1, 2)
    assert generator_loss(logits).item() == -1.5
    per_image = np.mean([math.log1p(math.exp(-3.0)), math.log(2)])
    assert generator_loss(logits, "non_saturating", per_image=True).item() == pytest.approx(float(per_image), rel=1e-6)


def test_adaptive_weight_by_hand() -> None:
    weight = adaptive_weight(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 0.5]))
    assert weight.item() == pytest.approx(math.sqrt(18) / (0.5 + 1e-4))


def test_adaptive_weight_is_bounded() -> None:
    large, none = torch.tensor([1e3]), torch.tensor([0.0])
    assert adaptive_weight(large, none).item() == 1e4
    assert adaptive_weight(large, none, maximum=7.0).item() == 7.0


def test_adversarial_refuses_options() -> None:
    with pytest.raises(VaevqMedError, match="expected one of hinge, non_saturating"):
        AdversarialTerm(generator_loss="wasserstein")
    with pytest.raises(VaevqMedError, match="paths is 'all'"):
        AdversarialTerm(paths="all")
    with pytest.raises(VaevqMedError, match="start_step is -1"):
        AdversarialTerm(start_step=-1)


class Linear(nn.Module):
    """A discriminator whose logits are the image times a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize(("paths", "expected"), [("quantized", -0.4), ("both", 0.1), ("mean_logits", 0.1)])
def test_adversarial_paths(paths: str, expected: float) -> None:
    term = AdversarialTerm(paths=paths)
    assert term.generator(make_output(), Linear()).item() == pytest.approx(expected, rel=1e-5)


def test_mean_logits_averages_before_the_loss() -> None:
    # Logits 0.4 and -0.6, whose mean is -0.1.
    expected = {
        "both": 0.5 * (math.log1p(math.exp(-0.4)) + math.log1p(math.exp(0.6))),
        "mean_logits": math.log1p(math.exp(0.1)),
    }
    for paths, value in expected.items():
        term = AdversarialTerm(paths=paths, generator_loss="non_saturating")
        assert term.generator(make_output(), Linear()).item() == pytest.approx(value, rel=1e-5)


def test_objective_sums_weighted_terms_and_leaves_out_zeros() -> None:
    terms = {"reconstruction": ReconstructionLoss(), "codebook": QuantizerLoss(name="codebook"), "kl": KLLoss()}
    objective = TokenizerObjective(terms=terms, weights={"reconstruction": 2.0, "codebook": 0.5, "kl": 0.0})
    # With kl left out, a tokenizer without a posterior is fine.
    loss = objective.generator(ZERO, make_output(variational=False))
    assert loss.total.item() == pytest.approx(2 * 0.04 + 0.5 * 3)
    assert set(loss.terms) == {"reconstruction", "codebook"}
    assert loss.terms["codebook"].item() == 3.0


def test_objective_names_the_nearest_weight() -> None:
    with pytest.raises(VaevqMedError, match="did you mean 'rcs'"):
        TokenizerObjective(terms={"rcs": RCSLoss(), "kl": KLLoss()}, weights={"rsc": 1, "kl": 1})
    with pytest.raises(VaevqMedError, match=r"objective.adversarial is 1.0; expected"):
        TokenizerObjective(terms={"kl": KLLoss()}, weights={"kl": 1}, adversarial=1.0)  # type: ignore[arg-type]
    with pytest.raises(VaevqMedError, match="no kl"):
        TokenizerObjective(terms={"rcs": RCSLoss(), "kl": KLLoss()}, weights={"rcs": 1})


def test_a_term_that_is_null_is_left_out_unless_it_has_a_weight() -> None:
    """An override sets a term to null to do without its network."""
    terms = {"reconstruction": ReconstructionLoss(), "perceptual": None}
    for weight in ({"perceptual": 0.0}, {"perceptual": None}, {}):
        objective = TokenizerObjective(terms=terms, weights={"reconstruction": 1.0, **weight})
        loss = objective.generator(ZERO, make_output(variational=False))
        assert set(loss.terms) == {"reconstruction"}
    with pytest.raises(VaevqMedError, match=r"terms\.perceptual is null; expected a term, since its weight is 0\.5"):
        TokenizerObjective(terms=terms, weights={"reconstruction": 1.0, "perceptual": 0.5})


def test_a_term_by_a_name_of_the_log_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="'loss', which the log has already"):
        TokenizerObjective(terms={"loss": KLLoss()}, weights={"loss": 1})


def test_a_term_that_is_no_scalar_is_named() -> None:
    class PerImage(LossTerm):
        def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
            return (target - output.reconstruction).abs().mean(dim=(1, 2, 3))

    image = torch.zeros(2, 1, 4, 4)
    latent = torch.zeros(2, 2, 1, 1)
    quantizer = QuantizerOutput(latent, latent, torch.zeros(2, 1, 1, 1, dtype=torch.int64))
    objective = TokenizerObjective(terms={"mine": PerImage()}, weights={"mine": 1})
    with pytest.raises(VaevqMedError, match=r"terms\.mine: found a tensor of shape \[2\], expected a scalar"):
        objective.generator(image, TokenizerOutput(image, None, latent, None, quantizer))


def test_gan_takes_part_from_its_start_step_only() -> None:
    objective = TokenizerObjective(
        terms={"reconstruction": ReconstructionLoss()},
        weights={"reconstruction": 1.0},
        adversarial=AdversarialTerm(start_step=3, weight=0.5, adaptive=False),
    )
    output = make_output()
    assert objective.generator(ZERO, output, step=2).total.item() == pytest.approx(0.13)
    later = objective.generator(ZERO, output, discriminator=Linear(), step=3)
    assert later.total.item() == pytest.approx(0.13 - 0.5 * 0.4)
    with pytest.raises(VaevqMedError, match="no discriminator"):
        objective.generator(ZERO, output, step=3)


def test_adaptive_weight_enters_the_total() -> None:
    objective = TokenizerObjective(
        terms={"reconstruction": ReconstructionLoss(), "codebook": QuantizerLoss(name="codebook")},
        weights={"reconstruction": 3.0, "codebook": 1.0},
        adversarial=AdversarialTerm(weight=0.5),
    )
    layer = torch.tensor(0.2, requires_grad=True)
    base = make_output(variational=False)
    output = TokenizerOutput(layer.expand(2, 1, 4, 4), None, base.latent, None, base.quantizer)
    loss = objective.generator(ZERO, output, discriminator=Linear(), last_layer=layer)
    # The image is the layer: 3 d(x^2)/dx = 1.2 against d(-2x)/dx = -2.
    adaptive = 1.2 / (2 + 1e-4)
    assert loss.terms["adaptive_weight"].item() == pytest.approx(adaptive, rel=1e-5)
    assert loss.total.item() == pytest.approx(3 * 0.04 + 3 - 0.5 * adaptive * 0.4, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.total, layer)
    assert gradient.item() == pytest.approx(1.2 - 0.5 * adaptive * 2, rel=1e-5)
    with pytest.raises(VaevqMedError, match="last layer"):
        objective.generator(ZERO, output, discriminator=Linear())


def test_adaptive_weight_goes_back_through_each_network_once() -> None:
    """Gradients of the parameters are those of the sum written out, which goes back three times."""
    torch.manual_seed(0)
    decoder, discriminator = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Conv2d(3, 1, 1)), nn.Conv2d(1, 1, 2)
    last_layer, target, latent = decoder[2].weight, random(2, 1, 4, 4), random(4, 2, 6, 6, seed=1).requires_grad_()
    objective = TokenizerObjective(
        terms={"reconstruction": ReconstructionLoss(), "codebook": QuantizerLoss(name="codebook")},
        weights={"reconstruction": 3.0, "codebook": 2.0},
        adversarial=AdversarialTerm(weight=0.5, paths="both"),
    )
    base = make_output()

    def output() -> TokenizerOutput:
        paths = decoder(latent).chunk(2)
        quantizer = dataclasses.replace(base.quantizer, losses={"codebook": latent.square().mean()})
        return TokenizerOutput(paths[0], paths[1], base.latent, base.posterior, quantizer)

    backward = 0

    def count(*_: object) -> None:
        nonlocal backward
        backward += 1

    handle = discriminator.register_full_backward_hook(count)
    discriminator.requires_grad_(False)
    wanted = (*decoder.parameters(), latent)
    found = torch.autograd.grad(
        0.5 * objective.generator(target, output(), discriminator=discriminator, last_layer=last_layer).total, wanted
    )
    assert backward == 1
    handle.remove()

    of = output()
    images = (of.reconstruction, of.reconstruction_continuous)
    likelihood = 3 * sum((image - target).square().mean() for image in images)
    gan = -discriminator(torch.cat(images)).mean()
    above, below = (torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (likelihood, gan))
    total = likelihood + 2 * latent.square().mean() + 0.5 * above / (below + 1e-4) * gan
    for one, other in zip(found, torch.autograd.grad(0.5 * total, wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("paths", "expected"),
    # Logits of the real image 0, of the paths 0.4 and -0.6: 0.5 (1 + E relu(1 + fake)).
    [("quantized", 0.5 * (1 + 1.4)), ("both", 0.5 * (1 + 0.9)), ("mean_logits", 0.5 * (1 + 0.9))],
)
def test_discriminator_loss_of_an_output(paths: str, expected: float) -> None:
    objective = TokenizerObjective(terms={}, weights={}, adversarial=AdversarialTerm(paths=paths, start_step=1))
    loss = objective.discriminator(ZERO, make_output(), discriminator=Linear(), step=1)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert set(loss.terms) == {"real_logit", "fake_logit"}
    with pytest.raises(VaevqMedError, match="step 0"):
        objective.discriminator(ZERO, make_output(), discriminator=Linear(), step=0)


def test_generator_step_reaches_the_image_past_a_frozen_discriminator() -> None:
    objective = TokenizerObjective(terms={}, weights={}, adversarial=AdversarialTerm(weight=0.5, adaptive=False))
    output, discriminator = make_output(), Linear().requires_grad_(False)
    objective.generator(ZERO, output, discriminator=discriminator).total.backward()
    assert discriminator.scale.grad is None
    # -0.5 * 2 over the 32 pixels.
    torch.testing.assert_close(output.reconstruction.grad, torch.full((2, 1, 4, 4), -1 / 32))


def test_quantizer_loss_names_what_there_is() -> None:
    with pytest.raises(VaevqMedError, match="found codebook, commitment"):
        QuantizerLoss(name="entropy")(ZERO, make_output())


def test_discriminator_step_sends_nothing_to_the_tokenizer() -> None:
    objective = TokenizerObjective(
        terms={"reconstruction": ReconstructionLoss()}, weights={"reconstruction": 1.0}, adversarial=AdversarialTerm()
    )
    output, discriminator = make_output(), Linear()
    objective.discriminator(ZERO, output, discriminator=discriminator).total.backward()
    assert output.reconstruction.grad is None
    assert discriminator.scale.grad is not None


def test_control_state_carries_the_budget() -> None:
    def build() -> TokenizerObjective:
        return TokenizerObjective(terms={"kl": KLLoss(budget=1.0, num_embeddings=8)}, weights={"kl": 1.0})

    first, second = build(), build()
    first.generator(random(2, 1, 4, 4), make_output(mean=torch.full((2, 3, 2, 2), 9.0)))
    second.load_control_state(first.control_state())
    assert float(second.terms["kl"].factor) == float(first.terms["kl"].factor) != 1.0


def test_dcr_spreads_a_codebook_that_starts_tiny() -> None:
    """VQGAN's start at K = 16,384: variances of 1e-9, which fp32 eigenvalues do not resolve."""
    codebook = ((torch.rand(16384, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 16384).requires_grad_()
    (gradient,) = torch.autograd.grad(gaussian_wasserstein2_to_standard(codebook), codebook)
    wide = codebook.detach().double().requires_grad_()
    (reference,) = torch.autograd.grad(gaussian_wasserstein2_to_standard(wide), wide)
    assert float(gradient.norm()) > 0.01
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-9)


def test_kl_budget_has_the_same_speed_however_a_batch_is_chunked() -> None:
    factors = []
    for chunks in (1, 4):
        term = KLLoss(budget=1.0, num_embeddings=8, rate=0.05)
        with term.one_update():
            for _ in range(chunks):
                term(random(2, 1, 4, 4), make_output(mean=torch.full((2, 3, 2, 2), 2.0)))
        factors.append(float(term.factor))
    assert factors[0] == pytest.approx(factors[1])
    assert factors[0] != 1


def test_kl_budget_does_not_move_where_a_batch_ends_in_an_error() -> None:
    term = KLLoss(budget=1.0, num_embeddings=8, rate=0.05)

    def broken_off() -> None:
        with term.one_update():
            term(random(2, 1, 4, 4), make_output(mean=torch.full((2, 3, 2, 2), 2.0)))
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert float(term.factor) == 1
    term(random(2, 1, 4, 4), make_output(mean=torch.full((2, 3, 2, 2), 2.0)))
    assert float(term.factor) != 1


@pytest.mark.parametrize("shape", [(40, 5), (2, 30, 4)])
def test_dcr_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    codebook = (random(*shape, seed=4, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_wasserstein2_to_standard, codebook)
    # All variances equal, where eigenvectors have no gradient.
    cross = torch.cat([torch.eye(4), -torch.eye(4)]).double().mul(0.7).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_wasserstein2_to_standard, cross)


class Steered(LossTerm):
    """A term from elsewhere, whose strength grows by one at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("strength", torch.tensor(1.0))

    strength: Tensor

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        return self.strength * output.reconstruction.mean()

    @contextmanager
    def one_update(self) -> Iterator[None]:
        yield
        self.strength += 1

    def control(self) -> Tensor:
        return self.strength

    def figures(self) -> Mapping[str, Tensor]:
        return {"strength": self.strength}


def test_a_term_from_elsewhere_is_steered_logged_and_kept_in_checkpoints() -> None:
    objective = TokenizerObjective(terms={"mine": Steered(), "dcr": DCRLoss()}, weights={"mine": 2.0, "dcr": 0})
    images = torch.ones(1, 1, 4, 4)
    output = cast(TokenizerOutput, SimpleNamespace(reconstruction=images))
    for number in (1.0, 2.0):
        with objective.one_update():
            for _ in range(3):
                found = objective.generator(images, output)
        assert found.terms == {"mine": number, "mine_strength": number}
    other = TokenizerObjective(terms={"mine": Steered()}, weights={"mine": 1.0})
    other.load_control_state(objective.control_state())
    assert objective.control_state() == other.control_state() == {"mine": 3.0}
