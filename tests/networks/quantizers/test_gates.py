"""Gates of a two-level quantizer: what they measure, the share that they keep, and whom a gradient reaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.patches import patch_entropy, patches_of
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.networks.quantizers.gates import (
    EntropyGate,
    Gate,
    LearnedGate,
    PosteriorGate,
    ThresholdGate,
    VarianceGate,
    budget,
    content,
    threshold_of_share,
)
from vaevq_med.networks.quantizers.two_level_residual import ResidualTwoLevel


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two(gate: Gate) -> ResidualTwoLevel:
    levels = [VectorQuantizer(num_embeddings=8, embedding_dim=3, init="normal") for _ in range(2)]
    return ResidualTwoLevel(top=levels[0], bottom=levels[1], gate=gate)


def test_the_pixels_under_each_position() -> None:
    images = drawn(2, 3, 8, 12)
    found = patches_of(images, (2, 3))
    assert found.shape == (2, 2, 3, 3, 4 * 4)
    expected = images[1, :, 4:8, 8:12]
    assert torch.equal(found[1, 1, 2].view(3, 4, 4), expected)
    volume = drawn(1, 1, 4, 4, 8)
    assert torch.equal(patches_of(volume, (2, 2, 2))[0, 1, 0, 1].view(2, 2, 4), volume[0, 0, 2:, :2, 4:])
    with pytest.raises(VaevqMedError, match=r"the images have size \(8, 12\); expected multiples of the grid \(3, 3\)"):
        patches_of(images, (3, 3))


def by_numpy(patch: np.ndarray, bins: np.ndarray) -> float:
    mass = np.exp(-0.5 * ((patch[:, None] - bins) / 0.01) ** 2).mean(axis=0)
    p = mass / mass.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@pytest.mark.parametrize("centered", [False, True])
def test_the_entropy_of_a_patch_is_that_of_its_soft_histogram(centered: bool) -> None:
    images = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = patch_entropy(images, (2, 2), centered=centered)
    for item, row, column in np.ndindex(2, 2, 2):
        patch = images[item].mean(dim=0)[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().double().numpy()
        patch = np.clip(patch - patch.mean(), -1, 1) if centered else patch
        expected = by_numpy(patch, np.linspace(-1, 1, 33 if centered else 32))
        assert float(found[item, row, column]) == pytest.approx(expected, abs=1e-4)


def test_entropies_that_are_known() -> None:
    """Black 0; one gray between two bins log 2 as published, and 0 around its own mean; two grays alike log 2."""
    between = float(np.linspace(-1, 1, 32)[15:17].mean())
    grays = torch.stack([torch.full((1, 4, 4), gray) for gray in (-1.0, between, 0.3)])
    assert patch_entropy(grays, (1, 1), centered=True).abs().max().item() < 1e-6
    published = patch_entropy(grays, (1, 1), centered=False).flatten().tolist()
    assert published[:2] == pytest.approx([0, math.log(2)], abs=1e-6)
    halves = torch.cat([torch.full((1, 1, 2, 4), -0.5), torch.full((1, 1, 2, 4), 0.5)], dim=2)
    assert patch_entropy(halves, (1, 1)).item() == pytest.approx(math.log(2), abs=1e-6)
    noise = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert patch_entropy(noise, (1, 1), centered=False).item() == pytest.approx(math.log(32), abs=0.03)


@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 200), st.floats(0.01, 0.99))
def test_the_budget_by_hand(num_open: int, num_content: int, num_black: int, share: float) -> None:
    num_open, num_cells = min(num_open, num_content + num_black), num_content + num_black
    counts = [torch.tensor(float(count)) for count in (num_open, num_content, num_cells)]
    found = budget(*counts, share=share).item()
    of_content = num_content / num_cells
    assert found == pytest.approx((of_content * (num_open / num_content - share)) ** 2, rel=1e-4, abs=1e-6)
    assert 0 <= found <= 1


def test_the_budget_is_that_of_dq_vae_where_all_cells_have_content() -> None:
    """Of a 16x16 grid with g open cells there are 256 - g + 4 g codes, and r = (codes - 256) / 768."""
    cells = torch.tensor(256.0)
    for num_open, share in ((128, 0.5), (77, 0.5), (256, 0.3)):
        r = ((256 - num_open) + 4 * num_open - 256) / 768
        found = budget(torch.tensor(float(num_open)), cells, cells, share=share).item()
        assert found == pytest.approx((r - share) ** 2, abs=1e-7)


def test_without_content_there_is_no_budget_to_miss() -> None:
    """Of black images nothing is asked, and one cell with content is no reason for a loss of thousands."""
    gate, z = LearnedGate(embedding_dim=3, share=0.5), drawn(4, 12, 32, 32)
    images = -torch.ones(4, 1, 128, 128)
    loss = gate(z, None, images).losses["budget"]
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, list(gate.parameters()))
    assert all(float(one.abs().sum()) == 0 for one in gradients)
    images[0, 0, 0, 0] = 1
    assert 0 < gate(z, None, images).losses["budget"].item() < 1


def test_the_loss_of_a_router_counts_open_cells_over_those_with_content() -> None:
    """Half of the picture is black: 8 cells of 16 have content, and all 16 are open."""
    images = drawn(1, 1, 16, 16).clamp(-1, 1)
    images[..., :8] = -1
    z = drawn(1, 12, 4, 4)
    assert content(images, z.shape[2:], z).sum() == 8
    gate = LearnedGate(embedding_dim=3, share=0.5)
    gate.router[-1].weight.data.zero_()
    gate.router[-1].bias.data = torch.tensor([-100.0, 100.0])
    assert gate(z, None, images).losses["budget"].item() == pytest.approx(((16 - 0.5 * 8) / 16) ** 2)
    assert gate(z).losses["budget"].item() == pytest.approx(0.25)


def test_the_decoder_reaches_a_router_and_no_other_gate() -> None:
    """Through the fine codes that the gate multiplies: of one cell d/dg of sum(q) is the sum of its fine codes."""
    torch.manual_seed(0)
    gate = LearnedGate(embedding_dim=3, share=0.5)
    quantizer = two(gate)
    output = quantizer(drawn(2, 12, 4, 4), None, drawn(2, 1, 16, 16))
    gradients = torch.autograd.grad(output.quantized.square().sum(), list(gate.parameters()), retain_graph=True)
    assert all(float(one.abs().sum()) > 0 for one in gradients)
    gradients = torch.autograd.grad(output.losses["budget"], list(gate.parameters()))
    assert all(float(one.abs().sum()) > 0 for one in gradients)
    for other in (EntropyGate(), VarianceGate(), PosteriorGate()):
        assert not list(other.parameters())
        z, logvar = drawn(2, 12, 4, 4).requires_grad_(), drawn(2, 12, 4, 4, seed=1).requires_grad_()
        assert not other(z, DiagonalGaussian(z, logvar), drawn(2, 1, 16, 16)).opened.requires_grad


def test_a_routers_gates_are_0_or_1_and_with_a_threshold_of_0_the_likelier() -> None:
    torch.manual_seed(0)
    gate, z = LearnedGate(embedding_dim=3, share=0.5, threshold=0.0), drawn(8, 12, 16, 16)
    for _ in range(5):
        assert set(gate(z).opened.detach().unique().tolist()) == {0.0, 1.0}
    likelier = gate.router(z.movedim(1, -1)).argmax(dim=-1)
    assert torch.equal(gate.eval()(z).opened, likelier.float())
    assert torch.equal(gate(z).opened, likelier.float())


def test_a_router_opens_its_share_in_evaluation_too() -> None:
    """Where it says of every cell that it is open at about three draws in ten, the likelier of the two opens none."""
    torch.manual_seed(0)
    gate = LearnedGate(embedding_dim=3, share=0.3)
    gate.router[-1].bias.data = torch.tensor([5.0, 5.0 - math.log(0.7 / 0.3) - 2])
    for step in range(10):
        gate(drawn(8, 12, 16, 16, seed=step))
    z = drawn(8, 12, 16, 16, seed=99)
    opened = gate.eval()(z).opened
    assert float(gate.router(z.movedim(1, -1)).argmax(dim=-1).float().mean()) < 0.1
    assert float(opened.mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(gate(z).opened, opened)


def test_indices_hold_the_gate_of_the_encoder() -> None:
    z, images = drawn(2, 12, 4, 4), drawn(2, 1, 16, 16).clamp(-1, 1)
    posterior = DiagonalGaussian(z, drawn(2, 12, 4, 4, seed=1))
    for gate in (EntropyGate(threshold=2.0), VarianceGate(threshold=0.4), PosteriorGate(threshold=0.0)):
        opened = gate(z, posterior, images).opened.bool()
        assert 0 < int(opened.sum()) < opened.numel()
        assert torch.equal(two(gate).opened(two(gate)(z, posterior, images).indices), opened)


def test_the_scores_by_hand() -> None:
    images = torch.tensor([-1.0, 1.0, 0.5, 0.5]).view(1, 1, 1, 4)
    z = torch.zeros(1, 2, 1, 2)
    assert VarianceGate().score(z, None, images).flatten().tolist() == [1.0, 0.0]
    color = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)  # of one color throughout
    assert VarianceGate().score(z, None, color).flatten().tolist() == [0.0, 0.0]
    assert float(content(color, z.shape[2:], z).sum()) == 0
    logvar = torch.tensor([[-2.0, 1.0], [-4.0, 3.0]]).view(1, 2, 1, 2)
    assert PosteriorGate().score(z, DiagonalGaussian(z, logvar), None).flatten().tolist() == [3.0, -2.0]


class Given(ThresholdGate):
    """Scores as the latent's first channel has them."""

    def score(self, z: Tensor, posterior: object, images: Tensor | None) -> Tensor:
        return z[:, 0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("shape", ["normal", "lognormal", "far"])
def test_the_threshold_finds_its_share(share: float, shape: str) -> None:
    gate, draws = Given(share=share), torch.Generator().manual_seed(0)

    def scores() -> Tensor:
        z = torch.randn(8, 1, 16, 16, generator=draws)
        return {"normal": z, "lognormal": z.exp(), "far": 1000 + 0.01 * z}[shape]

    for _ in range(30):
        gate(scores())
    opened = torch.stack([gate.eval()(scores()).opened for _ in range(10)])
    assert float(opened.mean()) == pytest.approx(share, abs=0.03)


def test_the_share_is_of_what_has_content() -> None:
    """Three quarters of each picture are black; half of the rest is opened, an eighth of all cells, and no black."""
    gate, draws = VarianceGate(share=0.5), torch.Generator().manual_seed(0)

    def images() -> Tensor:
        found = -torch.ones(8, 1, 32, 32)
        # Cells of different contrast.
        contrast = torch.rand(8, 1, 8, 2, generator=draws).repeat_interleave(4, 2).repeat_interleave(4, 3)
        found[..., :8] = contrast * (2 * torch.rand(8, 1, 32, 8, generator=draws) - 1)
        return found

    z = torch.zeros(8, 12, 8, 8)
    for _ in range(30):
        gate(z, None, images())
    opened = torch.cat([gate.eval()(z, None, images()).opened for _ in range(20)])
    assert float(opened.mean()) == pytest.approx(0.125, abs=0.015)
    assert float(opened[..., 2:].sum()) == 0


def test_a_batch_without_content_moves_nothing_and_a_fixed_threshold_stays() -> None:
    z, black = torch.zeros(2, 12, 4, 4), -torch.ones(2, 1, 16, 16)
    gate = VarianceGate()
    gate(z, None, black)
    assert (gate.threshold.item(), gate.updates.item()) == (0.0, 0.0)
    fixed = VarianceGate(threshold=0.25)
    fixed(z, None, drawn(2, 1, 16, 16))
    assert (fixed.threshold.item(), fixed.updates.item()) == (0.25, 0.0)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=50, unique=True), st.integers(0, 49), st.data())
@settings(max_examples=60, deadline=None)
def test_the_threshold_of_a_batch_by_sorting(scores: list[float], num_black: int, data: st.DataObject) -> None:
    """As many scores lie above it as the share of the cells with content, where scores are apart."""
    ordered = sorted(scores)
    span = ordered[-1] - ordered[0]
    num_content = max(1, len(scores) - num_black)
    has_content = torch.cat([torch.ones(num_content), torch.zeros(len(scores) - num_content)])
    share = data.draw(st.floats(0.01, 0.99))
    found, count = threshold_of_share(torch.tensor(scores), has_content, share=share)
    assert count.item() == num_content
    wanted = math.floor(share * num_content + 1e-9)
    # Scores that lie between the threshold and the exact one are nearer than it is found.
    slack = 2 * span / 63**3
    assert sum(score > found.item() + slack for score in scores) <= wanted
    assert sum(score > found.item() - slack for score in scores) >= wanted


def test_a_threshold_follows_scores_that_drift() -> None:
    gate, draws = Given(share=0.5), torch.Generator().manual_seed(0)
    for step in range(60):
        gate(torch.randn(8, 1, 16, 16, generator=draws) + 0.02 * step)
    opened = gate.eval()(torch.randn(8, 1, 16, 16, generator=draws) + 0.02 * 60).opened
    # It is behind by decay / (1 - decay) steps of 0.02 and the one that is to come: 0.2 standard deviations.
    assert float(opened.mean()) == pytest.approx(0.579, abs=0.03)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_a_batch_in_parts_moves_the_threshold_once(sizes: list[int]) -> None:
    whole, parts = two(Given(share=0.3)), two(Given(share=0.3))
    z = drawn(sum(sizes), 12, 2, 2)
    for _ in range(2):
        whole(z)
        with parts.one_update():
            for part in z.split(sizes):
                parts(part)
    torch.testing.assert_close(parts.gate.threshold, whole.gate.threshold)
    assert parts.gate.updates.item() == 2


def test_without_what_they_need_gates_open_or_say_so() -> None:
    z = drawn(1, 12, 2, 2)
    assert EntropyGate()(z).opened is None
    assert VarianceGate()(z).opened is None
    gate = PosteriorGate()
    with pytest.raises(VaevqMedError, match="a PosteriorGate needs the encoder's posterior; found none"):
        gate(z)
    assert gate.eval()(z).opened is None


def test_a_score_that_is_no_number_does_not_stay_in_the_threshold() -> None:
    gate, z = Given(share=0.5), drawn(4, 1, 8, 8)
    gate(z)
    before = gate.threshold.clone()
    gate(z.clone().index_fill_(0, torch.tensor(1), math.nan))
    gate(z.clone().index_fill_(0, torch.tensor(1), math.inf))
    assert torch.equal(gate.threshold, before)
    assert gate.updates.item() == 1
    gate(z + 1)
    assert float(gate.threshold) > float(before)


def test_a_router_of_other_cells_than_the_quantizers_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="embedding_dim times its cell_size is 24; expected the quantizer's, 12"):
        two(LearnedGate(embedding_dim=3, cell_size=8))


def test_options_out_of_range_are_refused() -> None:
    for threshold in (math.nan, math.inf, "0.5"):
        with pytest.raises(VaevqMedError, match=f"threshold is {threshold!r}; expected a finite number, or None"):
            VarianceGate(threshold=threshold)  # type: ignore[arg-type]
    for share in (math.nan, "0.5"):
        with pytest.raises(VaevqMedError, match=f"share is {share!r}; expected a number"):
            PosteriorGate(share=share)  # type: ignore[arg-type]
    with pytest.raises(VaevqMedError, match=r"share is 1.5; expected a number in \[0, 1\]"):
        VarianceGate(share=1.5)
    with pytest.raises(VaevqMedError, match=r"decay is 1; expected a number in \[0, 1\)"):
        VarianceGate(decay=1)
    with pytest.raises(VaevqMedError, match="temperature is 0; expected above 0"):
        LearnedGate(embedding_dim=4, temperature=0)
