"""FSQ and iFSQ: by hand, every index and back, the use of the bins, projection, refusals, a peer and the bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundles import evaluation_overrides, run_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.dcr import DCRLoss
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import FSQ, IFSQ


def column(*channels: float) -> torch.Tensor:
    """One position."""
    return torch.tensor(channels).view(1, -1, 1, 1)


def test_an_even_number_of_values_by_hand() -> None:
    # L = 4: h = 1.5015, o = 0.5, s = atanh(0.5 / 1.5015) = 0.3462.
    # z = 1: 1.5015 tanh(1.3462) - 0.5 = 0.811, to 1; z = -1: 1.5015 tanh(-0.6538) - 0.5 = -1.362, to -1.
    # z = 9: 1.0015, to 1; z = -9: -2.0015, to -2; z = 0: 0. Each divided by 2.
    quantizer = FSQ(levels=[4] * 5)
    z = column(0.0, 1.0, -1.0, 9.0, -9.0).requires_grad_()
    output = quantizer(z)
    assert output.codes.flatten().tolist() == [0.0, 0.5, -0.5, 0.5, -1.0]
    # The digits are 2, 3, 1, 3, 0; the first counts ones.
    assert output.indices.tolist() == [[[[2 + 3 * 4 + 1 * 16 + 3 * 64]]]]
    assert output.losses == {}
    (gradient,) = torch.autograd.grad(output.quantized.sum(), z)
    shift = math.atanh(0.5 / 1.5015)
    expected = [1.5015 / 2 * (1 - math.tanh(value + shift) ** 2) for value in (0.0, 1.0, -1.0, 9.0, -9.0)]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_an_odd_number_of_values_by_hand() -> None:
    # L = 5: 2.002 tanh(0.8) = 1.329, to 1; 2.002 tanh(-1.5) = -1.812, to -2. Each divided by 2.
    output = FSQ(levels=[5, 5])(column(0.8, -1.5))
    assert output.codes.flatten().tolist() == [0.5, -1.0]
    assert output.indices.item() == 3 + 0 * 5


def test_ifsq_by_hand() -> None:
    # L = 7: 3 (2 sigmoid(1.6) - 1) = 1.992, to 2; 3 (2 sigmoid(-0.32) - 1) = -0.476, to 0. Each divided by 3.
    z = column(1.0, -0.2).requires_grad_()
    output = IFSQ(levels=[7, 7])(z)
    assert output.codes.flatten().tolist() == pytest.approx([2 / 3, 0.0])
    assert output.indices.item() == 5 + 3 * 7
    (gradient,) = torch.autograd.grad(output.quantized.sum(), z)
    slopes = [3.2 * p * (1 - p) for p in (1 / (1 + math.exp(-1.6)), 1 / (1 + math.exp(0.32)))]
    assert gradient.flatten().tolist() == pytest.approx(slopes)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from([FSQ, IFSQ]))
def test_every_index_has_its_digits(data: st.DataObject, kind: type[FSQ]) -> None:
    values = st.integers(3, 40) if kind is FSQ else st.integers(1, 20).map(lambda half: 2 * half + 1)
    levels = data.draw(st.lists(values, min_size=1, max_size=8))
    quantizer = kind(levels=levels)
    chosen = data.draw(st.lists(st.integers(0, quantizer.num_embeddings - 1), min_size=1, max_size=20))
    indices = torch.tensor(chosen).view(1, 1, -1, 1)
    digits = quantizer.indices_to_digits(indices)
    expected = np.stack(np.unravel_index(np.array(chosen), levels, order="F"), axis=-1)
    assert np.array_equal(digits.numpy()[0, 0], expected)
    assert torch.equal(quantizer.digits_to_indices(digits), indices)
    halves = np.array([level // 2 for level in levels])
    codes = quantizer.indices_to_codes(indices).numpy()[0, :, 0].T
    np.testing.assert_allclose(codes, (expected - halves) / halves, rtol=1e-6)


@pytest.mark.parametrize("kind", [FSQ, IFSQ])
def test_every_code_is_reached(kind: type[FSQ]) -> None:
    quantizer = kind(levels=[5, 3, 7])
    axis = torch.linspace(-4, 4, 41)
    z = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).view(1, 3, 41 * 41, 41)
    assert len(quantizer(z).indices.unique()) == quantizer.num_embeddings == 105


@pytest.mark.parametrize("kind", [FSQ, IFSQ])
@pytest.mark.parametrize("level", [5, 1003])
def test_indices_stay_in_range(kind: type[FSQ], level: int) -> None:
    z = column(math.inf, -math.inf, math.nan, 1e30)
    quantizer = kind(levels=[level] * 4)
    digits = quantizer.indices_to_digits(quantizer(z).indices).flatten().tolist()
    assert digits == [level - 1, 0, level // 2, level - 1]


@pytest.mark.parametrize(("kind", "bits", "end"), [(FSQ, 4.057, 0.043), (IFSQ, 4.018, 0.016)])
def test_how_a_normal_latent_fills_the_bins(kind: type[FSQ], bits: float, end: float) -> None:
    """The masses of the 17 bins from their edges; iFSQ's entropy is not the larger, its end bins are the smaller."""
    edges = (np.arange(16) - 7.5) / 8
    inner = np.arctanh(edges / 1.001) if kind is FSQ else np.log((1 + edges) / (1 - edges)) / 1.6
    masses = np.diff(norm.cdf(inner), prepend=0, append=1)
    quantiles = norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    z = torch.tensor(quantiles, dtype=torch.float32).view(1, 1, 1000, 100)
    counts = torch.bincount(kind(levels=[17])(z).indices.flatten(), minlength=17).numpy()
    np.testing.assert_allclose(counts / 100_000, masses, atol=2e-5)
    assert -(masses * np.log2(masses)).sum() == pytest.approx(bits, abs=1e-3)
    assert masses[0] == pytest.approx(end, abs=1e-3)


def test_a_projection_frees_the_width() -> None:
    torch.manual_seed(0)
    quantizer = FSQ(levels=[8, 5], embedding_dim=6, projection=True)
    z = torch.randn(2, 6, 3, 4)
    output = quantizer(z)
    inner = FSQ(levels=[8, 5])(quantizer.project_in(z.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(output.indices, inner.indices)
    torch.testing.assert_close(output.codes, quantizer.project_out(inner.codes.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (FSQ, {"levels": []}, "levels are \\[\\]; expected one or more, each at least 3"),
        (FSQ, {"levels": [5, 2]}, "each at least 3"),
        (IFSQ, {"levels": [7, 8]}, "each odd and at least 3"),
        (FSQ, {"levels": [8, 5], "num_embeddings": 64}, "num_embeddings is 64; expected .* 40"),
        (FSQ, {"levels": [8, 5], "embedding_dim": 64}, "embedding_dim is 64; .* 2, or projection true"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind: type[FSQ], options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        kind(**options)


def test_dcr_says_that_there_is_no_codebook() -> None:
    z = torch.zeros(1, 2, 2, 2)
    output = TokenizerOutput(z, z, z, DiagonalGaussian(z, z), FSQ(levels=[5, 5])(z))
    with pytest.raises(VaevqMedError, match="needs an explicit codebook"):
        DCRLoss()(z, output)


@pytest.mark.peer
@pytest.mark.parametrize(("levels", "dim"), [([8, 8, 8, 6, 5], 5), ([7, 5, 4, 3], 4), ([8, 5, 5, 5], 16)])
def test_it_agrees_with_vector_quantize_pytorch(levels: list[int], dim: int) -> None:
    """Indices, codes, outputs and gradients. Intended differences: none."""
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.FSQ(levels, dim=dim)
    ours = FSQ(levels=levels, embedding_dim=dim, projection=dim != len(levels))
    ours.load_state_dict(theirs.state_dict())
    first = 2 * torch.randn(2, dim, 8, 8)
    first.requires_grad_()
    second = first.detach().clone().requires_grad_()
    quantized, indices = theirs(first)
    output = ours(second)
    assert len(indices.unique()) > 90
    assert torch.equal(output.indices.squeeze(-1), indices.long())
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(ours.indices_to_codes(output.indices), theirs.indices_to_codes(indices))
    direction = torch.randn(first.shape)
    of_ours = torch.autograd.grad(output.quantized, [second, *ours.parameters()], direction)
    of_theirs = torch.autograd.grad(quantized, [first, *theirs.parameters()], direction)
    for own, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(("overlay", "codes"), [("fsq", 15360), ("ifsq", 16807)])
def test_the_overlay_trains_and_evaluates(overlay: str, codes: int, toy_overrides: dict[str, Any]) -> None:
    kept = {key: value for key, value in toy_overrides.items() if not key.startswith("objective#adversarial")}
    for key in ("num_embeddings", "embedding_dim"):
        del kept[key]
    overrides = {**kept, "max_epochs": 1, "val_max_items": 4, "objective#adversarial": None}
    overrides["objective#weights#perceptual"] = 0.0
    parser = run_bundle("train.json", overrides, overlay, run_id="training")
    trainer = parser.get_parsed_content("train#trainer")
    assert trainer.state.iteration == 4
    assert set(trainer.state.terms) & {"kl", "rcs", "dcr", "codebook", "commitment"} == set()
    network = parser.get_parsed_content("network")
    assert network.num_embeddings == codes
    assert abs(network.quantizer.bits_per_position - 14) < 0.1
    evaluated = run_bundle("evaluate.json", evaluation_overrides(overrides), run_id="evaluating")
    assert evaluated.get_parsed_content("network").num_embeddings == codes
    record = json.loads((Path(overrides["output_dir"]) / "evaluation" / "test" / "metrics.json").read_text())
    assert 1 <= record["summary"]["overall"]["active_channels_relative"]["value"] <= network.embedding_dim
    assert "active_channels" not in record["summary"]["overall"]
