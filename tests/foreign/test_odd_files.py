"""Foreign files that are nearly right: older names are understood, and values that cannot be are refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign_networks import VQGAN, small
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.foreign.adopt import Adopt
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.registry import kind_of
from vaevq_med.networks.adapters.base import ForeignTokenizer
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.trained.pack import BundlePack

_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def adopt(kind: str, source: Path, **options: Any) -> Any:
    options = {"image_size": 16, **options}
    return Adopt(kind, source, source.parent / "adopted.pt", kind_of(kind).options(**options), overwrite=True).run()


def refused(kind: str, source: Path, **options: Any) -> str:
    with pytest.raises(VaevqMedError) as caught:
        adopt(kind, source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def kl(tmp_path: Path) -> tuple[Any, Path]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=3,
    ).eval()
    network.save_pretrained(tmp_path / "kl")
    return network, tmp_path / "kl"


@pytest.mark.peer
@pytest.mark.parametrize("convolutions", [False, True])
def test_a_file_of_old_names_of_attention_is_the_network_that_diffusers_loads(
    convolutions: bool, kl: tuple[Any, Path]
) -> None:
    network, folder = kl
    path = folder / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, value in load_file(path).items():
        for new, before in _OLD.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
                value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
        old[name] = value.contiguous()
    assert any(".proj_attn." in name for name in old)
    save_file(old, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "of_tomorrow": 1}))
    report = adopt("diffusers-kl", folder, latent_range="-3,3")
    assert any(note.startswith("config.json: of_tomorrow ignored") for note in report.notes)
    theirs = network if convolutions else type(network).from_pretrained(folder).eval()
    x = small(1, 1, 3, 16, 16)
    with torch.no_grad():
        mean = StoredTokenizer(report.output).network().encode(x).mode()
        torch.testing.assert_close(mean, theirs.encode(x).latent_dist.mode(), rtol=1e-4, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"latent_channels": None}, "found values that do not belong in it (TypeError"),
        ({"in_channels": [3]}, "found values that do not belong in it (TypeError"),
        ({"block_out_channels": "wide"}, "found arguments that it does not take"),
        ({"layers_per_block": None}, "found arguments that it does not take"),
    ],
)
def test_a_damaged_configuration_is_refused_in_a_line(values: dict[str, Any], said: str, kl: tuple[Any, Path]) -> None:
    path = kl[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    line = refused("diffusers-kl", kl[1], latent_range="-3,3")
    assert said in line
    assert str(kl[1]) in line


@pytest.mark.peer
def test_json_that_is_nested_without_end_is_refused_in_a_line(kl: tuple[Any, Path]) -> None:
    (kl[1] / "config.json").write_text("[" * 100_000)
    assert "config.json: found no JSON" in refused("diffusers-kl", kl[1], latent_range="-3,3")


@pytest.mark.parametrize("axes", [1, True])
def test_axes_that_monai_does_not_have_are_refused_in_a_line(axes: Any, tmp_path: Path) -> None:
    config = {"spatial_dims": axes, "in_channels": 1, "out_channels": 1, "channels": [32, 32], "latent_channels": 3}
    (tmp_path / "c.json").write_text(json.dumps({**config, "num_res_blocks": 1, "attention_levels": [False, False]}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    line = refused("monai-kl", tmp_path / "a.pt", config=tmp_path / "c.json", latent_range="-3,3")
    assert str(tmp_path / "a.pt") in line


def vqgan() -> dict[str, Tensor]:
    state = VQGAN(multipliers=(1, 2), attention=()).state()
    for name, (a, b) in {"quant_conv": (4, 16), "post_quant_conv": (16, 4)}.items():
        state |= {f"{name}.weight": torch.zeros(a, b, 1, 1), f"{name}.bias": torch.zeros(a)}
    return {**state, "quantize.embedding.weight": torch.randn(8, 4)}


def test_a_misshapen_first_convolution_is_refused_in_a_line(tmp_path: Path) -> None:
    torch.save({**vqgan(), "encoder.conv_in.weight": torch.zeros(32)}, tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in refused("taming", tmp_path / "a.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_without_finite_output_is_refused(value: float, tmp_path: Path) -> None:
    state = vqgan()
    state["decoder.conv_out.bias"] = torch.full_like(state["decoder.conv_out.bias"], value)
    torch.save(state, tmp_path / "a.pt")
    assert "found an image with values that are NaN or infinite" in refused("taming", tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["-inf,1", "0,inf", "nan,1", "-1e308,1e308"])
def test_a_range_is_finite(text: str) -> None:
    from vaevq_med.foreign.folders import numbers

    with pytest.raises(ForeignError, match=r"--latent-range: found .*, expected two finite numbers"):
        numbers(text, "latent_range")


def test_weights_that_are_not_finite_are_not_packed(tmp_path: Path) -> None:
    torch.save(vqgan(), tmp_path / "a.pt")
    output = adopt("taming", tmp_path / "a.pt").output
    state = torch.load(output, weights_only=True)
    next(iter(state["network"].values())).view(-1)[0] = float("nan")
    torch.save(state, output)
    with pytest.raises(VaevqMedError, match="with values that are NaN or infinite, expected finite weights to pack"):
        BundlePack("brats", tmp_path / "zoo", output).run()
    assert not (tmp_path / "zoo").exists()


class Widening(ForeignTokenizer):
    """Three channels in, five out."""

    def __init__(self) -> None:
        quantizer = VectorQuantizer(num_embeddings=8, embedding_dim=3)
        super().__init__(quantizer=quantizer, factors=(1, 1), own_channels=3, in_channels=1)
        self.last = nn.Conv2d(3, 5, 1)

    def foreign_encode(self, images: Tensor) -> Tensor:
        return images

    def foreign_decode(self, codes: Tensor) -> Tensor:
        return self.last(codes)


def test_outputs_of_other_channels_than_the_inputs_are_not_averaged() -> None:
    with pytest.raises(VaevqMedError, match=r"output has 5 channels .*; expected 3"):
        Widening()(torch.zeros(1, 1, 4, 4))
