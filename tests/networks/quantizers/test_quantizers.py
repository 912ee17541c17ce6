"""Every quantizer keeps the same contract; each method has a case worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.memory import LargestTensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import SimVQ, VectorQuantizer, nearest, nearest_codeword
from vaevq_med.networks.quantizers.base import CodebookQuantizer
from vaevq_med.networks.quantizers.distances import Search

K, D = 32, 4
MAKERS: dict[str, Callable[[str], CodebookQuantizer]] = {
    "vq-uniform": lambda a: VectorQuantizer(num_embeddings=K, embedding_dim=D, init="uniform", assignment=a),
    "vq-normal": lambda a: VectorQuantizer(num_embeddings=K, embedding_dim=D, init="normal", assignment=a),
    "simvq": lambda a: SimVQ(num_embeddings=K, embedding_dim=D, assignment=a),
    "simvq-orthogonal": lambda a: SimVQ(
        num_embeddings=K, embedding_dim=D, init="orthogonal", scale=2.0, bias=False, assignment=a
    ),
    "simvq-trainable": lambda a: SimVQ(num_embeddings=K, embedding_dim=D, trainable_basis=True, assignment=a),
}


@pytest.fixture(params=[f"{name}:{assignment}" for name in MAKERS for assignment in ("euclidean", "posterior")])
def quantizer(request: pytest.FixtureRequest) -> CodebookQuantizer:
    torch.manual_seed(0)
    name, assignment = request.param.split(":")
    return MAKERS[name](assignment)


@pytest.fixture
def latent() -> tuple[torch.Tensor, DiagonalGaussian]:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, D, 3, 5, generator=generator)
    logvar = torch.randn(2, D, 3, 5, generator=generator)
    return mean, DiagonalGaussian(mean, logvar)


def brute_force(z: torch.Tensor, codebook: torch.Tensor, precision: torch.Tensor | None = None) -> torch.Tensor:
    difference = (z.double()[:, None] - codebook.double()[None]).square()
    if precision is not None:
        difference = difference * precision.double()[:, None]
    return difference.sum(-1).argmin(1)


def test_shapes_types_and_round_trip(
    quantizer: CodebookQuantizer, latent: tuple[torch.Tensor, DiagonalGaussian]
) -> None:
    z, posterior = latent
    output = quantizer(z, posterior)
    assert output.indices.shape == (2, 3, 5, 1)
    assert output.indices.dtype == torch.int64
    assert 0 <= int(output.indices.min()) <= int(output.indices.max()) < K
    assert output.quantized.shape == output.codes.shape == z.shape
    assert torch.equal(quantizer.indices_to_codes(output.indices), output.codes)
    assert torch.equal(output.quantized, output.codes)
    codebook = quantizer.codebook()
    assert codebook.shape == (K, D)
    assert torch.equal(codebook, output.codebook)


def test_indices_are_the_nearest_codewords(
    quantizer: CodebookQuantizer, latent: tuple[torch.Tensor, DiagonalGaussian]
) -> None:
    z, posterior = latent
    rows = z.permute(0, 2, 3, 1).reshape(-1, D)
    weights = posterior.std.permute(0, 2, 3, 1).reshape(-1, D).double() ** -2
    expected = brute_force(rows, quantizer.codebook(), weights if quantizer.assignment == "posterior" else None)
    assert quantizer(z, posterior).indices.flatten().tolist() == expected.tolist()


def test_gradients(quantizer: CodebookQuantizer, latent: tuple[torch.Tensor, DiagonalGaussian]) -> None:
    z, posterior = latent
    z = z.clone().requires_grad_()
    output = quantizer(z, posterior)
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in quantizer.parameters() if p.requires_grad]
    to_z = torch.autograd.grad(output.quantized, z, gradient, retain_graph=True)[0]
    assert torch.equal(to_z, gradient)
    through = torch.autograd.grad(output.quantized, parameters, gradient, retain_graph=True, allow_unused=True)
    assert all(g is None for g in through)
    of_codes = torch.autograd.grad(output.codes, parameters, gradient, allow_unused=False)
    assert all(g.abs().sum() > 0 for g in of_codes)


def test_losses_by_hand(quantizer: CodebookQuantizer, latent: tuple[torch.Tensor, DiagonalGaussian]) -> None:
    z, posterior = latent
    z = z.clone().requires_grad_()
    output = quantizer(z, posterior)
    assert set(output.losses) == {"codebook", "commitment"}
    expected = float((z - output.codes).square().mean())
    assert [float(loss) for loss in output.losses.values()] == pytest.approx([expected, expected])
    assert torch.autograd.grad(output.losses["codebook"], z, retain_graph=True, allow_unused=True)[0] is None
    commitment = torch.autograd.grad(output.losses["commitment"], z)[0]
    torch.testing.assert_close(commitment, 2 * (z - output.codes).detach() / z.numel())


def test_evaluation_changes_nothing(
    quantizer: CodebookQuantizer, latent: tuple[torch.Tensor, DiagonalGaussian]
) -> None:
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()
    first, second = quantizer(*latent).indices, quantizer(*latent).indices
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_autocast_leaves_the_assignment_alone(
    quantizer: CodebookQuantizer, latent: tuple[torch.Tensor, DiagonalGaussian]
) -> None:
    plain = quantizer(*latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(*latent)
        looked_up = quantizer.indices_to_codes(plain.indices)
    assert torch.equal(plain.codes, looked_up)
    assert torch.equal(plain.indices, cast.indices)
    assert cast.codes.dtype == torch.float32
    assert torch.equal(plain.codes, cast.codes)


def test_state_dict_round_trip(
    request: pytest.FixtureRequest,
    quantizer: CodebookQuantizer,
    latent: tuple[torch.Tensor, DiagonalGaussian],
    tmp_path: Path,
) -> None:
    expected = quantizer(*latent)
    torch.save(quantizer.state_dict(), tmp_path / "q.pt")
    name, assignment = request.node.callspec.params["quantizer"].split(":")
    fresh = MAKERS[name](assignment)
    assert not torch.equal(fresh.codebook(), expected.codebook)
    fresh.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    output = fresh(*latent)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.indices, expected.indices)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(1, 2, 2, dtype=torch.int64), r"shape \(1, 2, 2\)"),
        (torch.full((1, 2, 2, 1), K), "range from 32 to 32"),
        (torch.full((1, 2, 2, 1), -1), "range from -1 to -1"),
    ],
)
def test_bad_indices_are_refused(quantizer: CodebookQuantizer, bad: torch.Tensor, said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        quantizer.indices_to_codes(bad)


def test_a_latent_of_another_width_is_refused(quantizer: CodebookQuantizer) -> None:
    with pytest.raises(VaevqMedError, match=r"expected \[B, 4, \*grid\]"):
        quantizer(torch.zeros(1, D + 1, 2, 2), None)


def test_posterior_assignment_without_a_posterior_says_what_to_set() -> None:
    with pytest.raises(VaevqMedError, match="network_def#variational"):
        MAKERS["simvq"]("posterior")(torch.zeros(1, D, 2, 2))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (VectorQuantizer, {"init": "zeros"}, "expected one of uniform, normal"),
        (SimVQ, {"init": "uniform"}, "expected one of default, orthogonal"),
        (SimVQ, {"assignment": "cosine"}, "expected one of euclidean, posterior"),
        (VectorQuantizer, {"num_embeddings": 0}, "expected at least 1"),
        (VectorQuantizer, {"embedding_dim": 0}, "expected at least 1"),
    ],
)
def test_bad_options_are_refused(kind: type[CodebookQuantizer], options: dict[str, object], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        kind(**{"num_embeddings": K, "embedding_dim": D, **options})  # type: ignore[arg-type]


def test_gradient_of_codes_adds_up_in_the_rows_that_were_used() -> None:
    quantizer = VectorQuantizer(num_embeddings=3, embedding_dim=1)
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    codes = quantizer(torch.tensor([0.1, 1.9, 2.2]).view(1, 1, 1, 3)).codes
    (gradient,) = torch.autograd.grad(codes, quantizer.embedding, torch.tensor([1.0, 10.0, 100.0]).view_as(codes))
    assert gradient.flatten().tolist() == [1.0, 0.0, 110.0]


def test_vector_quantizer_by_hand() -> None:
    quantizer = VectorQuantizer(num_embeddings=3, embedding_dim=2)
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    output = quantizer(torch.tensor([[0.9, 0.2], [0.1, 1.5]]).T.reshape(1, 2, 1, 2))
    assert output.indices.flatten().tolist() == [1, 2]
    # ((0.1^2 + 0.2^2) + (0.1^2 + 0.5^2)) / 4
    assert float(output.losses["codebook"]) == pytest.approx(0.0775)


def test_vector_quantizer_initializations() -> None:
    torch.manual_seed(0)
    uniform = VectorQuantizer(num_embeddings=1000, embedding_dim=8, init="uniform").codebook()
    assert float(uniform.abs().max()) <= 1e-3
    assert float(uniform.std()) == pytest.approx(1e-3 / 3**0.5, rel=0.05)
    normal = VectorQuantizer(num_embeddings=1000, embedding_dim=8, init="normal").codebook()
    assert float(normal.std()) == pytest.approx(1, rel=0.05)


def test_simvq_codebook_by_hand_and_moves_as_a_whole() -> None:
    quantizer = SimVQ(num_embeddings=2, embedding_dim=2)
    with torch.no_grad():
        quantizer.basis.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        quantizer.projection.weight.copy_(torch.tensor([[2.0, 3.0], [0.0, 1.0]]))
        quantizer.projection.bias.copy_(torch.tensor([0.5, -0.5]))
    assert quantizer.codebook().tolist() == [[2.5, -0.5], [5.5, 0.5]]
    # A step on one used codeword moves the unused one, too, and leaves the basis.
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer.codebook()[0].sum().backward()
    before = quantizer.codebook()[1].clone()
    optimizer.step()
    assert not torch.equal(quantizer.codebook()[1], before)
    assert quantizer.basis.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_simvq_orthogonal_start_is_the_prior() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(num_embeddings=4096, embedding_dim=16, init="orthogonal", scale=4.0)
    covariance = torch.cov(quantizer.codebook().T)
    torch.testing.assert_close(covariance, torch.eye(16), atol=0.12, rtol=0)


def test_posterior_assignment_by_hand() -> None:
    quantizer = VectorQuantizer(num_embeddings=2, embedding_dim=2, assignment="posterior")
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    mean = torch.zeros(1, 2, 1, 1)
    # Nearer is the first; but the encoder is sure of the first channel and hardly of the second.
    posterior = DiagonalGaussian(mean, torch.tensor([0.1, 10.0]).square().log().view(1, 2, 1, 1))
    assert quantizer(mean, posterior).indices.item() == 1


@pytest.fixture(params=[False, True], ids=["as on a CPU", "of fixed shapes"])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search as on a CPU, and as on a device."""
    monkeypatch.setattr(nearest, "_needs_fixed_shapes", lambda device: request.param)


@pytest.mark.usefixtures("shapes")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 90),
    d=st.integers(1, 9),
    chunk=st.integers(1, 3000),
    seed=st.integers(0, 10**6),
    weighted=st.booleans(),
    ties=st.booleans(),
)
def test_search_is_the_exact_argmin(n: int, k: int, d: int, chunk: int, seed: int, weighted: bool, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    if ties:
        codebook = codebook[torch.randint(0, k, (k,), generator=generator)]
        z = codebook[torch.randint(0, k, (n,), generator=generator)] + 0.0
    precision = torch.rand(n, d, generator=generator) + 0.1 if weighted else None
    found = nearest_codeword(z, codebook, precision=precision, chunk_size=chunk)
    assert found.tolist() == brute_force(z, codebook, precision).tolist()


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [None, 100, 5000])
def test_search_is_exact_for_many_codewords(weighted: bool, ties: bool, chunk: int | None) -> None:
    """From 128 codewords on, the search keeps the minima of blocks wider than one codeword."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(100, 6, generator=generator), torch.randn(700, 6, generator=generator)
    if ties:
        codebook = codebook[torch.randint(0, 100, (700,), generator=generator)]
        z = codebook[:100].clone()
    precision = torch.rand(100, 6, generator=generator) + 0.1 if weighted else None
    found = nearest_codeword(z, codebook, precision=precision, chunk_size=chunk)
    assert found.tolist() == brute_force(z, codebook, precision).tolist()


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_search_is_exact_in_a_tight_cluster_far_from_the_origin(weighted: bool, distance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    center = distance * torch.randn(1, 4, generator=generator)
    codebook = center + 1e-6 * distance * torch.randn(300, 4, generator=generator)
    z = center + 1e-6 * distance * torch.randn(200, 4, generator=generator)
    precision = 10 * torch.rand(200, 4, generator=generator) + 0.1 if weighted else None
    found = nearest_codeword(z, codebook, precision=precision)
    assert found.tolist() == brute_force(z, codebook, precision).tolist()


@pytest.mark.usefixtures("shapes")
def test_search_of_a_tight_cluster_spans_its_parts_and_keeps_the_lowest_of_ties() -> None:
    """Near-equal codewords are settled 4096 at a time: the nearest may stand past the first part, or in both."""
    codebook = (4096 + torch.arange(5000) * 2.0**-11).unsqueeze(1)
    codebook[4900:] = codebook[:100]
    z = codebook[[4899, 4500, 4096, 4095, 99, 0]]
    assert nearest_codeword(z, codebook).tolist() == [4899, 4500, 4096, 4095, 99, 0]


@pytest.mark.usefixtures("shapes")
def test_ties_go_to_the_lowest_index() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    assert nearest_codeword(z, codebook).tolist() == [1, 1, 1]
    assert nearest_codeword(z, codebook.flip(0)).tolist() == [0, 1, 1]
    assert nearest_codeword(z, torch.zeros(500, 2)).tolist() == [0, 0, 0]


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("weighted", [False, True])
def test_indices_stay_in_range_where_a_latent_is_not_finite(weighted: bool) -> None:
    z = torch.tensor([[float("nan")] * 2, [float("inf")] * 2, [-float("inf"), 0.0]])
    found = nearest_codeword(z, torch.randn(300, 2), precision=torch.ones(3, 2) if weighted else None)
    assert bool(((found >= 0) & (found < 300)).all())


@pytest.mark.usefixtures("shapes")
def test_search_resolves_what_rounding_hides() -> None:
    """Far from the origin, fp32 cannot tell these codewords apart by the expanded square."""
    codebook = torch.tensor([[4096.0], [4096.0 + 2**-11], [4096.0 + 2**-10]])
    z = torch.tensor([[4096.0 + 2**-10], [4096.0 + 2**-11], [4096.0]])
    assert nearest_codeword(z, codebook).tolist() == [2, 1, 0]


def test_more_near_ties_than_are_settled_give_codewords_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_needs_fixed_shapes", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    n, k = 8192, 1024
    codebook = 100 + 1e-5 * torch.randn(k, 4, generator=generator)
    z = 100 + 1e-5 * torch.randn(n, 4, generator=generator)
    exact, found = brute_force(z, codebook), nearest_codeword(z, codebook)
    # A sixteenth at least is settled; of the others the score, near 20,000, is right to its own rounding.
    assert int((found == exact).sum()) >= n // 16

    def scores(index: torch.Tensor) -> torch.Tensor:
        code = codebook[index].double()
        return 0.5 * code.square().sum(dim=1) - (z.double() * code).sum(dim=1)

    assert float((scores(found) - scores(exact)).max()) <= 2e4 * 2**-23 * 13


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("weighted", [False, True])
def test_search_never_holds_the_distance_matrix(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    n, k, d = 4096, 2048, 8
    z, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    precision = torch.rand(n, d, generator=generator) + 0.5 if weighted else None
    chunk = 2**16
    with LargestTensor() as largest:
        nearest_codeword(z, codebook, precision=precision, chunk_size=chunk)
    assert largest.elements <= max(chunk, 2 * n * d)
    assert largest.elements < n * k / 50


def test_search_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(VaevqMedError, match=r"\[N, D\]"):
        nearest_codeword(torch.zeros(2, 3), torch.zeros(4, 2))
    with pytest.raises(VaevqMedError, match="no codeword"):
        nearest_codeword(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(VaevqMedError, match="precision has shape"):
        nearest_codeword(torch.zeros(2, 3), torch.zeros(4, 3), precision=torch.ones(2, 1))
    with pytest.raises(VaevqMedError, match="chunk_size is 0"):
        nearest_codeword(torch.zeros(2, 3), torch.zeros(4, 3), chunk_size=0)


@pytest.mark.peer
def test_simvq_agrees_with_vector_quantize_pytorch() -> None:
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.SimVQ(dim=D, codebook_size=K, channel_first=True, rotation_trick=False)
    ours = SimVQ(num_embeddings=K, embedding_dim=D, bias=False)
    with torch.no_grad():
        ours.basis.copy_(theirs.frozen_codebook)
        ours.projection.weight.copy_(theirs.code_transform.weight)
    z, target = torch.randn(2, D, 3, 5), torch.randn(2, D, 3, 5)
    their_z, our_z = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices, loss = theirs(their_z)
    output = ours(our_z)
    assert torch.equal(output.indices[..., 0], indices)
    torch.testing.assert_close(output.quantized, quantized)
    # Theirs weighs by itself: codebook 1, commitment 0.25.
    our_loss = output.losses["codebook"] + 0.25 * output.losses["commitment"]
    torch.testing.assert_close(our_loss, loss)
    (loss + F.mse_loss(quantized, target)).backward()
    (our_loss + F.mse_loss(output.quantized, target)).backward()
    torch.testing.assert_close(our_z.grad, their_z.grad)
    torch.testing.assert_close(ours.projection.weight.grad, theirs.code_transform.weight.grad)
    assert bool(ours.projection.weight.grad.any())


@pytest.mark.peer
def test_vector_quantizer_agrees_with_vector_quantize_pytorch() -> None:
    """Theirs learns by gradient where it is told to, with one weight for codebook and commitment."""
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.VectorQuantize(
        dim=D,
        codebook_size=K,
        accept_image_fmap=True,
        rotation_trick=False,
        ema_update=False,
        learnable_codebook=True,
        commitment_weight=0.5,
    )
    ours = VectorQuantizer(num_embeddings=K, embedding_dim=D)
    with torch.no_grad():
        ours.embedding.copy_(theirs.codebook)
    z, target = torch.randn(2, D, 3, 5), torch.randn(2, D, 3, 5)
    their_z, our_z = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices, loss = theirs(their_z)
    output = ours(our_z)
    assert len(indices.unique()) > 3
    assert torch.equal(output.indices[..., 0], indices)
    torch.testing.assert_close(output.quantized, quantized)
    for part in ("codebook", "commitment"):
        torch.testing.assert_close(0.5 * output.losses[part], loss.squeeze())
    our_loss = 0.5 * (output.losses["codebook"] + output.losses["commitment"])
    (loss.sum() + F.mse_loss(quantized, target)).backward()
    (our_loss + F.mse_loss(output.quantized, target)).backward()
    torch.testing.assert_close(our_z.grad, their_z.grad)
    (table,) = (parameter for parameter in theirs.parameters() if parameter.shape[-2:] == (K, D))
    torch.testing.assert_close(ours.embedding.grad, table.grad.reshape(K, D))


@pytest.mark.parametrize("num_embeddings", [40, 2000])
def test_copies_of_codewords_go_to_the_first_of_them(num_embeddings: int) -> None:
    torch.manual_seed(0)
    distinct, latents = torch.randn(3, 4), torch.randn(200, 4)
    which = torch.randint(3, (num_embeddings,))
    nearest = torch.cdist(latents.double(), distinct.double()).argmin(dim=1)
    first = torch.stack([(which == number).nonzero()[0, 0] for number in range(3)])
    assert torch.equal(nearest_codeword(latents, distinct[which]), first[nearest])


def test_a_codebook_of_one_value_is_searched_without_a_distance_to_every_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    evaluate = Search.distances

    def count(*arguments: Any) -> torch.Tensor:
        distances = evaluate(*arguments)
        seen.append(distances.numel())
        return distances

    monkeypatch.setattr(Search, "distances", count)
    index = nearest_codeword(torch.randn(500, 4), torch.zeros(4096, 4))
    assert bool((index == 0).all())
    assert sum(seen) < 500 * 4096 / 10
