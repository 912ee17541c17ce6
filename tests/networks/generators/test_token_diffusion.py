"""Token diffusion on toys whose bound is known, and its losses by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators import token_diffusion
from vaevq_med.networks.generators.corruption import PROCESSES
from vaevq_med.networks.generators.token_diffusion import TokenDiffusion

SIZES: dict[str, Any] = {"width": 8, "depth": 1, "num_heads": 2}
NO_DROPOUT = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout", "label_dropout"), 0.0)


class Marginals(TokenDiffusion):
    """Independent tokens, whose distributions it knows."""

    table: Tensor

    def features(self, tokens: Tensor, labels: Tensor | None, times: Tensor) -> Tensor:
        return self.table.expand(len(tokens), -1, -1)


class EqualBits(TokenDiffusion):
    """Two bits that are equal and fair, and the exact conditional of each given the corrupted pair."""

    def features(self, tokens: Tensor, labels: Tensor | None, times: Tensor) -> Tensor:
        other = tokens.flip(1)
        if self.corruption.replaces:
            rows = self.corruption.log_evidence(
                other.flatten(), times[:, None].expand_as(other).flatten(), torch.zeros(other.numel(), 2)
            )
            return rows.view(len(tokens), 2, 2)
        return 60.0 * (F.one_hot(other.clamp_max(1), 2) * (other < 2)[..., None]).float()


def known(kind: type[TokenDiffusion], process: str, **options: Any) -> Any:
    """A network whose features are the logits."""
    network = kind(**{"grid_size": (1, 2), "process": process, **SIZES, **options}).eval()
    network.heads = torch.nn.ModuleList(torch.nn.Identity() for _ in network.heads)
    return network


def toy(**options: Any) -> TokenDiffusion:
    """A network whose weights, heads and norms included, are far from their start."""
    torch.manual_seed(0)
    network = TokenDiffusion(**{"num_embeddings": 5, "grid_size": (2, 3), "num_classes": 3, **SIZES, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network.eval()


def indices(network: TokenDiffusion, batch: int = 3) -> Tensor:
    shape = (batch, *network.grid_size, network.num_codebooks)
    return torch.randint(network.num_embeddings, shape, generator=torch.Generator().manual_seed(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the bound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("num_steps", [2, 12])
def test_the_bound_of_independent_tokens_is_their_information(process: str, num_steps: int) -> None:
    """Whatever the number of steps: the steps back are exact, since there is nothing between tokens to lose."""
    network = known(Marginals, process, num_embeddings=3, num_steps=num_steps)
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    network.table = probabilities.log()
    image = torch.tensor([0, 1]).view(1, 1, 2, 1)
    information = -(math.log(0.7) + math.log(0.1)) / 2
    found = network.bound(image.expand(60_000, 1, 2, 1), generator=generator())
    assert found.item() == pytest.approx(information, rel=0.03)


def factorized_bound(process: str, num_steps: int) -> float:
    """The bound in nats of two equal fair bits with exact conditionals: every pair at every time, by matrices."""
    size = 3

    def share(t: int) -> tuple[float, float]:
        if process == "uniform":
            return (math.cos(math.pi / 2 * t / num_steps) ** 2 if t < num_steps else 0.0), 0.0
        return 1 - t / num_steps, {"absorbing": 1.0, "mask_replace": 0.9}[process] * t / num_steps

    def matrix(kept: float, masked: float) -> np.ndarray:
        found = np.full((size, size), (1 - kept - masked) / 2)
        found[[0, 1], [0, 1]] += kept
        found[:2, 2], found[2] = masked, [0, 0, 1]
        return found

    total = 0.0
    for t in range(1, num_steps + 1):
        (kept, masked), (before, masked_before) = share(t), share(t - 1)
        step = matrix(kept / before, 1 - (1 - masked) / (1 - masked_before))
        now, earlier = matrix(kept, masked), matrix(before, masked_before)
        for pair in itertools.product(range(size), repeat=2):
            chance = now[0, pair[0]] * now[0, pair[1]]  # both bits are 0
            if chance < 1e-15:
                continue
            belief = now[:2, pair[0]] * now[:2, pair[1]]
            belief = belief / belief.sum()
            for token in pair:
                backs = [earlier[bit] * step[:, token] for bit in (0, 1)]
                backs = [back / max(back.sum(), 1e-300) for back in backs]
                true, model = backs[0], belief @ np.array(backs)
                some = true > 1e-15
                total += chance * float((true[some] * np.log(true[some] / model[some])).sum())
    return total


@pytest.mark.parametrize("num_steps", [2, 8])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_bound_of_two_equal_bits(process: str, num_steps: int) -> None:
    """Of ``absorbing`` it is ``log 2 (1 + 1 / T)``: what drawing both at a step costs."""
    expected = factorized_bound(process, num_steps)
    if process == "absorbing":
        assert expected == pytest.approx(math.log(2) * (1 + 1 / num_steps))
    network = known(EqualBits, process, num_embeddings=2, num_steps=num_steps)
    found = network.bound(torch.zeros(60_000, 1, 2, 1, dtype=torch.int64), generator=generator())
    assert 2 * found.item() == pytest.approx(expected, rel=0.03)
    assert expected > math.log(2)


@pytest.mark.parametrize("process", PROCESSES)
def test_an_untrained_network_bounds_by_log_k(process: str) -> None:
    network = TokenDiffusion(
        num_embeddings=16, grid_size=(2, 2), process=process, num_steps=20, num_codebooks=2, **SIZES
    )
    drawn = torch.randint(16, (8192, 2, 2, 2), generator=generator(1))
    assert network.bound(drawn, generator=generator()).item() == pytest.approx(math.log(16), rel=0.02)
    tokens = torch.full((1, 8), 16)
    assert network.train()(tokens).exp().max().item() == pytest.approx(1 / 16)


def test_the_bound_is_the_same_whatever_is_trained() -> None:
    found = []
    for objective in ("bound", "reweighted", "masked"):
        network = toy(objective=objective)
        found.append(network.bound(indices(network), torch.tensor([0, 1, 2]), generator=generator()).item())
    assert found[0] == found[1] == found[2]


# --- what is trained ----------------------------------------------------------------------------------


def cross_entropies(network: TokenDiffusion, tokens: Tensor, corrupted: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(network(corrupted, labels).flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_the_losses_of_masks_by_hand(num_codebooks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 1, 3])
    network = toy(num_steps=4, num_codebooks=num_codebooks)
    tokens = indices(network).flatten(1)
    times = torch.tensor([1, 3, 4])
    hides = torch.rand(tokens.shape, generator=generator(3)) < 0.5
    corrupted = torch.where(hides, 5, tokens)
    monkeypatch.setattr(token_diffusion, "_spread", lambda tokens, generator: (times - 0.5) / 4)
    monkeypatch.setattr(network.corruption, "corrupt", lambda tokens, times, generator: corrupted)
    costs = cross_entropies(network, tokens, corrupted, labels) * hides
    wanted = {
        "bound": (costs * (4 / times)[:, None]).mean(),
        "reweighted": (costs * (1 - times / 4)[:, None]).mean(),
    }
    for objective, expected in wanted.items():
        network.objective = objective
        torch.testing.assert_close(network.loss(indices(network), labels), expected)
    torch.testing.assert_close(network.bound(indices(network), labels), wanted["bound"])
    network.objective, network.auxiliary_weight = "bound", 0.1
    # The auxiliary term is over every token, and in `absorbing` the others are known.
    auxiliary = 0.1 * 4 * (cross_entropies(network, tokens, corrupted, labels) * (2 - times / 4)[:, None]).mean()
    torch.testing.assert_close(network.loss(indices(network), labels), wanted["bound"] + auxiliary)


def test_the_loss_of_maskgit_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    network = toy(objective="masked", label_smoothing=0.1)
    tokens, labels = indices(network).flatten(1), torch.tensor([0, 1, 3])
    hides = torch.rand(tokens.shape, generator=generator(3)) < 0.5
    monkeypatch.setattr(token_diffusion, "_hidden_at_random", lambda tokens, generator: hides)
    logs = network(torch.where(hides, 5, tokens), labels)
    smoothed = -0.9 * logs.gather(-1, tokens[..., None])[..., 0] - 0.1 * logs.mean(dim=-1)
    torch.testing.assert_close(network.loss(indices(network), labels), smoothed[hides].mean())


def test_the_share_of_masks_is_a_cosine_of_what_is_uniform() -> None:
    tokens = torch.zeros(2000, 100, dtype=torch.int64)
    counts = token_diffusion._hidden_at_random(tokens, generator()).sum(dim=1)
    assert counts.min() >= 1
    ordered = counts.sort(descending=True).values
    expected = (100 * np.cos(np.pi / 2 * (np.arange(2000) + 0.5) / 2000)).clip(1)
    np.testing.assert_allclose(ordered.numpy(), expected - 0.5, atol=0.6)
    assert token_diffusion._hidden_at_random(tokens[:, :1], generator()).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_losses_in_parts_are_the_same(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = toy(process=process, num_steps=6, num_codebooks=2)
    parameters = [*network.parameters()]
    whole = network.loss(indices(network), torch.tensor([0, 1, 2]), generator=generator())
    wanted = torch.autograd.grad(whole, parameters)
    monkeypatch.setattr(token_diffusion, "LOGITS_AT_ONCE", 4 * 5)
    parts = network.loss(indices(network), torch.tensor([0, 1, 2]), generator=generator())
    torch.testing.assert_close(parts, whole)
    for (name, _), own, other in zip(
        network.named_parameters(), torch.autograd.grad(parts, parameters), wanted, strict=True
    ):
        assert own.any(), name
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_few_patterns_are_learned(process: str) -> None:
    """Two images of four tokens, of which one token tells the rest: the optimum is near ``log 2 / 4`` nats a token."""
    torch.manual_seed(0)
    network = TokenDiffusion(
        num_embeddings=4, grid_size=(2, 2), width=16, depth=1, num_heads=2, process=process, num_steps=20, **NO_DROPOUT
    )
    patterns = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]]).view(2, 2, 2, 1).repeat(32, 1, 1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(100):
        optimizer.zero_grad()
        network.loss(patterns, generator=generator(step)).backward()
        optimizer.step()
    bound = network.eval().bound(patterns.repeat(20, 1, 1, 1), generator=generator()).item()
    assert 0.97 * math.log(2) / 4 <= bound < 0.72 * math.log(4)


# --- the network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_a_token_is_predicted_from_all_others_and_the_label(process: str) -> None:
    network = toy(process=process, num_steps=6, num_codebooks=2)
    tokens = indices(network, batch=1).flatten(1)
    times, labels = torch.tensor([3]), torch.tensor([1])
    found = network(tokens, labels, times)
    assert found.shape == (1, 12, 5)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(1, 12))
    for place in (0, 5, 11):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 5
        moved = (network(changed, labels, times) - found).abs().amax(dim=-1)[0]
        assert (moved > 1e-5).all()
    assert not torch.allclose(network(tokens, torch.tensor([2]), times), found, atol=1e-4)
    torch.testing.assert_close(network(tokens, None, times), network(tokens, torch.tensor([3]), times))
    sees_time = not torch.allclose(network(tokens, labels, torch.tensor([4])), found, atol=1e-4)
    assert sees_time == (process != "absorbing")


def test_labels_are_dropped_in_training_alone() -> None:
    network = toy(**{**NO_DROPOUT, "label_dropout": 0.5}, objective="masked")
    many, labels = indices(network, batch=20), torch.arange(20) % 3
    drawn = torch.rand(20, generator=generator(7)) < 0.5
    kept = network.loss(many, labels, generator=generator(7))
    source = generator(7)
    torch.rand(20, generator=source)
    by_hand = network.loss(many, torch.where(drawn, 3, labels), generator=source)
    torch.testing.assert_close(network.train().loss(many, labels, generator=generator(7)), by_hand)
    assert not torch.allclose(kept, by_hand)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"process": "noise"}, "process is 'noise'; expected one of absorbing"),
        ({"objective": "elbo"}, "objective is 'elbo'; expected one of bound, reweighted, masked"),
        ({"objective": "masked", "process": "uniform"}, "objective is 'masked' with the process 'uniform'; expected"),
        ({"auxiliary_weight": -1}, "auxiliary_weight is -1; expected 0 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected from 0 to below 1"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1 with the objective 'bound'; expected 0, as 'masked' alone"),
        ({"auxiliary_weight": 0.1, "objective": "masked"}, "auxiliary_weight is 0.1 with the objective 'masked'; exp"),
        ({"auxiliary_weight": 1, "objective": "reweighted"}, "auxiliary_weight is 1 with the objective 'reweighted'"),
        ({"auxiliary_weight": math.inf}, "auxiliary_weight is inf; expected 0 or more"),
        ({"num_steps": 2.5}, "num_steps is 2.5; expected a whole number, 2 or more"),
        ({"num_steps": True}, "num_steps is True; expected a whole number, 2 or more"),
        ({"width": 10}, "width is 10 with num_heads 2; expected a multiple of 4"),
        ({"num_classes": -1}, "num_classes is -1; expected 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(VaevqMedError, match=complaint):
        toy(**options)


def test_indices_that_do_not_fit_are_refused() -> None:
    network = toy()
    with pytest.raises(VaevqMedError, match=r"indices have shape \(1, 3, 2, 1\); expected \[B, 2, 3, 1\]"):
        network.loss(torch.zeros(1, 3, 2, 1, dtype=torch.int64))
    with pytest.raises(VaevqMedError, match="indices range from 5 to 5; expected within 0 to 4"):
        network.bound(torch.full((1, 2, 3, 1), 5))
