"""Two processes make the gradients of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.processes import gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *("train", "information_matched", "rvq", "lfq", "ibq", "wasserstein_vq", "coherent_dcr_assignments", "aligned"),
        "gate_posterior",
    ],
)
def test_two_processes_have_the_gradients_of_one(variant: str, toy_overrides: dict[str, Any], tmp_path: Path) -> None:
    shared = {
        **toy_overrides,
        "max_epochs": 1,
        "epoch_length": 1,
        "checkpoint_interval": 1000,
        "max_grad_norm": None,
        "objective#adversarial#start_step": 0,
        # Batch statistics are synchronized on GPUs only.
        "discriminator_def#norm": "group",
        "augment": None,
        "val_interval": 1000,
    }
    if variant == "lfq":
        # At the published temperature rounding alone moves the gradient.
        shared |= {"num_embeddings": 16, "network_def#quantizer#temperature": 2.0, "objective#weights#entropy": 1.0}
    if variant == "ibq":
        shared |= {"network_def#quantizer#entropy_temperature": 2.0, "objective#weights#entropy": 1.0}
    if variant == "wasserstein_vq":
        shared |= {"objective#terms#dcr#detach_features": False, "objective#weights#dcr": 1.0}
    if variant == "coherent_dcr_assignments":
        shared |= {"objective#weights#dcr": 1.0}
    if variant == "gate_posterior":  # cells that are closed, in unequal numbers
        shared |= {"network_def#quantizer#gate#threshold": 0.02, "objective#weights#commitment": 1.0}
    overlays = [] if variant == "train" else [variant]
    one = gradients(1, {**shared, "batch_size": 4, "output_dir": str(tmp_path / "one")}, overlays, tmp_path / "one.pt")
    two = gradients(
        2,
        {**shared, "batch_size": 2, "output_dir": str(tmp_path / "two")},
        [*overlays, "multi_gpu"],
        tmp_path / "two.pt",
    )
    assert one["iteration"] == two["iteration"] == 1
    for part in ("network", "discriminator"):
        assert one[part].keys() == two[part].keys()
        largest = max(float(gradient.abs().max()) for gradient in one[part].values())
        assert largest > 0
        for name, gradient in one[part].items():
            # A bias before a normalization has no gradient but rounding.
            difference = float((two[part][name] - gradient).abs().max())
            assert difference < 1e-5 * largest + 1e-3 * float(gradient.abs().max()), f"{part} {name}"
    weights = ["adaptive_weight", *(["alignment_adaptive_weight"] if variant == "aligned" else [])]
    for name in weights:
        assert two["terms"][name] == pytest.approx(one["terms"][name], rel=1e-3)
