"""A LlamaGen that sees the slice below: the network, its data, its training and its coder."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, OVERLAYS
from helpers.bundles import TOY
from helpers.index_stacks import random_prior, smooth_stack
from helpers.scans import write_case
from helpers.stores import encode, write_checkpoint
from helpers.toy_networks import HEIGHT, WIDTH, K, grid, toy
from monai.bundle import ConfigWorkflow

from vaevq_med.codec.case import CompressedCase
from vaevq_med.codec.coders.walks.raster import RasterSteps, RasterWalk
from vaevq_med.codec.options import CompressOptions
from vaevq_med.codec.work import compress
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.losses import LayerTokenLoss
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.tokens import LayerDataset, TokenDataset
from vaevq_med.trained.network import StoredGenerator

SLICES = Path(__file__).parents[1] / "fixtures" / "slices"


def below_of(network: LlamaGen, batch: int = 3) -> torch.Tensor:
    """Slices below, of which the first has none and the second lacks some positions."""
    below = grid(network, batch, seed=9)
    below[0] = -1
    below[1, 0] = -1
    return below


@pytest.mark.parametrize("books", [1, 2])
def test_the_condition_by_hand(books: int) -> None:
    network = toy(num_codebooks=books, sees_below=True).double()
    below = below_of(network)
    found = network.below_condition(below, 3)
    assert found.shape == (3, HEIGHT * WIDTH * books, 16)
    for item in range(3):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                expected = torch.zeros(16, dtype=torch.float64)
                for matrix, (down, right) in zip(network.below_mixing, ((0, 0), (0, 1), (1, 0)), strict=True):
                    inside = row + down < HEIGHT and column + right < WIDTH
                    for book in range(books):
                        token = int(below[item, row + down, column + right, book]) if inside else -1
                        vector = network.below_embedding.weight[book * (K + 1) + (K if token < 0 else token)]
                        expected = expected + matrix.weight @ vector  # type: ignore[operator]
                for book in range(books):
                    torch.testing.assert_close(found[item, (row * WIDTH + column) * books + book], expected)


def test_a_place_sees_what_is_below_it_and_no_further() -> None:
    network = toy(sees_below=True)
    tokens, below = grid(network, 1), grid(network, 1, seed=5)
    with torch.no_grad():
        before = network(tokens, below=below).flatten(1, 3)[0]
        for place in range(HEIGHT * WIDTH):
            changed = below.clone()
            changed.view(-1)[place] = (changed.view(-1)[place] + 1) % K
            moved = (network(tokens, below=changed).flatten(1, 3)[0] - before).abs().amax(dim=1) > 1e-6
            first = max(0, place - WIDTH) if place >= WIDTH else max(0, place - (place % WIDTH > 0))
            assert moved.nonzero()[0] == first


def test_without_a_slice_below_steps_and_passes_agree() -> None:
    network = toy(num_codebooks=2, sees_below=True)
    tokens = grid(network)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected = network(tokens, labels).flatten(1, 3)
        given = network(tokens, labels, torch.full_like(tokens, -1)).flatten(1, 3)
        cache, static = network.new_cache(3), network.new_static_cache(3)
        inputs, flat = labels, tokens.flatten(1)
        for place in range(flat.shape[1]):
            first = place == 0
            logits = network.static_step(inputs, static, codebook=place % 2, end=place + 1, first=first)
            torch.testing.assert_close(logits, expected[:, place], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(network.step(inputs, cache), expected[:, place], atol=1e-4, rtol=1e-4)
            static.place.add_(1)
            inputs = flat[:, place]
    assert torch.equal(expected, given)


def test_what_does_not_fit_is_refused() -> None:
    network, other = toy(sees_below=True), toy()
    tokens = grid(network)
    with pytest.raises(VaevqMedError, match="expected none, as sees_below is false"):
        other(tokens, below=tokens)
    with pytest.raises(VaevqMedError, match=r"below has shape \(3, 6\)"):
        network(tokens, below=tokens.flatten(1))
    with pytest.raises(VaevqMedError, match="indices of the slice below"):
        network(tokens, below=torch.full_like(tokens, K))
    with pytest.raises(VaevqMedError, match="sees_below is false"):
        LayerTokenLoss(network=other)
    volume = {"tokenizer": {"num_embeddings": K, "num_codebooks": 1}, "grid": [4, HEIGHT, WIDTH]}
    assert network.sizes(volume, "")["grid"] == ([HEIGHT, WIDTH], [HEIGHT, WIDTH])
    with pytest.raises(VaevqMedError, match="expected rows and columns"):
        other.sizes(volume, "")
    with pytest.raises(VaevqMedError, match="draws no volume"):
        network.draws(None, grid=(4, HEIGHT, WIDTH), settings={}, trained_with=str)  # type: ignore[arg-type]


def test_training_learns_to_copy_the_slice_below() -> None:
    """Tokens are independent, so that only the slice below tells them."""
    torch.manual_seed(0)
    network = LlamaGen(num_embeddings=8, grid_size=(2, 3), width=32, depth=1, num_heads=2, sees_below=True)
    loss = LayerTokenLoss(network=network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        layer = torch.randint(8, (32, 2, 3, 1))
        optimizer.zero_grad()
        loss(torch.stack([layer, layer], dim=1), torch.zeros(32, dtype=torch.int64)).backward()
        optimizer.step()
    loss.eval()
    layer = torch.randint(8, (64, 2, 3, 1))
    labels = torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        found = float(loss(torch.stack([layer, layer], dim=1), labels))
        alone = float(loss(torch.stack([torch.full_like(layer, -1), layer], dim=1), labels))
    assert found < 0.2 * math.log(8) < alone
    assert loss.figures(found)["perplexity"] == pytest.approx(math.exp(found))


@pytest.mark.parametrize("books", [1, 2])
def test_steps_are_the_networks_own_with_a_slice_below(books: int) -> None:
    network = random_prior(3, 11, (3, 4), books, sees_below=True).network
    tokens, below = grid(network), below_of(network)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected = network.double()(tokens, labels, below).flatten(1, -2)
    steps, found = RasterSteps(network, labels, below), []
    for place in range(expected.shape[1]):
        found.append(steps.logits(steps.hidden()))
        steps.feed(tokens.flatten(1)[:, place])
    # The network turns in fp32.
    assert (torch.stack(found, dim=1) - expected).abs().max() < 1e-4
    assert RasterWalk(network, 0).slices_at_once == 1


@pytest.mark.parametrize("shape", [(5, 4, 5), (1, 5, 4, 5)])
def test_the_coder_reads_slices_and_volumes(shape: tuple[int, ...]) -> None:
    stack = smooth_stack(2, shape=shape, num_codebooks=2)
    live = np.random.default_rng(0).random(shape) < 0.8
    layout = replace(stack.layout, live=live)
    indices = np.where(live[..., None], stack.indices, 0)
    coder = random_prior(0, 16, num_codebooks=2, sees_below=True)
    data = coder.encode(indices, layout)
    assert (coder.decode(data, layout) == indices).all()
    if len(shape) == 3:
        # As layers of one volume they have the same neighbors; a slice that is missing leaves one without any below.
        volume = replace(layout, live=live[None], slices=layout.slices[:1])
        assert coder.encode(indices[None], volume) == data
        apart = replace(layout, slices=layout.slices + np.array([0, 0, 1, 1, 1]))
        assert coder.encode(indices, apart) != data
        assert (coder.decode(coder.encode(indices, apart), apart) == indices).all()


def place_of(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*)-z(\d+)\.png", name)
    assert found is not None
    return found[1], int(found[2])


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt")


@pytest.fixture(scope="module")
def store(tokenizer_path: Path, slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stores") / "indices"
    encode(tokenizer_path, slice_dataset, output)
    return output


def test_the_layer_below_is_the_slice_of_the_number_before(store: Path) -> None:
    layers, tokens = LayerDataset(tokens_dir=store, seed=4), TokenDataset(tokens_dir=store)
    places = {place_of(item["id"]): number for number, item in enumerate(tokens.items)}
    assert len(layers) == len(tokens)
    found = 0
    for index in range(2 * len(layers)):
        item = layers[index]
        view, number = layers.view(index), index % len(layers)
        assert torch.equal(item["layers"][1], tokens.item(number, view)["indices"])
        of, at = place_of(item["id"])
        if (of, at - 1) in places:
            found += 1
            assert torch.equal(item["layers"][0], tokens.item(places[of, at - 1], view)["indices"])
        else:
            assert (item["layers"][0] == -1).all()
    assert 0 < found < 2 * len(layers)


def test_of_runs_of_slices_every_layer_is_an_item(slice_dataset: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c.pt", whole={"slice_context": 1}, depth=2)
    encode(checkpoint, slice_dataset, tmp_path / "runs")
    layers, tokens = LayerDataset(tokens_dir=tmp_path / "runs"), TokenDataset(tokens_dir=tmp_path / "runs")
    assert tokens.store.content["depth"] == 2
    assert len(layers) == 2 * len(tokens)
    places = {place_of(item["id"]): number for number, item in enumerate(tokens.items)}
    joined = 0
    for index in range(len(layers)):
        below, own = layers[index]["layers"]
        whole = tokens.item(index // 2, layers.view(index))["indices"]
        assert torch.equal(own, whole[index % 2])
        of, at = place_of(layers[index]["id"])
        before = places.get((of, at - 2))
        if index % 2:
            assert torch.equal(below, whole[0])
        elif before is None:
            assert (below == -1).all()
        else:
            joined += 1
            assert torch.equal(below, tokens.item(before, layers.view(index))["indices"][1])
    assert joined


def test_a_store_of_photographs_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaevq_med.tokens.layers._SLICE", re.compile("nothing"))
    with pytest.raises(DataError, match="expected slices of volumes, made by vaevq-med slice-extract"):
        LayerDataset(tokens_dir=store)


def test_the_overlay_trains_a_prior_that_codes_a_case(store: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {
        "tokens_dir": str(store),
        "output_dir": str(tmp_path / "run"),
        "tracking_uri": "none",
        "device": "cpu",
        "max_epochs": 1,
        "batch_size": 4,
        "num_workers": 0,
        "precision": "fp32",
        "val_max_items": 4,
        **TOY["autoregressive"],
    }
    workflow = ConfigWorkflow(
        config_file=[str(BUNDLE / "train_autoregressive.json"), str(OVERLAYS / "generation/autoregressive_below.json")],
        meta_file=str(BUNDLE / "metadata.json"),
        logging_file=str(BUNDLE / "logging.conf"),
        workflow_type="train",
        **overrides,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    prior = tmp_path / "run" / "checkpoints" / "best.pt"
    network = StoredGenerator(prior).network()
    assert isinstance(network, LlamaGen)
    assert network.sees_below
    source = write_case(tmp_path / "cases", "BraTS-GLI-00000-000", ("t1n", "t1c"))
    options = {"checkpoint": tokenizer_path, "workers": 1, "batch_size": 8, "modality": ["t1n", "t1c"]}
    found = []
    for name, coder in {"prior": {"coder": "prior", "model": prior}, "fixed": {"coder": "fixed"}}.items():
        path = tmp_path / f"{name}.vvq"
        compress(source, path, CompressOptions(**options, **coder)).run()  # type: ignore[arg-type]
        found.append(CompressedCase.from_bytes("", path.read_bytes(), model=coder.get("model")))  # type: ignore[arg-type]
    for one, other in zip(*(case.streams for case in found), strict=True):
        assert (one.indices == other.indices).all()
