"""Every configuration on a pretended GPU: whole steps of training and evaluation on fake CUDA tensors.

What these find is a tensor left on the CPU, a number read or a shape that depends on the values between two looks at
the terms, and a type that a GPU's autocast makes where the CPU's does not. Numbers there are none.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BUNDLE, OVERLAYS
from helpers.generator_overlays import generator_kind
from monai.bundle import ConfigParser

from vaevq_med.core.resources import overlay_files

BUNDLES = (BUNDLE, BUNDLE.parent / "imagenet")
FOLDER = BUNDLE.parents[1] / "benchmarks" / "gpu"
# Both bundles have the shared overlays, so that each is walked in both precisions, in one bundle each.
PRECISION = {"brats": "bf16", "imagenet": "fp32"}
BASIC = {"precision", "micro_batch_size", "batch_size", "max_epochs", "image_size"}
MOST_GIB_AN_IMAGE = 1.5
SIZE, BATCH, DEPTH = 32, 2, 8
SMALL = {"num_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [16]}
SMALL_TRANSFORMER = {"width": 32, "depth": 2, "num_heads": 2, "num_slots": 8}
SMALL_GENERATOR = {
    "autoregressive": {"width": 32, "depth": 2, "num_heads": 2},
    "diffusion": {"num_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "cross_attention_dim": 32},
}
STORE = {"num_embeddings": 64, "num_codebooks": 2, "grid_size": [8, 8], "num_classes": 4, "in_channels": 4}


@pytest.fixture(scope="module")
def fake() -> Iterator[ModuleType]:
    """The module that pretends."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("_fake_cuda")
    finally:
        sys.path.remove(str(FOLDER))


def cases(kind: str) -> list[Any]:
    """Each bundle with each overlay, and with none."""

    def marks(bundle: Path, path: Path | None) -> list[pytest.MarkDecorator]:
        return [pytest.mark.slow] if path is not None and bundle != BUNDLE and OVERLAYS in path.parents else []

    return [
        pytest.param(bundle, path, marks=marks(bundle, path), id=f"{bundle.name}-{path.stem if path else 'default'}")
        for bundle in BUNDLES
        for path in (None, *overlay_files(bundle, kind).values())
    ]


def read(bundle: Path, file: str, overlay: Path | None, small: dict[str, Any]) -> ConfigParser:
    """The configuration on no data, small but for what the overlay itself sets."""
    # Of the shared overlays this one alone is said to follow another.
    first = [OVERLAYS / "simvq.json"] if overlay is not None and overlay.stem == "vlq" else []
    files = [bundle / file, *first, *([overlay] if overlay else [])]
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    chosen = json.loads(overlay.read_text()) if overlay else {}
    items = [None] * 8
    overrides = {
        "device": torch.device("cuda", 0),
        "precision": PRECISION[bundle.name],
        "batch_size": BATCH,
        "max_epochs": 1,
        "micro_batch_size": BATCH,
        "epoch_length": len(items),
        "train#dataloader": items,
        "train#handlers": [],
        "validate#dataloader": items,
        "validate#handlers": [],
        **small,
    }
    parser.update({key: value for key, value in overrides.items() if key not in chosen or key in BASIC})
    return parser


def _sizes(whole: dict[str, Any] | None) -> dict[str, Any]:
    """Of a half of the backbone; of one that an overlay brings whole, those that it has."""
    return SMALL if whole is None else {key: value for key, value in SMALL_TRANSFORMER.items() if key in whole}


def tokenizer_config(bundle: Path, overlay: Path | None) -> ConfigParser:
    chosen = json.loads(overlay.read_text()) if overlay else {}
    small = {
        f"network_def#{part}#{key}": value
        for part in ("encoder", "decoder")
        for key, value in _sizes(chosen.get(f"network_def#{part}")).items()
    }
    parser = read(bundle, "train.json", overlay, {"image_size": SIZE, **small})
    # Files that a new run would read.
    if parser.get("features") is not None:
        parser["features"] = None
    return parser


def tensors_of(values: Any) -> list[torch.Tensor]:
    """The terms that nobody has read, as they are on the device."""
    return [value for value in values._values.values() if isinstance(value, torch.Tensor)]


LENGTHS = {"coarse_first": ["networks/generators/coarse_first.py"]}
"""Files that overlays may wait in once a step: for the length of a sequence that depends on the images."""


def walk(
    mode: Any, trainer: Any, batch: dict[str, torch.Tensor], first: int, lengths: Sequence[str] = ()
) -> dict[str, Any]:
    """An iteration, which must not wait; the number is that of one at which the terms are not read."""
    before = [parameter for parameter in trainer.network.parameters() if parameter.requires_grad]
    trainer.state.iteration = first
    mode.waits.clear()
    output = trainer._iteration(trainer, batch)
    assert {parameter.device.type for parameter in before} == {"cuda"}
    assert all(parameter.grad is None or parameter.grad.device.type == "cuda" for parameter in before)
    assert sum(parameter.grad is not None for parameter in before) > len(before) / 2
    assert [(place.split(":")[0], count) for place, count in mode.waits.items()] == [(file, 1) for file in lengths]
    return output


@pytest.mark.parametrize(("bundle", "overlay"), cases(""))
def test_a_tokenizer_is_trained_and_evaluated(fake: ModuleType, bundle: Path, overlay: Path | None) -> None:
    """A whole step with the GAN on and its update, and a batch of evaluation, by every overlay."""
    if overlay is not None and overlay.stem == "multi_gpu":
        pytest.skip("DistributedDataParallel's reducer is C++ that reads the memory of parameters, which fakes lack")
    with fake.fake_cuda() as mode:
        parser = tokenizer_config(bundle, overlay)
        trainer = parser.get_parsed_content("train#trainer")
        channels = parser.get_parsed_content("in_channels")
        size = (SIZE, SIZE) if parser.get("depth") is None else (DEPTH, SIZE, SIZE)
        images = torch.zeros(BATCH, channels, *size)
        adversarial = trainer.objective.adversarial
        start = 1 if adversarial is None else adversarial.start_step + 1
        batch = {"image": images}
        output = walk(mode, trainer, batch, start)
        assert output["pred"].device.type == "cuda"
        assert output["pred"].shape == images.shape
        terms = tensors_of(trainer.state.terms)
        assert len(terms) >= len(trainer.objective.terms)
        assert {term.device.type for term in terms} == {"cuda"}
        assert trainer.is_adversarial == ("discriminator_loss" in trainer.state.terms) == (adversarial is not None)
        evaluator = parser.get_parsed_content("validate#evaluator")
        evaluator.generator = None
        mode.waits.clear()
        output = evaluator._iteration(evaluator, batch)
        assert dict(mode.waits) == {}
        assert {value.device.type for value in output.values()} == {"cuda"}
        assert output["pred"].dtype is torch.float32
        assert ("indices" in output) == (trainer.network.quantizer.bits_per_position is not None)
        assert output.get("indices", torch.zeros(1, dtype=torch.int64)).dtype is torch.int64


@pytest.mark.parametrize("kind", sorted(SMALL_GENERATOR))
@pytest.mark.parametrize(("bundle", "overlay"), cases("generation"))
def test_a_generator_is_trained(fake: ModuleType, bundle: Path, overlay: Path | None, kind: str) -> None:
    if overlay is not None and overlay.stem == "generator_multi_gpu":
        pytest.skip("DistributedDataParallel's reducer is C++ that reads the memory of parameters, which fakes lack")
    of_network = generator_kind(overlay) if overlay is not None else None
    if of_network != kind if of_network else overlay is not None and kind not in overlay.stem:
        pytest.skip("an overlay of the other generator")
    whole = overlay is not None and "network_def" in json.loads(overlay.read_text())  # with sizes of its own
    small = {} if whole else {f"network_def#{key}": value for key, value in SMALL_GENERATOR[kind].items()}
    # The widths of the overlays are what they are for; fakes take no memory.
    with fake.fake_cuda() as mode:
        parser = read(bundle, f"train_{kind}.json", overlay, {**small, **STORE})
        parser["network"] = "$@network_def.to(@device)"
        parser["grid_size"] = STORE["grid_size"]  # an overlay reads it from a store
        if parser.get("clusters") is not None:  # a file that a new run would read
            parser["clusters"], parser["num_clusters"] = None, 16
        trainer = parser.get_parsed_content("train#trainer")
        labels = torch.zeros(BATCH, dtype=torch.int64)
        if kind == "autoregressive":
            layers = [2] if trainer.loss.key == "layers" else []  # the one below, and the one that is predicted
            values = torch.zeros(BATCH, *layers, *STORE["grid_size"], STORE["num_codebooks"], dtype=torch.int64)
        else:
            values = torch.zeros(BATCH, STORE["in_channels"], *STORE["grid_size"])
        batch = {trainer.loss.key: values, "label": labels}
        # The first step brings the schedule's tables and the latents' scale to their places.
        trainer.state.iteration = 1
        trainer._iteration(trainer, batch)
        output = walk(mode, trainer, batch, 2, LENGTHS.get(overlay.stem, ()) if overlay is not None else ())
        assert output["loss"].device.type == "cuda"
        assert {term.device.type for term in tensors_of(trainer.state.terms)} == {"cuda"}


def test_the_default_step_fits_a_card_of_24_gb(fake: ModuleType) -> None:
    """Memory of the default training at its true size, GAN and perceptual loss on, in bf16."""
    table = importlib.import_module("memory_table")
    gib = 2**30
    with fake.fake_cuda(card=25 * gib, count_memory=True) as mode:
        trainer = table.default_trainer(256)
        assert trainer.micro_batch_size == "auto"
        # Chooses the micro-batch; one part of a batch then has the peak of a whole one.
        trainer._plan(lambda count: trainer._probe(torch.zeros(count, 1, 256, 256, device="cuda:0")), 32)
        chosen = trainer.micro_batch_size
        peaks = {}
        for count in sorted({8, 16, chosen}):
            trainer.micro_batch_size = count
            peaks[count] = table.peak(mode, trainer, 256, count) / gib
        print(f"chosen: {chosen}; counted peaks in GiB: {peaks}")
        assert chosen >= 8
        assert 4 < peaks[chosen] < 20
        # What the choice goes by: twice as much an image halves the micro-batch, and the peak stays.
        assert (peaks[16] - peaks[8]) / 8 < MOST_GIB_AN_IMAGE
