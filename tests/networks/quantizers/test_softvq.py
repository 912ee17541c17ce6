"""SoftVQ: by hand, the published form written out, segments, both read-outs and the bundle.

No peer package has the method.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.bundles import evaluation_overrides, quick, run_bundle, train_and_evaluate
from helpers.memory import LargestTensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import SimVQ, SoftVQ, soft_assignment


def test_by_hand() -> None:
    quantizer = SoftVQ(
        num_embeddings=2, embedding_dim=2, num_segments=2, temperature=2 / math.log(3), entropy_temperature=0.01
    )
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[[5.0, 0.0], [-5.0, 0.0]], [[0.0, 0.1], [0.0, -0.1]]]))
    # Lengths do not count. Products 1 and -1 differ by 2, so that p = (3/4, 1/4); products of 0 give 1/2 each.
    z = torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, -0.2], [7.0, 0.0]]).T.reshape(1, 2, 2, 2)
    output = quantizer(z)
    expected = [[0.5, 0.0], [0.0, 0.0], [0.0, -0.5], [0.0, 0.0]]
    torch.testing.assert_close(output.codes[0].flatten(1).T, torch.tensor(expected))
    assert output.indices.flatten().tolist()[0] == 0
    assert output.indices.flatten().tolist()[2] == 1
    # At T' = 0.01 a latent is sure, or as unsure as can be: H is 0 or ln 2, and the mean (3/4, 1/4) in both segments.
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert output.losses["entropy"].item() == pytest.approx(math.log(2) / 2 - quarter, abs=1e-6)
    # Each index is looked up in the codebook of its position's segment.
    codes = quantizer.indices_to_codes(torch.tensor([0, 1, 0, 1]).view(1, 2, 2, 1))
    assert codes[0].flatten(1).T.tolist() == [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]


def published(quantizer: SoftVQ, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixture, and the entropy loss of one segment, from the N x K probabilities of each segment."""
    batch, channels, height, width = z.shape
    tokens = z.flatten(2).transpose(1, 2).reshape(batch, quantizer.num_segments, -1, channels)
    table = quantizer.embedding
    if quantizer.normalize:
        tokens, table = F.normalize(tokens, dim=-1), F.normalize(table, dim=-1)
    logits = torch.einsum("bsnd,skd->bsnk", tokens, table.detach())
    mixture = torch.einsum("bsnk,skd->bsnd", (logits / quantizer.temperature).softmax(-1), table)
    sharp = (logits / quantizer.entropy_temperature).softmax(-1)
    of_each = torch.special.entr(sharp).sum(-1).mean()
    of_mean = torch.special.entr(sharp.mean(dim=(0, 2))).sum(-1).mean()
    return mixture.reshape(batch, height * width, channels).transpose(1, 2).reshape(z.shape), of_each - of_mean


@pytest.mark.parametrize(("segments", "normalize"), [(1, True), (4, True), (2, False)])
def test_it_is_the_published_form(segments: int, normalize: bool) -> None:
    torch.manual_seed(0)
    quantizer = SoftVQ(
        num_embeddings=20,
        embedding_dim=4,
        num_segments=segments,
        normalize=normalize,
        init="normal",
        entropy_temperature=0.3,
    )
    z = torch.randn(3, 4, 4, 6, requires_grad=True)
    output = quantizer(z)
    assert set(output.losses) == {"entropy"}
    mixture, entropy = published(quantizer, z)
    torch.testing.assert_close(output.quantized, mixture)
    torch.testing.assert_close(output.losses["entropy"], entropy)
    direction = torch.randn(z.shape)
    inputs = (z, quantizer.embedding)
    found = torch.autograd.grad((output.quantized * direction).sum() + output.losses["entropy"], inputs)
    for own, other in zip(found, torch.autograd.grad((mixture * direction).sum() + entropy, inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    assert torch.autograd.grad(quantizer(z).losses["entropy"], inputs, allow_unused=True)[1] is None


@pytest.mark.parametrize("normalize", [True, False])
def test_the_hard_readout_is_the_likeliest_codeword_with_the_gradient_of_the_mixture(normalize: bool) -> None:
    torch.manual_seed(0)
    quantizer = SoftVQ(num_embeddings=20, embedding_dim=4, num_segments=2, normalize=normalize, init="normal")
    z = torch.randn(3, 4, 4, 6, requires_grad=True)
    soft = quantizer(z)
    assert not quantizer.is_discrete
    quantizer.select_readout("hard")
    hard = quantizer(z)
    assert quantizer.is_discrete
    assert torch.equal(hard.indices, soft.indices)
    assert torch.equal(hard.quantized, quantizer.indices_to_codes(soft.indices))
    assert not torch.allclose(hard.quantized, soft.quantized, atol=0.1)
    halves = z.detach().flatten(2).split(12, dim=2)
    pairs = zip(halves, quantizer.codebook(), strict=True)
    likeliest = [torch.einsum("bdn,kd->bnk", half, table).argmax(-1) for half, table in pairs]
    assert torch.equal(hard.indices.flatten(1), torch.cat(likeliest, dim=1))
    direction = torch.randn(z.shape)
    inputs = (z, quantizer.embedding)
    of_hard = torch.autograd.grad((hard.quantized * direction).sum(), inputs)
    for own, other in zip(of_hard, torch.autograd.grad((soft.quantized * direction).sum(), inputs), strict=True):
        assert torch.equal(own, other)


def test_segments_need_not_divide_the_positions() -> None:
    torch.manual_seed(0)
    quantizer = SoftVQ(num_embeddings=8, embedding_dim=4, num_segments=4, readout="hard")
    z = F.normalize(torch.randn(2, 4, 2, 3), dim=1)
    output = quantizer(z)
    # Six positions in four segments: 2, 2, 1, 1.
    for position, segment in enumerate([0, 0, 1, 1, 2, 3]):
        distances = torch.cdist(z.flatten(2)[:, :, position], quantizer.codebook()[segment])
        assert output.indices.flatten(1)[:, position].tolist() == distances.argmin(dim=1).tolist()
    few = quantizer(z[..., :1, :2])  # two of the codebooks have no position
    assert bool(few.losses["entropy"].isfinite())
    (few.quantized.sum() + few.losses["entropy"]).backward()
    assert quantizer.embedding.grad is not None
    assert quantizer.embedding.grad.abs().sum(dim=(1, 2)).count_nonzero() == 2


def test_nothing_as_large_as_latents_times_codewords_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soft_assignment._DEFAULT_CHUNK, "cpu", 2**15)
    quantizer = SoftVQ(num_embeddings=1024, embedding_dim=4, num_segments=2)
    z = torch.randn(1, 4, 32, 64, requires_grad=True)
    with LargestTensor() as largest:
        output = quantizer(z)
        (output.quantized.sum() + output.losses["entropy"]).backward()
    assert largest.elements == 64 * 1024  # 64 latents at least


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_segments": 0}, "num_segments is 0; expected at least 1"),
        ({"num_embeddings": 0}, "num_embeddings is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"entropy_temperature": -1.0}, "entropy_temperature -1.0; expected above 0"),
        ({"readout": "firm"}, "readout is 'firm'; expected one of soft, hard"),
        ({"init": "zeros"}, "expected one of uniform, normal"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        SoftVQ(**{"num_embeddings": 8, "embedding_dim": 4, **options})


def test_a_quantizer_with_one_way_to_decode_has_no_readout() -> None:
    with pytest.raises(VaevqMedError, match="readout is 'hard'; expected None, the quantizer is SimVQ"):
        SimVQ(num_embeddings=8, embedding_dim=4).select_readout("hard")


def test_both_readouts_of_one_checkpoint_are_evaluated_apart(toy_overrides: dict[str, Any]) -> None:
    overrides = quick(toy_overrides)
    trainer, soft = train_and_evaluate(overrides, "softvq")
    assert -math.log(32) <= trainer.state.terms["entropy"] <= math.log(32)
    assert "codebook" not in trainer.state.terms
    evaluation = {**evaluation_overrides(overrides), "readout": "hard"}
    run_bundle("evaluate.json", evaluation, run_id="evaluating")
    folder = Path(overrides["output_dir"]) / "evaluation"
    records = {name: json.loads((folder / name / "metrics.json").read_text()) for name in ("test", "test_hard")}
    assert [records[name]["provenance"]["readout"] for name in records] == ["soft", "hard"]
    hard = records["test_hard"]["summary"]["overall"]
    # The same indices, other images.
    assert hard["utilization"] == soft["utilization"]
    assert hard["psnr"]["value"] != soft["psnr"]["value"]

    del evaluation["tracking_uri"]
    parser = run_bundle("inference.json", {**evaluation, "max_items": 2, "write": ["indices"]})
    assert len(list((Path(overrides["output_dir"]) / "predictions" / "test_hard").rglob("*.npy"))) == 2
    network = parser.get_parsed_content("network")
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(images), network.decode_indices(network.encode_indices(images)))
