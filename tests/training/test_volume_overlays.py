"""The overlays of volumes: trained, resumed, validated, evaluated and encoded, at toy size."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config, trainer_of, write_slice_dataset
from helpers.bundles import evaluation_overrides, quick, run_bundle, states_equal

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.perceptual import PerceptualLoss
from vaevq_med.networks.outputs import QuantizerOutput, TokenizerOutput
from vaevq_med.tokens.encode import EncodeTokens
from vaevq_med.tokens.store import TokenDataset
from vaevq_med.trained.file import read_checkpoint

SMALL = {"depth": 4, "batch_size": 2}
LENGTHS = {f"schedulers#{number}#total_steps": 4 for number in range(2)}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten slices a case of one contrast."""
    folder = write_slice_dataset(tmp_path_factory.mktemp("volumes"), slices=10)
    content = json.loads((folder / "dataset.json").read_text())
    for split in ("training", "validation", "test"):
        content[split] = [entry for entry in content[split] if entry["modality"] == "t1n"]
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def overrides(volumes: Path, output: Path, overlay: str, **further: Any) -> dict[str, Any]:
    patch = {} if overlay == "slice_context" else {"patch_size": 16}
    return {**quick(toy_config(volumes, output)), **SMALL, **LENGTHS, **patch, **further}


@pytest.fixture(scope="module")
def trained(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """Two epochs of one step each, in one go."""
    config = overrides(volumes, tmp_path_factory.mktemp("trained") / "run", "volume_f4", max_epochs=2)
    trainer = trainer_of(config, "volume_f4")
    trainer.run()
    return config, trainer


@pytest.fixture(scope="module")
def flat(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained tokenizer of slices."""
    config = quick(toy_config(volumes, tmp_path_factory.mktemp("flat") / "run"))
    trainer_of(config).run()
    return config


def evaluated(config: dict[str, Any], **further: Any) -> tuple[dict[str, Any], Path]:
    """The record of an evaluation without feature networks, and its folder."""
    without = {"lpips_network": None, "fid_network": None}
    run_bundle("evaluate.json", {**evaluation_overrides(config), **without, **further}, run_id="evaluating")
    folder = Path(config["output_dir"]) / "evaluation" / further.get("evaluation_name", "test")
    return json.loads((folder / "metrics.json").read_text())["summary"], folder


def test_a_run_on_volumes_goes_on_where_it_stood(trained: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    config, unbroken = trained
    # Three runs of slices of one case, two a step.
    assert unbroken.state.iteration == 2
    assert all(math.isfinite(value) for value in unbroken.state.terms.values())
    summary = unbroken.summary()
    assert summary["bits_per_pixel"] == pytest.approx(summary["bits_per_position"] / 8)
    config = {**config, "output_dir": str(tmp_path)}
    trainer_of({**config, "max_epochs": 1}, "volume_f4").run()
    resumed = trainer_of(config, "volume_f4")
    assert resumed.state.iteration == 1
    resumed.run()
    assert states_equal(resumed.network.state_dict(), unbroken.network.state_dict())


def test_volumes_are_evaluated_slice_by_slice(trained: tuple[dict[str, Any], Any]) -> None:
    summary, folder = evaluated(trained[0])
    overall = summary["overall"]
    # A row and the usual figures of each slice; one pair of neighbors less in each of the three items.
    assert overall["psnr"]["n"] == overall["ssim"]["n"] == 10
    assert overall["inter_slice_error"]["n"] == 10 - 3
    assert 0 < overall["inter_slice_error"]["value"] < 1
    assert summary["region"]["brain"]["psnr"]["n"] == 10
    with (folder / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["slice"]) for row in rows] == list(range(10))
    assert [row["inter_slice_error"] == "nan" for row in rows] == [False, False, False, True] * 2 + [False, True]
    assert (folder / "best_median_worst.png").stat().st_size > 1000


@pytest.mark.parametrize(("overlay", "pixels"), [("volume_f8", 8), ("slice_context", 4)])
def test_the_other_overlays_train_and_are_evaluated(overlay: str, pixels: int, volumes: Path, tmp_path: Path) -> None:
    config = overrides(volumes, tmp_path / "run", overlay)
    trainer = trainer_of(config, overlay)
    trainer.run()
    assert trainer.state.iteration == 1
    assert all(math.isfinite(value) for value in trainer.state.terms.values())
    summary = trainer.summary()
    assert summary["bits_per_pixel"] == pytest.approx(summary["bits_per_position"] / pixels)
    overall = evaluated(config)[0]["overall"]
    assert (overall["psnr"]["n"], overall["inter_slice_error"]["n"]) == (10, 7)


def test_a_volume_starts_from_slices(flat: dict[str, Any], volumes: Path, tmp_path: Path) -> None:
    checkpoint = Path(flat["output_dir"]) / "checkpoints" / "last.pt"
    state = read_checkpoint(checkpoint)["ema"]
    deep = trainer_of(overrides(volumes, tmp_path / "deep", "volume_f4", init_from=str(checkpoint)), "volume_f4")
    assert torch.equal(deep.network.encoder.layers[0].weight[:, :, 1], state["encoder.layers.0.weight"])
    assert deep.network.encoder.layers[0].weight[:, :, 0].abs().max() == 0
    settings = overrides(volumes, tmp_path / "context", "slice_context", init_from=str(checkpoint))
    context = trainer_of(settings, "slice_context")
    assert torch.equal(context.network.post_quant_conv.weight[:, :, 1], state["post_quant_conv.weight"])
    assert context.network.post_quant_conv.weight[:, :, 0].abs().max() == 0


def test_a_tokenizer_of_slices_is_evaluated_on_volumes(flat: dict[str, Any]) -> None:
    single = evaluated(flat)[0]["overall"]
    volume = evaluated(flat, depth=4, evaluation_name="volumes")[0]["overall"]
    assert volume["psnr"] == pytest.approx(single["psnr"])
    assert volume["ssim"] == pytest.approx(single["ssim"])
    assert "inter_slice_error" not in single
    assert volume["inter_slice_error"]["n"] == 7


@pytest.mark.parametrize(("kind", "shape"), [("indices", (2, 16, 16, 1)), ("latents", (4, 2, 16, 16))])
def test_tokens_of_volumes_are_stored(
    kind: str, shape: tuple[int, ...], trained: tuple[dict[str, Any], Any], volumes: Path, tmp_path: Path
) -> None:
    checkpoint = Path(trained[0]["output_dir"]) / "checkpoints" / "last.pt"
    command = EncodeTokens(
        checkpoint=checkpoint, dataset=volumes, output=tmp_path / "store", kind=kind, workers=0, device="cpu"
    )
    store = command.run().store
    assert store.grid == (2, 16, 16)
    item = TokenDataset(tokens_dir=store.root, split="training", grid=(2, 16, 16))[0]
    assert tuple(item["indices" if kind == "indices" else "latent"].shape) == shape


def test_channels_last_is_refused(volumes: Path, tmp_path: Path) -> None:
    with pytest.raises((SystemExit, VaevqMedError)):
        trainer_of(overrides(volumes, tmp_path, "volume_f4", channels_last=True), "volume_f4")


def test_the_perceptual_loss_of_a_volume_is_that_of_its_slices() -> None:
    loss = PerceptualLoss(num_slices=3)
    target, found = torch.rand(2, 1, 3, 32, 32), torch.rand(2, 1, 3, 32, 32)

    def output(images: torch.Tensor) -> TokenizerOutput:
        return TokenizerOutput(images, None, images, None, QuantizerOutput(images, images, torch.zeros(1)))

    by_slice = [loss(target[:, :, z], output(found[:, :, z])) for z in range(3)]
    torch.testing.assert_close(loss(target, output(found)), torch.stack(by_slice).mean())
