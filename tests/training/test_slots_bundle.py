"""One-dimensional tokens through the bundles: trained, judged, stored, learned by LlamaGen, and refused where due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OVERLAYS, toy_config, trainer_of
from helpers.bundles import TOY, generator_overrides, quick, run_bundle, run_generator, train_and_evaluate
from helpers.stores import encode
from helpers.transformers import of_transformers, write_slots
from monai.bundle import ConfigParser

from vaevq_med.codec.model import describe
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.tasks.probes import Probe
from vaevq_med.trained import StoredTokenizer
from vaevq_med.trained.pack import BundlePack
from vaevq_med.trained.verify import BundleVerify

SLOTS = {"num_slots": 8}


@pytest.mark.parametrize("overlays", [("titok",), ("nested_1d", "rvq")], ids="+".join)
def test_it_trains_and_is_judged(overlays: tuple[str, ...], toy_overrides: dict[str, Any]) -> None:
    trainer, overall = train_and_evaluate(of_transformers(quick(toy_overrides), **SLOTS), *overlays)
    network = trainer.network
    assert network.factors == (32, 4)
    assert overall["psnr"]["n"] == 16
    assert (network.decoder.nested is not None) == (overlays[0] == "nested_1d") == (network.num_prefixes > 1)
    bits = network.quantizer.bits_per_position
    assert trainer.summary()["bits_per_pixel"] == pytest.approx(8 * bits / 32**2)


def test_nested_slots_are_packed_verified_and_cut(slice_dataset: Path, tmp_path: Path) -> None:
    config = of_transformers(quick(toy_config(slice_dataset, tmp_path / "run")), **SLOTS)
    trainer_of(config, "nested_1d").run()
    source = tmp_path / "run/checkpoints/last.pt"
    BundlePack("brats", tmp_path / "zoo", source).run()
    assert list(BundleVerify(tmp_path / "zoo").run())
    first, second = (StoredTokenizer(path).network() for path in (source, tmp_path / "zoo"))
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        indices = first.encode_indices(x)
        assert torch.equal(second.encode_indices(x), indices)
        for count in (1, 8):
            assert torch.equal(
                second.decode_indices(indices[:, :, :count]), first.decode_indices(indices[:, :, :count])
            )


@pytest.mark.parametrize("name", ["flow", "flow_transformer"])
def test_a_flow_learns_the_latents_of_slots_and_draws_them(name: str, slice_dataset: Path, tmp_path: Path) -> None:
    checkpoint = write_slots(tmp_path / "slots.pt")
    encode(checkpoint, slice_dataset, tmp_path / "latents", kind="latents")
    sizes = TOY["diffusion"] | {"network_def#channel_mult": [1]}  # a U-Net halves a grid of one row at no level
    if name == "flow_transformer":
        sizes = {"network_def#width": 16, "network_def#depth": 1, "network_def#num_heads": 2}
    training = generator_overrides(tmp_path / "latents", tmp_path / "run", sizes)
    run_generator("train_diffusion.json", training, name)
    drawing = {
        "checkpoint_path": str(tmp_path / "run" / "checkpoints" / "last.pt"),
        "tokenizer_path": str(checkpoint),
        "generated_dir": str(tmp_path / "drawn"),
        "device": "cpu",
        "num_samples": 2,
        "num_steps": 3,
    }
    run_bundle("generate.json", drawing)
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2


def test_the_null_slots_and_the_slots_learn(slice_dataset: Path, tmp_path: Path) -> None:
    config = of_transformers(quick(toy_config(slice_dataset, tmp_path / "run")), **SLOTS)
    trainer = trainer_of(config, "nested_1d")
    names = ("decoder.nested.null", "decoder.places", "decoder.mask_token", "encoder.slots")
    before = {name: trainer.network.get_parameter(name).detach().clone() for name in names}
    trainer.run()
    assert not [name for name in names if torch.equal(trainer.network.get_parameter(name), before[name])]


def test_the_small_sizes_go_over_those_of_a_cpu_and_leave_the_quantizer() -> None:
    parser = ConfigParser()
    names = ("small_cpu", "nested_1d", "nested_1d_small_cpu")
    parser.read_config([str(OVERLAYS.parent / "imagenet/train.json"), *(str(OVERLAYS / f"{n}.json") for n in names)])
    network = parser.get_parsed_content("network_def").eval()
    assert (network.quantizer.num_embeddings, network.embedding_dim) == (4096, 12)
    assert network.encode_indices(torch.zeros(1, 3, 128, 128)).shape == (1, 1, 32, 1)
    assert sum(parameter.numel() for parameter in network.encoder.parameters()) == pytest.approx(0.82e6, rel=0.01)


def test_llamagen_learns_the_sequence_and_draws_it(
    slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_slots(tmp_path / "slots.pt")
    store = encode(checkpoint, slice_dataset, tmp_path / "tokens").store
    assert store.grid == (1, 8)
    assert store.tokenizer["patchwise"] is False
    overrides = generator_overrides(tmp_path / "tokens", tmp_path / "run")
    trainer = run_bundle("train_autoregressive.json", overrides, run_id="training").get_parsed_content("train#trainer")
    assert trainer.network.grid_size == (1, 8)
    drawing = {
        "checkpoint_path": str(tmp_path / "run" / "checkpoints" / "last.pt"),
        "tokenizer_path": str(checkpoint),
        "generated_dir": str(tmp_path / "drawn"),
        "device": "cpu",
        "num_samples": 2,
    }
    run_bundle("generate.json", drawing)
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    around = {"inpaint_tokens": str(tmp_path / "tokens"), "inpaint_box": [0, 0, 8, 8], "inpaint_split": "test"}
    with pytest.raises(SystemExit):
        run_bundle("generate.json", {**drawing, **around})
    assert (
        "inpaint_tokens: found tokens that stand for no place, expected one for each patch" in capsys.readouterr().err
    )


def test_what_asks_for_places_refuses_it(
    slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_slots(tmp_path / "slots.pt")
    stored = StoredTokenizer(checkpoint)
    with pytest.raises(VaevqMedError, match="found tokens that stand for no place, expected one for each patch of"):
        describe(stored, stored.network())
    with pytest.raises(VaevqMedError, match="found tokens that stand for no place, expected one for each patch"):
        Probe(checkpoints=[checkpoint], dataset=slice_dataset, output=tmp_path / "probes").run()
    toy = quick(toy_config(slice_dataset, tmp_path / "run"))
    config = {**of_transformers(toy, **SLOTS), "network_def#variational": True}
    with pytest.raises(SystemExit):
        run_bundle("train.json", config, "nested_1d", "kl_budget", run_id="training")
    said = "objective.terms.kl.tokens is 'content' with tokens that have no patch; expected 'all'"
    assert said in capsys.readouterr().err
    run_bundle("train.json", {**config, "objective#terms#kl#tokens": "all"}, "nested_1d", "kl_budget")
