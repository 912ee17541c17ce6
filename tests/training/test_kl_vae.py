"""Continuous first, then discrete: a KL-VAE trained, judged and encoded, and a quantizer set into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config, trainer_of
from helpers.bundles import evaluation_overrides, quick, run_bundle

from vaevq_med.codec.model import describe
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.tokens.encode import EncodeTokens
from vaevq_med.tokens.store import TokenDataset
from vaevq_med.trained.network import StoredTokenizer


@pytest.fixture(scope="module")
def vae(slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained KL-VAE."""
    config = quick(toy_config(slice_dataset, tmp_path_factory.mktemp("vae") / "run"))
    trainer = trainer_of(config, "kl_vae")
    trainer.run()
    assert trainer.state.terms["reconstruction"] > 0
    return config


def checkpoint_of(config: dict[str, Any]) -> Path:
    return Path(config["output_dir"]) / "checkpoints" / "last.pt"


def test_it_is_judged_without_bits_and_codewords(vae: dict[str, Any]) -> None:
    run = json.loads((Path(vae["output_dir"]) / "run.json").read_text())
    assert not [name for name in run if name.startswith("bits_")]
    assert sorted(path.name for path in (Path(vae["output_dir"]) / "validation").iterdir()) == ["reconstructions.png"]
    without = {"lpips_network": None, "fid_network": None}
    run_bundle("evaluate.json", {**evaluation_overrides(vae), **without}, run_id="evaluating")
    record = json.loads((Path(vae["output_dir"]) / "evaluation" / "test" / "metrics.json").read_text())
    overall = record["summary"]["overall"]
    assert overall["psnr"]["n"] == 16
    assert {"active_channels"} < set(overall)
    assert not {"utilization", "perplexity", "dead_codes", "utilization_sample"} & set(overall)
    assert record["provenance"]["is_discrete"] is False


def test_its_latents_are_stored_and_its_indices_refused(
    vae: dict[str, Any], slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "checkpoint": checkpoint_of(vae),
        "dataset": slice_dataset,
        "workers": 0,
        "device": "cpu",
    }
    store = EncodeTokens(output=tmp_path / "latents", kind="latents", dtype="float32", **options).run().store
    latent = torch.as_tensor(TokenDataset(tokens_dir=store.root, split="test")[0]["latent"])
    stored = StoredTokenizer(checkpoint_of(vae))
    network = stored.network()
    image = torch.from_numpy(_first(slice_dataset)).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(latent, network.encode(image).mean[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(
        VaevqMedError,
        match=r"found Continuous, expected one that decodes its indices, .*; --kind latents has its latents",
    ):
        EncodeTokens(output=tmp_path / "indices", **options).run()
    with pytest.raises(VaevqMedError, match="found Continuous, whose images are not decoded from indices, expected a"):
        describe(stored, network)
    overrides = {key: value for key, value in evaluation_overrides(vae).items() if key != "tracking_uri"}
    with pytest.raises(SystemExit):
        run_bundle("inference.json", overrides)
    assert "write: found indices of Continuous, which has none, expected reconstructions" in capsys.readouterr().err
    run_bundle("inference.json", {**overrides, "write": "reconstructions"})


def _first(dataset: Path) -> Any:
    from vaevq_med.images.dataset import SliceDataset
    from vaevq_med.images.transforms import LoadSliced

    return SliceDataset(dataset_dir=dataset, split="test", transform=LoadSliced(image_size=32))[0]["image"].numpy()


@pytest.mark.parametrize("overlays", [("vqgan_ema",), ("vqgan", "rectifier"), ("coherent",), ("rvq",)])
def test_a_quantizer_is_set_into_it(overlays: tuple[str, ...], vae: dict[str, Any], tmp_path: Path) -> None:
    """Encoder, decoder and the mean of the latent are the VAE's; the frozen ones are so at the end."""
    config = {
        **vae,
        "output_dir": str(tmp_path / "run"),
        "init_from": str(checkpoint_of(vae)),
        "freeze": ["encoder", "decoder"],
        "codebook_init": "kmeans",
        "codebook_init_batches": 2,
    }
    trainer = trainer_of(config, *overlays)
    before = StoredTokenizer(checkpoint_of(vae)).network()
    images = torch.randn(2, 1, 32, 32)
    encoded = trainer.network.eval().encode(images)
    mean = encoded.mean if isinstance(encoded, DiagonalGaussian) else encoded
    torch.testing.assert_close(mean, before.encode(images).mean)
    trainer.run()
    for name, value in before.state_dict().items():
        if name.startswith(("encoder.", "decoder.")):
            assert torch.equal(trainer.network.state_dict()[name], value), name
    if "rectifier" in overlays:
        assert trainer.network.rectifier.layers[-1].weight.abs().sum() > 0
    found = StoredTokenizer(tmp_path / "run" / "checkpoints" / "last.pt").network()
    assert found.encode_indices(images).shape[:3] == (2, 16, 16)
