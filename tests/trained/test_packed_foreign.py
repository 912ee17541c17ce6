"""Networks of other packages in a packed bundle: what card and metadata say of them, and what verify refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from torch import Tensor, nn

from vaevq_med.core import components
from vaevq_med.core.components import trust
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.foreign.adopt import Adopt
from vaevq_med.foreign.registry import kind_of
from vaevq_med.trained.pack import BundlePack
from vaevq_med.trained.verify import BundleVerify


def packed(kind: str, source: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    """The card and the metadata of a foreign network."""
    folder = source.parent
    Adopt(kind, source, folder / "a.pt", kind_of(kind).options(image_size=16, **options)).run()
    BundlePack("brats", folder / "zoo", folder / "a.pt").run()
    assert len([*BundleVerify(folder / "zoo").run()]) == 4
    metadata = json.loads((folder / "zoo/configs/metadata.json").read_text())
    return (folder / "zoo/README.md").read_text(), metadata


class _Encoder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4)


class _Decoder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=4.0)


@pytest.fixture
def trusted() -> Iterator[None]:
    trust("torchscript")
    yield
    components._named_by_user.discard("torchscript")


def test_the_card_of_programs_says_that_they_run(tmp_path: Path, trusted: None) -> None:
    source = tmp_path / "pair"
    source.mkdir()
    for name, part in (("encoder", _Encoder()), ("decoder", _Decoder())):
        torch.jit.script(part).save(source / f"{name}.jit")
    card, _ = packed("torchscript", source, latent_range="-2,2")
    assert "Its weights are programs of TorchScript, whose code runs" in card
    assert "vaevq-med --trusted torchscript bundle verify FOLDER" in card
    assert "--dataset_dir DATA --trusted \"['torchscript']\"" in card
    assert "trust(['torchscript'])" in card
    assert "Nothing in it is unpickled or run" not in card
    components._named_by_user.discard("torchscript")
    with pytest.raises(
        VaevqMedError, match="safetensors: found a TorchScript program, expected one that the user trusts"
    ):
        [*BundleVerify(tmp_path / "zoo").run()]


@pytest.mark.peer
def test_an_adopted_network_is_described_as_what_it_is(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    network = diffusers.VQModel(**blocks, block_out_channels=(32,), latent_channels=4, num_vq_embeddings=8)
    network.save_pretrained(tmp_path / "vq")
    card, metadata = packed("diffusers-vq", tmp_path / "vq")
    installed = version("diffusers")
    assert metadata["required_packages_version"]["diffusers"] == installed
    assert f"It was packed with diffusers {installed}, whose classes it is built of" in card
    kind = kind_of("diffusers-vq")
    assert metadata["license"] == kind.license
    assert metadata["references"] == [kind.title]
    assert kind.license in metadata["intended_use"]
    assert "config.json, diffusion_pytorch_model.safetensors" in metadata["description"]
    assert card.count("# Taken over: VQModel of diffusers") == 1
    for name in ("name", "task", "description", "authors", "copyright", "references", "intended_use", "data_source"):
        told = json.dumps(metadata[name])
        assert not any(word in told for word in ("VAEVQ", "BraTS", "brain", "vaevq_med developers")), name


def test_a_record_unlike_the_header_and_an_empty_origin_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    BundlePack("brats", folder, FIXTURES / "simvq.pt").run()
    made = folder / "made_by.json"
    whole = json.loads(made.read_text())
    made.write_text(json.dumps({**whole, "files": {}}))
    record = folder / "models/trained.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "iteration": 10**6}))
    with pytest.raises(VaevqMedError, match=r"trained\.json: found another record than that in the header of model"):
        [*BundleVerify(folder).run()]
    made.write_text("{}")
    with pytest.raises(VaevqMedError, match=r"made_by\.json: found neither the network's hash nor those of files"):
        [*BundleVerify(folder).run()]
