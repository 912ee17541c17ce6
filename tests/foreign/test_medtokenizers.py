"""Tokenizers of ``medtokenizers``, where it is installed: its own classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign_networks import small

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.foreign.adopt import Adopt
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.registry import kind_of
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.trained.network import StoredTokenizer

SMALL: dict[str, Any] = {"channels": 16, "channels_mult": (1, 2), "num_res_blocks": 1, "spatial_compression": 2}
SIZES: dict[str, Any] = {**SMALL, "dim": 2, "resolution": 16, "z_channels": 16, "decoder_blocks_per_stage": [1, 1]}


def adopt(kind: str, source: Path, **options: Any) -> Tokenizer:
    output = source.parent / "adopted.pt"
    Adopt(kind, source, output, kind_of(kind).options(**{"image_size": 16, **options}), overwrite=True).run()
    return StoredTokenizer(output).network()


@pytest.mark.peer
@pytest.mark.parametrize(
    "quantizer",
    [
        {"quantizer": "VQ", "num_embeddings": 32},
        {"quantizer": "FSQ", "levels": [5, 4, 3]},
        {"quantizer": "RESFSQ", "levels": [5, 5, 5]},
        {"quantizer": "LFQ", "codebook_size": 16, "codebook_dim": 4},
    ],
)
def test_indices(tmp_path: Path, quantizer: dict[str, Any]) -> None:
    medtokenizers = pytest.importorskip("medtokenizers")
    torch.manual_seed(0)
    network = medtokenizers.DiscreteTokenizer(**SIZES, embedding_dim=4, **quantizer).eval()
    network.save_pretrained(tmp_path / "folder")
    found = adopt("medtokenizers-discrete", tmp_path / "folder")
    assert not found.gives_latent
    x = small(1, 2, 1, 16, 16)
    with torch.no_grad():
        indices = network.tokenize((x + 1) / 2)
        assert torch.equal(found.encode_indices(x).flatten(), indices.flatten().long())
        torch.testing.assert_close((found(x) + 1) / 2, network.detokenize(indices))


@pytest.mark.peer
@pytest.mark.parametrize(
    "formulation", [{"formulation": "VAE"}, {"formulation": "VAE", "separate_quant_conv": False}, {"formulation": "AE"}]
)
def test_latents(tmp_path: Path, formulation: dict[str, Any]) -> None:
    medtokenizers = pytest.importorskip("medtokenizers")
    torch.manual_seed(0)
    network = medtokenizers.ContinuousTokenizer(**SIZES, latent_channels=3, **formulation).eval()
    network.save_pretrained(tmp_path / "folder")
    found = adopt("medtokenizers-continuous", tmp_path / "folder", latent_range="-2,2")
    assert found.gives_latent
    x = small(1, 1, 1, 16, 16)
    with torch.no_grad():
        latent, (_, told) = network.encode((x + 1) / 2)
        mine = found.encode(x)
        assert isinstance(mine, DiagonalGaussian) == (formulation["formulation"] == "VAE")
        if isinstance(mine, DiagonalGaussian):
            mean = told[0]
            std = told[1].exp() if formulation.get("separate_quant_conv", True) else (told[1] / 2).exp()
            torch.testing.assert_close(mine.mean, mean)
            torch.testing.assert_close(mine.std, std)
        else:
            torch.testing.assert_close(mine, latent)
            mean = latent
        torch.testing.assert_close((found.decode(mean) + 1) / 2, network.decode(mean))


def test_without_the_package_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "medtokenizers", None)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantizer": "VQ", "num_embeddings": 8}')
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(VaevqMedError, match=r"package medtokenizers: .*pip install vaevq_med\[medtokenizers\]"):
        adopt("medtokenizers-discrete", folder)
    with pytest.raises(ForeignError, match="found no 'formulation', expected the configuration of ContinuousTokenizer"):
        adopt("medtokenizers-continuous", folder, latent_range="-2,2")
