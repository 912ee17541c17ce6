"""The prior as a coder: its float64 steps are the network's, and its list makes rounding agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.index_stacks import random_prior, smooth_stack

from vaevq_med.codec.coders.prior import DELTA, PriorCoder, _Near, _Told
from vaevq_med.codec.coders.walks.base import walk_for
from vaevq_med.codec.coders.walks.raster import RasterSteps
from vaevq_med.codec.errors import CodecError
from vaevq_med.trained.network import StoredGenerator


def logits_of(network: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Step by step, ``[B, h w G, K]``."""
    steps, found = RasterSteps(network, labels), []  # type: ignore[arg-type]
    for place in range(tokens.shape[1]):
        found.append(steps.logits(steps.hidden()))
        steps.feed(tokens[:, place])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("codebooks", [1, 2])
def test_steps_are_the_networks_own(codebooks: int) -> None:
    network = random_prior(3, 11, (3, 4), codebooks).network
    tokens = torch.randint(11, (5, 3, 4, codebooks), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        expected = network(tokens, labels).flatten(1, -2)
    found = logits_of(network, tokens.flatten(1), labels)
    assert found.dtype == torch.float64
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-4


def test_other_batches_and_threads_stay_far_within_the_bound() -> None:
    network = random_prior(4, 50, (4, 4)).network
    tokens = torch.randint(50, (9, 16), generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(9, dtype=torch.int64)
    together = logits_of(network, tokens, labels)
    alone = torch.cat([logits_of(network, row[None], labels[:1]) for row in tokens[:3]])
    assert (together[:3] - alone).abs().max() < 1e-11
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert (together - logits_of(network, tokens, labels)).abs().max() < 1e-11
    finally:
        torch.set_num_threads(before)


def test_values_near_a_boundary_are_rounded_as_the_encoder_had_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (200, 30))
    close = rng.random(values.shape) < 0.1
    # A tenth lies within the bound of a boundary, on either side of it, and some exactly on it.
    values[close] = np.rint(values[close]) + 0.5 + rng.uniform(-0.9, 0.9, close.sum()) * DELTA
    values[0, :3] = [0.5, -0.5, 7.5]
    near = _Near()
    rounded = np.concatenate([near.note(part) for part in np.split(values, 4)])
    for shift in (-DELTA, -DELTA / 3, 0.0, DELTA / 2, DELTA):
        # What another machine might have in place of the encoder's values.
        other = values + shift * 0.99 * np.sign(rng.normal(size=values.shape))
        told, rest = _Told.read(near.tell() + b"rest")
        assert rest == b"rest"
        assert (np.concatenate([told.settle(part) for part in np.split(other, 8)]) == rounded).all()
        told.finish()
    assert len(near.entries) >= close.sum()
    if shift:
        assert (np.floor(other + 0.5) != rounded).any()


def test_a_list_that_is_too_long_is_refused() -> None:
    near = _Near()
    near.note(np.array([[0.5, 1.2]]))
    told, _ = _Told.read(near.tell())
    with pytest.raises(CodecError, match="more values"):
        told.finish()
    with pytest.raises(CodecError, match="does not end"):
        _Told.read(b"\xff\xff")


def test_streams_decode_though_every_logit_is_off_by_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = smooth_stack(3, shape=(3, 4, 5))
    coder = random_prior(0, 16)
    data = coder.encode(stack.indices, stack.layout)
    exact = RasterSteps.logits
    rng = np.random.default_rng(1)

    def off(self: RasterSteps, hidden: torch.Tensor) -> torch.Tensor:
        found = exact(self, hidden)
        return found + torch.from_numpy(rng.uniform(-1, 1, found.shape)) * 5e-10

    monkeypatch.setattr(RasterSteps, "logits", off)
    assert (coder.decode(data, stack.layout) == stack.indices).all()


def test_another_grid_or_background_is_refused() -> None:
    stack = smooth_stack(3, shape=(3, 5, 5))
    coder = random_prior(0, 16)
    with pytest.raises(CodecError, match=r"grid \[4, 5\], expected \[5, 5\]"):
        coder.encode(stack.indices, stack.layout)
    with pytest.raises(CodecError, match="background"):
        type(coder)(coder.network, background=(16,))


def loaded(name: str) -> PriorCoder:
    path = Path(__file__).parents[1] / "fixtures" / f"{name}.pt"
    return PriorCoder.load(path, {"hash": StoredGenerator(path).tokens["tokenizer"]["content_hash"]})


def test_a_generator_without_a_walk_is_refused() -> None:
    assert walk_for(loaded("autoregressive").network) is not None
    with pytest.raises(
        CodecError, match=r"diffusion.pt: found a LatentDiffusionUNet, expected a CoarseFirst or LlamaGen$"
    ):
        loaded("diffusion")


def test_an_even_network_takes_the_fixed_length() -> None:
    coder = random_prior(0, 16)
    for head in coder.network.heads:
        torch.nn.init.zeros_(head.weight)  # type: ignore[arg-type]
    stack = smooth_stack(3, shape=(30, 4, 5))
    bits = 8 * len(coder.encode(stack.indices, stack.layout)) / stack.layout.live.sum()
    assert bits == pytest.approx(4, abs=0.15)
