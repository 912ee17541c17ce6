"""Two levels of codes: what is known of them by hand, and what they are where one of the levels says nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from helpers.quantizer_cases import Case
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import IBQ, CoherentVQ, ResidualQuantizer, SimVQ, VectorQuantizer, VectorQuantizerEMA
from vaevq_med.networks.quantizers.base import CodebookQuantizer
from vaevq_med.networks.quantizers.gates import EntropyGate, Gate, LearnedGate, PosteriorGate, VarianceGate
from vaevq_med.networks.quantizers.tree import TreeQuantizer
from vaevq_med.networks.quantizers.two_level import TwoLevelQuantizer
from vaevq_med.networks.quantizers.two_level_learned import LearnedTwoLevel
from vaevq_med.networks.quantizers.two_level_residual import ResidualTwoLevel


def level(kind: type[CodebookQuantizer] = VectorQuantizer, **options: object) -> CodebookQuantizer:
    options = {"init": "normal"} | options if kind is VectorQuantizer else options
    return kind(num_embeddings=16, embedding_dim=3, **options)  # type: ignore[call-arg]


def two(
    kind: type[TwoLevelQuantizer] = ResidualTwoLevel,
    of: type[CodebookQuantizer] = VectorQuantizer,
    cell_size: int = 4,
    gate: Gate | None = None,
    **options: object,
) -> TwoLevelQuantizer:
    return kind(top=level(of, **options), bottom=level(of, **options), cell_size=cell_size, gate=gate)


CASES = {
    "two-level-residual": Case(two),
    "two-level-learned": Case(lambda: two(LearnedTwoLevel), straight_through=False),
    "two-level-ema": Case(lambda: two(of=VectorQuantizerEMA, revival_share=0.5, revival_count=1.0), learns=False),
    "two-level-coherent": Case(lambda: two(of=CoherentVQ), learns=False),
    "two-level-simvq": Case(lambda: two(LearnedTwoLevel, of=SimVQ), straight_through=False),
    "two-level-posterior": Case(lambda: two(gate=PosteriorGate()), straight_through=False),
    "two-level-posterior-ema": Case(
        lambda: two(of=VectorQuantizerEMA, gate=PosteriorGate()), straight_through=False, learns=False
    ),
    "two-level-posterior-coherent": Case(
        lambda: two(of=CoherentVQ, gate=PosteriorGate()), straight_through=False, learns=False
    ),
    "two-level-router": Case(lambda: two(gate=LearnedGate(embedding_dim=3, hidden=8)), straight_through=False),
    "two-level-learned-router": Case(
        lambda: two(LearnedTwoLevel, gate=LearnedGate(embedding_dim=3, hidden=8)), straight_through=False
    ),
    "two-level-closed": Case(lambda: two(LearnedTwoLevel, gate=EntropyGate(share=0.0)), straight_through=False),
    "two-level-open": Case(lambda: two(gate=LearnedGate(embedding_dim=3, share=1.0))),
    "two-level-no-image": Case(lambda: two(gate=VarianceGate())),
}

FORMS = [ResidualTwoLevel, LearnedTwoLevel]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("of", [VectorQuantizer, VectorQuantizerEMA])
def test_of_one_position_a_cell_it_is_a_residual_quantizer_of_two_stages(of: type[CodebookQuantizer]) -> None:
    """To the bit: indices, codes, losses, the encoder's gradient, and the codebooks after the step."""
    torch.manual_seed(0)
    stages = [level(of), level(of)]
    residual = ResidualQuantizer(stages=copy.deepcopy(stages))
    levels = ResidualTwoLevel(top=stages[0], bottom=stages[1], cell_size=1)
    found = []
    for quantizer in (residual, levels):
        z = drawn(2, 3, 4, 5).requires_grad_()
        output = quantizer(z)
        total = output.quantized.square().sum() + sum(output.losses.values())
        (gradient,) = torch.autograd.grad(total, z)
        tables = [stage.codebook().detach() for stage in ([*quantizer.stages] if quantizer is residual else stages)]
        found.append([output.indices, output.quantized, output.codes, *output.losses.values(), gradient, *tables])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_bottom_codebook_of_nothing_gives_the_top_codes() -> None:
    quantizer = two()
    quantizer.bottom.embedding.data.zero_()
    z = drawn(2, 12, 3, 3)
    output = quantizer(z)
    means = z.view(2, 4, 3, 3, 3).mean(dim=1)
    top = quantizer.top(means).codes
    assert torch.equal(output.codes, top.repeat(1, 4, 1, 1))
    assert torch.equal(output.indices[..., :1], quantizer.top(means).indices)


def test_a_cell_of_one_codeword_leaves_nothing() -> None:
    """Of latents that are constant within cells, with values that the top codebook has."""
    quantizer = two()
    chosen = torch.randint(0, 16, (2, 3, 3), generator=torch.Generator().manual_seed(1))
    z = quantizer.top.embedding.detach()[chosen].movedim(-1, 1).repeat(1, 4, 1, 1)
    with torch.no_grad():
        quantizer.bottom.embedding[5] = 0
    output = quantizer(z)
    assert torch.equal(output.indices[..., 0], chosen)
    assert bool((output.indices[..., 1:] == 5).all())
    assert torch.equal(output.codes, z)
    assert all(loss.item() == 0 for loss in output.losses.values())


def test_bottom_codes_are_those_of_the_positions_row_by_row() -> None:
    """A cell whose four positions are codewords 3, 1, 2 and 0 of the bottom, around a mean of nothing."""
    quantizer = two()
    quantizer.top.embedding.data[0] = 0
    quantizer.bottom.embedding.data[:4] = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    z = quantizer.bottom.embedding.detach()[[3, 1, 2, 0]].reshape(1, 12, 1, 1)
    assert quantizer(z).indices.flatten().tolist() == [0, 3, 1, 2, 0]


def test_the_learned_maps_start_as_the_residual_form() -> None:
    torch.manual_seed(0)
    residual = two()
    learned = LearnedTwoLevel(top=residual.top, bottom=residual.bottom)
    z = drawn(2, 12, 3, 3)
    of_residual, of_learned = (q(z) for q in (residual, learned))
    assert torch.equal(of_residual.indices, of_learned.indices)
    torch.testing.assert_close(of_residual.codes, of_learned.codes)
    gradients = []
    for quantizer in (residual, learned):
        x = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((quantizer(x).quantized * drawn(2, 12, 3, 3, seed=2)).sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def test_the_decoder_trains_the_maps_and_the_codebooks_learn_through_the_codes() -> None:
    quantizer = two(LearnedTwoLevel)
    output = quantizer(drawn(2, 12, 3, 3))
    output.quantized.square().sum().backward(retain_graph=True)
    maps = [quantizer.to_rest, quantizer.to_codes]
    assert all(float(one.weight.grad.abs().sum()) > 0 for one in maps)
    # What the first map adds the second takes away at the start; the commitment moves it.
    output.losses["commitment"].backward()
    assert float(quantizer.to_coarse.weight.grad.abs().sum()) > 0
    assert quantizer.top.embedding.grad is None
    quantizer(drawn(2, 12, 3, 3)).codes.square().sum().backward()
    assert float(quantizer.top.embedding.grad.abs().sum()) > 0
    assert float(quantizer.bottom.embedding.grad.abs().sum()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_first_codes_alone_are_the_structure(form: type[TwoLevelQuantizer]) -> None:
    quantizer = two(form)
    indices = quantizer(drawn(2, 12, 3, 3)).indices
    top = quantizer.top.codebook()[indices[..., 0]].movedim(-1, 1)
    only = quantizer.indices_to_codes(indices, num_codes=1)
    torch.testing.assert_close(only, top.repeat(1, 4, 1, 1))
    assert torch.equal(quantizer.first_codes(indices[..., :1]), only)
    assert torch.equal(quantizer.indices_to_codes(indices, num_codes=5), quantizer.indices_to_codes(indices))
    two_of_four = quantizer.indices_to_codes(indices, num_codes=3)
    torch.testing.assert_close(two_of_four[:, :6], quantizer.indices_to_codes(indices)[:, :6])
    torch.testing.assert_close(two_of_four[:, 6:], only[:, 6:])
    with pytest.raises(VaevqMedError, match="num_codes is 6; expected 1 to 5"):
        quantizer.indices_to_codes(indices, num_codes=6)


def gates(share: float) -> list[Gate]:
    kinds: list[Callable[..., Gate]] = [EntropyGate, VarianceGate, PosteriorGate]
    return [*(kind(share=share) for kind in kinds), LearnedGate(embedding_dim=3, share=share)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", range(4))
def test_an_open_gate_is_none_and_a_closed_one_leaves_the_top(form: type[TwoLevelQuantizer], which: int) -> None:
    torch.manual_seed(0)
    without = two(form)
    z, images = drawn(2, 12, 3, 3), drawn(2, 1, 12, 12, seed=3).clamp(-1, 1)
    posterior = DiagonalGaussian(z, drawn(2, 12, 3, 3, seed=4))
    expected = without(z, posterior)
    opened = form(top=without.top, bottom=without.bottom, gate=gates(1.0)[which])
    closed = form(top=without.top, bottom=without.bottom, gate=gates(0.0)[which])
    found = opened(z, posterior, images)
    assert (opened.num_embeddings, without.num_embeddings) == (17, 16)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.quantized, expected.quantized)
    assert all(torch.equal(found.losses[name], loss) for name, loss in expected.losses.items())
    found = closed(z, posterior, images)
    assert bool((found.indices[..., 1:] == 16).all())
    assert torch.equal(found.codes, without.indices_to_codes(expected.indices, num_codes=1))
    # The mean over both levels: nothing of the bottom counts.
    of_top = without.top(without.coarse(without.positions_of(z))).losses["codebook"]
    torch.testing.assert_close(found.losses["codebook"], of_top / 2)


class Fixed(Gate):
    """A gate as it is given."""

    def __init__(self, opened: Tensor) -> None:
        super().__init__()
        self.opened = opened

    def decide(self, z: Tensor, posterior: object, images: Tensor | None) -> object:
        from vaevq_med.networks.quantizers.gates import GateOutput

        return GateOutput(self.opened)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", [VectorQuantizer, VectorQuantizerEMA])
def test_only_what_is_there_counts(form: type[TwoLevelQuantizer], of: type[CodebookQuantizer]) -> None:
    """A gate that opens some cells: loss, gradient and codebook are those of the open cells' positions alone."""
    torch.manual_seed(0)
    opened = (torch.rand(2, 3, 3) > 0.5).float()
    whole = two(form, of)
    z = drawn(2, 12, 3, 3)
    parts = form(top=copy.deepcopy(whole.top), bottom=copy.deepcopy(whole.bottom), gate=Fixed(opened))
    reference = copy.deepcopy(whole)
    expected = whole.eval()(z)
    output = parts(z)
    assert torch.equal(parts.opened(output.indices), opened.bool())
    per_cell = opened.bool().unsqueeze(1).expand_as(z)
    only_top = whole.indices_to_codes(expected.indices, num_codes=1)
    torch.testing.assert_close(output.codes, torch.where(per_cell, expected.codes, only_top))
    # Computed anew on the open cells as a list of latents.
    fine = reference.positions_of(z)
    coarse = reference.coarse(fine)
    top = reference.top.eval()(coarse)
    rest = reference.rest(fine, top.codes).permute(0, 2, 3, 4, 1)[opened.bool()]  # [open, n, d]
    of_rest = reference.bottom.train()(rest.reshape(1, -1, 3).mT)
    expected_loss = (top.losses["commitment"] + of_rest.losses["commitment"]) / 2
    torch.testing.assert_close(output.losses["commitment"], expected_loss)
    if of is VectorQuantizerEMA:
        torch.testing.assert_close(parts.bottom.cluster_size, reference.bottom.cluster_size)
        torch.testing.assert_close(parts.bottom.codebook(), reference.bottom.codebook())


@pytest.mark.parametrize("of", [VectorQuantizerEMA, CoherentVQ])
@pytest.mark.parametrize("share_open", [0.0, 0.3])
def test_closed_cells_neither_move_nor_revive_a_codebook(of: type[CodebookQuantizer], share_open: float) -> None:
    """Whatever the latents of closed cells are, the bottom codebook becomes the same, to the bit."""
    draws = torch.Generator().manual_seed(0)
    opened = (torch.rand(3, 4, 4, generator=draws) < share_open).float()
    options = {"revival_share": 0.5, "revival_count": 1.0, "decay": 0.5}
    torch.manual_seed(0)
    one = ResidualTwoLevel(top=level(), bottom=level(of, **options), gate=Fixed(opened))
    start = one.bottom.codebook().clone()
    other = copy.deepcopy(one)
    closed = (opened == 0).unsqueeze(1)
    z = drawn(3, 12, 4, 4)
    for step in range(4):
        # Of the same mean, so that top codes are the same.
        further = 50 * drawn(3, 3, 4, 4, seed=step + 1)
        moved = torch.where(closed, z + torch.cat([further, -further, further, -further], dim=1), z)
        for quantizer, latent in ((one, z), (other, moved)):
            torch.manual_seed(step)
            quantizer(latent, DiagonalGaussian(latent, 0.1 * drawn(3, 12, 4, 4, seed=9)))
        for name, value in one.bottom.state_dict().items():
            assert torch.equal(value, other.bottom.state_dict()[name]), name
    assert float(other.bottom.codebook().abs().max()) < 10
    if share_open:
        moved_far = (one.bottom.codebook() - start).abs().amax(dim=1) > 0.1
        assert int(moved_far.sum()) > 8


def test_a_closed_cell_passes_its_mean_gradient_and_an_open_one_all_of_it() -> None:
    opened = torch.tensor([[[1.0, 0.0]]])
    z = drawn(1, 12, 1, 2).requires_grad_()
    quantizer = two(gate=Fixed(opened))
    weights = drawn(1, 12, 1, 2, seed=5)
    (gradient,) = torch.autograd.grad((quantizer(z).quantized * weights).sum(), z)
    assert torch.equal(gradient[..., 0], weights[..., 0])
    mean = weights[..., 1].view(4, 3).mean(dim=0)
    torch.testing.assert_close(gradient[..., 1].view(4, 3), mean.expand(4, 3))


def test_the_posterior_of_a_mean_and_of_a_difference() -> None:
    """Four independent normals of variances 1, 2, 3 and 6: their mean has a variance of 12 / 16."""
    quantizer = ResidualTwoLevel(
        top=VectorQuantizer(num_embeddings=2, embedding_dim=1),
        bottom=VectorQuantizer(num_embeddings=2, embedding_dim=1),
    )
    variance = torch.tensor([1.0, 2, 3, 6]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(torch.tensor([1.0, 2, 3, 6]).view(1, 4, 1, 1), variance.log())
    of_mean = quantizer.coarse_posterior(posterior)
    assert of_mean is not None
    torch.testing.assert_close(of_mean.std.square().flatten(), torch.tensor([0.75]))
    assert of_mean.mean.flatten().tolist() == [3.0]
    of_rest = quantizer.rest_posterior(posterior, torch.full((1, 1, 1, 1), 2.5))
    assert of_rest is not None
    assert of_rest.mean.flatten().tolist() == [-1.5, -0.5, 0.5, 3.5]
    torch.testing.assert_close(of_rest.std.square().flatten(), variance.flatten())


def test_the_rate_by_hand() -> None:
    """Of 8 cells 2 are open: 2 codes a cell on average, of 4 bits each, and H(1/4) = 0.8113 bits for the gate."""
    quantizer = two(gate=PosteriorGate())
    counts = torch.zeros(5, 17, dtype=torch.int64)
    counts[0, 3] = 8
    counts[1:, 16], counts[1:, 0] = 6, 2
    assert quantizer.rate(counts) == pytest.approx({"mean_codes": 2.0, "mean_bits": 8 + 0.8112781})
    counts[1:, 16], counts[1:, 0] = 0, 8
    assert quantizer.rate(counts) == {"mean_codes": 5.0, "mean_bits": 20.0}
    assert quantizer.rate(0 * counts) == two().rate(counts) == {}
    assert quantizer.bits_per_position == 5 * math.log2(17)


def test_the_first_codebook_starts_on_means_and_the_second_on_what_they_leave() -> None:
    quantizer, given = two(), []

    def cluster(rows: Tensor, count: int) -> Tensor:
        given.append(rows)
        return torch.zeros(count, rows.shape[1])

    z = drawn(2, 12, 3, 3)
    assert quantizer.start_codebook(z, cluster)
    fine = z.view(2, 4, 3, 3, 3)
    torch.testing.assert_close(given[0], fine.mean(dim=1).movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(given[1], fine.permute(0, 3, 4, 1, 2).reshape(-1, 3))


def test_what_does_not_fit_together_is_refused() -> None:
    small = VectorQuantizer(num_embeddings=8, embedding_dim=3)
    with pytest.raises(VaevqMedError, match=r"found \(16, 3\) and \(8, 3\), expected the same in both"):
        ResidualTwoLevel(top=level(), bottom=small)
    with pytest.raises(VaevqMedError, match="the levels are VectorQuantizer and IBQ; expected"):
        ResidualTwoLevel(top=level(), bottom=IBQ(num_embeddings=16, embedding_dim=3))  # type: ignore[arg-type]
    with pytest.raises(VaevqMedError, match="assignment is 'posterior' in a level of learned maps"):
        two(LearnedTwoLevel, of=CoherentVQ)
    with pytest.raises(VaevqMedError, match="cell_size is 0; expected at least 1"):
        two(cell_size=0)

    class Unaware(VectorQuantizer):
        def forward(self, z, posterior=None):  # type: ignore[no-untyped-def, override]
            return super().forward(z, posterior)

    with pytest.raises(VaevqMedError, match="Unaware cannot leave positions out; expected another bottom level under"):
        two(of=Unaware, gate=PosteriorGate())
    aware = Unaware(num_embeddings=16, embedding_dim=3)
    assert ResidualTwoLevel(top=aware, bottom=level(), gate=PosteriorGate()).num_embeddings == 17
    assert TreeQuantizer(top=aware, gate=PosteriorGate()).num_embeddings == 17
    assert two(of=Unaware).num_embeddings == 16
