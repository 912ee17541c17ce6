"""IBQ: by hand, the published form written out, its memory and the bundle. No peer package has the method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.bundles import evaluation_overrides, quick, run_bundle, train_and_evaluate
from helpers.memory import LargestTensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import IBQ, soft_assignment


def test_by_hand() -> None:
    quantizer = IBQ(num_embeddings=2, embedding_dim=1)
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[3.0], [1.0]]))
    # Logits 3 z and z: with z = ln(3) / 2, p = (3/4, 1/4). The codeword of the larger product is not the nearest one.
    z = torch.tensor(math.log(3) / 2).view(1, 1, 1, 1).requires_grad_()
    output = quantizer(z)
    assert output.indices.item() == 0
    assert output.quantized.item() == 3.0
    to_z, to_codebook = torch.autograd.grad(output.quantized, (z, quantizer.embedding), retain_graph=True)
    # dq/dz = sum_k p_k (e_k - m) e_k with m = 2.5; dq/de_k = p_k (e_k - m) z, and 1 for the chosen one.
    assert to_z.item() == pytest.approx(0.75 * 0.5 * 3 + 0.25 * -1.5 * 1)
    assert to_codebook.flatten().tolist() == pytest.approx([1 + 0.375 * z.item(), -0.375 * z.item()])
    # All three are (3 - z)^2, their gradients for z differ: -2 (3 - z), 0, and 2 (3 - z) (dq/dz - 1).
    gap = 3 - z.item()
    for name, slope in (("commitment", -2 * gap), ("codebook", 0.0), ("double_quantization", -0.5 * gap)):
        assert output.losses[name].item() == pytest.approx(gap**2)
        (gradient,) = torch.autograd.grad(output.losses[name], z, retain_graph=True, materialize_grads=True)
        assert gradient.item() == pytest.approx(slope, rel=1e-5)
    # One latent alone is its own mean.
    assert output.losses["entropy"].item() == pytest.approx(0, abs=1e-6)


def published(z: torch.Tensor, codebook: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weighted loss from the N x K one-hot vectors, with the published weights."""
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    logits = flat @ codebook.T
    soft = logits.softmax(dim=1)
    hard = F.one_hot(logits.argmax(dim=1), len(codebook)).to(soft.dtype)
    through, chosen = (hard - soft.detach() + soft) @ codebook, hard @ codebook
    loss = F.mse_loss(through, flat) + F.mse_loss(flat, chosen.detach()) + 0.25 * F.mse_loss(chosen, flat.detach())
    sharp = (logits / temperature).softmax(dim=1)
    entropy = torch.special.entr(sharp).sum(dim=1).mean() - torch.special.entr(sharp.mean(dim=0)).sum()
    return through.view(*z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2), loss + 0.05 * entropy


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_it_is_the_published_form(temperature: float) -> None:
    torch.manual_seed(0)
    quantizer = IBQ(num_embeddings=20, embedding_dim=4, entropy_temperature=temperature)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    output = quantizer(z)
    weights = {"double_quantization": 1.0, "commitment": 1.0, "codebook": 0.25, "entropy": 0.05}
    assert output.losses.keys() == weights.keys()
    loss = torch.stack([weight * output.losses[name] for name, weight in weights.items()]).sum()
    value, expected = published(z, quantizer.embedding, temperature)
    torch.testing.assert_close(output.quantized, value)
    torch.testing.assert_close(loss, expected)
    direction = torch.randn(z.shape)
    inputs = (z, quantizer.embedding)
    found = torch.autograd.grad((output.quantized * direction).sum() + loss, inputs)
    for own, other in zip(found, torch.autograd.grad((value * direction).sum() + expected, inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert bool((found[1].abs().sum(dim=1) > 0).all())


def test_nothing_as_large_as_latents_times_codewords_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soft_assignment._DEFAULT_CHUNK, "cpu", 2**15)
    quantizer, z = IBQ(num_embeddings=1024, embedding_dim=4), torch.randn(1, 4, 32, 64, requires_grad=True)
    with LargestTensor() as largest:
        output = quantizer(z)
        (output.quantized.sum() + torch.stack(list(output.losses.values())).sum()).backward()
    assert largest.elements == 64 * 1024  # 64 latents at least


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_embeddings": 0}, "num_embeddings is 0; expected at least 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature is 0.0; expected above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        IBQ(**{"num_embeddings": 8, "embedding_dim": 4, **options})


def test_the_overlay_trains_and_evaluates(toy_overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = quick(toy_overrides)
    trainer, _ = train_and_evaluate(overrides, "ibq")
    assert {"codebook", "commitment", "double_quantization", "entropy"} < set(trainer.state.terms)
    assert -math.log(32) <= trainer.state.terms["entropy"] <= math.log(32)
    # It has one way to decode; another is refused in a line.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_bundle("evaluate.json", {**evaluation_overrides(overrides), "readout": "hard"}, run_id="evaluating")
    assert capsys.readouterr().err == "vaevq-med: readout is 'hard'; expected None, the quantizer is IBQ\n"
