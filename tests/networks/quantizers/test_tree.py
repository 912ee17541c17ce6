"""A tree of codewords: each position is compared with the children of its cell's codeword alone."""

from __future__ import annotations

import pytest
import torch
from helpers.quantizer_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import VectorQuantizer, VectorQuantizerEMA, tree
from vaevq_med.networks.quantizers.gates import PosteriorGate
from vaevq_med.networks.quantizers.tree import TreeQuantizer, nearest_child
from vaevq_med.networks.quantizers.two_level_residual import ResidualTwoLevel


def parents(size: int = 8) -> VectorQuantizer:
    return VectorQuantizer(num_embeddings=size, embedding_dim=3, init="normal")


CASES = {
    "tree": Case(lambda: TreeQuantizer(top=parents(), cell_size=4, init="normal")),
    "tree-single": Case(lambda: TreeQuantizer(top=parents(), cell_size=1)),
    "tree-posterior": Case(
        lambda: TreeQuantizer(top=VectorQuantizerEMA(num_embeddings=8, embedding_dim=3), gate=PosteriorGate()),
        straight_through=False,
    ),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_pair_of_indices_is_a_leaf_of_one_codebook() -> None:
    quantizer = TreeQuantizer(top=parents(), cell_size=1, init="normal")
    z = drawn(2, 3, 4, 5)
    output = quantizer(z)
    leaf = 8 * output.indices[..., 0] + output.indices[..., 1]
    assert torch.equal(quantizer.leaves()[leaf].movedim(-1, 1), output.codes)
    # Brute force over the leaves of the chosen parent, and the nearest parent of all.
    flat, leaves = z.movedim(1, -1).reshape(-1, 3), quantizer.leaves().view(8, 8, 3)
    parent = torch.cdist(flat, quantizer.top.embedding).argmin(dim=1)
    child = (leaves[parent] - flat.unsqueeze(1)).norm(dim=2).argmin(dim=1)
    assert torch.equal(output.indices.reshape(-1, 2), torch.stack([parent, child], dim=1))
    assert quantizer.bits_per_position == 6


def test_with_the_same_children_everywhere_it_has_two_flat_levels() -> None:
    quantizer = TreeQuantizer(top=parents(), cell_size=4, init="normal")
    bottom = parents()
    quantizer.offsets.data.copy_(bottom.embedding.detach().expand(8, 8, 3))
    flat = ResidualTwoLevel(top=quantizer.top, bottom=bottom, cell_size=4)
    z = drawn(2, 12, 3, 3)
    found, expected = quantizer(z), flat(z)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.codes, expected.codes)
    assert all(torch.equal(found.losses[name], loss) for name, loss in expected.losses.items())


def test_children_at_their_parents_leave_the_parents() -> None:
    quantizer = TreeQuantizer(top=parents(), cell_size=4)
    quantizer.offsets.data.zero_()
    output = quantizer(drawn(2, 12, 3, 3))
    assert torch.equal(output.codes, quantizer.indices_to_codes(output.indices, num_codes=1))


def test_a_child_learns_from_its_own_parents_cells() -> None:
    quantizer = TreeQuantizer(top=parents(), cell_size=4, init="normal")
    output = quantizer(drawn(2, 12, 3, 3))
    output.losses["codebook"].backward()
    moved = quantizer.offsets.grad.abs().sum(dim=(1, 2)) > 0
    used = torch.zeros(8, dtype=torch.bool).index_fill_(0, output.indices[..., 0].flatten().unique(), True)
    assert torch.equal(moved, used)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 40), st.integers(0, 1000), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_the_search_is_that_of_all_pairs(num_parents: int, size: int, count: int, seed: int, at_once: int) -> None:
    children, latents = drawn(num_parents, size, 2, seed=seed), drawn(count, 2, seed=seed + 1)
    owners = torch.randint(0, num_parents, (count,), generator=torch.Generator().manual_seed(seed))
    expected = [
        int((children[k].double() - z.double()).norm(dim=1).argmin()) for z, k in zip(latents, owners, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tree._AT_ONCE, "cpu", at_once)
        assert nearest_child(latents, children, owners).tolist() == expected


def test_the_children_of_all_start_on_what_the_parents_leave() -> None:
    quantizer, given_rows = TreeQuantizer(top=parents(), cell_size=4), []

    def cluster(rows: Tensor, count: int) -> Tensor:
        given_rows.append(rows)
        return torch.arange(float(count)).unsqueeze(1).expand(count, rows.shape[1])

    assert quantizer.start_codebook(drawn(2, 12, 3, 3), cluster)
    assert [len(rows) for rows in given_rows] == [18, 72]
    assert torch.equal(quantizer.offsets.detach(), torch.arange(8.0).view(1, 8, 1).expand(8, 8, 3))


def test_a_closed_cell_is_its_parent() -> None:
    quantizer = TreeQuantizer(top=parents(), cell_size=4, init="normal", gate=PosteriorGate(threshold=0.0))
    z = drawn(1, 12, 1, 2)
    logvar = torch.cat([torch.ones(1, 12, 1, 1), -torch.ones(1, 12, 1, 1)], dim=3)
    output = quantizer(z, DiagonalGaussian(z, logvar))
    assert output.indices[0, 0, 0, 1:].tolist() == [8] * 4
    assert bool((output.indices[0, 0, 1] < 8).all())
    parent = quantizer.top.embedding[output.indices[0, 0, 0, 0]]
    assert torch.equal(output.codes[0, :, 0, 0], parent.repeat(4))
