"""MGVQ: nested masking and revival by hand, anchors beside scipy, two processes, and the overlay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ddp_anchors
from helpers.bundles import quick, states_equal, train_and_evaluate
from helpers.memory import LargestTensor
from helpers.processes import run_in_two
from scipy.special import softmax

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import MGVQ, mgvq
from vaevq_med.networks.quantizers.mgvq import draw_anchors


def plain(*tables: list[float], **options: Any) -> MGVQ:
    """Groups of one channel with the codewords given, not normalized."""
    quantizer = MGVQ(
        num_embeddings=len(tables[0]),
        embedding_dim=len(tables),
        num_codebooks=len(tables),
        **{"normalize": False, "revival": False, **options},
    )
    quantizer.embedding.data.copy_(torch.tensor(tables).unsqueeze(-1))
    return quantizer


@pytest.fixture
def fixed_draw(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fix(u: float) -> None:
        monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(*shape, u) if shape[0] != 1 else torch.tensor([u]))

    return fix


@pytest.mark.parametrize(("u", "active"), [(0.0, 1), (0.19, 1), (0.25, 2), (0.35, 3), (0.4, 4), (0.9, 4)])
def test_one_draw_masks_the_last_groups(u: float, active: int, fixed_draw: Any) -> None:
    quantizer = plain([1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, -4.0], mask_probabilities=[0, 0.2, 0.3, 0.4])
    fixed_draw(u)
    z = torch.tensor([1.5, -1.0, 5.0, -4.0]).view(1, 4, 1, 1).requires_grad_()
    output = quantizer(z)
    codes = [1.0, -2.0, 3.0, -4.0]
    # What the losses read is not masked.
    assert output.codes.flatten().tolist() == codes
    assert output.quantized.flatten().tolist() == codes[:active] + [0.0] * (4 - active)
    squares = [0.25, 1.0, 4.0, 0.0]
    assert output.losses["codebook"].item() == pytest.approx(sum(squares[:active]) / active)
    assert output.losses["commitment"].item() == pytest.approx(sum(squares[:active]) / active)
    (to_z,) = torch.autograd.grad(output.quantized.sum() + output.losses["commitment"], z)
    assert to_z.flatten()[active:].tolist() == [0.0] * (4 - active)
    errors = torch.tensor([0.5, 1.0, 2.0, 0.0])[:active]
    torch.testing.assert_close(to_z.flatten()[:active], 1 + 2 * errors / active)


def test_nothing_is_masked_in_evaluation_nor_without_probabilities(fixed_draw: Any) -> None:
    fixed_draw(0.0)
    z = torch.ones(1, 2, 1, 1)
    masked = plain([1.0], [1.0], mask_probabilities=[0, 1])
    assert masked(z).quantized.flatten().tolist() == [1.0, 0.0]
    assert masked.eval()(z).quantized.flatten().tolist() == [1.0, 1.0]
    assert plain([1.0], [1.0])(z).quantized.flatten().tolist() == [1.0, 1.0]


def test_decoding_from_the_first_groups_is_what_masking_trained() -> None:
    quantizer = plain([1.0, -1.0], [2.0, -2.0], [3.0, -3.0])
    indices = torch.tensor([0, 1, 1]).view(1, 1, 1, 3)
    for active, expected in ((1, [1.0, 0.0, 0.0]), (2, [1.0, -2.0, 0.0]), (3, [1.0, -2.0, -3.0]), (None, [1, -2, -3])):
        assert quantizer.indices_to_codes(indices, num_active=active).flatten().tolist() == expected
    for bad in (0, 4):
        with pytest.raises(VaevqMedError, match=f"num_active is {bad}; expected 1 to 3"):
            quantizer.indices_to_codes(indices, num_active=bad)


def test_normalized_groups_by_hand() -> None:
    quantizer = MGVQ(num_embeddings=2, embedding_dim=4, num_codebooks=2).eval()
    quantizer.embedding.data.copy_(torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -2.0]]]))
    output = quantizer(torch.tensor([10.0, 0.0, 0.1, -0.2]).view(1, 4, 1, 1))
    assert output.indices.flatten().tolist() == [0, 1]
    torch.testing.assert_close(output.codes.flatten(), torch.tensor([0.6, 0.8, 0.0, -1.0]))
    # ||(1, 0) - (0.6, 0.8)||^2 = 0.8 and ||(1, -2) / sqrt 5 - (0, -1)||^2 = 2 - 4 / sqrt 5, over 4 elements.
    assert output.losses["commitment"].item() == pytest.approx((0.8 + 2 - 4 / math.sqrt(5)) / 4)


def test_revival_by_hand() -> None:
    quantizer = plain([3.0, -1.0], decay=0.99, revival=True)
    quantizer(torch.full((1, 1, 1, 1), 4.0))
    # P = (0.01, 0) and the only anchor is the latent: a = exp(-10 * 2 * P / 0.01 - 0.001).
    used, unused = math.exp(-20.001), math.exp(-0.001)
    torch.testing.assert_close(quantizer.usage, torch.tensor([[0.01, 0.0]]))
    expected = torch.tensor([3 + used, -1 + 5 * unused])
    torch.testing.assert_close(quantizer.embedding.detach().flatten(), expected, rtol=1e-6, atol=1e-6)
    quantizer(torch.full((1, 1, 1, 1), 4.0))
    # The second latent is nearest to the codeword that took the first one's place.
    torch.testing.assert_close(quantizer.usage, torch.tensor([[0.0099, 0.01]]))


def test_codewords_in_use_do_not_move() -> None:
    quantizer = plain([0.0, 1.0, 2.0, 3.0], revival=True)
    quantizer.usage.fill_(0.25)
    before = quantizer.embedding.detach().clone()
    quantizer(torch.tensor([0.1, 1.2, 2.1, 2.8]).view(1, 1, 2, 2))
    assert torch.equal(quantizer.embedding, before)


@pytest.mark.parametrize("normalize", [True, False])
def test_revival_leaves_the_gradients_of_the_step_alone(normalize: bool) -> None:
    z = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    gradients = []
    for revival in (False, True):
        torch.manual_seed(1)
        quantizer = MGVQ(num_embeddings=8, embedding_dim=6, num_codebooks=2, normalize=normalize, revival=revival)
        start = quantizer.embedding.detach().clone()
        output = quantizer(z)
        (output.losses["codebook"] + output.codebook.square().sum()).backward()
        gradients.append(quantizer.embedding.grad)
        assert torch.equal(quantizer.embedding, start) != revival
    assert torch.equal(*gradients)


def test_anchors_have_the_probabilities_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, codewords = torch.randn(7, 2, generator=generator), torch.randn(3, 2, generator=generator)
    distances = ((codewords[:, None] - latents).double() ** 2).sum(-1)
    expected = softmax(-distances.numpy(), axis=1)
    steps = 5000
    uniform = (torch.arange(steps) + 0.5) / steps
    for chunk in (2**21, 7 * 11):
        monkeypatch.setitem(mgvq._PROBABILITIES_AT_ONCE, "cpu", chunk)
        anchors = draw_anchors(latents, codewords.repeat_interleave(steps, 0), uniform.repeat(3)).view(3, steps, 2)
        for drawn, probabilities in zip(anchors, expected, strict=True):
            shares = [(drawn == latent).all(dim=1).double().mean().item() for latent in latents]
            assert shares == pytest.approx(probabilities.tolist(), abs=2 / steps)


def test_anchors_survive_extreme_draws_and_distances() -> None:
    latents = torch.tensor([[0.0], [1e4]])
    drawn = draw_anchors(latents, torch.tensor([[-1e6], [2e6], [0.0]]), torch.tensor([0.0, 1.0, 1.0]))
    assert drawn.flatten().tolist()[:2] == [0.0, 1e4]
    assert bool(torch.isin(drawn, latents).all())
    assert draw_anchors(latents, torch.zeros(0, 1), torch.zeros(0)).shape == (0, 1)


def test_revival_brings_a_collapsed_codebook_into_use() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 4, 8, 8)
    shares = []
    for revival in (False, True):
        quantizer = MGVQ(num_embeddings=32, embedding_dim=4, num_codebooks=2, normalize=False, revival=revival)
        quantizer.embedding.data[:] = 100.0
        quantizer.embedding.data[:, 0] = 0.0
        for _ in range(30):
            output = quantizer(z)
        shares.append(min(len(group.unique()) for group in output.indices.unbind(-1)) / 32)
    assert shares[0] == 1 / 32
    assert shares[1] > 0.7


def test_draws_repeat_with_the_generator() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        quantizer = MGVQ(num_embeddings=16, embedding_dim=8, num_codebooks=4, mask_probabilities=[0, 0.2, 0.3, 0.4])
        z = torch.randn(2, 8, 4, 4)
        torch.manual_seed(seed)
        for _ in range(3):
            quantizer(z)
        states.append(quantizer.state_dict())
    assert states_equal(states[0], states[1])
    assert not states_equal(states[0], states[2])


def test_no_tensor_of_the_size_of_all_distances_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mgvq._PROBABILITIES_AT_ONCE, "cpu", 2**16)
    positions, codewords = 4096, 1024
    quantizer = MGVQ(num_embeddings=codewords, embedding_dim=4, num_codebooks=2)
    z = torch.randn(1, 4, 64, 64, requires_grad=True)
    with LargestTensor() as largest:
        output = quantizer(z)
        (output.losses["codebook"] + output.quantized.sum()).backward()
    assert largest.elements < positions * codewords / 2


@pytest.mark.slow
def test_two_processes_train_the_codebooks_of_one(tmp_path: Path) -> None:
    first, second = run_in_two(ddp_anchors, tmp_path)
    one = ddp_anchors.train(0, slice(None))
    start = {name: quantizer.state_dict() for name, quantizer in ddp_anchors.quantizers().items()}
    assert bool(one["published"]["masked"].any())
    for name in one:
        assert states_equal(first[name], second[name]), name
        for key, value in one[name].items():
            torch.testing.assert_close(first[name][key], value, msg=lambda text, n=name, k=key: f"{n} {k}: {text}")
        assert not torch.equal(one[name]["embedding"], start[name]["embedding"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_probabilities": [0, 0.2]}, "expected 4 numbers"),
        ({"mask_probabilities": [0.1, 0.2, 0.3, 0.4]}, "from 0"),
        ({"mask_probabilities": [0, 0.3, 0.2, 0.4]}, "none below"),
        ({"mask_probabilities": [0, 0.2, 0.3, 1.4]}, "at most 1"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"embedding_dim": 6}, "a multiple of num_codebooks"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        MGVQ(**{"num_embeddings": 8, "embedding_dim": 8, **options})


def test_the_overlay_trains_and_evaluates(toy_overrides: dict[str, Any]) -> None:
    trainer, _ = train_and_evaluate({**quick(toy_overrides), "embedding_dim": 8}, "mgvq")
    quantizer = trainer.network.quantizer
    # A frequency that moved in each of four iterations from 0.
    torch.testing.assert_close(quantizer.usage.sum(dim=1), torch.full((4,), 1 - 0.99**4))
