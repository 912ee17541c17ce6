"""Dice and cross-entropy by hand, and a teacher's word where regions are not known."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from conftest import BUNDLE
from helpers.segmenters import small_segmenter
from monai.bundle import ConfigParser
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.segmentation import SegmentationLoss
from vaevq_med.networks.perturbation import FeaturePerturbation, QuantizedPerturbation
from vaevq_med.networks.quantizers.simvq import SimVQ

WEIGHTS = {"dice": 1.0, "cross_entropy": 2.0}
IMAGES = torch.rand(4, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
REGIONS = (torch.rand(4, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.7).float()
ALL, NONE = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)


class Says(nn.Module):
    """A teacher of which every pixel has the same logit."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 3, *images.shape[-2:]), self.logit)


def loss_of(network: Any = None, **arguments: Any) -> SegmentationLoss:
    return SegmentationLoss(**{"network": network or small_segmenter(), "weights": WEIGHTS, **arguments})


def test_the_terms_by_hand() -> None:
    network = small_segmenter()
    found = loss_of(network)(IMAGES, REGIONS, ALL)
    p, t = network(IMAGES).sigmoid().detach(), REGIONS[:, :, 1]
    both, total = (p * t).sum(dim=(0, 2, 3)), (p + t).sum(dim=(0, 2, 3))
    dice = (1 - (2 * both + 1e-5) / (total + 1e-5)).mean()
    entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    torch.testing.assert_close(found.terms["dice"], dice)
    torch.testing.assert_close(found.terms["cross_entropy"], entropy)
    torch.testing.assert_close(found.total.detach(), dice + 2 * entropy)


def test_what_is_not_known_does_not_count() -> None:
    loss, changed = loss_of(), REGIONS.clone()
    changed[2:] = 1 - changed[2:]
    known = torch.tensor([True, True, False, False])
    first, second = (loss(IMAGES, regions, known).total for regions in (REGIONS, changed))
    assert torch.equal(first, second)
    assert torch.equal(first, loss(IMAGES[:2], REGIONS[:2], ALL[:2]).total)


def test_a_part_without_anything_known_has_gradients_of_zero() -> None:
    network = small_segmenter()
    found = loss_of(network)(IMAGES, REGIONS, NONE)
    assert found.total.item() == 0
    assert not found.terms
    found.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_an_unsure_teacher_says_nothing_and_a_sure_one_is_learned() -> None:
    weights = {**WEIGHTS, "consistency": 1.0}
    unsure = loss_of(weights=weights, teacher=Says(1.0))(IMAGES, REGIONS, NONE)
    assert unsure.total.item() == pytest.approx(0, abs=1e-6)
    network = small_segmenter()
    loss = loss_of(network, weights=weights, teacher=Says(5.0))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss(IMAGES, REGIONS, NONE).total.backward()
        optimizer.step()
    assert network(IMAGES).sigmoid().mean() > 0.9


def test_the_teacher_is_no_part_of_the_loss() -> None:
    teacher = small_segmenter(seed=1)
    loss = loss_of(weights={**WEIGHTS, "consistency": 1.0}, teacher=teacher)
    before = copy.deepcopy(teacher.state_dict())
    assert len(list(loss.parameters())) == len(list(loss.network.parameters()))
    loss.train()
    assert not teacher.training
    loss(IMAGES, REGIONS, NONE).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_disturbed_view_keeps_the_background() -> None:
    images = IMAGES.clone()
    images[..., :8] = -1
    torch.manual_seed(0)
    disturbed = loss_of()._disturbed(images)
    assert torch.equal(disturbed[..., :8], images[..., :8])
    assert (disturbed[..., 8:] - images[..., 8:]).abs().mean() > 0.02
    assert disturbed.abs().max() <= 1
    assert torch.allclose(loss_of(noise=0.0, gain=0.0)._disturbed(images), images, atol=1e-6)


def test_a_quantizer_has_its_terms_and_may_be_perturbed() -> None:
    network = small_segmenter(quantizer=SimVQ(num_embeddings=8, embedding_dim=4))
    weights = {**WEIGHTS, "consistency": 1.0, "codebook": 1.0, "commitment": 0.25}
    loss = loss_of(network, weights=weights, teacher=Says(5.0), perturbation=QuantizedPerturbation(epsilon=1.0))
    found = loss(IMAGES, REGIONS, torch.tensor([True, False, True, False]))
    assert set(found.terms) == set(weights)
    expected = sum(weight * found.terms[name] for name, weight in weights.items())
    torch.testing.assert_close(found.total.detach(), expected)


OVERLAYS = BUNDLE.parent / "segmentation" / "overlays"
PERTURBED = sorted(
    path.stem for path in OVERLAYS.glob("*.json") if "loss_def#perturbation" in json.loads(path.read_text())
)


def overlaid(name: str) -> FeaturePerturbation:
    """The perturbation that an overlay of the bundle sets."""
    content = json.loads((OVERLAYS / f"{name}.json").read_text())
    return ConfigParser({"made": content["loss_def#perturbation"]}).get_parsed_content("made")


def seen_by_the_decoder(perturbation: FeaturePerturbation | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The features of the disturbed view as they are decoded, and the loss, both with the same draws."""
    torch.manual_seed(0)
    network = small_segmenter(quantizer=SimVQ(num_embeddings=64, embedding_dim=4))
    loss = loss_of(network, weights={**WEIGHTS, "consistency": 1.0}, teacher=Says(5.0), perturbation=perturbation)
    decoded, decode = [], network.decode
    monkeypatch.setattr(network, "decode", lambda features: decoded.append(features) or decode(features))
    torch.manual_seed(0)
    found = loss(IMAGES, REGIONS, torch.tensor([True, True, False, False]))
    known, disturbed = decoded
    return known, disturbed, found, network


def test_the_perturbation_changes_the_disturbed_view_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_known, plain, plain_loss, _ = seen_by_the_decoder(None, monkeypatch)
    known, perturbed, loss, network = seen_by_the_decoder(QuantizedPerturbation(epsilon=1.0), monkeypatch)
    assert torch.equal(known.coarse, plain_known.coarse)
    for name in ("dice", "cross_entropy"):
        assert torch.equal(loss.terms[name], plain_loss.terms[name])
    assert torch.equal(perturbed.quantizer.indices, plain.quantizer.indices)
    # Each position has another codeword than the one that was found for it.
    codes = network.quantizer.codebook()
    steps = perturbed.coarse.detach().movedim(1, -1).flatten(0, -2)[:, None] - codes.detach()
    to_codeword = steps.norm(dim=2)
    assert float(to_codeword.amin(dim=1).max()) < 1e-5
    assert not (to_codeword.argmin(dim=1) == plain.quantizer.indices.flatten()).any()
    assert loss.terms["consistency"].item() != pytest.approx(plain_loss.terms["consistency"].item(), rel=1e-4)


def test_the_overlays_of_the_bundle_perturb_in_ways_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"teacher_qpm_distance", "teacher_qpm_nearest", "teacher_qpm_uniform"} < set(PERTURBED)
    views = {name: seen_by_the_decoder(overlaid(name), monkeypatch)[1].coarse for name in PERTURBED}
    views["none"] = seen_by_the_decoder(None, monkeypatch)[1].coarse
    for one, other in itertools.combinations(views, 2):
        assert not torch.allclose(views[one], views[other]), f"{one} and {other}"


def test_replacements_by_nearest_are_nearer_than_by_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean squared step of the positions that are replaced, at the same share of 0.7."""
    plain = seen_by_the_decoder(None, monkeypatch)[1].coarse
    steps = {}
    for name in ("distance", "nearest", "uniform"):
        moved = seen_by_the_decoder(overlaid(f"teacher_qpm_{name}"), monkeypatch)[1].coarse - plain
        squares = moved.detach().square().sum(dim=1)
        replaced = squares > 1e-8
        assert float(replaced.float().mean()) == pytest.approx(0.7, abs=0.12)
        steps[name] = float(squares[replaced].mean())
    assert steps["distance"] < steps["nearest"] < 0.6 * steps["uniform"]


def test_what_is_wrong_is_said() -> None:
    for arguments, said in (
        ({"weights": {"dise": 1.0}}, "found 'dise', expected a term of the loss; did you mean 'dice'"),
        ({"weights": {"consistency": 1.0}}, "consistency without a teacher"),
        ({"confidence": 1.0}, "confidence: found 1.0"),
        ({"noise": -1.0}, "noise, gain"),
    ):
        with pytest.raises(VaevqMedError, match=said):
            loss_of(**arguments)
