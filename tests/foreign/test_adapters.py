"""Networks of other packages as tokenizers: the real classes with random weights, and what they give themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.foreign_networks import small
from PIL import Image
from torch import Tensor, nn

from vaevq_med.core import components
from vaevq_med.core.components import ComponentError
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.foreign.adopt import Adopt, AdoptReport
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.registry import kind_of
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.trained.file import CheckpointError
from vaevq_med.trained.network import StoredTokenizer


def adopt(kind: str, source: Path, **options: Any) -> tuple[AdoptReport, Tokenizer]:
    output = source.parent / "adopted.pt"
    report = Adopt(kind, source, output, kind_of(kind).options(**{"image_size": 16, **options}), overwrite=True).run()
    stored = StoredTokenizer(output)
    stored.check_target()
    return report, stored.network()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def vq_model(tmp_path: Path) -> tuple[Any, Path]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        latent_channels=4,
        num_vq_embeddings=16,
        vq_embed_dim=4,
    ).eval()
    network.quantize.embedding.weight.data = torch.randn(16, 4) / 4
    network.save_pretrained(tmp_path / "vq")
    return network, tmp_path / "vq"


@pytest.mark.peer
def test_vq_model_of_diffusers(vq_model: tuple[Any, Path]) -> None:
    network, folder = vq_model
    report, found = adopt("diffusers-vq", folder)
    assert (report.factors, report.bits, report.in_channels) == ((2, 2), 4.0, 3)
    x = small(1, 2, 3, 16, 16)
    with torch.no_grad():
        latent = network.encode(x).latents
        close(found.encode(x), latent)
        close(found(x), network.decode(latent).sample)
        indices = network.quantize(latent)[2][2].view(2, 8, 8)
        assert torch.equal(found.encode_indices(x)[..., 0], indices)


@pytest.mark.peer
def test_the_same_network_by_way_of_taming_transformers_names(vq_model: tuple[Any, Path], tmp_path: Path) -> None:
    """``diffusers`` renames VQGAN's parts: named back, the converter makes the same tokenizer of them."""
    network, _ = vq_model
    state = {}
    for name, value in network.state_dict().items():
        for old, new in (
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            *((f"down_blocks.{i}.", f"down.{i}.") for i in range(2)),
            *((f"up_blocks.{i}.", f"up.{1 - i}.") for i in range(2)),
            ("resnets.", "block."),
            ("attentions.", "attn."),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            name = name.replace(old, new)
        is_linear = value.ndim == 2 and name.split(".")[-2] in ("q", "k", "v", "proj_out")
        state[name] = value[:, :, None, None] if is_linear else value
    torch.save({"state_dict": state}, tmp_path / "taming.ckpt")
    _, found = adopt("taming", tmp_path / "taming.ckpt")
    x = small(1, 1, 3, 16, 16)
    with torch.no_grad():
        latent = network.encode(x).latents
        close(found.encode(x), latent)
        close(found(x), network.decode(latent).sample)


def gray_slices(folder: Path, size: int = 16) -> Path:
    """A data set of three slices."""
    entries = []
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 255, (size, size), dtype=np.uint8)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / "images" / f"{number}.png")
        entries.append({"image": f"images/{number}.png", "patient": f"p{number}", "case": f"c{number}", "slice": 0})
    content = {"name": "toy", "training": entries, "validation": [], "test": [], "modality": {"0": "MRI"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.peer
def test_autoencoder_kl_of_diffusers_with_a_measured_range(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=3,
    ).eval()
    network.save_pretrained(tmp_path / "kl")
    with pytest.raises(ForeignError, match="the latent is continuous: found neither of --latent-from"):
        adopt("diffusers-kl", tmp_path / "kl")
    dataset = gray_slices(tmp_path / "data")
    report, found = adopt("diffusers-kl", tmp_path / "kl", in_channels=1, latent_from=dataset, latent_bits=6)
    assert (report.bits, report.in_channels) == (18.0, 1)
    x = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(dataset / "images" / f"{n}.png"))).float()[None] / 127.5 - 1
            for n in range(3)
        ]
    )
    with torch.no_grad():
        posterior = network.encode(x.expand(-1, 3, -1, -1)).latent_dist
        mine = found.encode(x)
        assert isinstance(mine, DiagonalGaussian)
        close(mine.mean, posterior.mean)
        close(mine.logvar, posterior.logvar)
        low, high = posterior.mean.amin(dim=(0, 2, 3)), posterior.mean.amax(dim=(0, 2, 3))
        quantizer: Any = found.quantizer
        torch.testing.assert_close(torch.stack([quantizer.low, quantizer.high]), torch.stack([low, high]))
        assert found.encode_indices(x).amax(dim=(0, 1, 2)).tolist() == [63] * 3
        close(found.decode(mine.mean), network.decode(posterior.mean).sample.mean(dim=1, keepdim=True))
    told = torch.load(report.output, weights_only=True)["data"]["adopted"]
    assert told["latent"]["images"] == 3
    assert sorted(told["files"]) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("axes", [2, 3])
def test_vqvae_of_monai(tmp_path: Path, axes: int) -> None:
    from monai.networks.nets import VQVAE

    arguments = {
        "spatial_dims": axes,
        "in_channels": 1,
        "out_channels": 1,
        "channels": [8, 16],
        "num_res_layers": 1,
        "num_res_channels": [8, 16],
        "downsample_parameters": [[2, 4, 1, 1]] * 2,
        "upsample_parameters": [[2, 4, 1, 1, 0]] * 2,
        "num_embeddings": 8,
        "embedding_dim": 4,
    }
    torch.manual_seed(0)
    network = VQVAE(**arguments).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    bundle = {"spatial_dims": axes, "network_def": {"_target_": "VQVAE", **arguments, "spatial_dims": "@spatial_dims"}}
    (tmp_path / "train.json").write_text(json.dumps(bundle))
    depth = {"depth": 8} if axes == 3 else {}
    report, found = adopt("monai-vqvae", tmp_path / "model.pt", config=tmp_path / "train.json", **depth)
    assert (report.factors, report.bits) == ((4,) * axes, 3.0)
    x = small(1, 1, 1, *([8] * (axes == 3)), 16, 16)
    with torch.no_grad():
        unit = (x + 1) / 2  # its range by default
        assert torch.equal(found.encode_indices(x)[..., 0], network.index_quantize(unit))
        close((found(x) + 1) / 2, network(unit)[0])
    if axes == 3:
        with pytest.raises(ForeignError, match="found no depth, expected the slices of an item, --depth"):
            adopt("monai-vqvae", tmp_path / "model.pt", config=tmp_path / "train.json")


@pytest.mark.parametrize("kind", ["monai-kl", "maisi"])
def test_continuous_networks_of_monai(tmp_path: Path, kind: str) -> None:
    """MAISI's shape: volumes, three levels, no attention."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import AutoencoderKL

    widths = {"monai-kl": "channels", "maisi": "num_channels"}[kind]
    arguments: dict[str, Any] = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "num_res_blocks": [1, 1, 1],
        widths: [8, 8, 16],
        "attention_levels": [False, False, False],
        "latent_channels": 4,
        "norm_num_groups": 8,
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    }
    if kind == "maisi":
        arguments |= {"num_splits": 1, "dim_split": 0, "norm_float16": False, "print_info": False}
    torch.manual_seed(0)
    network = (AutoencoderKL if kind == "monai-kl" else AutoencoderKlMaisi)(**arguments).eval()
    torch.save({"autoencoder_state_dict": network.state_dict()}, tmp_path / "model.pt")
    (tmp_path / "network.json").write_text(json.dumps(arguments))
    report, found = adopt(
        kind, tmp_path / "model.pt", config=tmp_path / "network.json", depth=8, latent_range="-3,3", value_range="0,1"
    )
    assert (report.factors, report.bits) == ((4, 4, 4), 32.0)
    x = small(1, 1, 1, 8, 16, 16)
    with torch.no_grad():
        mean, std = network.encode((x + 1) / 2)
        mine = found.encode(x)
        assert isinstance(mine, DiagonalGaussian)
        close(mine.mean, mean)
        close(mine.std, std)
        close((found.decode(mean) + 1) / 2, network.decode(mean))
        assert found.encode_indices(x).shape == (1, 2, 4, 4, 4)


class _Indices(nn.Module):
    """FSQ of mean patches, as Cosmos encodes: indices, codes, and a number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = nn.functional.avg_pool2d(x, 4)[:, :2].tanh()
        digits = (pooled * 2).round() + 2
        return (digits[:, 0] + 5 * digits[:, 1]).int(), (digits - 2) / 2, pooled.mean()


class _FromIndices(nn.Module):
    def forward(self, indices: Tensor) -> Tensor:
        digits = torch.stack([indices % 5, indices // 5, indices % 5], dim=1)
        return nn.functional.interpolate((digits.float() - 2) / 2, scale_factor=4.0)


class _Latent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.fixture
def trusted() -> Iterator[None]:
    components.trust("torchscript")
    yield
    components._named_by_user.discard("torchscript")


def scripted(folder: Path, encoder: nn.Module, decoder: nn.Module) -> Path:
    folder.mkdir()
    torch.jit.script(encoder).save(folder / "encoder.jit")
    torch.jit.script(decoder).save(folder / "decoder.jit")
    return folder


def test_a_torchscript_pair_with_indices(tmp_path: Path, trusted: None) -> None:
    folder = scripted(tmp_path / "di", _Indices(), _FromIndices())
    with pytest.raises(ForeignError, match="found an encoder that gives indices, without --levels"):
        adopt("torchscript", folder)
    for levels in ("5,5", "25"):  # as digits, and as a number alone
        report, found = adopt("torchscript", folder, levels=levels)
        assert report.factors == (4, 4)
        assert report.bits == pytest.approx(np.log2(25))
        assert not found.gives_latent
        x = small(1, 2, 3, 16, 16)
        indices = _Indices()(x)[0]
        assert torch.equal(found.encode_indices(x)[..., 0], indices.long())
        close(found(x), _FromIndices()(indices))
    _, found = adopt("torchscript", folder, levels="5,5")
    close(found.encode_stage_2_inputs(x), _Indices()(x)[1])


def test_a_continuous_torchscript_pair(tmp_path: Path, trusted: None) -> None:
    torch.manual_seed(0)
    encoder, decoder = _Latent(), nn.Sequential(nn.ConvTranspose2d(6, 3, 4, stride=4))
    report, found = adopt("torchscript", scripted(tmp_path / "ci", encoder, decoder), latent_range="-2,2")
    assert report.bits == 48.0
    assert found.gives_latent
    x = small(1, 1, 3, 16, 16)
    with torch.no_grad():
        close(found.encode_stage_2_inputs(x), encoder(x))
        close(found.decode(encoder(x)), decoder(encoder(x)))


def test_a_program_runs_where_it_is_trusted_alone(tmp_path: Path, trusted: None) -> None:
    """Neither adopting nor reading a checkpoint that somebody else adopted."""
    folder = scripted(tmp_path / "di", _Indices(), _FromIndices())
    report, _ = adopt("torchscript", folder, levels="5,5")
    components._named_by_user.discard("torchscript")
    said = "found a TorchScript program, expected one that the user trusts"
    with pytest.raises(ComponentError, match=said):
        adopt("torchscript", folder, levels="5,5")
    with pytest.raises(CheckpointError, match=said):
        StoredTokenizer(report.output).network()


def test_a_package_that_is_not_here_is_named(vq_model: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = vq_model
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent("diffusers"), *sys.meta_path])
    with pytest.raises(
        VaevqMedError, match=r"package diffusers: .*it is not installed.*pip install vaevq_med\[diffusers\]"
    ):
        adopt("diffusers-vq", folder)


class _Absent:
    """A finder to which a package does not exist."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


def test_arguments_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    (tmp_path / "network.json").write_text(json.dumps({"_target_": "monai.networks.nets.UNet", "spatial_dims": 2}))
    with pytest.raises(ForeignError, match="found the class UNet, expected VQVAE"):
        adopt("monai-vqvae", tmp_path / "model.pt", config=tmp_path / "network.json")
    (tmp_path / "network.json").write_text(json.dumps({"spatial_dims": 2, "channels": "$[1] * 3"}))
    with pytest.raises(ForeignError, match=r"found the expression '\$\[1\] \* 3', expected plain values"):
        adopt("monai-vqvae", tmp_path / "model.pt", config=tmp_path / "network.json")
    with pytest.raises(ForeignError, match="--config: found none, expected the JSON file of the arguments of VQVAE"):
        adopt("monai-vqvae", tmp_path / "model.pt")
