"""The overlay ``aligned``: its term in a run, its weight at 0, and what evaluation makes of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config, trainer_of
from helpers.bundles import quick

from vaevq_med.trained.network import StoredTokenizer


def config_of(dataset: Path, output: Path, **options: Any) -> dict[str, Any]:
    return {**quick(toy_config(dataset, output)), **options}


@pytest.mark.parametrize("below", ["kl_vae", "fq"])
def test_a_latent_and_a_sub_codebook_are_aligned(below: str, slice_dataset: Path, tmp_path: Path) -> None:
    config = config_of(slice_dataset, tmp_path / "run")
    if below == "fq":
        config |= {"network_def#projector#reads": "quantized", "network_def#projector#channels": [0, 2]}
    trainer = trainer_of(config, below, "aligned")
    before = trainer.network.projector.layer.weight.detach().clone()
    trainer.run()
    terms = trainer.state.terms
    assert 0 < terms["alignment_mcos"] < 1.5
    assert 0 <= terms["alignment_mdms"] < 1
    assert terms["alignment"] == pytest.approx(terms["alignment_mcos"] + terms["alignment_mdms"], rel=1e-5)
    assert terms["alignment_adaptive_weight"] > 0
    assert not torch.equal(trainer.network.projector.layer.weight, before)
    # What is stored is read without the loss and its network; a reconstruction is what it is without the projector.
    network = StoredTokenizer(tmp_path / "run" / "checkpoints" / "last.pt").network()
    assert network.projector is not None
    images = torch.randn(2, 1, 32, 32)
    found = network(images)
    network.projector = None
    assert torch.equal(network(images), found)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A library that may choose between one and two, by how busy the machine is, rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_weight_of_zero_is_the_run_without_to_the_bit(slice_dataset: Path, tmp_path: Path) -> None:
    states = []
    for name, overlays in (("without", ("kl_vae",)), ("zero", ("kl_vae", "aligned"))):
        config = config_of(slice_dataset, tmp_path / name)
        if name == "zero":
            config["objective#weights#alignment"] = 0.0
        trainer = trainer_of(config, *overlays)
        trainer.run()
        states.append(trainer.network.state_dict())
    without, zero = states
    assert set(zero) - set(without) == {"projector.layer.weight"}
    for key, value in without.items():
        assert torch.equal(zero[key], value), key
