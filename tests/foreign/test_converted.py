"""Published tokenizers of this package's architecture: true names and shapes in, the same network out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.foreign_networks import (
    LLAMAGEN,
    VQGAN,
    magvit_decode,
    magvit_encode,
    magvit_state,
    small,
)
from torch import Tensor

from vaevq_med.foreign.adopt import Adopt, AdoptReport
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.registry import kind_of
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import SimVQ, VectorQuantizer
from vaevq_med.networks.quantizers.cosine import CosineVQ
from vaevq_med.trained.network import StoredTokenizer


def adopt(kind: str, source: Path, **options: Any) -> tuple[AdoptReport, Tokenizer]:
    output = source.parent / "adopted.pt"
    given = kind_of(kind).options(**{"image_size": 32, **options})
    report = Adopt(kind, source, output, given, overwrite=True).run()
    stored = StoredTokenizer(output)
    stored.check_target()
    return report, stored.network()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def around(width: int, codes: int, *, latent: int = 16) -> dict[str, Tensor]:
    """The 1x1 convolutions around the codes."""
    rng = torch.Generator().manual_seed(9)
    return {
        "quant_conv.weight": torch.randn(width, latent, 1, 1, generator=rng) / 4,
        "quant_conv.bias": torch.randn(width, generator=rng),
        "post_quant_conv.weight": torch.randn(codes, width if latent == 16 else width // 2, 1, 1, generator=rng),
        "post_quant_conv.bias": torch.randn(codes, generator=rng),
    }


def projected(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])


@pytest.mark.parametrize(("multipliers", "attention"), [((1, 1, 2, 2), (3,)), ((1, 1, 2, 1, 2), (3, 4)), ((1, 2), ())])
def test_vqgan_of_taming_transformers(tmp_path: Path, multipliers: Sequence[int], attention: Sequence[int]) -> None:
    net = VQGAN(multipliers=multipliers, attention=attention)
    state = {**net.state(), **around(8, 16)}
    state["quantize.embedding.weight"] = torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
    lightning = {
        "epoch": 3,
        "global_step": 7,
        "state_dict": {**state, "loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())},
    }
    torch.save(lightning, tmp_path / "last.ckpt")
    report, network = adopt("taming", tmp_path / "last.ckpt")
    assert report.factors == (2 ** (len(multipliers) - 1),) * 2
    assert report.bits == 5.0
    assert isinstance(network.quantizer, VectorQuantizer)
    x = small(1, 2, 3, 32, 32)
    with torch.no_grad():
        latent = projected(state, "quant_conv", net.encode(state, x))
        close(network.encode(x), latent)
        distances = (latent.movedim(1, -1)[..., None, :] - state["quantize.embedding.weight"]).square().sum(-1)
        indices = distances.argmin(-1)
        assert torch.equal(network.encode_indices(x)[..., 0], indices)
        codes = state["quantize.embedding.weight"][indices].movedim(-1, 1)
        close(network(x), net.decode(state, projected(state, "post_quant_conv", codes)))


def test_a_first_stage_within_a_latent_diffusion_model_and_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = VQGAN()
    state = {**net.state(), **around(4, 16), "quantize.embedding.weight": torch.randn(8, 4)}
    whole = {f"first_stage_model.{name}": value.half() for name, value in state.items()}
    save_file({**whole, "model.diffusion_model.out.weight": torch.zeros(1)}, tmp_path / "ldm.safetensors")
    _, network = adopt("taming", tmp_path / "ldm.safetensors")
    x = small(1, 1, 3, 16, 16)
    rounded = {name: value.half().float() for name, value in state.items()}
    with torch.no_grad():
        close(network.encode(x), projected(rounded, "quant_conv", net.encode(rounded, x)))


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2), (1, 1, 2, 2, 4)])
def test_llamagen(tmp_path: Path, multipliers: Sequence[int]) -> None:
    """Attention at the last level, the decoder's levels from the coarsest, codes of length 1."""
    net = VQGAN(names=LLAMAGEN, multipliers=multipliers, attention=(len(multipliers) - 1,))
    state = {**net.state(), **around(8, 16)}
    state["quantize.embedding.weight"] = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    torch.save({"model": {**state, "quantize.codebook_used": torch.zeros(65536)}, "steps": 3}, tmp_path / "vq_ds16.pt")
    report, network = adopt("llamagen", tmp_path / "vq_ds16.pt")
    assert report.bits == 6.0
    assert isinstance(network.quantizer, CosineVQ)
    x = small(1, 1, 3, 32, 32)
    with torch.no_grad():
        latent = projected(state, "quant_conv", net.encode(state, x))
        close(network.encode(x), latent)
        table = state["quantize.embedding.weight"] / state["quantize.embedding.weight"].norm(dim=1, keepdim=True)
        unit = latent / latent.norm(dim=1, keepdim=True)
        indices = torch.einsum("bdhw,kd->bhwk", unit, table).argmax(-1)
        assert torch.equal(network.encode_indices(x)[..., 0], indices)
        decoded = net.decode(state, projected(state, "post_quant_conv", table[indices].movedim(-1, 1)))
        close(network.decode_indices(indices[..., None]), decoded)


def averages(state: dict[str, Tensor], trained: Sequence[str]) -> dict[str, Tensor]:
    """Averaged weights as ``LitEma`` keeps them: names without dots, 0.5 more than the raw ones."""
    found = {f"model_ema.{name.replace('.', '')}": state[name] + 0.5 for name in trained}
    return {**found, "model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}


def linear_codebook(width: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return {
        "quantize.embedding.weight": torch.randn(32, width, generator=rng),
        "quantize.embedding_proj.weight": torch.randn(width, width, generator=rng) / width**0.5,
        "quantize.embedding_proj.bias": torch.randn(width, generator=rng),
    }


def test_simvq_with_averages(tmp_path: Path) -> None:
    state = {**magvit_state(latent=8, codes=8, decoder_width=32), **linear_codebook(8)}
    trained = [name for name in state if name != "quantize.embedding.weight"]  # whose basis is frozen
    torch.save({"state_dict": {**state, **averages(state, trained)}}, tmp_path / "simvq.ckpt")
    report, network = adopt("simvq", tmp_path / "simvq.ckpt")
    assert report.factors == (2, 2)
    raw = StoredTokenizer(report.output, weights="network").network()
    x = small(1, 1, 3, 16, 16)
    for found, own in ((raw, state), (network, {n: v + 0.5 * (n in trained) for n, v in state.items()})):
        assert isinstance(found.quantizer, SimVQ)
        codebook = own["quantize.embedding.weight"] @ own["quantize.embedding_proj.weight"].T
        codebook = codebook + own["quantize.embedding_proj.bias"]
        with torch.no_grad():
            torch.testing.assert_close(found.encode(x), magvit_encode(own, x), rtol=1e-3, atol=1e-3)
            close(found.quantizer.codebook(), codebook)
            codes = codebook[torch.arange(16).view(1, 4, 4)].movedim(-1, 1)
            decoded = found.decode_indices(torch.arange(16).view(1, 4, 4, 1))
            torch.testing.assert_close(decoded, magvit_decode(own, codes), rtol=1e-3, atol=1e-3)


def test_the_authors_vaevq(tmp_path: Path) -> None:
    """Means and log variances, a decoder of half the width, the posterior's mean quantized."""
    state = {**magvit_state(latent=16, codes=8, decoder_width=32, seed=4), **linear_codebook(8)}
    torch.save({"state_dict": state}, tmp_path / "vaevq.ckpt")
    _, network = adopt("vaevq", tmp_path / "vaevq.ckpt")
    x = small(1, 1, 3, 16, 16)
    with torch.no_grad():
        mean, logvar = magvit_encode(state, x).chunk(2, dim=1)
        posterior = network.encode(x)
        assert isinstance(posterior, DiagonalGaussian)
        close(posterior.mean, mean)
        close(posterior.logvar, logvar)
        codebook = network.quantizer.codebook()
        assert codebook is not None
        nearest = torch.cdist(mean.movedim(1, -1).reshape(-1, 8), codebook).argmin(1)
        assert torch.equal(network.encode_indices(x).flatten(), nearest)
        codes = codebook[nearest].view(1, 8, 8, 8).movedim(-1, 1)
        close(network(x), magvit_decode(state, codes))
    with pytest.raises(
        ForeignError, match="found an encoder of 16 channels and a decoder of 8, expected as many as the"
    ):
        adopt("simvq", tmp_path / "vaevq.ckpt")


def continuous(tmp_path: Path, lora: bool = False) -> tuple[VQGAN, dict[str, Tensor], Path]:
    net = VQGAN(latent=8, codes=4, attention=(), multipliers=(1, 2), channels=1)
    state = {**net.state(), **around(6, 4, latent=8)}
    saved = dict(state)
    if lora:
        rng, base = torch.Generator().manual_seed(2), "encoder.mid.block_1.conv1"
        down, up = torch.randn(4, 64, 3, 3, generator=rng) / 20, torch.randn(64, 4, 1, 1, generator=rng) / 2
        for part in ("weight", "bias"):
            saved[f"{base}.conv.{part}"] = saved.pop(f"{base}.{part}")
        saved |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
        state[f"{base}.weight"] = state[f"{base}.weight"] + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    extra = {"channel_ds.0.weight": torch.zeros(1), "channel_proj.bias": torch.zeros(3), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": {**saved, **extra}}, tmp_path / "vae.ckpt")
    return net, state, tmp_path / "vae.ckpt"


@pytest.mark.parametrize("lora", [False, True])
def test_the_autoencoder_of_latent_diffusion_in_bits(tmp_path: Path, lora: bool) -> None:
    net, state, path = continuous(tmp_path, lora)
    report, network = adopt("ldm-kl", path, latent_range="-6,6")
    assert (report.bits, report.in_channels) == (24.0, 1)
    x = small(1, 1, 1, 16, 16)
    with torch.no_grad():
        mean, logvar = projected(state, "quant_conv", net.encode(state, x)).chunk(2, dim=1)
        posterior = network.encode(x)
        assert isinstance(posterior, DiagonalGaussian)
        close(posterior.mean, mean)
        close(posterior.logvar, logvar)
        close(network.decode(mean), net.decode(state, projected(state, "post_quant_conv", mean)))
        digits = network.encode_indices(x)
        assert digits.shape == (1, 8, 8, 3)
        close(network.quantizer.indices_to_codes(digits), ((mean.clamp(-6, 6) + 6) * 255 / 12).round() * 12 / 255 - 6)
    soft = StoredTokenizer(report.output, readout="soft").network()
    with torch.no_grad():
        close(soft(x), network.decode(mean))


def test_the_same_in_three_dimensions(tmp_path: Path) -> None:
    """MedVAE's volumes: each axis padded at its far end, halved, repeated."""
    net = VQGAN(latent=4, codes=2, attention=(1,), multipliers=(1, 1), blocks=1, channels=1, axes=3)
    rng = torch.Generator().manual_seed(9)
    state = net.state()
    for name, (a, b) in {"quant_conv": (4, 4), "post_quant_conv": (2, 2)}.items():
        state[f"{name}.weight"] = torch.randn(a, b, 1, 1, 1, generator=rng)
        state[f"{name}.bias"] = torch.randn(a, generator=rng)
    torch.save({"state_dict": state}, tmp_path / "vae3d.ckpt")
    options = {"image_size": 8, "depth": 4, "latent_range": "-6,6"}
    report, network = adopt("ldm-kl", tmp_path / "vae3d.ckpt", **options)
    assert (report.factors, report.bits, network.takes_volumes) == ((2, 2, 2), 16.0, True)
    x = small(1, 1, 1, 4, 8, 8)
    with torch.no_grad():
        mean, logvar = F.conv3d(net.encode(state, x), state["quant_conv.weight"], state["quant_conv.bias"]).chunk(2, 1)
        posterior = network.encode(x)
        assert isinstance(posterior, DiagonalGaussian)
        close(posterior.mean, mean)
        close(posterior.logvar, logvar)
        features = F.conv3d(mean, state["post_quant_conv.weight"], state["post_quant_conv.bias"])
        close(network.decode(mean), net.decode(state, features))


def test_gray_images_through_a_network_of_colors(tmp_path: Path) -> None:
    """What the network makes of the image three times, averaged."""
    net = VQGAN()
    state = {**net.state(), **around(4, 16), "quantize.embedding.weight": torch.randn(8, 4)}
    torch.save(state, tmp_path / "a.pt")
    _, colors = adopt("taming", tmp_path / "a.pt")
    report, gray = adopt("taming", tmp_path / "a.pt", in_channels=1)
    assert report.in_channels == 1
    assert "repeated to the network's channels on the way in" in report.notes[0]
    x = small(1, 2, 1, 16, 16)
    with torch.no_grad():
        close(gray.encode(x), colors.encode(x.expand(-1, 3, -1, -1)))
        codes = gray.quantizer.indices_to_codes(gray.encode_indices(x))
        close(gray.decode(codes), colors.decode(codes).mean(dim=1, keepdim=True))
    with pytest.raises(ForeignError, match=r"--in-channels: found 2, expected 3, as .* has, or 1"):
        adopt("taming", tmp_path / "a.pt", in_channels=2)
