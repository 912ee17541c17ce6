"""VLQ over every quantizer: what the overlays' page says works trains, and the rest is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLE, OVERLAYS, toy_config
from helpers.bundles import quick, train_and_evaluate
from monai.bundle import ConfigParser

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.dcr import DCRLoss
from vaevq_med.networks.outputs import LossOutput, TokenizerOutput
from vaevq_med.networks.quantizers import VectorQuantizer, VectorQuantizerEMA
from vaevq_med.networks.tokenizer import TrainingForward

# What toy sizes need beside what is the same for all.
SIZES: dict[str, dict[str, Any]] = {
    "fvq": {"num_embeddings": 64, "network_def#quantizer#width": 16},
    "mgvq": {"embedding_dim": 8},
    "vqgan_lc": {"num_features": 6, "features": None},
}


def readme_table() -> dict[str, str]:
    """What the table says of each overlay: ``yes``, ``no`` or an override."""
    section = (OVERLAYS / "README.md").read_text().split("## VLQ over another quantizer")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    return {name: verdict.strip("`") for names, verdict, _ in rows for name in re.findall(r"`(\w+)`", names)}


TABLE = {name: verdict for name, verdict in readme_table().items() if (OVERLAYS / f"{name}.json").exists()}
WORKING = [name for name, verdict in TABLE.items() if verdict != "no"]


def step(name: str, overrides: dict[str, Any]) -> tuple[torch.nn.Module, TokenizerOutput, LossOutput]:
    """The loss of one training step of an overlay with VLQ, and its backward pass."""
    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "train.json"), *(str(OVERLAYS / f"{n}.json") for n in (name, "vlq"))])
    toy = quick(toy_config(Path("unread"), Path("unwritten")))
    overlay = json.loads((OVERLAYS / f"{name}.json").read_text())
    if "embedding_dim" in overlay:  # a method whose sizes depend on each other
        toy = {key: value for key, value in toy.items() if key not in overlay}
    parser.update(pairs=toy | SIZES.get(name, {}) | overrides)
    network = parser.get_parsed_content("network_def")
    objective = parser.get_parsed_content("objective")
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    output = TrainingForward(network)(images)
    loss = objective.generator(images, output, last_layer=network.last_layer)
    loss.total.backward()
    return network, output, loss


def override(verdict: str) -> dict[str, Any]:
    match = re.fullmatch(r"--(\S+) (\S+)", verdict)
    return {match[1]: {"False": False, "0": 0.0}[match[2]]} if match else {}


@pytest.mark.parametrize("name", WORKING)
def test_a_quantizer_that_the_table_lets_through_trains(name: str) -> None:
    network, output, loss = step(name, override(TABLE[name]))
    expected = {"reconstruction", "kl", "rcs"} | (
        set() if TABLE[name].startswith("--objective#weights#dcr") else {"dcr"}
    )
    assert expected <= set(loss.terms)
    assert not {"codebook", "commitment"} & set(loss.terms)
    assert output.posterior is not None
    assert output.reconstruction_continuous is not None
    assert all(bool(value.isfinite()) for value in loss.terms.values())
    gradients = {key: p.grad for key, p in network.named_parameters() if p.requires_grad}
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    # The codebook learns from the RCS, where it learns by gradient at all.
    codebooks = [gradient for key, gradient in gradients.items() if key.startswith("quantizer.")]
    assert any(bool(gradient.any()) for gradient in codebooks) or not codebooks


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if "dcr" in verdict or verdict == "no"])
def test_a_quantizer_that_does_not_fit_is_refused_in_a_line_that_names_the_term(name: str) -> None:
    with pytest.raises(VaevqMedError, match=r"DCRLoss needs .*\bdcr\b") as refused:
        step(name, {})
    assert "\n" not in str(refused.value)


def test_unit_codewords_keep_the_floor_that_the_table_states() -> None:
    # A group's codewords have total variance K / (K - 1) (1 - |mean|^2), and DCR is least where it is spread evenly.
    _, output, loss = step("fq", {})
    assert output.quantizer.codebook is not None
    groups, codewords, channels = output.quantizer.codebook.shape
    assert loss.terms["dcr"].item() > groups * (channels**0.5 - (codewords / (codewords - 1)) ** 0.5) ** 2
    assert step("fq", {"network_def#quantizer#normalize": False})[2].terms["dcr"].isfinite()


def test_dcr_wants_a_codebook_that_it_can_move() -> None:
    z = torch.randn(1, 4, 2, 2)
    fixed, free = (kind(num_embeddings=8, embedding_dim=4)(z) for kind in (VectorQuantizerEMA, VectorQuantizer))
    term, image = DCRLoss(), torch.zeros(1, 1, 4, 4)
    assert bool(term(image, TokenizerOutput(image, None, z, None, free)).isfinite())
    output = TokenizerOutput(image, None, z, None, fixed)
    with pytest.raises(VaevqMedError, match="Set objective#weights#dcr to 0"):
        term(image, output)
    with torch.no_grad():
        assert bool(term(image, output).isfinite())


def test_the_overlays_compose_through_the_bundle(toy_overrides: dict[str, Any]) -> None:
    overrides = {**quick(toy_overrides), "network_def#quantizer#normalize": False}
    trainer, _ = train_and_evaluate(overrides, "fq", "vlq")
    assert {"kl", "rcs", "dcr", "disentanglement"} < set(trainer.state.terms)
    assert trainer.network.variational
