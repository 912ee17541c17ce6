"""The contract that every quantizer keeps, whatever its method."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from helpers.quantizer_cases import Case, all_cases
from monai.data import MetaTensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import quantizers
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer

ALL_CASES = all_cases()


@pytest.fixture(params=list(ALL_CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return ALL_CASES[request.param]


@pytest.fixture
def quantizer(case: Case) -> Quantizer:
    torch.manual_seed(0)
    return case.make()


def latent(quantizer: Quantizer, seed: int = 1) -> tuple[torch.Tensor, DiagonalGaussian]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, quantizer.embedding_dim, 3, 5, generator=generator)
    return mean, DiagonalGaussian(mean, torch.randn(mean.shape, generator=generator))


def test_every_quantizer_has_a_case() -> None:
    """Every class of every file, whether or not the package exports it."""
    modules = [
        importlib.import_module(f"{quantizers.__name__}.{module.name}")
        for module in pkgutil.iter_modules(quantizers.__path__)
    ]
    concrete = {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Quantizer) and not inspect.isabstract(kind)
    }
    assert {type(case.make()) for case in all_cases(indexed=False).values()} == concrete


def test_a_certain_distribution_has_the_code_and_an_even_one_the_mean(quantizer: Quantizer) -> None:
    z, posterior = latent(quantizer)
    indices = quantizer.eval()(z, posterior).indices
    certain = torch.nn.functional.one_hot(indices[..., 0], quantizer.num_embeddings).double()
    codebook = quantizer.codebook()
    if quantizer.num_codebooks > 1 or (codebook is not None and codebook.ndim > 2):
        with pytest.raises(VaevqMedError, match="has more than one table of codewords; expected one"):
            quantizer.mean_codes(certain)
        return
    exactly = {} if codebook is None else {"rtol": 0.0, "atol": 0.0}  # codes that are computed round by their number
    torch.testing.assert_close(quantizer.mean_codes(certain), quantizer.indices_to_codes(indices), **exactly)
    other = (indices + 1) % quantizer.num_embeddings
    even = (certain + torch.nn.functional.one_hot(other[..., 0], quantizer.num_embeddings)) / 2
    mean = (quantizer.indices_to_codes(indices) + quantizer.indices_to_codes(other)) / 2
    torch.testing.assert_close(quantizer.mean_codes(even), mean)
    with pytest.raises(VaevqMedError, match=rf"expected \[B, \*grid, {quantizer.num_embeddings}\]"):
        quantizer.mean_codes(certain[..., :-1])


def test_what_fixes_the_number_of_codewords_is_an_argument(quantizer: Quantizer) -> None:
    kind = type(quantizer)
    assert kind.size_arguments
    assert set(kind.size_arguments) <= set(inspect.signature(kind).parameters)


def test_a_sweep_sets_the_number_of_codewords_alone_or_not_at_all() -> None:
    kinds = {type(case.make()).__name__: type(case.make()).size_arguments for case in ALL_CASES.values()}
    assert kinds["FSQ"] == kinds["IFSQ"] == ("levels", "embedding_dim")
    assert kinds["LFQ"] == ("num_embeddings", "embedding_dim")
    assert kinds["VectorQuantizer"] == kinds["MGVQ"] == ("num_embeddings",)


def test_shapes_types_and_ranges(quantizer: Quantizer) -> None:
    z, posterior = latent(quantizer)
    for mode in (True, False):
        output = quantizer.train(mode)(z, posterior)
        assert output.indices.shape == (2, 3, 5, quantizer.num_codebooks)
        assert output.indices.dtype == torch.int64
        assert 0 <= int(output.indices.min()) <= int(output.indices.max()) < quantizer.num_embeddings
        assert output.quantized.shape == output.codes.shape == z.shape
        assert output.quantized.dtype == output.codes.dtype == torch.float32
        assert all(loss.ndim == 0 and bool(loss.isfinite()) for loss in output.losses.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", [(12,), (2, 3, 2)])
def test_how_the_positions_are_laid_out_changes_nothing(case: Case, grid: tuple[int, ...], training: bool) -> None:
    """Tokens in a row and those of a volume are what the same latents give in rows and columns."""
    found = []
    for sizes in (grid, (3, 4)):
        torch.manual_seed(0)
        quantizer = case.make().train(training)
        generator = torch.Generator().manual_seed(1)
        z, logvar = torch.randn(2, 2, quantizer.embedding_dim, 12, generator=generator).unflatten(-1, sizes)
        posterior = DiagonalGaussian(z, logvar)
        for _ in range(2):  # the second time with the codebook that the first one moved
            output = quantizer(z.requires_grad_(), posterior)
        assert output.indices.shape == (2, *sizes, quantizer.num_codebooks)
        assert output.quantized.shape == output.codes.shape == (2, quantizer.embedding_dim, *sizes)
        (gradient,) = torch.autograd.grad(output.quantized.square().sum() + sum(output.losses.values()), z)
        looked_up = quantizer.eval().indices_to_codes(output.indices)
        found.append(
            {
                "indices": output.indices.flatten(1, -2),
                "quantized": output.quantized.flatten(2),
                "codes": output.codes.flatten(2),
                "looked up": looked_up.flatten(2),
                "gradient": gradient.flatten(2),
                **output.losses,
            }
        )
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_latents_of_monais_own_type_are_taken(quantizer: Quantizer, training: bool) -> None:
    z, posterior = latent(quantizer)
    meta = DiagonalGaussian(MetaTensor(posterior.mean), MetaTensor(posterior.logvar))
    assert torch.equal(quantizer.eval()(MetaTensor(z), meta).indices, quantizer(z, posterior).indices)
    if training:
        output = quantizer.train()(MetaTensor(z).requires_grad_(), meta)
        (output.quantized.sum() + sum(output.losses.values())).backward()


def test_indices_give_the_codes_back(quantizer: Quantizer, case: Case) -> None:
    output = quantizer.eval()(*latent(quantizer))
    again = quantizer.indices_to_codes(output.indices)
    if quantizer.is_discrete:
        assert torch.equal(again, output.codes)
    assert again.shape == output.codes.shape
    assert torch.equal(output.quantized, output.codes) == case.exact


def test_the_codebook_is_what_the_output_carries(quantizer: Quantizer) -> None:
    output = quantizer.eval()(*latent(quantizer))
    codebook = quantizer.codebook()
    if codebook is None:
        assert output.codebook is None
        return
    groups, channels = quantizer.num_codebooks, quantizer.embedding_dim
    segments = getattr(quantizer, "num_segments", groups)
    shapes = {(quantizer.num_embeddings, channels), (segments, quantizer.num_embeddings, channels // groups)}
    assert tuple(codebook.shape) in shapes
    assert output.codebook is not None
    assert torch.equal(output.codebook, codebook)


def test_gradient_reaches_the_encoder(quantizer: Quantizer, case: Case) -> None:
    z, posterior = latent(quantizer)
    z.requires_grad_()
    output = quantizer(z, posterior)
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (to_z,) = torch.autograd.grad(output.quantized, z, gradient)
    assert bool(to_z.isfinite().all())
    assert float(to_z.abs().sum()) > 0
    if case.straight_through:
        assert torch.equal(to_z, gradient)


def test_gradient_reaches_the_parameters_through_the_codes(quantizer: Quantizer, case: Case) -> None:
    output = quantizer(*latent(quantizer))
    parameters = [p for p in quantizer.parameters() if p.requires_grad]
    if not case.learns:
        assert not output.codes.requires_grad or not parameters
        return
    gradients = torch.autograd.grad(output.codes.square().sum(), parameters, allow_unused=True)
    assert any(g is not None and float(g.abs().sum()) > 0 for g in gradients)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)


def test_every_parameter_takes_part_in_a_step(quantizer: Quantizer) -> None:
    """DDP waits for the gradient of every parameter."""
    output = quantizer(*latent(quantizer))
    total = output.quantized.sum() + output.codes.square().sum() + sum(output.losses.values())
    if total.requires_grad:
        total.backward()
    assert all(p.grad is not None for p in quantizer.parameters() if p.requires_grad)


def test_evaluation_changes_nothing(quantizer: Quantizer) -> None:
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()
    first, second = quantizer(*latent(quantizer)), quantizer(*latent(quantizer))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.quantized, second.quantized)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_autocast_leaves_the_assignment_alone(quantizer: Quantizer) -> None:
    quantizer.eval()
    plain = quantizer(*latent(quantizer))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(*latent(quantizer))
        looked_up = quantizer.indices_to_codes(plain.indices)
    assert torch.equal(plain.indices, cast.indices)
    assert torch.equal(plain.codes, cast.codes)
    if quantizer.is_discrete:
        assert torch.equal(plain.codes, looked_up)


def test_memory_format_changes_nothing(quantizer: Quantizer) -> None:
    quantizer.eval()
    z, posterior = latent(quantizer)
    plain = quantizer(z, posterior)
    last = quantizer(z.contiguous(memory_format=torch.channels_last), posterior)
    assert torch.equal(plain.indices, last.indices)
    torch.testing.assert_close(plain.codes, last.codes)


def test_state_dict_round_trip(quantizer: Quantizer, case: Case, tmp_path: Path) -> None:
    quantizer.train()
    quantizer(*latent(quantizer, seed=5))  # what training keeps in buffers is part of the state
    expected = quantizer.eval()(*latent(quantizer))
    torch.save(quantizer.state_dict(), tmp_path / "quantizer.pt")
    torch.manual_seed(99)
    fresh = case.make().eval()
    if case.random_start:
        assert not torch.equal(fresh(*latent(quantizer)).codes, expected.codes)
    fresh.load_state_dict(torch.load(tmp_path / "quantizer.pt", weights_only=True))
    output = fresh(*latent(quantizer))
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.indices, expected.indices)


def test_bad_indices_are_refused(quantizer: Quantizer) -> None:
    groups, top = quantizer.num_codebooks, quantizer.num_embeddings
    for bad, said in (
        (torch.zeros(1, groups, dtype=torch.int64), rf"shape \(1, {groups}\)"),
        (torch.zeros(1, 2, 2, groups + 1, dtype=torch.int64), "shape"),
        (torch.full((1, 2, 2, groups), top), f"range from {top} to {top}"),
        (torch.full((1, 2, 2, groups), -1), "range from -1 to -1"),
    ):
        with pytest.raises(VaevqMedError, match=said):
            quantizer.indices_to_codes(bad)


def test_a_latent_of_another_width_is_refused(quantizer: Quantizer) -> None:
    width = quantizer.embedding_dim
    with pytest.raises(VaevqMedError, match=rf"expected \[B, {width}, \*grid\]"):
        quantizer(torch.zeros(1, width + 1, 2, 2), None)
    with pytest.raises(VaevqMedError, match=rf"shape \(1, {width}\)"):
        quantizer(torch.zeros(1, width), None)
