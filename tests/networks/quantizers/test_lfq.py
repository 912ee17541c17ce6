"""LFQ: by hand, its entropies against every code written out, their memory, a peer and the bundle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.bundles import evaluation_overrides, run_bundle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import LFQ
from vaevq_med.networks.quantizers.lfq import bit_entropies


def brute_force(latents: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both entropies from the N x K probabilities."""
    bits = latents.shape[1]
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=latents.dtype)] * bits).view(-1, bits)
    logs = torch.log_softmax(2 * latents @ codes.T / temperature, dim=1)
    mean = logs.exp().mean(dim=0)
    return -(logs.exp() * logs).sum(dim=1).mean(), torch.special.entr(mean).sum()


def test_by_hand() -> None:
    # P(+1) = sigmoid(4 z / T): with T = 2 and z = ln(3) / 2 it is 3/4, with z = -ln(3) / 2 1/4.
    one = math.log(3) / 2
    z = torch.tensor([[one, one], [one, -one]]).T.reshape(1, 2, 1, 2).requires_grad_()
    output = LFQ(num_embeddings=4, temperature=2.0)(z)
    # The first channel is the higher bit.
    assert output.indices.flatten().tolist() == [3, 2]
    assert output.codes[0, :, 0].T.tolist() == [[1.0, 1.0], [1.0, -1.0]]
    assert output.losses["commitment"].item() == pytest.approx(((1 - one) ** 2 * 4) / 4)
    # H(p) = 2 h(1/4) for both. The mean over both gives the second bit 1/2 and leaves it independent: h(1/4) + ln 2.
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert output.losses["entropy"].item() == pytest.approx(2 * quarter - (quarter + math.log(2)))
    # d/dz of mean((z - sign z)^2)
    (gradient,) = torch.autograd.grad(output.losses["commitment"], z)
    assert gradient[0, :, 0].T.flatten().tolist() == pytest.approx([(one - 1) / 2] * 3 + [(1 - one) / 2])


def test_zero_is_minus_one() -> None:
    output = LFQ(num_embeddings=8)(torch.tensor([0.0, 1e-30, -1e-30]).view(1, 3, 1, 1))
    assert output.codes.flatten().tolist() == [-1.0, 1.0, -1.0]
    assert output.indices.item() == 0b010


def test_a_codebook_per_bit_is_the_same_code_in_bits() -> None:
    """The bits of the one index, the highest first, of the same latents; everything else to the bit."""
    z = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    whole, apart = LFQ(num_embeddings=32), LFQ(num_embeddings=32, codebook_per_bit=True)
    assert (apart.num_embeddings, apart.num_codebooks, apart.bits_per_position) == (2, 5, whole.bits_per_position)
    one, bits = whole(z), apart(z)
    written = [[int(digit) for digit in f"{index:05b}"] for index in one.indices.flatten().tolist()]
    assert bits.indices.flatten(0, 2).tolist() == written
    assert torch.equal(bits.codes, one.codes)
    assert bits.losses == one.losses
    assert torch.equal(apart.indices_to_codes(bits.indices), one.codes)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.1, 4.0])
def test_entropies_are_those_of_every_code_written_out(bits: int, temperature: float) -> None:
    latents = torch.randn(50, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    found, expected = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    for own, other in zip(bit_entropies(found, temperature, bits), brute_force(expected, temperature), strict=True):
        torch.testing.assert_close(own, other)
        (of_own,) = torch.autograd.grad(own, found, retain_graph=True)
        (of_other,) = torch.autograd.grad(other, expected, retain_graph=True)
        torch.testing.assert_close(of_own, of_other)


def test_groups_of_bits_add_up_and_bound_the_entropy() -> None:
    torch.manual_seed(0)
    latents = torch.randn(40, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    whole = bit_entropies(latents, 1.0, 7)
    last = whole[1]
    for size in (4, 3, 1):
        each, mean = bit_entropies(latents, 1.0, size)
        assert each == whole[0]
        parts = [brute_force(part, 1.0)[1] for part in latents.split(size, dim=1)]
        torch.testing.assert_close(mean, torch.stack(parts).sum())
        assert mean > last
        last = mean


def test_sure_latents_have_finite_gradients() -> None:
    """At the published temperature most codes have probability 0 in fp32."""
    z = torch.randn(2, 14, 4, 4, generator=torch.Generator().manual_seed(0))
    z[0, :, 0, 0] = 0
    z.requires_grad_()
    entropy = LFQ(num_embeddings=2**14)(z).losses["entropy"]
    (gradient,) = torch.autograd.grad(entropy, z)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0
    # 31 latents fall on codes of their own; the one at 0 is spread over all of them.
    assert entropy.item() < 14 * math.log(2) / 32 - 31 / 32 * math.log(31)


def test_nothing_as_large_as_latents_times_codes_is_held() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor):
                    self.numel = max(self.numel, value.numel())
            return result

    quantizer, z = LFQ(num_embeddings=2**12), torch.randn(1, 12, 32, 32, requires_grad=True)
    with Largest() as largest:
        losses = quantizer(z).losses
        (losses["entropy"] + losses["commitment"]).backward()
    assert 1024 * 2**6 <= largest.numel < 1024 * 2**12 // 32
    assert z.grad is not None


def test_the_gradient_passes_straight_through_also_in_evaluation() -> None:
    quantizer = LFQ(num_embeddings=4).eval()
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    output = quantizer(z)
    assert torch.equal(output.quantized, z.sign())
    assert torch.equal(torch.autograd.grad(output.quantized.sum(), z)[0], torch.ones_like(z))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_embeddings": 1000}, "num_embeddings is 1000; expected a power of 2"),
        ({"num_embeddings": 1}, "expected a power of 2"),
        ({"num_embeddings": 16, "embedding_dim": 64}, "embedding_dim is 64; .* 4, or projection true"),
        ({"num_embeddings": 16, "temperature": 0.0}, "temperature is 0.0"),
        ({"num_embeddings": 16, "bits_per_group": 5}, "bits_per_group is 5; expected 1 to 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        LFQ(**options)


@pytest.mark.peer
@pytest.mark.parametrize(("bits", "dim", "scale"), [(4, 4, 0.2), (5, 10, 0.3)])
def test_it_agrees_with_vector_quantize_pytorch(bits: int, dim: int, scale: float) -> None:
    """Indices, codes, outputs, both entropies, commitment and gradients.

    Intended differences: the peer takes the logarithm of no probability below 1e-5, ours of any (so the latents are
    small and T is 1 here); it passes no gradient through the signs in evaluation; its losses are absent there.
    """
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.LFQ(dim=dim, codebook_size=2**bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    projection = dim != bits
    if projection:
        nn.init.zeros_(theirs.project_in.bias)
    ours = LFQ(num_embeddings=2**bits, embedding_dim=dim, temperature=1.0, projection=projection)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name.startswith("project")})
    first = (scale * torch.randn(2, dim, 6, 6)).requires_grad_()
    second = first.detach().clone().requires_grad_()
    (quantized, indices, loss), parts = theirs(first, inv_temperature=1.0, return_loss_breakdown=True)
    output = ours(second)
    assert len(indices.unique()) > 10
    assert torch.equal(output.indices.squeeze(-1), indices.long())
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(ours.indices_to_codes(output.indices), theirs.indices_to_codes(indices))
    torch.testing.assert_close(output.losses["entropy"], parts.per_sample_entropy - parts.batch_entropy)
    torch.testing.assert_close(output.losses["commitment"], parts.commitment)
    direction = torch.randn(first.shape)
    own_total = 0.1 * output.losses["entropy"] + 0.25 * output.losses["commitment"]
    of_ours = torch.autograd.grad((output.quantized * direction).sum() + own_total, [second, *ours.parameters()])
    of_theirs = torch.autograd.grad((quantized * direction).sum() + loss, [first, *theirs.parameters()])
    for own, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(own, other)


def test_the_overlay_trains_and_evaluates(toy_overrides: dict[str, Any]) -> None:
    kept = {key: value for key, value in toy_overrides.items() if not key.startswith("objective#adversarial")}
    for key in ("num_embeddings", "embedding_dim"):
        del kept[key]
    overrides = {**kept, "max_epochs": 1, "val_max_items": 4, "objective#adversarial": None}
    overrides["objective#weights#perceptual"] = 0.0
    parser = run_bundle("train.json", overrides, "lfq", run_id="training")
    terms = parser.get_parsed_content("train#trainer").state.terms
    assert {"reconstruction", "entropy", "commitment"} < set(terms)
    assert -14 * math.log(2) <= terms["entropy"] <= 14 * math.log(2)
    assert parser.get_parsed_content("network").quantizer.bits_per_position == 14
    evaluated = run_bundle("evaluate.json", evaluation_overrides(overrides), run_id="evaluating")
    assert evaluated.get_parsed_content("network").num_embeddings == 2**14
