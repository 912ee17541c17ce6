"""The tokenizer's evaluator: what it decodes, and a batch on a device that the host does not wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vaevq_med.evaluation.reconstruction import ReconstructionEvaluation
from vaevq_med.networks.decoder import Decoder
from vaevq_med.networks.encoder import Encoder
from vaevq_med.networks.features import FeatureNetwork
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator

SHARED: dict[str, Any] = {
    "num_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "image_size": 32,
    "z_channels": 8,
}


def tokenizer(variational: bool) -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(
        encoder=Encoder(in_channels=1, **SHARED),
        decoder=Decoder(out_channels=1, **SHARED),
        quantizer=VectorQuantizer(num_embeddings=16, embedding_dim=4),
        embedding_dim=4,
        variational=variational,
    ).eval()


def evaluator_of(network: VisualTokenizer, device: str = "cpu", quantize: str = "mode") -> TokenizerEvaluator:
    return TokenizerEvaluator(device=device, val_data_loader=[{}], network=network, quantize=quantize)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("quantize", ["mode", "sample"])
def test_the_continuous_path_is_decoded_where_it_is_asked_for(quantize: str) -> None:
    network = tokenizer(variational=True)
    decoded: list[int] = []
    network.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output)))
    evaluator = evaluator_of(network, quantize=quantize)
    outputs = []
    for continuous in (False, True):
        torch.manual_seed(0)
        outputs.append(evaluator.reconstruct(images(), continuous=continuous))
    assert decoded == [3, 6]
    plain, both = outputs
    assert set(plain) == {"pred", "indices", "indices_sample", "mean", "std"}
    assert set(both) == {*plain, "pred_continuous"}
    for name, value in plain.items():
        torch.testing.assert_close(value, both[name])
    with torch.no_grad():
        torch.testing.assert_close(both["pred_continuous"], network.decode(network.encode(images()).mode()))


def test_without_a_posterior_there_is_no_continuous_path() -> None:
    output = evaluator_of(tokenizer(variational=False)).reconstruct(images(), continuous=True)
    assert set(output) == {"pred", "indices", "mean"}


def test_the_latent_before_quantization_is_given_and_encoded_once() -> None:
    network, encoded = tokenizer(variational=False), []
    network.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    output = evaluator_of(network).reconstruct(images())
    assert encoded == [3]
    with torch.no_grad():
        torch.testing.assert_close(output["mean"], network.encode(images()))
    assert not torch.equal(output["mean"], network.quantizer(output["mean"]).quantized)


def test_what_quantizes_by_itself_gives_no_latent() -> None:
    network = tokenizer(variational=False)
    network.gives_latent = False
    assert set(evaluator_of(network).reconstruct(images())) == {"pred", "indices"}


class Convolution(FeatureNetwork):
    """A layer of fixed weights."""

    name = "convolution"
    weights_sha256 = "ab" * 32
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self._freeze()

    def _layers(self, images: Tensor) -> list[Tensor]:
        return [self.layer(images)]

    def _pooled(self, images: Tensor) -> Tensor:
        return self.layer(images).mean(dim=(2, 3))


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "plain"])
@pytest.mark.parametrize("with_regions", [True, False], ids=["regions", "whole"])
@pytest.mark.parametrize("shared", [True, False], ids=["one network", "two networks"])
def test_a_batch_on_a_device_has_no_step_that_the_host_waits_for(
    variational: bool, with_regions: bool, shared: bool
) -> None:
    """On fake tensors what depends on values, or mixes devices, is an error."""
    count = 4
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        network = tokenizer(variational)
        lpips = Convolution()
        measured = ReconstructionEvaluation(
            num_embeddings=16, lpips=lpips, fid=lpips if shared else Convolution(), device="cuda"
        )
        target = torch.zeros(count, 1, 32, 32)
        regions = {name: torch.zeros(count, 32, 32, dtype=torch.bool) for name in ("brain", "lesion")}
        for _ in range(2):
            output = evaluator_of(network).reconstruct(target)
            measured.update(
                target,
                output["pred"],
                output["indices"],
                metadata={"index": list(range(count)), "modality": ["t1n", "t2f", "t1n", ""], "path": ["a"] * count},
                regions=regions if with_regions else None,
                indices_sample=output.get("indices_sample"),
                posterior=(output["mean"], output.get("std")),
            )
        for _, names, values in measured._unread:
            assert values.device.type == "cuda"
            assert values.shape == (len(names), count) == (1 + 3 + 4 * with_regions, count)
        assert not measured._rows
    assert set(measured._distances) == {"all", "modality t1n", "modality t2f"}
    assert measured._distances["modality t1n"].count == 4
