"""Inpainting that puts the pixels of the images back, outside of the box and nowhere else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE
from helpers.stores import encode, write_checkpoint
from PIL import Image
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.generation.originals import Originals
from vaevq_med.generation.plan import SamplePlan
from vaevq_med.generation.sampling import ImageSampler
from vaevq_med.generation.writer import SampleWriter
from vaevq_med.tokens.store import TokenDataset

BOX = [8, 7, 17, 12]


class Gray(nn.Module):
    """Draws gray images, of which no pixel is an image's."""

    inpaints, num_classes = True, 0

    def draws(self, tokenizer: Any, **given: Any) -> Any:
        return lambda wanted: torch.full((len(wanted.seeds), 1, 32, 32), 0.123)

    def network_calls(self, **given: Any) -> int:
        return 1


@pytest.fixture(scope="module")
def tokens(slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    root = tmp_path_factory.mktemp("tokens")
    encode(write_checkpoint(root / "best.pt"), slice_dataset, root / "store", split="test")
    return TokenDataset(tokens_dir=root / "store", split="test")


def stored(tokens: TokenDataset) -> Any:
    """What a plan asks of a generator's checkpoint."""
    return SimpleNamespace(tokens=tokens.store.content, label_names=tokens.store.label_names, value=lambda key: None)


def plan(tokens: TokenDataset, **further: Any) -> SamplePlan:
    inpaint = {"inpaint_tokens": tokens.store.root, "inpaint_box": BOX, **further}
    return SamplePlan(stored=stored(tokens), num_samples=len(tokens) + 1, **inpaint)


def test_pixels_outside_of_the_box_are_those_of_the_images(
    tokens: TokenDataset, slice_dataset: Path, tmp_path: Path
) -> None:
    """To the bit of the files that are written; after the last image comes the first again."""
    chosen = plan(tokens, inpaint_images=slice_dataset)
    writer = SampleWriter(output_dir=tmp_path, plan=chosen, settings={}, provenance={}, write=("png", "npz"))
    ImageSampler(
        device="cpu",
        val_data_loader=writer.loader(3),
        network=Gray(),  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        stored=chosen.stored,
        settings={},
        precision="fp32",
        val_handlers=[writer],
    ).run()
    top, left, bottom, right = BOX
    outside = np.ones((32, 32), dtype=bool)
    outside[top:bottom, left:right] = False
    with (tmp_path / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [item["id"] for item in [*tokens.items, tokens.items[0]]]
    for row in rows:
        image = np.asarray(Image.open(slice_dataset / row["source"]))
        assert (image.shape, image.dtype) == ((32, 32), np.uint8)
        found = np.asarray(Image.open(tmp_path / row["file"]))
        np.testing.assert_array_equal(found[outside], image[outside])
        assert (found[~outside] == round(1.123 * 127.5)).all()
        with np.load(tmp_path / row["file"].replace("png", "npz")) as arrays:
            np.testing.assert_allclose(arrays["image"][0][outside], image[outside] / 127.5 - 1, atol=1e-6)
    content_hash = json.loads((slice_dataset / "dataset.json").read_text())["content_hash"]
    assert chosen.describe()["inpaint_images"] == content_hash


def test_without_the_images_nothing_changes(tokens: TokenDataset) -> None:
    without = plan(tokens)
    assert "inpaint_images" not in without.describe()
    assert {"original", "keeps"}.isdisjoint(without[0])


def test_another_data_set_is_refused(tokens: TokenDataset, slice_dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((slice_dataset / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**content, "content_hash": "sha256:of-another"}))
    with pytest.raises(
        VaevqMedError, match=r"inpaint_images: found the data set .*other \(sha256:of-another\), expected"
    ):
        plan(tokens, inpaint_images=other)
    lacking = {**content, "test": content["test"][1:]}
    (other / "dataset.json").write_text(json.dumps(lacking))
    with pytest.raises(VaevqMedError, match=f"inpaint_images: found no {content['test'][0]['image']} in "):
        plan(tokens, inpaint_images=other)
    with pytest.raises(VaevqMedError, match=r"inpaint_images: found '.*' without inpaint_tokens, expected"):
        SamplePlan(stored=stored(tokens), num_samples=1, inpaint_images=slice_dataset)


def test_stacked_contrasts_come_in_the_order_of_their_channels(slice_dataset: Path, tmp_path: Path) -> None:
    order = ["t2w", "t1n", "t2f", "t1c"]
    path = write_checkpoint(tmp_path / "four.pt", in_channels=4, stack_modalities=True, modalities=order)
    encode(path, slice_dataset, tmp_path / "tokens", split="test")
    four = TokenDataset(tokens_dir=tmp_path / "tokens", split="test")
    originals = Originals(slice_dataset, four, image_size=32, in_channels=4)
    for number, item in enumerate(four.items):
        files = [slice_dataset / item["id"].replace("t2w", name) for name in order]
        levels = np.stack([np.asarray(Image.open(file)) for file in files])
        np.testing.assert_allclose(originals[number].numpy(), levels / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("name", ["brats", "imagenet"])
def test_the_bundles_pass_the_folder_on(name: str) -> None:
    content = json.loads((BUNDLE.parent / name / "generate.json").read_text())
    assert content["inpaint_images"] is None
    assert content["dataset"]["inpaint_images"] == "@inpaint_images"
