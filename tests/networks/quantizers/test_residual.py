"""Residual quantization: by hand, shared codebooks, dropout, coarse decoding, and against a peer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import ResidualQuantizer, SimVQ, VectorQuantizer, VectorQuantizerEMA
from vaevq_med.networks.quantizers.base import CodebookQuantizer


def free(*codewords: float) -> VectorQuantizer:
    """A free codebook of one dimension."""
    quantizer = VectorQuantizer(num_embeddings=len(codewords), embedding_dim=1)
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor(codewords).unsqueeze(1))
    return quantizer


def moving(*codewords: float, decay: float = 0.5) -> VectorQuantizerEMA:
    """A codebook of moving averages of one dimension, with n = 1 and m = e."""
    quantizer = VectorQuantizerEMA(num_embeddings=len(codewords), embedding_dim=1, decay=decay, epsilon=1e-12)
    for buffer in (quantizer.embedding, quantizer.embedding_sum):
        buffer.copy_(torch.tensor(codewords).unsqueeze(1))
    return quantizer


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def test_two_stages_by_hand() -> None:
    quantizer = ResidualQuantizer(stages=[free(0.0, 10.0), free(-1.0, 2.0)])
    z = row(9.5, 1.5).requires_grad_()
    output = quantizer(z)
    # 9.5 = 10 - 0.5, and -1 is nearer to -0.5 than 2; 1.5 = 0 + 1.5.
    assert output.indices.tolist() == [[[[1, 0], [0, 1]]]]
    assert output.codes.flatten().tolist() == [9.0, 2.0]
    assert output.quantized.flatten().tolist() == [9.0, 2.0]
    assert output.codebook is None
    assert quantizer.codebook() is None
    assert quantizer.bits_per_position == 2
    # Stage 1: (0.5^2 + 1.5^2) / 2 = 1.25; stage 2: (0.5^2 + 0.5^2) / 2 = 0.25; their mean is 0.75.
    assert {name: float(value.detach()) for name, value in output.losses.items()} == pytest.approx(
        {"codebook": 0.75, "commitment": 0.75}
    )
    # d/dz of the mean over stages of mean((r_i - q_i)^2): ((-0.5 + 0.5), (1.5 - 0.5)) / 2
    (gradient,) = torch.autograd.grad(output.losses["commitment"], z, retain_graph=True)
    assert gradient.flatten().tolist() == [0.0, 0.5]
    # Each codeword is used once: (e - r) / 2.
    tables = [stage.embedding for stage in quantizer.stages]
    first, second = torch.autograd.grad(output.losses["codebook"], tables)
    assert first.flatten().tolist() == [-0.75, 0.25]
    assert second.flatten().tolist() == [-0.25, 0.25]


def test_the_gradient_of_the_codes_reaches_every_stage() -> None:
    quantizer = ResidualQuantizer(stages=[free(0.0, 10.0), free(-1.0, 2.0)])
    codes = quantizer(row(9.5, 1.5)).codes
    first, second = torch.autograd.grad(codes, [s.embedding for s in quantizer.stages], row(1.0, 10.0))
    assert first.flatten().tolist() == [10.0, 1.0]
    assert second.flatten().tolist() == [1.0, 10.0]


def test_decoding_from_the_first_stages() -> None:
    quantizer = ResidualQuantizer(stages=[free(0.0, 10.0), free(-1.0, 2.0), free(0.0, 0.25)])
    indices = quantizer(row(9.5, 1.75)).indices
    decoded = {g: quantizer.indices_to_codes(indices, num_stages=g).flatten().tolist() for g in (1, 2, 3)}
    assert decoded == {1: [10.0, 0.0], 2: [9.0, 2.0], 3: [9.25, 2.0]}
    assert torch.equal(quantizer.indices_to_codes(indices), quantizer.indices_to_codes(indices, num_stages=3))
    for bad in (0, 4):
        with pytest.raises(VaevqMedError, match=f"num_stages is {bad}; expected 1 to 3"):
            quantizer.indices_to_codes(indices, num_stages=bad)


def test_more_stages_leave_less() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(
        stages=[VectorQuantizerEMA(num_embeddings=8, embedding_dim=2, decay=0.8, revival_threshold=2.0) for _ in "1234"]
    )
    z = torch.randn(4, 2, 8, 8)
    for _ in range(20):
        quantizer(z)
    indices = quantizer.eval()(z).indices
    errors = [float((z - quantizer.indices_to_codes(indices, num_stages=g)).square().mean()) for g in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.1 * errors[0]


def test_stages_of_moving_averages_learn_their_residuals_by_hand() -> None:
    first, second = moving(0.0, 10.0), moving(-1.0, 2.0)
    output = ResidualQuantizer(stages=[first, second])(row(9.5, 1.5))
    assert set(output.losses) == {"commitment"}
    assert output.codes.flatten().tolist() == [9.0, 2.0]
    # n = 1 throughout; m = (e + sum) / 2.
    assert first.codebook().flatten().tolist() == pytest.approx([0.75, 9.75])
    assert second.codebook().flatten().tolist() == pytest.approx([-0.75, 1.75])


def test_a_shared_codebook_is_updated_once_by_all_stages() -> None:
    stage = moving(0.0, 4.0)
    quantizer = ResidualQuantizer(stages=[stage], num_codebooks=2)
    output = quantizer(row(5.0, 7.0))
    # 5 = 4 + 1 and 7 = 4 + 3: the second stage searches the codebook that the first did.
    assert output.indices.tolist() == [[[[1, 0], [1, 1]]]]
    assert output.codes.flatten().tolist() == [4.0, 8.0]
    # Codeword 0 was assigned the residual 1; codeword 1 the latents 5 and 7 and the residual 3.
    assert stage.cluster_size.tolist() == [1.0, 2.0]
    assert stage.embedding_sum.flatten().tolist() == [0.5, 9.5]


def test_dropout_keeps_the_first_stages_only() -> None:
    torch.manual_seed(0)
    stages = [free(0.0, 10.0), free(-1.0, 2.0), free(0.0, 0.25)]
    quantizer = ResidualQuantizer(stages=stages, dropout=True)
    z = row(9.5, 1.75)
    indices = quantizer(z).indices
    seen = {}
    for _ in range(60):
        output = quantizer(z)
        assert torch.equal(output.indices, indices)
        (kept,) = [g for g in (1, 2, 3) if torch.equal(output.codes, quantizer.indices_to_codes(indices, num_stages=g))]
        gradients = torch.autograd.grad(
            output.codes.sum() + sum(output.losses.values()), [stage.embedding for stage in stages]
        )
        assert [bool(gradient.any()) for gradient in gradients] == [number < kept for number in range(3)]
        seen[kept] = seen.get(kept, 0) + 1
        losses = {1: (0.25 + 3.0625) / 2, 2: (0.25 + 0.0625) / 2, 3: 0.0625}
        expected = sum(losses[g] for g in range(1, kept + 1)) / kept
        assert float(output.losses["commitment"]) == pytest.approx(expected)
    assert min(seen[g] for g in (1, 2, 3)) > 8
    assert torch.equal(quantizer.eval()(z).codes, quantizer.indices_to_codes(indices))


def test_dropped_stages_do_not_update() -> None:
    torch.manual_seed(0)
    stages = [moving(0.0, 10.0), moving(-1.0, 2.0)]
    quantizer = ResidualQuantizer(stages=stages, dropout=True)
    seen = set()
    for _ in range(20):
        before = [(stage.codebook().clone(), stage.embedding_sum.clone()) for stage in stages]
        output = quantizer(row(9.5, 1.5))
        first, second = (before[i][0][output.indices[..., i]].squeeze(-1) for i in range(2))
        moved = [not torch.equal(stage.embedding_sum, sums) for stage, (_, sums) in zip(stages, before, strict=True)]
        assert moved[0]
        torch.testing.assert_close(output.codes[:, 0], first + second if moved[1] else first)
        seen.add(moved[1])
    assert seen == {False, True}


def test_posterior_assignment_weighs_every_residual() -> None:
    def stage(table: list[list[float]]) -> VectorQuantizer:
        quantizer = VectorQuantizer(num_embeddings=2, embedding_dim=2, assignment="posterior")
        with torch.no_grad():
            quantizer.embedding.copy_(torch.tensor(table))
        return quantizer

    quantizer = ResidualQuantizer(stages=[stage([[1.0, 0.0], [0.0, 2.0]]), stage([[0.5, 0.0], [0.0, 1.0]])])
    assert quantizer.assignment == "posterior"
    mean = torch.zeros(1, 2, 1, 1)
    # The encoder is sure of the first channel: codewords that leave it alone win, though they are farther.
    posterior = DiagonalGaussian(mean, torch.tensor([0.1, 10.0]).square().log().view(1, 2, 1, 1))
    assert quantizer(mean, posterior).indices.flatten().tolist() == [1, 1]


def test_any_quantizer_with_a_codebook_can_be_a_stage() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(stages=[SimVQ(num_embeddings=8, embedding_dim=3) for _ in range(2)])
    output = quantizer(torch.randn(1, 3, 2, 2))
    tables = [quantizer.stage(number).codebook() for number in range(2)]
    expected = sum(tables[i][output.indices[..., i]] for i in range(2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(output.codes, expected)
    assert len(list(quantizer.parameters())) == 4


@pytest.mark.parametrize(
    ("stages", "num_codebooks", "said"),
    [
        ([], None, "the stages are none"),
        ([nn.Identity()], None, "the stages are Identity; expected quantizers"),
        ([free(0.0), free(1.0)], 3, "found 2 stages with num_codebooks 3"),
        ([free(0.0)], 0, "num_codebooks 0"),
        ([free(0.0), free(1.0, 2.0)], None, "'VectorQuantizer', 2, 1, 'euclidean'"),
        ([free(0.0), moving(0.0)], None, "'VectorQuantizerEMA', 1, 1, 'euclidean'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    stages: list[CodebookQuantizer], num_codebooks: int | None, said: str
) -> None:
    with pytest.raises(VaevqMedError, match=said):
        ResidualQuantizer(stages=stages, num_codebooks=num_codebooks)


@pytest.mark.peer
@pytest.mark.parametrize("learnable", [False, True])
def test_it_agrees_with_vector_quantize_pytorch(learnable: bool) -> None:
    """Outputs, indices, losses, gradients and updates of three stages.

    Intended differences: the peer passes a straight-through gradient through every stage, which makes it G times
    ours; it returns each stage's loss, where ours is their mean; its codebook loss with a learnable codebook is the
    commitment loss without a stop-gradient, the sum of ours.
    """
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.ResidualVQ(
        dim=4,
        num_quantizers=3,
        codebook_size=16,
        rotation_trick=False,
        learnable_codebook=learnable,
        ema_update=not learnable,
        decay=0.9,
    )
    kind = VectorQuantizer if learnable else VectorQuantizerEMA
    options = {} if learnable else {"decay": 0.9}
    ours = ResidualQuantizer(stages=[kind(num_embeddings=16, embedding_dim=4, **options) for _ in range(3)])
    with torch.no_grad():
        for layer, stage in zip(theirs.layers, ours.stages, strict=True):
            stage.embedding.copy_(layer.codebook)
            if not learnable:
                stage.embedding_sum.copy_(layer.codebook)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        z, direction = torch.randn(2, 2, 4, 3, 5, generator=generator)
        first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
        # The peer's form for images fails where the width is not D: it is given the positions as a sequence.
        quantized, indices, each = theirs(first.flatten(2).mT)
        quantized, indices = quantized.mT.reshape(z.shape), indices.reshape(2, 3, 5, 3)
        output = ours(second)
        assert len(indices[..., 2].unique()) > 3
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.quantized, quantized)
        torch.testing.assert_close(output.losses["commitment"], each.mean())
        (own,) = torch.autograd.grad(output.quantized, second, direction, retain_graph=True)
        (peers,) = torch.autograd.grad(quantized, first, direction, retain_graph=True)
        torch.testing.assert_close(peers, 3 * own)
        theirs.zero_grad()
        ours.zero_grad()
        (own,) = torch.autograd.grad(3 * output.losses["commitment"], second, retain_graph=True)
        (peers,) = torch.autograd.grad(each.sum(), first, retain_graph=True)
        torch.testing.assert_close(own, peers)
        if learnable:
            tables = [stage.embedding for stage in ours.stages]
            of_ours = torch.autograd.grad(3 * output.losses["codebook"], tables)
            of_theirs = torch.autograd.grad(each.sum(), [layer._codebook.embed for layer in theirs.layers])
            for a, b in zip(of_ours, of_theirs, strict=True):
                torch.testing.assert_close(a, b[0])
        else:
            for stage, layer in zip(ours.stages, theirs.layers, strict=True):
                torch.testing.assert_close(stage.codebook(), layer.codebook)
