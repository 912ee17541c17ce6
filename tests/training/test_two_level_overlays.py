"""The overlays of two levels: trained, evaluated with their rate, encoded, drawn from and compressed, at toy size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, OVERLAYS, toy_config
from helpers.bundles import TOY, evaluation_overrides, quick, run_bundle
from helpers.scans import write_case
from helpers.stores import encode
from monai.bundle import ConfigParser

from vaevq_med.codec.case import CompressedCase
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.work import compress, decompress
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.transforms import LoadSliced
from vaevq_med.losses import KLLoss, RCSLoss
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.networks.packing import packed
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.tokens.store import TokenDataset
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.trained.pack import BundlePack


def train(overlay: str, toy: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The configuration of a run of one epoch, and its trainer."""
    # A fixed threshold: a few steps find none that a test could know.
    fixed = {"network_def#quantizer#gate#threshold": 0.02} if overlay in ("gate_entropy", "gate_posterior") else {}
    config = {**quick(toy), "num_embeddings": 16, **fixed}
    return config, run_bundle("train.json", config, overlay, run_id="training").get_parsed_content("train#trainer")


def reconstructed(config: dict[str, Any]) -> tuple[StoredTokenizer, Any]:
    stored = StoredTokenizer(Path(config["output_dir"]) / "checkpoints" / "last.pt")
    return stored, stored.network().eval()


@pytest.mark.parametrize(
    ("overlay", "codes", "pixels"),
    [
        *[(name, 5, 16) for name in ("two_level", "two_level_residual", "gate_entropy", "gate_learned")],
        ("tree", 2, 4),
    ],
)
def test_an_overlay_trains_and_its_checkpoint_is_read(
    overlay: str, codes: int, pixels: int, toy_overrides: dict[str, Any]
) -> None:
    config, trainer = train(overlay, toy_overrides)
    summary = json.loads((Path(config["output_dir"]) / "run.json").read_text())
    bits = codes * math.log2(17 if overlay.startswith("gate") else 16)
    assert summary["bits_per_position"] == pytest.approx(bits)
    assert summary["bits_per_pixel"] == pytest.approx(bits / pixels)
    assert ("budget" in trainer.state.terms) == (overlay == "gate_learned")
    assert all(math.isfinite(float(value)) for value in trainer.state.terms.values())
    _, network = reconstructed(config)
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    with torch.inference_mode():
        indices = network.encode_indices(images)
        assert indices.shape[-1] == codes
        assert torch.equal(network.decode_indices(indices), network(images))


@pytest.mark.parametrize("overlay", ["two_level_residual", "gate_entropy", "gate_learned", "gate_posterior"])
@pytest.mark.parametrize("axes", [2, 3])
def test_kl_and_rcs_count_as_much_as_without_cells(overlay: str, axes: int) -> None:
    """Of the same latent, by the scales of the overlay, cells of 4 and of 8 positions."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "train.json"), str(OVERLAYS / f"{overlay}.json")])
    parser["network_def"]["quantizer"]["cell_size"] = 2**axes
    scales = {name: parser.get_parsed_content(f"objective#terms#{name}#scale") for name in ("kl", "rcs")}
    draws = torch.Generator().manual_seed(0)
    mean, logvar, codes = (torch.randn(2, 3, *[4] * axes, generator=draws) for _ in range(3))

    def output(cell: int) -> TokenizerOutput:
        m, v, c = (packed(one, cell, axes) for one in (mean, logvar, codes))
        quantized = QuantizerOutput(quantized=c, codes=c, indices=None)
        return TokenizerOutput(m, m, m, DiagonalGaussian(m, v), quantized)

    for kind, name in ((KLLoss, "kl"), (RCSLoss, "rcs")):
        expected = kind()(mean, output(1))
        found = kind(scale=scales[name])(mean, output(2))
        torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def gated(slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a run with the posterior's gate."""
    return train("gate_posterior", toy_config(slice_dataset, tmp_path_factory.mktemp("gated") / "run"))[0]


def test_the_rate_is_that_of_the_splits_indices(gated: dict[str, Any], slice_dataset: Path) -> None:
    without = {"lpips_network": None, "fid_network": None}
    run_bundle("evaluate.json", {**evaluation_overrides(gated), **without}, run_id="evaluating")
    record = json.loads((Path(gated["output_dir"]) / "evaluation" / "test" / "metrics.json").read_text())
    overall = record["summary"]["overall"]
    assert {"mean_bits", "mean_codes"} <= set(record["conventions"])
    _, network = reconstructed(gated)
    items = SliceDataset(dataset_dir=slice_dataset, split="test", transform=LoadSliced(image_size=32))
    with torch.inference_mode():
        indices = network.encode_indices(torch.stack([items[n]["image"] for n in range(len(items))]))
    share = float((indices[..., 1] != 16).double().mean())
    entropy = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    assert 0 < share < 1
    utilization = torch.stack([torch.bincount(codes.flatten(), minlength=17)[:16] > 0 for codes in indices.unbind(-1)])
    assert overall["utilization"]["value"] == pytest.approx(float(utilization.double().mean()))
    assert overall["mean_codes"]["value"] == pytest.approx(1 + 4 * share)
    assert overall["mean_bits"]["value"] == pytest.approx(4 * (1 + 4 * share) + entropy)


def test_stores_and_generators_take_what_is_absent_for_one_more_codeword(
    gated: dict[str, Any], slice_dataset: Path, tmp_path: Path
) -> None:
    stored, network = reconstructed(gated)
    tokens = tmp_path / "tokens"
    encode(stored.path, slice_dataset, tokens)
    store = TokenDataset(tokens_dir=tokens, split="test")
    found = torch.stack([store[number]["indices"] for number in range(4)])
    assert found.shape == (4, 8, 8, 5)
    assert int((found == 16).sum()) > 0
    items = SliceDataset(dataset_dir=slice_dataset, split="test", transform=LoadSliced(image_size=32))
    with torch.inference_mode():
        images = network(torch.stack([items[n]["image"] for n in range(4)]))
        torch.testing.assert_close(network.decode_indices(found), images)
    overrides = {
        "tokens_dir": str(tokens),
        "output_dir": str(tmp_path / "generator"),
        **{"tracking_uri": "none", "device": "cpu", "precision": "fp32", "num_workers": 0},
        **{"max_epochs": 1, "epoch_length": 1, "batch_size": 4, "val_max_items": 4, **TOY["autoregressive"]},
    }
    trainer = run_bundle("train_autoregressive.json", overrides, run_id="training").get_parsed_content("train#trainer")
    assert (trainer.network.num_embeddings, trainer.network.num_codebooks) == (17, 5)
    assert trainer.state.iteration == 1
    drawn = torch.full((1, 8, 8, 5), 16)  # whatever a generator draws is decoded
    with torch.inference_mode():
        assert bool(network.decode_indices(drawn).isfinite().all())


def test_a_card_says_that_a_gates_bits_are_at_most_those(gated: dict[str, Any], tmp_path: Path) -> None:
    stored, _ = reconstructed(gated)
    BundlePack("brats", tmp_path / "zoo", stored.path).run()
    text = (tmp_path / "zoo" / "README.md").read_text()
    assert "| bits a position, at most | " in text
    assert "| bits a pixel, at most | " in text
    assert "| bits a position | " not in text


def test_the_codec_takes_a_gated_tokenizer(gated: dict[str, Any], tmp_path: Path) -> None:
    stored, _ = reconstructed(gated)
    write_case(tmp_path / "cases", "BraTS-GLI-00000-000")
    streams, sizes = {}, {}
    for coder, codebooks in (("adaptive", None), ("fixed", None), ("adaptive", 1)):
        output = tmp_path / f"{coder}{codebooks}.vvq"
        options = CompressOptions(checkpoint=stored.path, workers=1, batch_size=8, coder=coder, codebooks=codebooks)
        compress(tmp_path / "cases" / "BraTS-GLI-00000-000", output, options).run()
        streams[coder, codebooks] = CompressedCase.from_bytes("", output.read_bytes()).streams[0].indices
        sizes[coder, codebooks] = output.stat().st_size
        back = DecompressOptions(checkpoint=stored.path, workers=1)
        assert decompress(output, tmp_path / f"back_{coder}{codebooks}", back).run().written == 1
    whole = streams["adaptive", None]
    assert whole.shape[-1] == 5
    assert int((whole == 16).sum()) > 0
    assert np.array_equal(streams["fixed", None], whole)
    assert np.array_equal(streams["adaptive", 1], whole[..., :1])  # the structure alone
    assert sizes["adaptive", 1] < sizes["adaptive", None] < sizes["fixed", None]
