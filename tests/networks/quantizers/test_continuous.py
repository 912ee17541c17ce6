"""The tokenizer that quantizes nothing, and the quantizer that is set into it."""

from __future__ import annotations

import pytest
import torch
from helpers.toy_networks import tokenizer

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import Continuous, VectorQuantizer
from vaevq_med.trained.starting import take_weights


def test_the_latent_passes_with_its_gradient() -> None:
    quantizer = Continuous(embedding_dim=4)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    output = quantizer(z)
    assert torch.equal(output.quantized, z)
    assert torch.equal(output.codes, z)
    assert output.indices.shape == (2, 3, 5, 0)
    assert (output.losses, output.codebook, quantizer.bits_per_position) == ({}, None, None)
    assert not quantizer.is_discrete
    assert not quantizer.state_dict()
    (gradient,) = torch.autograd.grad(output.quantized.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))


def test_both_paths_of_a_vae_are_its_own() -> None:
    network = tokenizer(quantizer=Continuous(embedding_dim=4), quantize_from="mean")
    images = torch.randn(2, 1, 32, 32)
    posterior = network.encode(images)
    torch.testing.assert_close(network(images), network.decode_latent(posterior.mean))
    noise = torch.randn(posterior.mean.shape)
    output = network.reconstruct_full(images, noise=noise)
    torch.testing.assert_close(output.reconstruction, network(images), atol=1e-5, rtol=1e-4)
    sample = posterior.mean + posterior.std * noise
    torch.testing.assert_close(output.reconstruction_continuous, network.decode_latent(sample), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.decode_stage_2_outputs(sample), network.decode_latent(sample))


@pytest.mark.parametrize("indices", [torch.zeros(1, 2, 2, 0, dtype=torch.int64), torch.zeros(1, 2, 2, 1).long()])
def test_indices_are_refused_in_one_line(indices: torch.Tensor) -> None:
    network = tokenizer(quantizer=Continuous(embedding_dim=4))
    with pytest.raises(VaevqMedError, match="without a quantizer, which has no indices; expected one with codewords"):
        network.decode_indices(indices)
    with pytest.raises(VaevqMedError, match="has 0 codebooks; expected 1"):
        network.index_quantize(torch.zeros(1, 1, 32, 32))


def test_a_codebook_of_all_latents_gives_the_continuous_reconstruction() -> None:
    """A quantizer that is fine enough, set into a VAE, changes nothing."""
    vae = tokenizer(quantizer=Continuous(embedding_dim=4))
    images = torch.randn(2, 1, 32, 32)
    latents = vae.encode(images).mean.detach()
    positions = latents.movedim(1, -1).flatten(0, -2)
    network = tokenizer(quantizer=VectorQuantizer(num_embeddings=len(positions), embedding_dim=4), variational=False)
    report = take_weights(network, vae.state_dict())
    assert not report.parts["quantizer"].is_loaded
    assert network.quantizer.start_codebook(latents, lambda rows, count: rows[:count])
    torch.testing.assert_close(network(images), vae(images), atol=1e-5, rtol=1e-4)
