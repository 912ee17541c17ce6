"""First indices, then the others of open positions: toys whose images can be counted, and sequences of every length."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators import coarse_first
from vaevq_med.networks.generators.base import Wanted
from vaevq_med.networks.generators.coarse_first import CoarseFirst, open_positions
from vaevq_med.networks.generators.drawing import TokenRule, draw_indices

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "num_heads": 2}


def toy(count: int = 4, grid: tuple[int, int] = (2, 3), codebooks: int = 3, **options: Any) -> CoarseFirst:
    torch.manual_seed(0)
    options = {"num_classes": 3, **SIZES, **options}
    network = CoarseFirst(num_embeddings=count, grid_size=grid, num_codebooks=codebooks, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network.eval()


def gated(network: CoarseFirst, opened: list[list[int]], seed: int = 1) -> Tensor:
    """Indices with the positions of each image that are open."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(opened), network.num_positions, network.num_codebooks)
    indices = torch.randint(network.last, shape, generator=generator)
    for image, chosen in zip(indices, opened, strict=True):
        closed = torch.ones(len(image), dtype=torch.bool)
        closed[chosen] = False
        image[closed, 1:] = network.last
    return indices.view(len(opened), *network.grid_size, network.num_codebooks)


def sources(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the likelihood -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "grid", "codebooks"), [(3, (1, 2), 2), (2, (1, 2), 3), (2, (1, 1), 4)])
def test_the_likelihoods_of_all_images_sum_to_one(count: int, grid: tuple[int, int], codebooks: int) -> None:
    """So a token sees none that comes after it, and no image is counted twice or left out."""
    network = toy(count, grid, codebooks, num_classes=0)
    tokens = grid[0] * grid[1] * codebooks
    whole = torch.tensor([*itertools.product(range(count), repeat=tokens)]).view(-1, *grid, codebooks)
    shares = [(-tokens * network.loss(image[None])).exp().item() for image in whole]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert max(shares) < 0.9
    together = network.loss(whole).item() * tokens * len(whole)
    assert together == pytest.approx(-sum(torch.tensor(share).log().item() for share in shares), rel=1e-5)


def test_what_is_closed_costs_nothing_and_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    network = toy()
    lengths: list[int] = []
    norm = network.norm.forward
    monkeypatch.setattr(network.norm, "forward", lambda x: (lengths.append(x.shape[1]), norm(x))[1])
    closed, some = gated(network, [[], []]), gated(network, [[1, 4], [3]])
    network.loss(closed)
    network.loss(some)
    assert lengths == [6, 6 + 2 * 2]
    uniform = CoarseFirst(num_embeddings=4, grid_size=(2, 3), num_codebooks=3, num_classes=3, **SIZES)
    # Heads of zeros: 6 words of 8 each, and two indices of 4 for each open position, of which one in four of the
    # second is ruled out only where the first was the last, which it never is here.
    bits = uniform.loss(some[:1]).item() * 18 / torch.tensor(2.0).log().item()
    assert bits == pytest.approx(6 * 3 + 2 * 2 * 2)


def test_the_order_is_all_first_indices_before_any_other() -> None:
    """What a position's other indices say changes nothing of the words; a word changes what follows it."""
    network = toy()
    indices = gated(network, [[1, 4]])
    other = indices.clone()
    other[0, 1, 1, 2] = (other[0, 1, 1, 2] + 1) % network.last  # the very last token of the sequence
    seen = [run_through(network, one) for one in (indices, other)]
    assert torch.equal(seen[0], seen[1])
    other[0, 0, 1, 1] = (other[0, 0, 1, 1] + 1) % network.last  # the first token after the words
    third = run_through(network, other)
    assert torch.equal(third[:, :7], seen[0][:, :7])
    assert not torch.allclose(third[:, 7:], seen[0][:, 7:])


def run_through(network: CoarseFirst, indices: Tensor) -> Tensor:
    """What the heads are given."""
    found: list[Tensor] = []
    hook = network.norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    network.loss(indices)
    hook.remove()
    return found[0]


def test_gradients_reach_every_weight_also_without_open_positions() -> None:
    network = toy(label_dropout=0.5)
    for opened in ([[], []], [[1], [0, 5]]):
        network.zero_grad(set_to_none=True)
        network.loss(gated(network, opened), torch.tensor([0, 3])).backward()
        missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        assert missing == []
    assert all(bool(head.weight.grad.any()) for head in network.other_heads)
    drawn, labels = gated(network, [[1]] * 12), torch.arange(12) % 3
    dropped = torch.rand(12, generator=sources(7)[0]) < 0.5
    by_hand = network.loss(drawn, torch.where(dropped, 3, labels))
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(network.loss(drawn, labels, generator=sources(7)[0]), by_hand)


# --- drawing ------------------------------------------------------------------------------------------


def test_the_draws_have_the_distribution_of_the_likelihood() -> None:
    network = toy(3, (1, 2), 2, num_classes=0)
    whole = torch.tensor([*itertools.product(range(3), repeat=4)]).view(-1, 1, 2, 2)
    expected = torch.stack([(-4 * network.loss(image[None])).exp() for image in whole]).detach()
    count = 20_000
    found = network.indices(Wanted(None, range(count)), TokenRule(), torch.Generator().manual_seed(0)).flatten(1)
    numbers = (found * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    torch.testing.assert_close(torch.bincount(numbers, minlength=81) / count, expected, atol=0.012, rtol=0)


def test_what_was_drawn_step_by_step_has_its_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values, places and turns of images of several lengths, against the whole sequence at once."""
    network = toy()
    logs: list[Tensor] = []

    def recorded(logits: Tensor, generator: Any) -> Tensor:
        drawn = draw_indices(logits, generator)
        logs.append(logits.log_softmax(dim=-1).gather(1, drawn[:, None])[:, 0])
        return drawn

    monkeypatch.setattr(coarse_first, "draw_indices", recorded)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    found = network.indices(Wanted(labels, range(6)), TokenRule(), sources(*range(6)))
    counts = network.opened(found.flatten(1)).sum(dim=1)
    assert len(set(counts.tolist())) > 1
    assert len(logs) == 6 + 2 * int(counts.max())
    table = torch.stack(logs, dim=1)
    for number in range(6):
        by_step = -table[number, : 6 + 2 * int(counts[number])].sum().item()
        at_once = 18 * network.loss(found[number : number + 1], labels[number : number + 1]).item()
        assert by_step == pytest.approx(at_once, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_depends_on_its_own_seed_and_label_alone(scale: float) -> None:
    network = toy()
    rule = TokenRule(scale, top_k=5)
    found = network.indices(Wanted(torch.tensor([0, 2, 1]), [5, 6, 7]), rule, sources(5, 6, 7))
    for number, (label, seed) in enumerate([(0, 5), (2, 6), (1, 7)]):
        alone = network.indices(Wanted(torch.tensor([label]), [seed]), rule, sources(seed))
        assert torch.equal(alone[0], found[number])
    assert len({tuple(image.flatten().tolist()) for image in found}) == 3


def test_nothing_impossible_is_drawn() -> None:
    """An open position has an index that is not the last, even where the network would have the last everywhere."""
    network = toy(num_classes=0)
    with torch.no_grad():
        for head in network.other_heads:
            head.weight[-1] = 50 * head.weight[-1].abs()
    drawn: list[Tensor] = []
    hook = network.first_head.register_forward_hook(lambda module, inputs, output: drawn.append(output))
    found = network.indices(Wanted(None, range(64)), TokenRule(), torch.Generator().manual_seed(0))
    hook.remove()
    assert len(drawn) == 6
    opened = network.opened(found.flatten(1))
    assert bool(opened.any())
    with pytest.MonkeyPatch.context() as patch:
        words: list[Tensor] = []
        patch.setattr(
            coarse_first,
            "draw_indices",
            lambda logits, source: (words.append(draw_indices(logits, source)), words[-1])[1],
        )
        again = network.indices(Wanted(None, range(64)), TokenRule(), torch.Generator().manual_seed(0))
    assert torch.equal(again, found)
    assert torch.equal(torch.stack(words[:6], dim=1) >= network.num_embeddings, opened)


def test_known_tokens_stay_open_or_closed() -> None:
    network = toy()
    known = gated(network, [[0, 1, 4], [2]])
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[:, 0, 1:] = False
    wanted = Wanted(torch.tensor([0, 1]), [5, 6], known, mask)
    found = network.indices(wanted, TokenRule(2.0), sources(5, 6))
    assert torch.equal(found[mask], known[mask])
    assert not torch.equal(found[~mask], known[~mask])
    # A position is open where an index says so, and may be where one says nothing of it.
    some = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    some[..., 1] = True
    seen = torch.zeros(2, 6, dtype=torch.bool)
    for seed in range(20):
        found = network.indices(Wanted(None, [5, 6], known, some), TokenRule(), sources(seed, seed + 100))
        assert torch.equal(found[..., 1], known[..., 1])
        opened = network.opened(found.flatten(1))
        assert bool((opened | ~network.opened(known.flatten(1))).all())
        seen |= opened
    assert bool(seen.all())
    assert torch.equal(network.indices(Wanted(None, [5, 6], known, some | True), TokenRule(), sources(5, 6)), known)


def test_another_type_leaves_the_network_as_it_is() -> None:
    network = toy()
    found = network.indices(Wanted(None, [5], dtype=torch.bfloat16), TokenRule(), sources(5))
    assert found.shape == (1, 2, 3, 3)
    assert network.token_embedding.weight.dtype == torch.float32


# --- sizes --------------------------------------------------------------------------------------------


def test_open_positions_come_in_order_and_shorter_images_are_filled_up() -> None:
    opened = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    positions, there = open_positions(opened)
    assert positions[0].tolist() == [1, 3, 4]
    assert positions[2, :2].tolist() == [0, 4]
    assert there.tolist() == [[True] * 3, [False] * 3, [True, True, False]]
    assert open_positions(torch.zeros(2, 4, dtype=torch.bool))[0].shape == (2, 0)


def test_calls_are_those_of_the_mean_share_of_open_positions() -> None:
    network = toy()
    assert network.network_calls(grid=(2, 3), settings={}) == 18
    network.prepare(lambda: gated(network, [[0, 1, 4], [2]]))
    assert float(network.mean_open) == pytest.approx(4 / 12)
    assert network.network_calls(grid=(2, 3), settings={}) == 6 + 12 / 3
    assert "mean_open" in network.state_dict()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VaevqMedError, match=r"num_codebooks is 1; expected 2 or more, .*, or LlamaGen"):
        CoarseFirst(num_embeddings=4, grid_size=2, num_codebooks=1, **SIZES)
    with pytest.raises(VaevqMedError, match="width is 6 with num_heads 2; expected a multiple of 4"):
        CoarseFirst(num_embeddings=4, grid_size=2, num_codebooks=2, **{**SIZES, "width": 6})
    network = toy()
    with pytest.raises(VaevqMedError, match=r"indices have shape \(1, 2, 2, 3\); expected \[B, 2, 3, 3\]"):
        network.loss(torch.zeros(1, 2, 2, 3, dtype=torch.int64))
    with pytest.raises(VaevqMedError, match="4"):
        network.loss(torch.full((1, 2, 3, 3), 4))


@pytest.mark.parametrize("guided", [False, True])
def test_the_likeliest_word_is_not_drawn_where_it_is_impossible(guided: bool) -> None:
    """Filters look at what is possible alone: with the likeliest word ruled out they keep the next one."""
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0], [0.0, 1.0, 2.0, 9.0]])
    impossible = torch.tensor([[True, False, False, False], [False, False, False, True]])
    both = torch.cat([logits, torch.zeros_like(logits)]) if guided else logits
    for options in ({"top_k": 1}, {"top_p": 0.3}):
        rule = TokenRule(guidance_scale=2.0 if guided else 1.0, **options)
        found = rule.possible(both, impossible).softmax(dim=-1)
        assert torch.equal(found, torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    everything = TokenRule(guidance_scale=2.0 if guided else 1.0).possible(both, impossible).softmax(dim=-1)
    scaled = ((2 if guided else 1) * logits).masked_fill(impossible, -float("inf")).softmax(dim=-1)
    torch.testing.assert_close(everything, scaled)
