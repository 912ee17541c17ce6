"""Overlays of DCR's forms and of the empirical prior, through the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundles import quick, run_bundle

from vaevq_med.losses import gaussian_wasserstein2_to_standard


@pytest.mark.parametrize(
    "overlays",
    [
        ("wasserstein_vq",),
        ("coherent_dcr_step",),
        ("coherent_dcr_assignments",),
        ("ard",),
        ("kl_budget", "ard"),
        ("coherent", "ard"),
    ],
    ids="+".join,
)
def test_the_overlay_trains(overlays: tuple[str, ...], toy_overrides: dict[str, Any]) -> None:
    overrides = quick(toy_overrides)
    trainer = run_bundle("train.json", overrides, *overlays, run_id="training").get_parsed_content("train#trainer")
    terms = trainer.state.terms
    assert all(value == value for value in terms.values())
    assert ("dcr" in terms) == (overlays[0] in ("wasserstein_vq", "coherent_dcr_assignments", "kl_budget"))
    checkpoint = torch.load(Path(overrides["output_dir"], "checkpoints/last.pt"), weights_only=True)
    if "ard" in overlays:
        stored = checkpoint["objective"]["kl"]
        assert stored.shape == (1 + trainer.network.embedding_dim,)
        assert (stored[0].item() == 1.0) == ("kl_budget" not in overlays)
        assert bool((stored[1:] != 1).all())
    if overlays == ("coherent_dcr_assignments",):
        # What is logged is Eq. 11, of a codebook that has moved by one batch since.
        codebook = checkpoint["network"]["quantizer.embedding"]
        assert terms["dcr"] == pytest.approx(gaussian_wasserstein2_to_standard(codebook).item(), rel=0.2)
