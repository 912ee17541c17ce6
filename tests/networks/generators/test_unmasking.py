"""Drawing many tokens at a time: what each order reveals, what few steps cost, and what stays."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import qmc
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.base import Wanted
from vaevq_med.networks.generators.corruption import PROCESSES, Corruption
from vaevq_med.networks.generators.drawing import TokenRule
from vaevq_med.networks.generators.token_diffusion import TokenDiffusion
from vaevq_med.networks.generators.unmasking import ORDERS, Reveal, generate_tokens, halton_order, unmasking_draws

SIZES: dict[str, Any] = {"width": 8, "depth": 1, "num_heads": 2}


class EqualBits(TokenDiffusion):
    """Two bits that are equal and fair, and the exact conditional of each given the corrupted pair."""

    def features(self, tokens: Tensor, labels: Tensor | None, times: Tensor) -> Tensor:
        other = tokens.flip(1)
        if self.corruption.replaces:
            rows = times[:, None].expand_as(other).flatten()
            evidence = self.corruption.log_evidence(other.flatten(), rows, torch.zeros(other.numel(), 2))
            return evidence.view(len(tokens), 2, 2)
        return 60.0 * (F.one_hot(other.clamp_max(1), 2) * (other < 2)[..., None]).float()


class Apart(TokenDiffusion):
    """Tokens of known probabilities ``[N, K]``, whatever the others are."""

    probabilities: Tensor
    seen: list[Tensor]

    def features(self, tokens: Tensor, labels: Tensor | None, times: Tensor) -> Tensor:
        self.seen.append(tokens.clone())
        return self.probabilities.log().expand(len(tokens), -1, -1)


def apart(probabilities: Tensor, grid: tuple[int, int], num_codebooks: int = 1) -> Apart:
    sizes = {"num_embeddings": probabilities.shape[1], "grid_size": grid, "num_codebooks": num_codebooks, **SIZES}
    network = Apart(num_steps=8, **sizes)
    network.heads = torch.nn.ModuleList(torch.nn.Identity() for _ in network.heads)
    network.probabilities, network.seen = probabilities, []
    return network.eval()


def spread(*spreads: int, grid: tuple[int, int], num_codebooks: int = 1) -> Apart:
    """Position i is fair over ``spreads[i]`` codewords, so that ``log p`` of what is drawn is minus its logarithm."""
    widths = torch.tensor(spreads)[:, None]
    return apart((torch.arange(max(spreads)) < widths) / widths, grid, num_codebooks)


def revealed_at(network: Apart, order: str, steps: int, count: int = 1, **options: float) -> Tensor:
    """The step at which each token was revealed, from 1, ``[count, N]``."""
    generate_tokens(
        network,
        reveal=Reveal(network.corruption, order, steps, **options),
        rule=TokenRule(),
        num_samples=count,
        generator=torch.Generator().manual_seed(0),
    )
    return torch.stack([tokens == network.corruption.mask for tokens in network.seen]).sum(dim=0)


def equal_bits(process: str = "absorbing", num_steps: int = 8) -> EqualBits:
    network = EqualBits(num_embeddings=2, grid_size=(1, 2), process=process, num_steps=num_steps, **SIZES).eval()
    network.heads = torch.nn.ModuleList([torch.nn.Identity()])
    return network


def toy(process: str = "absorbing", num_codebooks: int = 1, **options: Any) -> TokenDiffusion:
    torch.manual_seed(0)
    sizes = {"num_embeddings": 5, "grid_size": (3, 4), "num_classes": 3, "num_steps": 12, **SIZES, **options}
    network = TokenDiffusion(process=process, num_codebooks=num_codebooks, **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network.eval()


def sources(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(
    network: TokenDiffusion, seeds: list[int], order: str = "auto", steps: int | None = None, **more: Any
) -> Tensor:
    labels = torch.arange(len(seeds)) % 3 if network.num_classes else None
    return generate_tokens(
        network,
        reveal=Reveal(network.corruption, order, steps),
        rule=more.pop("rule", TokenRule()),
        labels=more.pop("labels", labels),
        num_samples=len(seeds),
        generator=sources(*seeds),
        **more,
    )


def mismatch(network: EqualBits, order: str, steps: int, count: int = 20_000) -> float:
    found = generate_tokens(
        network,
        reveal=Reveal(network.corruption, order, steps),
        rule=TokenRule(),
        num_samples=count,
        generator=torch.Generator().manual_seed(0),
    ).flatten(1)
    assert found.float().mean().item() == pytest.approx(0.5, abs=0.02)
    return (found[:, 0] != found[:, 1]).double().mean().item()


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_few_ancestral_steps_draw_equal_bits_that_differ(steps: int) -> None:
    """Both are revealed at the same of S steps with probability 1/S, and differ then in one of two cases."""
    assert mismatch(equal_bits(), "ancestral", steps) == pytest.approx(1 / (2 * steps), abs=0.012)


@pytest.mark.parametrize("order", ["confidence", "halton", "purity"])
def test_one_token_a_step_is_exact(order: str) -> None:
    network = equal_bits()
    assert mismatch(network, order, 2, 2000) == 0.0
    assert mismatch(network, order, 1) == pytest.approx(0.5, abs=0.015)


def exact_mismatch(process: str, num_steps: int, steps: int) -> float:
    """Of :class:`EqualBits`: every pair of corrupted tokens at every step, by the matrices of the process."""
    kept = 1 - np.arange(num_steps + 1) / num_steps
    masked = np.zeros_like(kept)
    if process == "uniform":
        kept = np.cos(np.pi / 2 * (1 - kept)) ** 2
    else:
        masked = {"absorbing": 1.0, "mask_replace": 0.9}[process] * (1 - kept)
    kept[-1] = 0.0
    one_step = []
    for t in range(1, num_steps + 1):
        keep, hide = kept[t] / kept[t - 1], 1 - (1 - masked[t]) / (1 - masked[t - 1])
        other = (1 - keep - hide) / 2
        one_step.append(np.array([[keep + other, other, hide], [other, keep + other, hide], [0, 0, 1]]))

    def between(start: int, end: int) -> np.ndarray:
        found = np.eye(3)
        for matrix in one_step[start:end]:
            found = found @ matrix
        return found

    times = [num_steps * (steps - step) // steps for step in range(steps + 1)]
    end = between(0, num_steps)[0]
    pairs = np.outer(end, end)
    for time, earlier in itertools.pairwise(times):
        now, before, step = between(0, time), between(0, earlier), between(earlier, time)
        after = np.zeros((3, 3))
        for first, second in itertools.product(range(3), repeat=2):
            if pairs[first, second] < 1e-15:
                continue
            belief = now[:2, first] * now[:2, second]
            if not belief.any():  # revealed at one step, unlike each other: they stay
                after[first, second] += pairs[first, second]
                continue
            backs = []
            for token in (first, second):
                each = np.array([before[bit] * step[:, token] for bit in (0, 1)])
                each /= each.sum(axis=1, keepdims=True).clip(1e-300)
                backs.append(belief @ each / belief.sum())
            after += pairs[first, second] * np.outer(*backs)
        pairs = after
    assert pairs.sum() == pytest.approx(1.0)
    return float(pairs[0, 1] + pairs[1, 0])


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("process", PROCESSES)
def test_ancestral_steps_draw_equal_bits_that_differ_as_often_as_their_matrices_say(process: str, steps: int) -> None:
    """A step draws the two independently of each other; where tokens are replaced, later steps mend some of that."""
    expected, count = exact_mismatch(process, 8, steps), 40_000
    if process == "absorbing":
        shares = np.diff([8 * step // steps for step in range(steps + 1)]) / 8
        assert expected == pytest.approx((shares**2).sum() / 2)
    found = mismatch(equal_bits(process), "ancestral", steps, count)
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_the_surest_are_revealed_first() -> None:
    """Without noise: of twelve tokens 1, 3, 4 and 4, in order of the codewords that they may be."""
    spreads = (7, 3, 12, 5, 1, 9, 2, 11, 4, 8, 10, 6)
    found = revealed_at(spread(*spreads, grid=(3, 4)), "confidence", 4, choice_temperature=0.0)
    expected = [1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert found[0].tolist() == [expected[width - 1] for width in spreads]


def orders_drawn(temperatures: list[float], spreads: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """The probability of each order of positions, drawn one by one in proportion to ``p^(1 / temperature)``."""
    found = {}
    for order in itertools.permutations(range(len(spreads))):
        chance, rest = 1.0, list(range(len(spreads)))
        for place, temperature in zip(order, temperatures, strict=False):
            weights = {other: spreads[other] ** (-1 / temperature) for other in rest}
            chance *= weights[place] / sum(weights.values())
            rest.remove(place)
        found[order] = chance
    assert sum(found.values()) == pytest.approx(1.0)
    return found


@pytest.mark.parametrize(
    ("order", "options", "temperatures"),
    [
        # Gumbel noise times tau (1 - s / S), which shrinks step by step.
        ("confidence", {"choice_temperature": 2.0}, [1.5, 1.0, 0.5]),
        ("confidence", {"choice_temperature": 0.8}, [0.6, 0.4, 0.2]),
        # By the largest probability itself, which sharpening what is drawn does not change.
        ("purity", {"purity_weight": 0.0}, [1.0, 1.0, 1.0]),
        ("purity", {"purity_weight": 3.0}, [1.0, 1.0, 1.0]),
    ],
)
def test_positions_are_drawn_in_proportion(order: str, options: dict[str, float], temperatures: list[float]) -> None:
    """The largest of ``log p / tau`` plus Gumbel noise is a draw in proportion to ``p^(1 / tau)``."""
    spreads, count = (2, 6, 1, 3), 20_000
    at = revealed_at(spread(*spreads, grid=(2, 2)), order, 4, count, **options)
    drawn_orders = Counter(tuple(row) for row in at.argsort(dim=1).tolist())
    assert at.sort(dim=1).values.unique(dim=0).tolist() == [[1, 2, 3, 4]]
    for positions, chance in orders_drawn(temperatures, spreads).items():
        deviation = (chance * (1 - chance) / count) ** 0.5
        assert drawn_orders[positions] / count == pytest.approx(chance, abs=4 * deviation + 1 / count), positions


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_halton_reveals_in_its_order_over_several_steps(num_codebooks: int) -> None:
    """By the arc cosine 2, 2, 3 and 5 of twelve positions, whose order is that of the points of scipy's sequence."""
    network = spread(*[4] * 12 * num_codebooks, grid=(3, 4), num_codebooks=num_codebooks)
    found = revealed_at(network, "halton", 4)[0].view(12, num_codebooks)
    points = qmc.Halton(d=2, scramble=False).random(4000)[1:].tolist()
    cells = [*dict.fromkeys(int(row * 3) * 4 + int(column * 4) for row, column in points)]
    left = [math.floor(12 * num_codebooks * math.acos(step / 4) / (math.pi / 2) + 1e-9) for step in range(5)]
    counts = -np.diff(left)
    assert num_codebooks == 2 or counts.tolist() == [2, 2, 3, 5]
    # Of a position the first codebook comes first.
    assert found[cells].flatten().tolist() == np.repeat([1, 2, 3, 4], counts).tolist()


@pytest.mark.parametrize(
    ("order", "steps", "revealed"),
    [
        ("confidence", 8, [5, 15, 24, 31, 39, 45, 48, 49]),
        ("confidence", 12, [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]),
        ("purity", 4, [64, 64, 64, 64]),
        ("halton", 2, [86, 170]),  # arccos(1/2) = pi/3, so that two thirds of 256, 170, are left
    ],
)
def test_how_many_are_revealed(order: str, steps: int, revealed: list[int]) -> None:
    reveal = Reveal(Corruption("absorbing", num_embeddings=2, num_steps=8), order, steps)
    count = left = torch.tensor([256, 1, 0])
    found = []
    for step in range(1, steps + 1):
        after = reveal.left(step, count, left)
        found.append(left - after)
        left = after
    assert [step[0].item() for step in found] == revealed
    assert torch.stack(found).sum(dim=0).tolist() == [256, 1, 0]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (8, 8)])
def test_halton_visits_each_position_once_in_the_sequence_of_scipy(height: int, width: int) -> None:
    found = halton_order(height, width)
    assert sorted(found.tolist()) == list(range(height * width))
    points = qmc.Halton(d=2, scramble=False).random(4000)[1:]
    cells = dict.fromkeys(int(row * height) * width + int(column * width) for row, column in points.tolist())
    assert [*cells] == found.argsort().tolist()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_known_tokens_come_back(process: str, num_codebooks: int) -> None:
    network = toy(process, num_codebooks)
    known = torch.randint(5, (2, 3, 4, num_codebooks), generator=sources(3)[0])
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[:, 1, 1:3] = False
    for order in ORDERS if process == "absorbing" else ("ancestral",):
        found = drawn(network, [5, 6], order, 6, known=known, mask=mask)
        assert torch.equal(found[mask], known[mask])
        assert found.min() >= 0
        assert found.max() < 5
    whole = torch.ones_like(mask)
    assert torch.equal(drawn(network, [5, 6], known=known, mask=whole), known)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("given", [0, 1])
def test_a_gap_follows_what_is_known_on_either_side(process: str, given: int) -> None:
    """Of two equal bits the known one decides, be it before or after the other in raster order."""
    network = equal_bits(process, 32)
    mask = torch.zeros(1000, 1, 2, dtype=torch.bool)
    mask[:, 0, given] = True
    known = torch.ones(1000, 1, 2, 1, dtype=torch.int64)
    for order in ORDERS if process == "absorbing" else ("ancestral",):
        found = generate_tokens(
            network,
            reveal=Reveal(network.corruption, order, 32),
            rule=TokenRule(),
            num_samples=1000,
            known=known,
            mask=mask,
            generator=torch.Generator().manual_seed(0),
        )[:, 0, 1 - given, 0]
        # Where tokens are replaced, a step draws the two independently, as in the test above.
        assert found.double().mean() >= (1.0 if process == "absorbing" else 0.93)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_sample_depends_on_its_seed_alone(process: str) -> None:
    network = toy(process)
    for order in ORDERS if process == "absorbing" else ("ancestral",):
        together = drawn(network, [5, 6, 7], order, 6)
        assert torch.equal(drawn(network, [6], order, 6, labels=torch.tensor([1])), together[1:2])
        assert not torch.equal(drawn(network, [9], order, 6, labels=torch.tensor([1])), together[1:2])


def test_guidance_goes_from_the_null_class_to_the_label() -> None:
    network = toy()
    labels, null = torch.tensor([0, 2]), torch.full((2,), 3)
    plain = drawn(network, [5, 6], labels=labels)
    assert torch.equal(drawn(network, [5, 6], labels=labels, rule=TokenRule(0.0)), drawn(network, [5, 6], labels=null))
    assert torch.equal(drawn(network, [5, 6], labels=labels, rule=TokenRule(0.99999)), plain)
    assert not torch.equal(drawn(network, [5, 6], labels=labels, rule=TokenRule(30.0)), plain)
    with pytest.raises(VaevqMedError, match=r"guidance_scale is 2\.0 without labels; expected labels, or 1"):
        generate_tokens(network, reveal=Reveal(network.corruption), rule=TokenRule(2.0), num_samples=2)


def test_top_k_of_one_without_noise_is_the_likeliest_of_all_at_once() -> None:
    network = toy()
    found = drawn(network, [5], "halton", 1, labels=torch.tensor([1]), rule=TokenRule(top_k=1))
    likeliest = network(torch.full((1, 12), 5), torch.tensor([1])).argmax(dim=-1)
    assert torch.equal(found.flatten(), likeliest.flatten())


def test_purity_sharpens_what_is_drawn() -> None:
    network = toy(num_classes=0)
    rule, source = TokenRule(), torch.Generator().manual_seed(0)
    likeliest = network(torch.full((1, 12), 5)).argmax(dim=-1).view(3, 4, 1)
    shares = []
    for weight in (0.0, 50.0):
        reveal = Reveal(network.corruption, "purity", 1, purity_weight=weight)
        found = generate_tokens(network, reveal=reveal, rule=rule, num_samples=500, generator=source)
        shares.append((found == likeliest).double().mean().item())
    assert shares[1] > 0.95 > shares[0]


@pytest.mark.parametrize("steps", [1, 2])
def test_what_is_drawn_is_sharpened_by_the_purity_of_its_position(steps: int) -> None:
    """``p^(1 + r purity)``: the surest mask has the largest purity, 1, and so has the only one that is left."""
    r, count = 2.0, 40_000
    less, more = 0.6, 0.9
    network = apart(torch.tensor([[less, 1 - less], [more, 1 - more]], dtype=torch.float64), (1, 2))
    found = generate_tokens(
        network,
        reveal=Reveal(network.corruption, "purity", steps, purity_weight=r),
        rule=TokenRule(),
        num_samples=count,
        generator=torch.Generator().manual_seed(0),
    )

    def share(probability: float, power: float) -> float:
        return probability**power / (probability**power + (1 - probability) ** power)

    # In one step both are drawn together; of two steps the first takes either in proportion to its probability.
    first = 1.0 if steps == 1 else less / (less + more)
    sharpened = first * share(less, 1 + r * less / more) + (1 - first) * share(less, 1 + r)
    for place, expected in enumerate((sharpened, share(more, 1 + r))):
        deviation = (expected * (1 - expected) / count) ** 0.5
        assert (found[:, 0, place] == 0).double().mean().item() == pytest.approx(expected, abs=4 * deviation)


def test_an_order_that_does_not_fit_is_refused() -> None:
    uniform = Corruption("uniform", num_embeddings=4, num_steps=10)
    assert (Reveal(uniform).order, Reveal(uniform).steps) == ("ancestral", 10)
    with pytest.raises(VaevqMedError, match="order is 'halton' with the process 'uniform'; expected 'ancestral'"):
        Reveal(uniform, "halton")
    with pytest.raises(VaevqMedError, match="num_steps is 11; expected 1 to 10, the times of the process"):
        Reveal(uniform, num_steps=11)
    absorbing = Corruption("absorbing", num_embeddings=4, num_steps=10)
    assert (Reveal(absorbing).order, Reveal(absorbing).steps) == ("confidence", 12)
    assert Reveal(absorbing, num_steps=64).steps == 64


def test_draws_decode_the_indices_of_the_settings() -> None:
    class Decoder:
        def decode_indices(self, indices: Tensor) -> Tensor:
            return indices

    network = toy()
    settings = {name: setting.default for name, setting in network.settings.items()}
    draw = unmasking_draws(network, Decoder(), {**settings, "order": "halton", "num_steps": 3})  # type: ignore[arg-type]
    expected = drawn(network, [5, 6], "halton", 3, rule=TokenRule(2.0))
    assert torch.equal(draw(Wanted(torch.tensor([0, 1]), [5, 6])), expected)
