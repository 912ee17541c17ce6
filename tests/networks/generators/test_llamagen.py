"""LlamaGen beside a reference in float64, its loss and cache, and the sampler beside brute force."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from helpers.toy_networks import HEIGHT, WIDTH, K, grid, toy
from monai.bundle import ConfigParser
from torch import Tensor
from torch.nn import functional

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators import trunk
from vaevq_med.networks.generators.autoregressive import generate_indices
from vaevq_med.networks.generators.drawing import draw_indices, filter_logits, guided_logits
from vaevq_med.networks.generators.llama_blocks import LlamaBlock, axial_rotations, rotate
from vaevq_med.networks.generators.llamagen import LlamaGen


def reference(network: LlamaGen, tokens: list[int], label: int) -> Tensor:
    """Logits of one sequence in float64: rotations as complex factors, attention as a sum at each place."""
    weights = {name: parameter.detach().double() for name, parameter in network.named_parameters()}
    books, dim = network.num_codebooks, network.head_dim
    embedded = [weights["token_embedding.weight"][i % books * K + token] for i, token in enumerate(tokens[:-1])]
    x = torch.stack([weights["class_embedding.weight"][label], *embedded])
    frequencies = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
    turns = [[0j] * (dim // 2)]
    for place in range(1, len(tokens)):
        row, column = divmod((place - 1) // books, WIDTH)
        angles = [row * f for f in frequencies] + [column * f for f in frequencies]
        turns.append([complex(math.cos(angle), math.sin(angle)) for angle in angles])
    factors = torch.tensor(turns, dtype=torch.complex128)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * weights[name]

    for layer in range(len(network.blocks)):
        block = f"blocks.{layer}."
        qkv = norm(x, f"{block}attention_norm.weight") @ weights[f"{block}qkv.weight"].T
        heads = []
        for query, key, value in zip(*(part.split(dim, dim=1) for part in qkv.chunk(3, dim=1)), strict=True):
            query = torch.view_as_complex(query.reshape(len(x), -1, 2).contiguous()) * factors
            key = torch.view_as_complex(key.reshape(len(x), -1, 2).contiguous()) * factors
            scores = (query @ key.conj().T).real / dim**0.5
            heads.append(torch.stack([scores[i, : i + 1].softmax(0) @ value[: i + 1] for i in range(len(x))]))
        x = x + torch.cat(heads, dim=1) @ weights[f"{block}projection.weight"].T
        gate, up = (norm(x, f"{block}ffn_norm.weight") @ weights[f"{block}gate_and_up.weight"].T).chunk(2, dim=1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{block}down.weight"].T
    x = norm(x, "norm.weight")
    return torch.stack([weights[f"heads.{i % books}.weight"] @ row for i, row in enumerate(x)])


@pytest.mark.parametrize(("num_codebooks", "label"), [(1, 2), (1, 4), (3, 0)])
def test_the_network_is_the_publication_place_by_place(num_codebooks: int, label: int) -> None:
    network = toy(num_codebooks=num_codebooks)
    indices = grid(network, batch=1)
    found = network(indices, torch.tensor([label]))
    assert found.shape == (1, HEIGHT, WIDTH, num_codebooks, K)
    expected = reference(network, indices.flatten().tolist(), label)
    torch.testing.assert_close(found.view(-1, K).double(), expected, atol=2e-5, rtol=1e-5)
    if label == network.null_class:
        assert torch.equal(network(indices), found)


@pytest.mark.parametrize(("name", "millions"), [("B", 110.9), ("L", 342.9), ("XL", 774.7)])
def test_published_sizes(name: str, millions: float) -> None:
    """B is 12 (4 768^2 + 3 768 2048 + 2 768) + 768 + 1001 768 + 2 16384 768 parameters; METHODS gives 110.9 M."""
    with torch.device("meta"):
        network = LlamaGen.preset(name, num_embeddings=16384, grid_size=16, num_classes=1000)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert round(total / 1e6, 1) == millions
    if name == "B":
        by_hand = 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768 + 1001 * 768 + 2 * 16384 * 768
        assert total == by_hand


def test_a_bundle_names_a_preset() -> None:
    options = {"num_embeddings": 16, "grid_size": [4, 8], "_target_": "vaevq_med.networks.LlamaGen.preset", "name": "S"}
    with torch.device("meta"):
        network = ConfigParser({"network_def": options}).get_parsed_content("network_def")
    assert isinstance(network, LlamaGen)
    assert (network.sequence_length, len(network.blocks), network.head_dim) == (32, 12, 64)


def test_start() -> None:
    torch.manual_seed(0)
    network = LlamaGen(num_embeddings=64, grid_size=2, width=32, depth=1, num_heads=2, num_classes=9)
    assert not bool(network.heads[0].weight.any())
    for weight in (network.token_embedding.weight, network.blocks[0].qkv.weight, network.blocks[0].down.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    # Every index has the same probability, whatever the dropouts draw.
    loss = network.train().loss(torch.zeros(5, 2, 2, 1, dtype=torch.int64), torch.arange(5))
    assert loss.item() == pytest.approx(math.log(64), abs=1e-6)


def test_rotation_by_hand() -> None:
    """Row 1, column 2 of a 2 x 3 grid, head_dim 8: frequencies 1 and 10000^(-1/2) = 0.01."""
    table = axial_rotations(HEIGHT, WIDTH, 8)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).view(1, 1, 1, 8)
    expected = []
    for (a, b), angle in zip([(1, 2), (3, 4), (5, 6), (7, 8)], [1.0, 0.01, 2.0, 0.02], strict=True):
        expected += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    place = 1 + 1 * WIDTH + 2
    torch.testing.assert_close(rotate(x, table[place : place + 1]).flatten(), torch.tensor(expected))
    assert torch.equal(axial_rotations(HEIGHT, WIDTH, 8, num_codebooks=2)[[11, 12]], table[[6, 6]])


def test_query_and_key_of_the_class_token_vanish_and_its_value_does_not() -> None:
    network = toy()
    cache = network.new_cache(2)
    network.step(torch.tensor([0, 1]), cache)
    network.step(torch.tensor([5, 6]), cache)
    assert not bool(cache.keys[..., 0, :].any())
    assert bool(cache.values[..., 0, :].any())
    assert bool(cache.keys[..., 1, :].any())
    assert not bool(rotate(torch.ones(1, 1, 1, 8), network.rotations(torch.device("cpu"))[:1]).any())


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_a_token_does_not_reach_what_comes_before_it(num_codebooks: int) -> None:
    network = toy(num_codebooks=num_codebooks)
    indices = grid(network, batch=1)
    before = network(indices).view(-1, K)
    for place in range(network.sequence_length):
        changed = indices.clone()
        changed.view(-1)[place] = (changed.view(-1)[place] + 1) % K
        after = network(changed).view(-1, K)
        torch.testing.assert_close(after[: place + 1], before[: place + 1], atol=1e-6, rtol=0)
        moved = (after[place + 1 :] - before[place + 1 :]).abs().amax(dim=1)
        assert bool((moved > 1e-4).all())


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_cached_logits_are_the_uncached_ones_at_every_place(num_codebooks: int) -> None:
    network = toy(num_codebooks=num_codebooks)
    indices, labels = grid(network), torch.tensor([0, 3, 4])
    whole = network(indices, labels).flatten(1, 3)
    tokens = indices.flatten(1)
    cache = network.new_cache(3)
    with torch.no_grad():
        for place in range(network.sequence_length):
            found = network.step(labels if place == 0 else tokens[:, place - 1], cache)
            torch.testing.assert_close(found, whole[:, place], atol=1e-5, rtol=1e-5)
    with pytest.raises(VaevqMedError, match=f"expected fewer than the sequence's {len(tokens[0])}"):
        network.step(tokens[:, -1], cache)


def test_prefixes_and_the_forms_of_indices() -> None:
    network = toy()
    indices = grid(network)
    whole = network(indices)
    assert torch.equal(network(indices.flatten(1)), whole.flatten(1, 3))
    assert torch.equal(network(indices.flatten(1, 2)), whole.flatten(1, 2))
    torch.testing.assert_close(network(indices.flatten(1)[:, :4]), whole.flatten(1, 3)[:, :4], atol=1e-5, rtol=1e-5)
    assert torch.equal(network(indices.to(torch.uint8)), whole)


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_the_loss_in_parts_is_the_cross_entropy(num_codebooks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = toy(num_codebooks=num_codebooks)
    indices, labels = grid(network), torch.tensor([0, 3, 4])
    expected = functional.cross_entropy(network(indices, labels).reshape(-1, K), indices.flatten())
    wanted = torch.autograd.grad(expected, [*network.parameters()])
    monkeypatch.setattr(trunk, "LOGITS_AT_ONCE", 4 * K)  # 18 rows of each codebook, 4 at once
    loss = network.loss(indices.to(torch.uint8), labels)
    torch.testing.assert_close(loss, expected)
    for name, own, other in zip(dict(network.named_parameters()), torch.autograd.grad(loss, [*network.parameters()]),
                                wanted, strict=True):  # fmt: skip
        assert bool(own.any()), name
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_label_dropout_draws_from_the_generator_in_training_only() -> None:
    none = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), 0.0)
    network = toy(label_dropout=0.4, **none)
    indices, labels = grid(network, batch=20), torch.arange(20) % 4
    drawn = torch.rand(20, generator=torch.Generator().manual_seed(7)) < 0.4
    assert 0 < int(drawn.sum()) < 20
    by_hand = network.loss(indices, torch.where(drawn, 4, labels))
    undropped = network.loss(indices, labels, generator=torch.Generator().manual_seed(7))
    assert not torch.allclose(by_hand, undropped)
    found = network.train().loss(indices, labels, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("name", ["token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout"])
def test_each_dropout_acts_in_training_only(name: str) -> None:
    names = ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout", "label_dropout")
    network = toy(**{**dict.fromkeys(names, 0.0), name: 0.5})
    indices = grid(network)
    assert torch.equal(network(indices), network(indices))
    network.train()
    assert not torch.allclose(network(indices), network(indices))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.7), (1, 0.01), (40, 0.95)])
def test_filter_is_brute_force(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(6, 5, 20, generator=torch.Generator().manual_seed(3))
    expected = np.full((6, 5, 20), -np.inf)
    for place in np.ndindex(6, 5):
        row = logits[place].double().numpy()
        allowed = sorted(range(20), key=lambda i: -row[i])[: top_k or None]
        mass = np.exp(row[allowed]) / np.exp(row[allowed]).sum()
        count = next((n for n in range(1, len(allowed)) if mass[:n].sum() >= top_p), len(allowed))
        expected[place][allowed[:count]] = row[allowed[:count]]
    found = filter_logits(logits, top_k=top_k, top_p=top_p)
    assert np.array_equal(found.double().numpy(), expected)


def test_filter_by_hand() -> None:
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    assert filter_logits(logits, top_p=0.7).isfinite().tolist() == [True, True, False, False]
    # 0.8 needs three; of the two equal ones it is that of lower index.
    assert filter_logits(logits, top_p=0.8).isfinite().tolist() == [True, True, True, False]
    assert filter_logits(logits, top_k=3).isfinite().tolist() == [True] * 4
    # Of the two left by top-k, 2/3 and 1/3, the first has more than 0.6.
    assert filter_logits(logits, top_k=2, top_p=0.6).isfinite().tolist() == [False, True, False, False]


def test_draws_have_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    drawn = draw_indices(probabilities.log().expand(20_000, 5), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == 0
    kept = probabilities > 0
    assert scipy.stats.chisquare(counts[kept].numpy(), [10_000, 6_000, 3_000, 1_000]).pvalue > 1e-3


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])
    assert guided_logits(conditional, unconditional, 2.0).tolist() == [0.0, 7.0]
    assert guided_logits(conditional, unconditional, 1.0).tolist() == [1.0, 4.0]
    assert guided_logits(conditional, unconditional, 0.0).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(("num_codebooks", "scale"), [(1, 1.0), (1, 2.5), (2, 0.0), (2, 3.0)])
def test_the_likeliest_tokens_are_those_of_passes_without_cache(num_codebooks: int, scale: float) -> None:
    network = toy(num_codebooks=num_codebooks)
    labels, none = torch.tensor([2, 0, 3]), torch.tensor([4, 4, 4])
    expected = torch.zeros(3, HEIGHT, WIDTH, num_codebooks, dtype=torch.int64)
    for place in range(network.sequence_length):
        c, u = (network(expected, given).flatten(1, 3)[:, place] for given in (labels, none))
        expected.view(3, -1)[:, place] = (u + scale * (c - u)).argmax(dim=1)
    found = generate_indices(network, labels=labels, guidance_scale=scale, top_k=1)
    assert torch.equal(found, expected)


def test_the_sampler_draws_what_its_options_allow() -> None:
    """Forty draws of the first token: those of the filtered, tempered distribution, and more than one of them."""
    network = toy()
    labels = torch.full((40,), 1)
    logits = network(torch.zeros(1, 1, dtype=torch.int64), labels[:1])[0, 0].detach()
    for options, allowed in (({"top_k": 3}, 3), ({"top_p": 0.5, "temperature": 2.0}, None)):
        tempered = logits / options.get("temperature", 1.0)
        order = tempered.argsort(descending=True)
        if allowed is None:
            allowed = 1 + int((tempered.softmax(0)[order].cumsum(0) < 0.5).sum())
        generator = torch.Generator().manual_seed(2)
        first = generate_indices(network, labels=labels, generator=generator, **options)[:, 0, 0, 0]
        assert allowed > 1
        assert 1 < len(set(first.tolist()))
        assert set(first.tolist()) <= set(order[:allowed].tolist())


def test_a_generator_decides_alone() -> None:
    network = toy()

    def sample(seed: int, labels: list[int]) -> Tensor:
        return generate_indices(
            network, labels=torch.tensor(labels), guidance_scale=2.0, generator=torch.Generator().manual_seed(seed)
        )

    state = torch.get_rng_state()
    first = sample(0, [1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(sample(0, [1, 2, 3]), first)
    assert not torch.equal(sample(1, [1, 2, 3]), first)
    # A companion's label changes that companion alone.
    other = sample(0, [1, 0, 3])
    assert torch.equal(other[[0, 2]], first[[0, 2]])
    assert not torch.equal(other[1], first[1])


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_known_tokens_stay_and_condition_what_follows(num_codebooks: int) -> None:
    network = toy(num_codebooks=num_codebooks)
    mask = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, 0, 1] = mask[1, 1, 2] = mask[1, 0, 0] = True
    known = grid(network, batch=2, seed=5).masked_fill(~mask.unsqueeze(-1), -1)
    found = generate_indices(network, num_samples=2, known=known, mask=mask, top_k=1)
    assert torch.equal(found[mask], known[mask])
    expected = torch.zeros_like(found)
    for place in range(network.sequence_length):
        likeliest = network(expected).flatten(1, 3)[:, place].argmax(dim=1)
        given = known.flatten(1)[:, place]
        expected.view(2, -1)[:, place] = torch.where(given >= 0, given, likeliest)
    assert torch.equal(found, expected)
    every = mask.unsqueeze(-1).expand_as(known)
    assert torch.equal(generate_indices(network, num_samples=2, known=known, mask=every, top_k=1), found)


def test_other_types_mode_and_progress() -> None:
    network = toy().train()
    calls: list[tuple[int, int]] = []
    labels = torch.tensor([0, 1])
    found = generate_indices(
        network, labels=labels, dtype=torch.bfloat16, top_k=1, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(n, 6) for n in range(1, 7)]
    assert network.training
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    half = copy.deepcopy(network).bfloat16().eval()
    assert torch.equal(generate_indices(half, labels=labels, top_k=1), found)
    assert half.new_cache(1).keys.dtype == torch.bfloat16
    assert half.rotations(torch.device("cpu")).dtype == torch.float32
    indices = grid(network, batch=2)
    torch.testing.assert_close(half(indices).float(), network.eval()(indices), atol=0.15, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = generate_indices(network, labels=labels, guidance_scale=2.0, top_k=1)
    assert torch.equal(inside, generate_indices(network, labels=labels, guidance_scale=2.0, top_k=1))


def test_a_trained_network_gives_back_what_it_has_seen() -> None:
    torch.manual_seed(0)
    none = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout", "label_dropout"), 0.0)
    network = LlamaGen(
        num_embeddings=K, grid_size=(HEIGHT, WIDTH), width=32, depth=1, num_heads=2, num_classes=3, **none
    )
    images, labels = grid(network), torch.arange(3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        network.loss(images, labels).backward()
        optimizer.step()
    assert network.eval().loss(images, labels).item() < 0.05
    assert torch.equal(generate_indices(network, labels=labels, top_k=1), images)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"width": 20}, "width is 20 with num_heads 2; expected a multiple of 4 channels"),
        ({"grid_size": (0, 3)}, "grid_size is 0; expected at least 1"),
        ({"grid_size": (1, 2, 3)}, r"grid_size is \(1, 2, 3\); expected rows and columns.*; layers of volumes .*below"),
        ({"grid_size": (4,)}, r"grid_size is \(4,\); expected rows and columns"),
        ({"num_codebooks": 0}, "num_codebooks is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0; expected from 0 to below 1"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(VaevqMedError, match=complaint):
        toy(**options)


def test_a_preset_beside_other_sizes() -> None:
    with pytest.raises(VaevqMedError, match="preset 'XL': found width 768 beside the name, expected 1280 or null"):
        LlamaGen.preset("XL", num_embeddings=4, grid_size=2, width=768)
    with torch.device("meta"):
        network = LlamaGen.preset("S", num_embeddings=4, grid_size=2, width=384, depth=None)
    assert len(network.blocks) == 12


def test_an_unknown_preset() -> None:
    with pytest.raises(VaevqMedError, match="no LlamaGen preset 'M'; expected one of S, B, L"):
        LlamaGen.preset("M", num_embeddings=4, grid_size=2)


@pytest.mark.parametrize(
    ("indices", "labels", "complaint"),
    [
        (torch.zeros(1, 7), None, r"shape \(1, 7\); expected \[B, n\] with n from 1 to 6, or \[B, 2, 3, 1\]"),
        (torch.zeros(1, 3, 2, 1), None, "expected"),
        (torch.zeros(1, 2, 3), None, "expected"),
        (torch.full((1, 6), K), None, "indices range from 11 to 11; expected within 0 to 10"),
        (torch.full((1, 6), -1), None, "indices range from -1 to -1"),
        (torch.zeros(1, 6), torch.tensor([5]), "labels range from 5 to 5; expected within 0 to 4"),
        (torch.zeros(2, 6), torch.tensor([1]), r"labels have shape \(1,\); expected \[2\]"),
    ],
)
def test_indices_and_labels_that_do_not_fit(indices: Tensor, labels: Tensor | None, complaint: str) -> None:
    with pytest.raises(VaevqMedError, match=complaint):
        toy()(indices.long(), labels)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "num_samples is None without labels"),
        ({"num_samples": 2, "guidance_scale": 2.0}, "without labels; expected labels, or 1"),
        ({"labels": torch.zeros(1).long(), "guidance_scale": -1.0}, "guidance_scale is -1.0; expected 0 to 10000"),
        ({"labels": torch.zeros(1).long(), "guidance_scale": 1e39}, "guidance_scale is 1e[+]39; expected 0 to 10000"),
        ({"num_samples": 2, "labels": torch.tensor([1])}, "num_samples is 2; expected"),
        ({"labels": torch.tensor([9])}, "labels range from 9 to 9"),
        ({"num_samples": 1, "temperature": 0.0}, "temperature is 0.0; expected 0.001 to 1000"),
        ({"num_samples": 1, "temperature": 1e-39}, "temperature is 1e-39; expected 0.001 to 1000"),
        ({"num_samples": 1, "top_p": 0.0}, "top_p 0.0"),
        ({"num_samples": 1, "top_k": -1}, "top_k -1"),
        ({"num_samples": 1, "known": torch.zeros(1, 2, 3, 1)}, "known without mask; expected both"),
        (
            {"num_samples": 1, "known": torch.zeros(1, 2, 3, 1), "mask": torch.ones(1, 3, 2) > 0},
            r"the mask \(1, 3, 2, 1\)",
        ),
        (
            {"num_samples": 1, "known": torch.full((1, 2, 3, 1), K), "mask": torch.ones(1, 2, 3) > 0},
            "known indices range from 11 to 11; expected within 0 to 10",
        ),
    ],
)
def test_sampling_options_that_do_not_fit(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(VaevqMedError, match=complaint):
        generate_indices(toy(), **options)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_looks_ahead_unless_it_is_causal(causal: bool) -> None:
    torch.manual_seed(0)
    none = {"attention_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
    block = LlamaBlock(width=8, num_heads=2, causal=causal, **none)
    tokens, rotations = torch.randn(1, 4, 8), torch.polar(torch.ones(4, 2), torch.rand(4, 2))
    changed = tokens.clone()
    changed[0, -1] += 1
    before, after = block(tokens, rotations), block(changed, rotations)
    assert torch.equal(before[:, :-1], after[:, :-1]) == causal
    assert not torch.equal(before[:, -1], after[:, -1])
