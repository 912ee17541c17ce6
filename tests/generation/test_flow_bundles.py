"""Rectified flow as its overlays train it and draw from it, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.bundles import TOY, generator_overrides
from helpers.bundles import run_generator as run
from helpers.stores import encode, write_checkpoint
from torch.nn.modules.module import register_module_forward_hook

from vaevq_med.networks.generators.flow import FlowTransformer, FlowUNet


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
    drawing = {
        "checkpoint_path": str(tmp_path / "run/checkpoints/best.pt"),
        "tokenizer_path": str(tokenizer),
        "device": "cpu",
        "num_samples": 2,
        "num_steps": 3,
    }
    passes: list[int] = []
    hook = register_module_forward_hook(
        lambda module, given, found: passes.append(1) if isinstance(module, FlowTransformer | FlowUNet) else None
    )
    run("generate.json", {**drawing, "generated_dir": str(tmp_path / "drawn")})
    hook.remove()
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    told = json.loads((tmp_path / "drawn/drawing.json").read_text())
    assert told["network_calls"] == len(passes) == 3
