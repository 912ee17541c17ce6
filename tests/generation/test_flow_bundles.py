"""Rectified flow as its overlays train it and draw from it, at toy size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_config
from helpers.bundles import TOY, drawing_overrides, generator_overrides, quick, run_bundle
from helpers.bundles import run_generator as run
from helpers.stores import encode, write_checkpoint
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.transforms import LoadSliced
from vaevq_med.networks import Projector
from vaevq_med.networks.generators.flow import FlowTransformer, FlowUNet
from vaevq_med.tokens.store import TokenDataset
from vaevq_med.trained.network import StoredTokenizer


@contextmanager
def passes_of(*kinds: type[nn.Module]) -> Iterator[list[str]]:
    """The names of the networks of some kinds, one for each time that one is called."""
    passes: list[str] = []
    hook = register_module_forward_hook(
        lambda module, given, found: passes.append(type(module).__name__) if isinstance(module, kinds) else None
    )
    try:
        yield passes
    finally:
        hook.remove()


def draw(trained: Path, tokenizer: Path, output: Path) -> None:
    run("generate.json", drawing_overrides(trained, tokenizer, num_steps=3, generated_dir=str(output)))
    assert len(list(output.glob("0*.png"))) == 2


@pytest.mark.parametrize("name", ["flow", "flow_transformer"])
def test_an_overlay_trains_a_flow_that_draws(name: str, slice_dataset: Path, tmp_path: Path) -> None:
    tokenizer = write_checkpoint(tmp_path / "tokenizer.pt")
    encode(tokenizer, slice_dataset, tmp_path / "latents", kind="latents")
    sizes = {
        "flow": TOY["diffusion"],
        "flow_transformer": {"network_def#width": 16, "network_def#depth": 1, "network_def#num_heads": 2},
    }
    training = generator_overrides(tmp_path / "latents", tmp_path / "run", sizes[name])
    if name == "flow":
        training["loss_def#direction_weight"] = 0.5
    else:
        training["num_train_timesteps"] = 10
    parser = run("train_diffusion.json", training, name)
    assert parser.get_parsed_content("validate#loss").direction_weight == (0.5 if name == "flow" else 1.0)
    assert getattr(parser.get_parsed_content("network"), "num_train_timesteps", 10) == 10
    loss = parser.get_parsed_content("validate#evaluator").state.metrics["loss"]
    # Of a network that predicts nothing: the variance of the noise and of the scaled latents, and a cosine of 0.
    assert 0.5 < loss < (4.0 if name == "flow" else 4.5)
    with passes_of(FlowTransformer, FlowUNet) as passes:
        draw(tmp_path / "run", tokenizer, tmp_path / "drawn")
    told = json.loads((tmp_path / "drawn/drawing.json").read_text())
    assert told["network_calls"] == len(passes) == 3


def test_an_aligned_kl_vae_is_the_tokenizer_of_a_flow(slice_dataset: Path, tmp_path: Path) -> None:
    """What the flow learns and draws is the latent itself; the projector is read by the tokenizer's training alone."""
    aligned, latents = tmp_path / "aligned", tmp_path / "latents"
    with passes_of(Projector) as passes:
        run_bundle("train.json", quick(toy_config(slice_dataset, aligned)), "kl_vae", "aligned", run_id="training")
    assert passes
    tokenizer = aligned / "checkpoints/last.pt"
    network = StoredTokenizer(tokenizer).network()
    assert network.projector is not None
    with passes_of(Projector) as passes:
        encode(tokenizer, slice_dataset, latents, kind="latents")
        training = generator_overrides(latents, tmp_path / "run", TOY["diffusion"])
        parser = run("train_diffusion.json", training, "flow")
        draw(tmp_path / "run", tokenizer, tmp_path / "drawn")
    assert passes == []
    items = SliceDataset(dataset_dir=slice_dataset, split="test", transform=LoadSliced(image_size=32))
    with torch.inference_mode():
        means = network.encode(torch.stack([items[number]["image"] for number in range(len(items))])).mean
    stored = TokenDataset(tokens_dir=latents, split="test", kind="latents").store.array("test")[:, 0]
    assert stored.shape[1:] == (4, 16, 16)
    np.testing.assert_allclose(stored, means, rtol=1e-3, atol=1e-3)  # the store has fp16
    # Of a network that predicts nothing: the variance of the noise and of the scaled latents.
    assert 0.5 < parser.get_parsed_content("validate#evaluator").state.metrics["loss"] < 4.0
