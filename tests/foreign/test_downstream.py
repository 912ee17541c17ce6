"""What takes a checkpoint takes an adopted one: token stores, the codec in two and three dimensions, its rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.foreign_networks import small
from monai.networks.nets import VQVAE, AutoencoderKL

from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.model import Model
from vaevq_med.codec.rate_control import latents_of
from vaevq_med.foreign.adopt import Adopt
from vaevq_med.foreign.registry import kind_of
from vaevq_med.networks.quantizers.cosine import CosineVQ
from vaevq_med.tokens.encode import EncodeTokens
from vaevq_med.trained.network import StoredTokenizer


def adopt(folder: Path, kind: str, network: Any, arguments: dict[str, Any], **options: Any) -> Path:
    torch.save(network.state_dict(), folder / "weights.pt")
    (folder / "network.json").write_text(json.dumps(arguments))
    chosen = kind_of(kind).options(image_size=16, config=folder / "network.json", **options)
    Adopt(kind, folder / "weights.pt", folder / "adopted.pt", chosen).run()
    return folder / "adopted.pt"


def vqvae(axes: int) -> dict[str, Any]:
    return {
        "spatial_dims": axes,
        "in_channels": 1,
        "out_channels": 1,
        "channels": [8],
        "num_res_layers": 1,
        "num_res_channels": [8],
        "downsample_parameters": [[2, 4, 1, 1]],
        "upsample_parameters": [[2, 4, 1, 1, 0]],
        "num_embeddings": 8,
        "embedding_dim": 4,
    }


def test_a_token_store_of_a_continuous_network_in_int8(tmp_path: Path, slice_dataset: Path) -> None:
    arguments = {
        "spatial_dims": 2,
        "num_res_blocks": [1, 1],
        "channels": [8, 8],
        "attention_levels": [False, False],
        "latent_channels": 3,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    network = AutoencoderKL(**arguments).eval()
    checkpoint = adopt(tmp_path, "monai-kl", network, arguments, latent_from=slice_dataset, latent_images=4)
    stores = {
        kind: EncodeTokens(checkpoint, slice_dataset, tmp_path / kind, kind=kind, workers=0, device="cpu").run().store
        for kind in ("indices", "latents")
    }
    header = stores["indices"].content
    assert (header["grid"], header["dtype"]) == ([8, 8], "uint8")
    assert header["tokenizer"]["quantizer"] == "UniformQuantizer"
    quantizer: Any = StoredTokenizer(checkpoint).network().quantizer
    values, latents = (np.asarray(stores[kind].array("training")[0, 0]) for kind in ("indices", "latents"))
    codes = quantizer.indices_to_codes(torch.from_numpy(values[None].astype(np.int64)))[0]
    clamped = torch.from_numpy(latents.astype(np.float32)).movedim(0, -1).clamp(quantizer.low, quantizer.high)
    half = (quantizer.step / 2 + 2e-3).expand_as(clamped)  # the store has half precision
    assert bool(((codes.movedim(0, -1) - clamped).abs() <= half).all())


@pytest.mark.parametrize("axes", [2, 3])
def test_squares_to_indices_and_back(tmp_path: Path, axes: int) -> None:
    torch.manual_seed(0)
    network = VQVAE(**vqvae(axes)).eval()
    depth = {"depth": 8} if axes == 3 else {}
    model = Model(StoredTokenizer(adopt(tmp_path, "monai-vqvae", network, vqvae(axes), **depth)), device="cpu")
    assert (model.of_volumes, model.patch, model.image_size) == (axes == 3, 2, 16)
    squares = (small(1, 8, 1, 16, 16) + 1) / 2
    volume = squares.transpose(0, 1)[None] if axes == 3 else squares
    indices = model.encode(squares.clone())
    with torch.no_grad():
        assert (indices[..., 0] == network.index_quantize(volume).numpy()).all()
        expected = network.decode_samples(network.index_quantize(volume)).clamp(0, 1)
    expected = expected[0].transpose(0, 1) if axes == 3 else expected
    torch.testing.assert_close(model.decode(indices), expected, rtol=1e-4, atol=1e-5)


def test_a_readout_without_indices_is_refused_by_the_codec(tmp_path: Path) -> None:
    arguments = {
        "spatial_dims": 2,
        "num_res_blocks": [1],
        "channels": [8],
        "attention_levels": [False],
        "norm_num_groups": 8,
    }
    checkpoint = adopt(tmp_path, "monai-kl", AutoencoderKL(**arguments), arguments, latent_range="-1,1")
    with pytest.raises(CodecError, match="found UniformQuantizer, whose images are not decoded from indices"):
        Model(StoredTokenizer(checkpoint, readout="soft"), device="cpu")


def test_rates_of_directions_compare_directions() -> None:
    """The codec's trade between distance and bits measures what the quantizer compares."""
    from helpers.toy_networks import tokenizer

    torch.manual_seed(0)
    network = tokenizer(variational=False, quantizer=CosineVQ(num_embeddings=8, embedding_dim=4)).eval()
    latents = latents_of(network, small(1, 1, 1, 16, 16))
    torch.testing.assert_close(latents.search.latents.norm(dim=1), torch.ones(16, dtype=torch.float64))
    assert (latents.distances(np.arange(16)).argmin(1) == latents.nearest).all()
