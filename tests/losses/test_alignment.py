"""The alignment of a latent with a frozen feature network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toy_networks import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses import AlignmentLoss, TokenizerObjective, marginal_cosine, marginal_distance_matrix
from vaevq_med.losses.adversarial import AdversarialTerm
from vaevq_med.losses.reconstruction import ReconstructionLoss
from vaevq_med.networks import PatchDiscriminator, Projector
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.quantizers import FSQ


def output_of(projected: Tensor | None) -> TokenizerOutput:
    """Of which the loss reads nothing else."""
    latent = torch.zeros(1, 2, 1, 1)
    quantized = QuantizerOutput(latent, latent, torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    return TokenizerOutput(latent, None, latent, None, quantized, projected=projected)


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(one: Tensor, other: Tensor) -> np.ndarray:
    """Cosines of all pairs of positions of two maps of one image, by scipy."""
    return 1 - cdist(one.flatten(1).T.double(), other.flatten(1).T.double(), metric="cosine")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), m1=st.floats(0, 1), m2=st.floats(0, 1), size=st.integers(1, 4), batch=st.integers(1, 3))
def test_both_halves_by_scipy(seed: int, m1: float, m2: float, size: int, batch: int) -> None:
    projected, features = maps(seed, batch, 5, size, 3), maps(seed + 100, batch, 5, size, 3)
    pairs = list(zip(projected, features, strict=True))
    mcos = np.mean([np.maximum(0, 1 - m1 - np.diag(angles(one, other))) for one, other in pairs])
    mdms = np.mean([np.maximum(0, np.abs(angles(one, one) - angles(other, other)) - m2) for one, other in pairs])
    assert marginal_cosine(projected, features, m1).item() == pytest.approx(mcos, abs=1e-5)
    assert marginal_distance_matrix(projected, features, m2).item() == pytest.approx(mdms, abs=1e-5)


def test_what_is_aligned_costs_nothing_and_a_rotation_turns_one_half_alone() -> None:
    features = maps(0, 2, 6, 4, 4)
    assert marginal_cosine(features, features, 0.0).item() == pytest.approx(0, abs=1e-6)
    assert marginal_distance_matrix(features, features, 0.0).item() == 0
    turn, _ = torch.linalg.qr(maps(1, 6, 6))
    turned = torch.einsum("fg,bghw->bfhw", turn, 3 * features)
    assert marginal_distance_matrix(turned, features, 0.0).item() == pytest.approx(0, abs=1e-6)
    assert marginal_cosine(turned, features, 0.0).item() > 0.5


def test_inside_the_margins_both_are_zero_and_without_a_gradient() -> None:
    features = maps(0, 1, 6, 4, 4)
    near = (features + 0.05 * maps(1, 1, 6, 4, 4)).requires_grad_()
    for loss in (marginal_cosine(near, features, 0.5), marginal_distance_matrix(near, features, 0.25)):
        (gradient,) = torch.autograd.grad(loss, near)
        assert loss.item() == 0
        assert not gradient.any()
    assert marginal_cosine(near, features, 0.0).item() > 0


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-6])
def test_what_has_no_direction_has_a_cosine_of_0_and_no_gradient(length: float) -> None:
    """Of 12 positions five are (almost) 0: the others are pulled as they are without them."""
    features, directed = maps(0, 1, 6, 1, 12), maps(1, 1, 6, 1, 7).requires_grad_()
    projected = torch.cat([directed, length * maps(2, 1, 6, 1, 5)], dim=3).detach().requires_grad_()
    loss, alone = marginal_cosine(projected, features, 0.0), marginal_cosine(directed, features[..., :7], 0.0)
    (gradient,), (expected,) = torch.autograd.grad(loss, projected), torch.autograd.grad(alone, directed)
    assert loss.item() == pytest.approx((7 * alone.item() + 5 * 1) / 12)
    torch.testing.assert_close(gradient[..., :7], 7 / 12 * expected)
    assert not gradient[..., 7:].any()
    distances = marginal_distance_matrix(projected, features, 0.0)
    units = torch.nn.functional.normalize(features.flatten(2), dim=1)[0]
    own = torch.cat([torch.nn.functional.normalize(directed.detach().flatten(2), dim=1)[0], torch.zeros(6, 5)], dim=1)
    torch.testing.assert_close(distances, (own.T @ own - units.T @ units).abs().mean())
    (gradient,) = torch.autograd.grad(distances, projected)
    assert gradient[..., :7].any()
    assert not gradient[..., 7:].any()
    nothing = torch.zeros(1, 6, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(marginal_cosine(nothing, features[..., :4].view(1, 6, 2, 2)), nothing)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([1e-8, 1e-3, 1e3, 1e8]), seed=st.integers(0, 99))
def test_a_direction_has_no_scale(scale: float, seed: int) -> None:
    projected, features = maps(seed, 1, 5, 3, 3), maps(seed + 100, 1, 5, 3, 3)
    torch.testing.assert_close(marginal_cosine(scale * projected, features, 0), marginal_cosine(projected, features, 0))


def test_a_code_of_zeros_does_not_take_the_adaptive_weight_from_the_others() -> None:
    """FSQ, three levels a channel: a third of the latents is pulled to the code of zeros."""
    images = maps(0, 2, 1, 32, 32).clamp(-1, 1)
    network = tokenizer(
        levels=2, quantizer=FSQ(levels=[3, 3, 3, 3]), projector=projector(reads="quantized"), quantize_from="mean"
    )
    with torch.no_grad():
        network.quant_conv.weight.mul_(3)
    output = network.reconstruct_full(images, noise=network.draw_noise(images))
    assert output.projected is not None
    zeros = (output.projected == 0).all(dim=1)
    assert 0 < zeros.sum() < zeros.numel()
    term = AlignmentLoss(mcos_margin=0, mdms_margin=0, adaptive=True)
    value = term(images, output)
    (gradient,) = torch.autograd.grad(value, network.latent_layer, retain_graph=True)
    assert 0 < gradient.norm() < 10
    terms = {"reconstruction": ReconstructionLoss(), "alignment": term}
    objective = TokenizerObjective(terms=terms, weights={"reconstruction": 1.0, "alignment": 0.1})
    loss = objective.generator(images, output, latent_layer=network.latent_layer)
    assert loss.terms["alignment_adaptive_weight"] > 1e-3


def test_rows_at_a_time_are_all_at_once() -> None:
    projected, features = maps(0, 2, 4, 3, 5).requires_grad_(), maps(1, 2, 7, 3, 5)
    whole = marginal_distance_matrix(projected, features, 0.1)
    parts = marginal_distance_matrix(projected, features, 0.1, at_once=2 * 15 * 4)  # four rows of 15
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, projected)[0] for loss in (parts, whole)))


@pytest.fixture(scope="module")
def term() -> AlignmentLoss:
    return AlignmentLoss()


def test_the_stage_is_that_of_the_grid_and_the_network_takes_no_gradient(term: AlignmentLoss) -> None:
    images = maps(0, 2, 1, 64, 64).clamp(-1, 1).requires_grad_()
    stages = term.features.layers(images.detach())
    for stage, f in ((1, 4), (2, 8), (3, 16)):
        features = stages[stage]
        assert features.shape[-1] == 64 // f
        projected = (2 * features).requires_grad_()
        loss = term(images, output_of(projected))
        assert loss.item() == 0
        assert term(images, output_of(-projected)).item() == pytest.approx(1.5, abs=0.3)  # 2 - 0.5 where f is not 0
        assert set(term.figures()) == {"mcos", "mdms"}
        loss.backward()
    assert images.grad is None
    assert all(one.grad is None and not one.requires_grad for one in term.parameters())


def test_another_stage_is_resized_and_its_channels_have_to_fit(term: AlignmentLoss) -> None:
    images = maps(0, 1, 1, 64, 64).clamp(-1, 1)
    deep = AlignmentLoss(stage=3, mcos_margin=0, mdms_margin=0)
    features = deep.features.layers(images)[3]  # 4 x 4
    twice = torch.nn.functional.interpolate(features, size=(8, 8), mode="bilinear", align_corners=False)
    assert deep(images, output_of(twice)).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(VaevqMedError, match="num_features is 112; expected 40, those of efficientnet-lite0 at 8x8"):
        term(images, output_of(twice))
    with pytest.raises(VaevqMedError, match="stage is 5; expected one of the 5 of efficientnet-lite0"):
        AlignmentLoss(stage=5)(images, output_of(twice))


def test_a_finer_stage_is_resized_without_aliasing(term: AlignmentLoss) -> None:
    images = maps(0, 1, 1, 64, 64).clamp(-1, 1)
    fine = AlignmentLoss(stage=1, mcos_margin=0, mdms_margin=0)
    features = fine.features.layers(images)[1]  # 16 x 16
    # A triangle of twice the step: weights of 1, 3, 3, 1 eighths in the inside.
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    halved = torch.nn.functional.interpolate(features, size=(8, 8), mode="area").clone()
    halved[..., 1:7, 1:7] = torch.nn.functional.conv2d(
        features.movedim(1, 0)[..., 1:15, 1:15], torch.outer(weights, weights)[None, None], stride=2
    ).movedim(0, 1)
    close = fine(images, output_of(halved)).item()
    plain = torch.nn.functional.interpolate(features, size=(8, 8), mode="bilinear", align_corners=False)
    assert close < 0.5 * fine(images, output_of(plain)).item()


def test_its_arithmetic_is_that_outside_of_autocast(term: AlignmentLoss) -> None:
    images, projected = maps(0, 1, 1, 64, 64).clamp(-1, 1), maps(1, 1, 40, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        term(images, output_of(projected))
        features = term.features.layers(images)[2].float()
    expected = {"mcos": marginal_cosine(projected, features), "mdms": marginal_distance_matrix(projected, features)}
    torch.testing.assert_close(dict(term.figures()), expected, rtol=1e-6, atol=0)


def test_channels_of_their_own_are_looked_at_one_by_one(term: AlignmentLoss) -> None:
    images = maps(0, 1, 2, 64, 64).clamp(-1, 1)
    each = term.features.layers(images.view(2, 1, 64, 64))[2]
    assert term(images, output_of(each.mean(dim=0, keepdim=True))).item() == 0


def test_slices_of_a_volume_and_no_pieces_of_one(term: AlignmentLoss) -> None:
    volumes = maps(0, 2, 1, 3, 64, 64).clamp(-1, 1)
    each = term.features.layers(volumes.transpose(1, 2).flatten(0, 1))[2]
    projected = each.unflatten(0, (2, 3)).transpose(1, 2)  # [B, F, d, h, w]
    assert term(volumes, output_of(projected)).item() == 0
    with pytest.raises(VaevqMedError, match=r"grid is \(1, 8, 8\) for volumes of 3 slices; expected one position"):
        term(volumes, output_of(projected[:, :, :1]))


def test_tokens_that_are_no_places_are_refused(term: AlignmentLoss) -> None:
    images = torch.zeros(1, 1, 64, 64)
    for grid in ((1, 16), (16,)):
        with pytest.raises(VaevqMedError, match="for images of 64x64; expected positions that are places of the image"):
            term(images, output_of(torch.zeros(1, 40, *grid)))


def test_a_tokenizer_without_a_projector_is_told(term: AlignmentLoss) -> None:
    with pytest.raises(VaevqMedError, match=r"found a tokenizer without. Set network_def#projector"):
        term(torch.zeros(1, 1, 8, 8), output_of(None))
    with pytest.raises(VaevqMedError, match="expected at least 0"):
        AlignmentLoss(mcos_margin=-0.1)


def test_the_control_is_another_network_and_always_the_same(term: AlignmentLoss) -> None:
    images = maps(0, 2, 1, 64, 64).clamp(-1, 1)
    state = torch.random.get_rng_state()
    first, second = AlignmentLoss(untrained=True), AlignmentLoss(untrained=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    learned, one, other = (found.features.layers(images)[2] for found in (term, first, second))
    assert torch.equal(one, other)
    assert not torch.allclose(one, learned, atol=0.1)
    assert one.flatten(2).std(dim=2).max() > 0.01  # it tells positions apart
    assert not any(parameter.requires_grad for parameter in first.parameters())


def projector(**options: Any) -> Projector:
    return Projector(**{"embedding_dim": 4, "num_features": 24, **options})


@pytest.mark.parametrize("variational", [False, True])
def test_the_projector_reads_the_sample_or_the_codes(variational: bool) -> None:
    images = maps(0, 2, 1, 32, 32)
    for reads in ("sample", "quantized"):
        network = tokenizer(variational=variational, projector=projector(reads=reads), quantize_from="mean")
        noise = network.draw_noise(images)
        output = network.reconstruct_full(images, noise=noise)
        encoded = network.encode(images)
        sample = encoded.sample(noise=noise) if variational else encoded
        expected = sample if reads == "sample" else output.quantizer.quantized
        assert output.projected is not None
        weight = network.projector.layer.weight
        torch.testing.assert_close(output.projected, torch.einsum("fd,bdhw->bfhw", weight, expected))
    part = projector(channels=[2, 4])
    values = maps(1, 2, 4, 3, 3)
    assert torch.equal(part(values), part(torch.cat([torch.zeros(2, 2, 3, 3), values[:, 2:]], dim=1)))
    assert tokenizer().reconstruct_full(images).projected is None


def test_a_projector_that_does_not_fit_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="the projector's embedding_dim is 8; expected 4"):
        tokenizer(projector=projector(embedding_dim=8))
    for channels in ([2, 2], [0, 5], [1]):
        with pytest.raises(VaevqMedError, match="expected the first and the one after the last, within 0 and 4"):
            projector(channels=channels)


def test_images_and_draws_are_what_they_are_without_a_projector() -> None:
    torch.manual_seed(0)
    projector()
    drawn = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(3))
    images = maps(0, 2, 1, 32, 32)
    assert torch.equal(tokenizer(projector=projector())(images), tokenizer()(images))
    assert not any("projector" in name for name in tokenizer().state_dict())


def test_the_adaptive_weight_is_the_ratio_at_the_latent() -> None:
    network = tokenizer(levels=2, projector=projector())
    images = maps(0, 2, 1, 32, 32).clamp(-1, 1)
    terms = {"reconstruction": ReconstructionLoss(), "alignment": AlignmentLoss(adaptive=True)}
    objective = TokenizerObjective(terms=terms, weights={"reconstruction": 2.0, "alignment": 0.1})
    layer = network.latent_layer
    assert layer is network.quant_conv.weight
    output = network.reconstruct_full(images, noise=network.draw_noise(images))
    loss = objective.generator(images, output, latent_layer=layer)
    values = {name: one(images, output) for name, one in terms.items()}
    norms = {name: torch.autograd.grad(value, layer, retain_graph=True)[0].norm() for name, value in values.items()}
    ratio = 2 * norms["reconstruction"] / (norms["alignment"] + 1e-4)
    assert norms["alignment"] > 0
    torch.testing.assert_close(loss.terms["alignment_adaptive_weight"], ratio)
    expected = 2 * values["reconstruction"] + 0.1 * ratio.detach() * values["alignment"]
    torch.testing.assert_close(loss.total, expected)
    # What steers is a constant of the step.
    torch.testing.assert_close(
        *(torch.autograd.grad(total, layer, retain_graph=True)[0] for total in (loss.total, expected))
    )
    # A weight of the likelihood in pixels, as the calibrated one has, is no reason to hold it at a few hundred.
    steep = TokenizerObjective(terms=terms, weights={"reconstruction": 2e5, "alignment": 0.1})
    found = steep.generator(images, output, latent_layer=layer).terms["alignment_adaptive_weight"]
    assert 1e2 < found < 1e8
    torch.testing.assert_close(found, 1e5 * ratio)
    with pytest.raises(VaevqMedError, match="adaptive weight of alignment needs the layer before the latent"):
        objective.generator(images, output)
    with pytest.raises(VaevqMedError, match=r"compile is true with objective.terms.alignment.adaptive"):
        objective.check_adaptive(network, compiled=True)
    network.quant_conv.requires_grad_(False)
    with pytest.raises(VaevqMedError, match=r"terms.alignment.adaptive is true with a frozen latent"):
        objective.check_adaptive(network)


def test_it_stands_beside_the_weight_of_the_gan() -> None:
    network = tokenizer(levels=2, projector=projector())
    discriminator = PatchDiscriminator(in_channels=1, num_channels=8, num_layers=1)
    images = maps(0, 2, 1, 32, 32).clamp(-1, 1)
    term = AlignmentLoss(adaptive=True)
    terms = {"reconstruction": ReconstructionLoss(), "alignment": term}
    weights = {"reconstruction": 1.0, "alignment": 0.1}
    layers = {"last_layer": network.last_layer, "latent_layer": network.latent_layer}
    output = network.reconstruct_full(images, noise=network.draw_noise(images))
    found = []
    for adversarial in (None, AdversarialTerm(weight=0.8)):
        objective = TokenizerObjective(terms=terms, weights=weights, adversarial=adversarial)
        found.append(objective.generator(images, output, discriminator=discriminator, **layers))
    without, both = found
    ratio = without.terms["alignment_adaptive_weight"]
    torch.testing.assert_close(both.terms["alignment_adaptive_weight"], ratio)
    gan = 0.8 * both.terms["adaptive_weight"] * both.terms["adversarial"]
    torch.testing.assert_close(both.total, without.total + gan)
    (whole,) = torch.autograd.grad(both.total, network.latent_layer, retain_graph=True)
    (half,) = torch.autograd.grad(without.total, network.latent_layer, retain_graph=True)
    assert not torch.allclose(whole, half)


def test_a_step_trains_the_projector_and_what_made_the_codes() -> None:
    images = maps(0, 2, 1, 32, 32).clamp(-1, 1)
    for reads in ("sample", "quantized"):
        network = tokenizer(levels=2, projector=projector(reads=reads))
        output = network.reconstruct_full(images, noise=network.draw_noise(images))
        AlignmentLoss(mcos_margin=0, mdms_margin=0)(images, output).backward()
        for weight in (network.projector.layer.weight, network.quant_conv.weight, network.encoder.first_layer):
            assert weight.grad is not None
            assert weight.grad.abs().sum() > 0
        assert network.decoder.last_layer.grad is None
    assert replace(output, projected=None).projected is None
