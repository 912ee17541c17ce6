"""Cells of positions as one position, and a tokenizer whose latent is packed so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import Decoder, Encoder, Projector, Rectifier, VisualTokenizer
from vaevq_med.networks.outputs import QuantizerOutput
from vaevq_med.networks.packing import packed, unpacked
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import CoherentVQ, Continuous, LearnedTwoLevel, ResidualTwoLevel, VectorQuantizer
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.quantizers.gates import PosteriorGate, VarianceGate


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1))
def test_packing_loses_nothing(side: int, axes: int, channels: int, further: int) -> None:
    shape = (2, channels, *[3] * further, *[side * (axis + 1) for axis in range(axes)])
    x = torch.randn(shape)
    found = packed(x, side, axes)
    assert found.shape == (2, channels * side**axes, *[3] * further, *range(1, axes + 1))
    assert torch.equal(unpacked(found, side, axes), x)


def test_it_is_torchs_space_to_depth_with_the_positions_first() -> None:
    x = torch.randn(2, 3, 4, 6)
    expected = F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(packed(x, 2, 2), expected)


def test_a_grid_that_does_not_divide_is_refused() -> None:
    with pytest.raises(VaevqMedError, match=r"the latent grid is \(3, 4\); expected multiples of the cell, 2"):
        packed(torch.zeros(1, 1, 3, 4), 2, 2)


SIZES = {"num_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [], "z_channels": 8}


def tokenizer(quantizer: Quantizer, cell: int = 2, axes: int = 2, **options: object) -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(
        encoder=Encoder(spatial_dims=axes, in_channels=1, image_size=16, **SIZES),  # type: ignore[arg-type]
        decoder=Decoder(spatial_dims=axes, out_channels=1, image_size=16, **SIZES),  # type: ignore[arg-type]
        quantizer=quantizer,
        embedding_dim=3,
        cell=cell,
        **options,  # type: ignore[arg-type]
    ).eval()


def levels() -> list[VectorQuantizer]:
    return [VectorQuantizer(num_embeddings=16, embedding_dim=3, init="normal") for _ in range(2)]


@pytest.mark.parametrize("variational", [False, True])
def test_a_packed_latent_changes_no_image(variational: bool) -> None:
    """Of a continuous latent, cells of any size decode to the same image, and to the same posterior's KL in all."""
    plain = tokenizer(Continuous(embedding_dim=3), cell=1, variational=variational)
    cells = tokenizer(Continuous(embedding_dim=12), cell=2, variational=variational)
    cells.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(plain(images), cells(images))
    assert (plain.factors, cells.factors) == ((2, 2), (4, 4))
    assert (plain.grid_of((16, 16)), cells.grid_of((16, 16))) == ((8, 8), (4, 4))
    assert cells.embedding_dim == 12
    if variational:
        kls = [one.encode(images).kl().sum() for one in (plain, cells)]
        torch.testing.assert_close(*kls)
        assert cells.draw_noise(images).shape == (2, 12, 4, 4)


@pytest.mark.parametrize("form", [ResidualTwoLevel, LearnedTwoLevel])
def test_two_levels_in_a_tokenizer(form: type[ResidualTwoLevel]) -> None:
    top, bottom = levels()
    network = tokenizer(form(top=top, bottom=bottom), variational=False)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    indices = network.encode_indices(images)
    assert indices.shape == (2, 4, 4, 5)
    assert torch.equal(network.decode_indices(indices), network(images))
    assert network.bits() == {"bits_per_position": 20.0, "bits_per_pixel": 20 / 16}
    structure = network.decode_indices(indices[..., :1])
    assert structure.shape == images.shape
    assert not torch.equal(structure, network(images))


def test_a_volume_has_cells_of_eight() -> None:
    top, bottom = levels()
    network = tokenizer(ResidualTwoLevel(top=top, bottom=bottom, cell_size=8), axes=3, variational=False)
    volumes = torch.rand(1, 1, 8, 8, 8) * 2 - 1
    indices = network.encode_indices(volumes)
    assert indices.shape == (1, 2, 2, 2, 9)
    assert torch.equal(network.decode_indices(indices), network(volumes))


def test_slices_that_see_their_neighbors_have_cells_within_the_slice() -> None:
    top, bottom = levels()
    network = tokenizer(ResidualTwoLevel(top=top, bottom=bottom), slice_context=1, variational=False)
    volumes = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    indices = network.encode_indices(volumes)
    assert (indices.shape, network.factors) == ((2, 3, 4, 4, 5), (1, 4, 4))
    assert torch.equal(network.decode_indices(indices), network(volumes))


@pytest.mark.parametrize("reads", ["sample", "quantized"])
def test_every_position_of_a_cell_is_projected(reads: str) -> None:
    """To the features that the same latent has without cells, on the encoder's grid."""
    options = {"variational": True, "quantize_from": "mean"}
    plain, cells = (
        tokenizer(
            Continuous(embedding_dim=3 * cell**2),
            cell=cell,
            projector=Projector(embedding_dim=3, num_features=5, reads=reads),
            **options,
        )
        for cell in (1, 2)
    )
    cells.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    noise = torch.randn(2, 3, 8, 8)
    expected = plain.reconstruct_full(images, noise=noise).projected
    found = cells.reconstruct_full(images, noise=packed(noise, 2, 2)).projected
    assert expected is not None
    assert found is not None
    assert found.shape == (2, 5, 8, 8)
    torch.testing.assert_close(found, expected)


def test_every_position_of_a_cell_is_rectified() -> None:
    rectifier = Rectifier(embedding_dim=3, num_channels=8, num_blocks=1)
    torch.nn.init.normal_(rectifier.layers[-1].weight)  # type: ignore[arg-type]
    plain, cells = (
        tokenizer(Continuous(embedding_dim=3 * cell**2), cell=cell, variational=False, rectifier=rectifier)
        for cell in (1, 2)
    )
    cells.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    torch.testing.assert_close(cells(images), plain(images))
    codes = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(cells.rectify(codes), packed(rectifier(unpacked(codes, 2, 2)), 2, 2))
    with pytest.raises(VaevqMedError, match="the rectifier's embedding_dim is 12; expected 3"):
        tokenizer(Continuous(embedding_dim=12), rectifier=Rectifier(embedding_dim=12, num_channels=8))


class Looking(Continuous):
    """Remembers what it was given."""

    sees_images = True

    def forward(  # type: ignore[override]
        self, z: torch.Tensor, posterior: object = None, images: torch.Tensor | None = None
    ) -> QuantizerOutput:
        self.given = (z, posterior, images)
        return super().forward(z)


@pytest.mark.parametrize("variational", [False, True])
def test_a_quantizer_that_looks_at_images_is_given_them_everywhere(variational: bool) -> None:
    quantizer = Looking(embedding_dim=3)
    network = tokenizer(quantizer, cell=1, variational=variational)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    for call in (network, network.encode_indices, network.reconstruct_full):
        quantizer.given = ()
        call(images)
        assert quantizer.given[2] is images
        assert (quantizer.given[1] is not None) == variational
    network.decode_stage_2_outputs(torch.zeros(2, 3, 8, 8))
    assert quantizer.given[1:] == (None, None)


def test_a_gate_in_a_tokenizer_is_in_its_indices() -> None:
    top, bottom = levels()
    gate = VarianceGate(threshold=0.01)
    network = tokenizer(ResidualTwoLevel(top=top, bottom=bottom, gate=gate), variational=False)
    images = -torch.ones(2, 1, 16, 16)
    images[:, :, :4, :8] = torch.rand(2, 1, 4, 8)
    indices = network.encode_indices(images)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[:, 0, :2] = True
    assert torch.equal(indices[..., 1] != 16, expected)
    assert torch.equal(network.decode_indices(indices), network(images))
    counts = torch.stack([torch.bincount(one.flatten(), minlength=17) for one in indices.unbind(-1)])
    assert network.quantizer.rate(counts)["mean_codes"] == pytest.approx(1 + 4 / 8)


def test_a_posterior_opens_what_the_encoder_is_sure_of() -> None:
    top, bottom = levels()
    network = tokenizer(ResidualTwoLevel(top=top, bottom=bottom, gate=PosteriorGate(threshold=0.0)))
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    posterior = network.encode(images)
    assert isinstance(posterior, DiagonalGaussian)
    sure = posterior.logvar.mean(dim=1) < 0
    assert torch.equal(network.encode_indices(images)[..., 1] != 16, sure)


def test_a_latent_that_a_generator_drew_has_all_codes() -> None:
    """Without a posterior and an image: open cells, and the nearest codewords."""
    top, bottom = (CoherentVQ(num_embeddings=16, embedding_dim=3) for _ in range(2))
    network = tokenizer(ResidualTwoLevel(top=top, bottom=bottom, gate=PosteriorGate(threshold=5.0)))
    z = torch.randn(2, 12, 4, 4)
    indices = network.quantize(z).indices
    assert int(indices.max()) < 16
    means = z.view(2, 4, 3, 4, 4).mean(dim=1).movedim(1, -1)
    assert torch.equal(indices[..., 0], torch.cdist(means.reshape(-1, 3), top.codebook()).argmin(1).view(2, 4, 4))
    assert torch.equal(network.decode_stage_2_outputs(z), network.decode_indices(indices))
    network.train()
    with pytest.raises(VaevqMedError, match="needs the encoder's posterior"):
        network.quantize(z)


@pytest.mark.parametrize(("cell", "of_cells"), [(1, "$"), (3, " over the 9 positions of a cell")])
def test_sizes_that_do_not_fit_are_refused(cell: int, of_cells: str) -> None:
    top, bottom = levels()
    with pytest.raises(VaevqMedError, match=f"embedding_dim is 3; expected the quantizer's, 12{of_cells}"):
        tokenizer(ResidualTwoLevel(top=top, bottom=bottom), cell)
