"""Tokenizers of transformers through the bundles: trained over several quantizers, judged, started from and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OVERLAYS, toy_config, trainer_of
from helpers.bundles import quick, run_bundle, train_and_evaluate
from helpers.transformers import of_transformers

from vaevq_med.networks import ViTDecoder, ViTEncoder
from vaevq_med.trained import StoredTokenizer
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.trained.pack import BundlePack


@pytest.fixture(scope="module")
def run(slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The overrides of a short run that is done."""
    config = of_transformers(quick(toy_config(slice_dataset, tmp_path_factory.mktemp("vit") / "run")))
    train_and_evaluate(config, "vit")
    return config


@pytest.mark.parametrize("overlays", [("cosine", "vit"), ("vit", "simvq"), ("rvq", "vit")], ids="+".join)
def test_it_trains_under_any_quantizer(overlays: tuple[str, ...], toy_overrides: dict[str, Any]) -> None:
    trainer, _ = train_and_evaluate(of_transformers(quick(toy_overrides)), *overlays)
    assert isinstance(trainer.network.encoder, ViTEncoder)
    assert trainer.network.quantizer.num_embeddings == 32


def test_the_adaptive_weight_is_measured_at_its_last_layer(toy_overrides: dict[str, Any]) -> None:
    parser = run_bundle("train.json", of_transformers(toy_overrides), "vit", run_id="training")
    trainer = parser.get_parsed_content("train#trainer")
    assert trainer.state.terms["adaptive_weight"] > 0
    assert trainer.network.last_layer.shape == (1, 8, 8, 16)


def test_a_run_starts_from_it_with_other_channels_and_freezes_it(
    run: dict[str, Any], slice_dataset: Path, tmp_path: Path
) -> None:
    source = Path(run["output_dir"]) / "checkpoints" / "last.pt"
    config = of_transformers(quick(toy_config(slice_dataset, tmp_path / "run")))
    # The positions have no weights, so that the image size may be another one; those of the sizes of the halves that
    # the overlay sets run on beyond the known ones, and those of the old sizes are interpolated.
    further = {"init_from": str(source), "freeze": ["encoder"], "in_channels": 2, "image_size": 64}
    network = trainer_of({**config, **further, "discriminator_def#in_channels": 2}, "vit").network
    before = read_checkpoint(source)["ema"]
    name = "encoder.patchify.layer.weight"
    own = network.state_dict()
    torch.testing.assert_close(own[name], before[name].expand(-1, 2, -1, -1) / 2)
    torch.testing.assert_close(own["decoder.head.weight"], before["decoder.head.weight"].expand(2, -1, -1, -1))
    torch.testing.assert_close(own["decoder.head.bias"], before["decoder.head.bias"].expand(2, -1, -1))
    trainer = trainer_of({**config, "init_from": str(source), "freeze": "encoder"}, "vit")
    trainer.run()
    after = trainer.network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("encoder."))
    assert not torch.equal(after["decoder.head.weight"], before["decoder.head.weight"])


def test_a_run_at_another_size_interpolates_positions_where_the_halves_keep_theirs(
    run: dict[str, Any], slice_dataset: Path, tmp_path: Path
) -> None:
    source = Path(run["output_dir"]) / "checkpoints" / "last.pt"
    config = of_transformers(quick(toy_config(slice_dataset, tmp_path / "run")))
    config |= {"init_from": str(source), "image_size": 64}
    kept = {f"network_def#{half}#image_size": 32 for half in ("encoder", "decoder")}
    first = StoredTokenizer(source).network().eval()
    images = torch.rand(1, 1, 64, 64)
    for further in (kept, {}):
        network = trainer_of({**config, **further}, "vit").network.eval()
        with torch.no_grad():
            assert torch.equal(network(images), first(images)) == bool(further)


def test_it_is_packed_and_read_back(run: dict[str, Any], tmp_path: Path) -> None:
    source = Path(run["output_dir"]) / "checkpoints" / "last.pt"
    BundlePack("brats", tmp_path / "zoo", source).run()
    images = torch.rand(1, 1, 32, 32)
    first, second = (StoredTokenizer(path).network() for path in (source, tmp_path / "zoo"))
    assert isinstance(second.decoder, ViTDecoder)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(first(images), second(images))


def test_the_small_sizes_go_over_those_of_a_cpu(toy_overrides: dict[str, Any]) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    names = ("small_cpu", "cosine", "vit_small_cpu")
    parser.read_config([str(OVERLAYS.parent / "brats/train.json"), *(str(OVERLAYS / f"{n}.json") for n in names)])
    network = parser.get_parsed_content("network_def")
    assert network.factors == (8, 8)
    assert sum(parameter.numel() for parameter in network.encoder.parameters()) == pytest.approx(0.8e6, rel=0.01)
    assert network(torch.zeros(1, 1, 128, 128)).shape == (1, 1, 128, 128)
