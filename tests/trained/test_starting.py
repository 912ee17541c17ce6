"""A network that starts from another one's weights, part by part."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import Decoder, Encoder, VisualTokenizer
from vaevq_med.networks.quantizers import FSQ, SimVQ, VectorQuantizer
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.trained.fitting import adapted_channels, check_definitions
from vaevq_med.trained.patients import TrainingPatients, trainings, without_names
from vaevq_med.trained.starting import check_parts, start_network, take_weights


def tokenizer(
    channels: int = 1, *, quantizer: Quantizer | None = None, dim: int = 4, variational: bool = False, width: int = 8
) -> VisualTokenizer:
    shared: dict[str, Any] = {
        "num_channels": width,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "image_size": 16,
        "z_channels": 8,
    }
    return VisualTokenizer(
        encoder=Encoder(in_channels=channels, **shared),
        decoder=Decoder(out_channels=channels, **shared),
        quantizer=quantizer or VectorQuantizer(num_embeddings=16, embedding_dim=dim),
        embedding_dim=dim,
        variational=variational,
    ).eval()


def moved(network: VisualTokenizer, seed: int = 3) -> VisualTokenizer:
    """As after some training: biases and scales are not at their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@given(old=st.integers(1, 5), new=st.integers(1, 5), seed=st.integers(0, 100))
def test_alike_channels_make_the_same_whatever_their_number(old: int, new: int, seed: int) -> None:
    """By the convolutions themselves: in and out, of images whose channels are alike."""
    torch.manual_seed(seed)
    image = torch.randn(1, 1, 6, 6)
    first, last = nn.Conv2d(old, 3, 3).double(), nn.Conv2d(3, old, 3).double()
    image = image.double()
    kernel = adapted_channels(first.weight, new, axis=1)
    torch.testing.assert_close(
        nn.functional.conv2d(image.expand(1, new, 6, 6), kernel, first.bias), first(image.expand(1, old, 6, 6))
    )
    features = torch.randn(1, 3, 6, 6).double()
    kernel, bias = (adapted_channels(one, new, axis=0) for one in (last.weight, last.bias))
    out = nn.functional.conv2d(features, kernel, bias)
    torch.testing.assert_close(out, last(features).mean(dim=1, keepdim=True).expand_as(out))


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 4), (4, 3)])
def test_a_network_for_other_channels_makes_of_alike_ones_the_same(old: int, new: int) -> None:
    before, after = moved(tokenizer(old)), moved(tokenizer(new), seed=4)
    found = take_weights(after, before.state_dict())
    image = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(
        after.encode(image.expand(-1, new, -1, -1)), before.encode(image.expand(-1, old, -1, -1)), atol=1e-5, rtol=1e-4
    )
    mean = before(image.expand(-1, old, -1, -1)).mean(dim=1, keepdim=True)
    torch.testing.assert_close(after(image.expand(-1, new, -1, -1)), mean.expand(-1, new, -1, -1), atol=1e-4, rtol=1e-4)
    words = f"from {old} to {new} channels"
    assert found.parts["encoder"].adapted == {"encoder.layers.0.weight": words}
    assert set(found.parts["decoder"].adapted.values()) == {words}
    assert len(found.parts["decoder"].adapted) == 2
    assert not any(part.new for part in found.parts.values())


def test_every_tensor_is_told_once_and_the_same_network_is_the_same() -> None:
    before, after = moved(tokenizer()), moved(tokenizer(), seed=4)
    found = take_weights(after, before.state_dict())
    names = [name for part in found.parts.values() for name in (*part.loaded, *part.adapted, *part.inflated, *part.new)]
    assert sorted(names) == sorted(after.state_dict())
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    assert list(found.parts) == ["encoder", "decoder", "quantizer", "latent"]


@pytest.mark.parametrize(
    ("quantizer", "told"),
    [
        (
            lambda: VectorQuantizer(num_embeddings=32, embedding_dim=4),
            r"1 left new \(quantizer.embedding is \[16, 4\] ",
        ),
        (lambda: SimVQ(num_embeddings=16, embedding_dim=4), r"3 left new \(quantizer.\w+(\.\w+)? not there"),
    ],
)
def test_another_codebook_is_left_new_and_said_so(quantizer: Any, told: str) -> None:
    before, after = moved(tokenizer()), moved(tokenizer(quantizer=quantizer()), seed=4)
    kept = {name: value.clone() for name, value in after.quantizer.state_dict().items()}
    found = take_weights(after, before.state_dict())
    assert not found.parts["quantizer"].is_loaded
    assert re.search(told, str(found.parts["quantizer"]))
    assert all(torch.equal(value, kept[name]) for name, value in after.quantizer.state_dict().items())
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(after.encode(image), before.encode(image))


def test_another_latent_width_leaves_the_convolutions_about_it_new() -> None:
    before, after = moved(tokenizer()), moved(tokenizer(quantizer=FSQ(levels=[5, 5, 5]), dim=3), seed=4)
    found = take_weights(after, before.state_dict())
    assert sorted(found.parts["latent"].new) == [
        *("post_quant_conv.bias", "post_quant_conv.weight", "quant_conv.bias", "quant_conv.weight"),
    ]
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(after.encoder(image), before.encoder(image))


def test_a_point_takes_the_mean_of_a_posterior_and_the_other_way_round() -> None:
    posterior, point = moved(tokenizer(variational=True)), moved(tokenizer(), seed=4)
    image = torch.randn(1, 1, 16, 16)
    found = take_weights(point, posterior.state_dict())
    torch.testing.assert_close(point.encode(image), posterior.encode(image).mean)
    assert set(found.parts["latent"].adapted) == {"quant_conv.weight", "quant_conv.bias"}
    again = moved(tokenizer(variational=True), seed=5)
    logvar = again.quant_conv.weight[4:].clone()
    take_weights(again, point.state_dict())
    torch.testing.assert_close(again.encode(image).mean, point.encode(image))
    assert torch.equal(again.quant_conv.weight[4:], logvar)


def test_parts_that_are_not_asked_for_stay_and_may_be_anything() -> None:
    before, after = moved(tokenizer(width=16)), moved(tokenizer(), seed=4)
    kept = {name: value.clone() for name, value in after.state_dict().items()}
    found = take_weights(after, before.state_dict(), parts=["quantizer"])
    assert "not asked for" in str(found.parts["encoder"])
    changed = [name for name, value in after.state_dict().items() if not torch.equal(value, kept[name])]
    assert changed == ["quantizer.embedding"]


@pytest.mark.parametrize(
    ("weights", "parts", "said"),
    [
        (
            lambda: tokenizer(width=16),
            None,
            r"encoder\.\S+: found shape \[16, 1, 3, 3\] .* the encoder has",
        ),
        (lambda: tokenizer(width=16), ["decoder"], r"decoder\.\S+: found shape .* leave it new"),
        (lambda: nn.Linear(2, 2), None, r"encoder\.\S+: found nothing in the weights"),
        (
            lambda: tokenizer(),
            ["encodr"],
            "init_parts: found 'encodr', expected some of encoder, decoder, ",
        ),
        (
            lambda: tokenizer(dim=8),
            ["quantizer"],
            r"found nothing to take of quantizer \(.*\[16, 8\] there",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(weights: Any, parts: Any, said: str) -> None:
    after = tokenizer()
    kept = {name: value.clone() for name, value in after.state_dict().items()}
    with pytest.raises(VaevqMedError, match=said) as error:
        take_weights(after, weights().state_dict(), parts=parts)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, kept[name]) for name, value in after.state_dict().items())


def test_a_file_is_told_with_its_hash_and_its_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, path = moved(tokenizer(3)), tmp_path / "last.pt"
    data = {"split_hash": "s", "content_hash": "c", "patients": ["a"], "recipe": {}}
    torch.save({"format": 1, "network": before.state_dict(), "iteration": 7, "data": data}, path)
    with caplog.at_level(logging.WARNING):
        record = start_network(tokenizer(1), path, parts=["encoder", "latent"])
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record["file"], record["iteration"]) == ("last.pt", 7)
    assert record["data"] == {"split_hash": "s", "content_hash": "c", "patients": ["a"]}
    assert record["parts"]["encoder"]["adapted"] == {"encoder.layers.0.weight": "from 3 to 1 channels"}
    assert record["parts"]["decoder"]["loaded"] == 0
    assert len([line for line in caplog.messages if line.startswith("  ")]) == 4
    with pytest.raises(VaevqMedError, match=r"init_from .*last\.pt: found nothing to take of nothing|init_parts"):
        start_network(tokenizer(1), path, parts=["nothing"])


def test_names_of_parts_are_those_of_the_network() -> None:
    class Wider(VisualTokenizer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.projector = nn.Linear(2, 2)

    plain = tokenizer()
    wide = Wider(
        encoder=plain.encoder, decoder=plain.decoder, quantizer=plain.quantizer, embedding_dim=4, variational=False
    )
    assert check_parts("freeze", "projector, latent", wide) == ["projector", "latent"]
    found = take_weights(wide, tokenizer().state_dict())
    assert "2 left new (projector.weight not there, projector.bias not there)" in str(found.parts["projector"])


def test_names_of_patients_stay_at_home_with_what_was_started_from() -> None:
    """A packed bundle has hashes in their place, also of the trainings before, which evaluations understand."""
    before = {
        "patients": ["BraTS-GLI-00001"],
        "started_from": {"file": "a.pt", "data": {"patients": ["BraTS-GLI-00002"]}},
    }
    told = {"patients": ["BraTS-GLI-00000"], "started_from": {"file": "b.pt", "data": before}}
    packed = without_names(told, "salt")
    assert "BraTS-GLI" not in str(packed)
    for number, (_, data) in enumerate(trainings(packed, "model.pt")):
        patients = TrainingPatients(data, "model.pt")
        names = [f"BraTS-GLI-{n:05d}" for n in range(3)]
        assert patients.among(names) == {f"BraTS-GLI-{number:05d}"}
    assert number == 2
    assert "started_from" in without_names(told, "salt", hashes=False)
    assert "BraTS-GLI" not in str(without_names(told, "salt", hashes=False))


def test_a_quantizer_of_another_class_is_left_new_whatever_its_shapes() -> None:
    before, after = moved(tokenizer()), moved(tokenizer(), seed=4)
    kept = after.quantizer.embedding.clone()
    named = {"quantizer": {"_target_": "vaevq_med.networks.quantizers.GaussianQuantizer"}}
    found = take_weights(after, before.state_dict(), given=named)
    assert "1 left new (quantizer.embedding was GaussianQuantizer)" in str(found.parts["quantizer"])
    assert torch.equal(after.quantizer.embedding, kept)
    same = {"quantizer": {"_target_": "vaevq_med.networks.quantizers.vq.VectorQuantizer"}}
    take_weights(after, before.state_dict(), given=same)
    assert torch.equal(after.quantizer.embedding, before.quantizer.embedding)


@pytest.mark.parametrize("of_posterior", [True, False])
def test_a_posterior_of_d_is_no_point_of_twice_d(of_posterior: bool) -> None:
    posterior, point = moved(tokenizer(variational=True)), moved(tokenizer(dim=8), seed=4)
    before, after = (posterior, point) if of_posterior else (point, posterior)
    kept = after.quant_conv.weight.clone()
    assert before.quant_conv.weight.shape == kept.shape
    found = take_weights(after, before.state_dict(), parts=["encoder", "latent"])
    assert "quant_conv.weight is of " in str(found.parts["latent"])
    assert found.record()["latent"]["units"] == []
    assert torch.equal(after.quant_conv.weight, kept)


ENCODER = {"_target_": "vaevq_med.networks.Encoder", "channel_mult": [1, 2], "in_channels": 3, "image_size": 16}


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"resampling": "magvit"}, "encoder: found resampling 'magvit' in the network to start from, expected 'vqgan'"),
        ({"middle_attention": False}, "encoder: found middle_attention False in .*, expected True"),
        ({"_target_": "vaevq_med.networks.encoder.Encoder", "channel_mult": (1, 2), "in_channels": 1}, None),
        ({"image_size": 64, "attention_resolutions": [], "dropout": 0.1, "resampling": "vqgan"}, None),
    ],
)
def test_the_same_tensors_may_be_another_network(there: dict[str, Any], said: str | None) -> None:
    before, after = moved(tokenizer()), moved(tokenizer(), seed=4)
    options = {"given": {"encoder": {**ENCODER, **there}}, "own": {"encoder": ENCODER}}
    if said is None:
        assert take_weights(after, before.state_dict(), **options).parts["encoder"].units == ["encoder"]
        return
    with pytest.raises(VaevqMedError, match=said):
        take_weights(after, before.state_dict(), **options)
    take_weights(after, before.state_dict(), parts=["decoder"], **options)


def test_slices_of_a_definition_start_volumes() -> None:
    """What is along z may differ; what is in the plane, and how volumes are normalized, may not."""
    deep = {**ENCODER, "spatial_dims": 3, "within_slices": True, "downsampling": [[1, 2, 2]]}
    check_definitions("encoder", {"encoder": ENCODER}, {"encoder": deep})
    whole = {**deep, "within_slices": False}
    with pytest.raises(VaevqMedError, match=r"within_slices False .* expected True"):
        check_definitions("encoder", {"encoder": whole}, {"encoder": deep})
    with pytest.raises(VaevqMedError, match="downsampling"):
        check_definitions("encoder", {"encoder": ENCODER}, {"encoder": {**deep, "downsampling": [[1, 1, 2]]}})


def test_tensors_that_the_encoder_has_no_place_for_are_another_encoder() -> None:
    weights = {**tokenizer().state_dict(), "encoder.more.weight": torch.ones(1)}
    with pytest.raises(VaevqMedError, match=r"encoder.more.weight: found shape \[1\] .* expected no such tensor"):
        take_weights(tokenizer(), weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: torch.full_like(one, float("nan")), "found values that are not finite in the weights to start"),
        (lambda one: torch.full_like(one, float("inf")), "found values that are not finite in the weights to start"),
        (lambda one: one.int(), "found int32 in the weights to start from, expected floats"),
        (lambda one: torch.complex(one, one), "found complex64 in the weights to start from, expected floats"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(change: Any, said: str) -> None:
    after, weights = tokenizer(), dict(moved(tokenizer()).state_dict())
    kept = {name: value.clone() for name, value in after.state_dict().items()}
    weights["encoder.layers.0.weight"] = change(weights["encoder.layers.0.weight"])
    with pytest.raises(VaevqMedError, match=f"encoder.layers.0.weight: {said}"):
        take_weights(after, weights)
    assert all(torch.equal(value, kept[name]) for name, value in after.state_dict().items())
