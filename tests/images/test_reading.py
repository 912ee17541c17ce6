"""One reading: what a data set records, what every stage makes of it, and what a checkpoint remembers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, FIXTURES, toy_config
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow
from monai.transforms import CenterSpatialCropd, Compose, RandFlipd, RandSpatialCropd
from PIL import Image
from torch import Tensor

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.evaluation.features import ImageReader, RealImages
from vaevq_med.evaluation.handler import EvaluationHandler
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import Manifest, load_manifest
from vaevq_med.images.reading import Reading, reader
from vaevq_med.images.transforms import LoadPhotograph, LoadSliced, RandResizedCropd, ResizeShortSided
from vaevq_med.metrics.reference import ReferenceCache
from vaevq_med.networks.features import FeatureNetwork, feature_network
from vaevq_med.prepare.codebook import FeatureCodebook
from vaevq_med.tokens import encode as encode_module
from vaevq_med.tokens.encode import EncodeTokens
from vaevq_med.trained.file import CheckpointError, read_checkpoint
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.trained.pack import BundlePack

IMAGENET = BUNDLE.parent / "imagenet"
SIZE = 32


def write_images(root: Path, *, slices: bool, reading: bool = True, side: tuple[int, int] = (60, 40)) -> Path:
    """Three oblong images a split; a resize to a square and a central crop of them differ."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
    (root / "images").mkdir(parents=True)
    for split, entries in splits.items():
        for number in range(3):
            small = rng.integers(0, 256, (5, 6) if slices else (5, 6, 3), dtype=np.uint8)
            name = f"images/{split}{number}.png"
            Image.fromarray(small).resize(side, Image.Resampling.BICUBIC).save(root / name)
            entry: dict[str, Any] = {"image": name, "label": 0}
            entries.append({**entry, "modality": "t1n", "patient": split, "case": split} if slices else entry)
    told = {"version": 1, "shape": "square" if slices else "center_crop", "channels": 1 if slices else 3}
    head = {
        "name": "oblong",
        **({"modality": {"0": "t1n"}} if slices else {"labels": {"0": "cat"}}),
        "channels_per_image": 1 if slices else 3,
        "content_hash": f"sha256:{root.name}",
        "split_hash": f"sha256:{root.name}",
        **({"reading": told} if reading else {}),
    }
    (root / "dataset.json").write_text(json.dumps({**head, **splits}))
    return root


def manifest_of(**head: Any) -> Manifest:
    return Manifest(Path("data/dataset.json"), head)


def workflow(bundle: Path, file: str, overrides: dict[str, Any], *overlays: str | Path) -> ConfigWorkflow:
    kind = "train" if file == "train.json" else "infer"
    files = [str(bundle / file), *map(str, overlays)]
    work = ConfigWorkflow(config_file=files, workflow_type=kind, **overrides)
    work.initialize()
    return work


def train(bundle: Path, overrides: dict[str, Any], *overlays: str | Path) -> Path:
    """One epoch; its checkpoint."""
    work = workflow(bundle, "train.json", overrides, *overlays)
    work.run()
    work.finalize()
    return Path(overrides["output_dir"]) / "checkpoints" / "last.pt"


def evaluation(checkpoint: Path, dataset: Path, output: Path, **more: Any) -> dict[str, Any]:
    shared = {"device": "cpu", "num_workers": 0, "batch_size": 3, "output_dir": str(output)}
    return {**shared, "checkpoint_path": str(checkpoint), "dataset_dir": str(dataset), **more}


# --- what a data set says -----------------------------------------------------------------------------


def test_a_data_set_says_how_it_is_read_and_an_older_one_is_told_by_its_contrasts() -> None:
    told = {"shape": "center_crop", "channels": 1}
    assert Reading.of(manifest_of(reading=told, modality={"0": "t1n"})) == Reading(shape="center_crop", channels=1)
    assert Reading.of(manifest_of(modality={"0": "t1n"}, channels_per_image=1)) == Reading(shape="square", channels=1)
    assert Reading.of(manifest_of(channels_per_image=3)) == Reading(shape="center_crop", channels=3)
    assert Reading.of(manifest_of()) == Reading(shape="center_crop", channels=3)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"shape": "round", "channels": 1}, r'reading: shape is "round"; expected one of square, center_crop'),
        ({"shape": "square"}, "reading: channels is missing; expected one of 1, 3"),
        ({"shape": "square", "channels": 2}, "reading: channels is 2; expected one of 1, 3"),
        ({"shape": "square", "channels": 1, "version": 2}, "reading: version is 2; expected one of 1"),
        ({"shape": "square", "channels": 1, "flip": True}, "reading: flip is unknown"),
        ("square", 'reading: it is "square"; expected an object'),
    ],
)
def test_a_reading_that_nobody_knows_is_one_line(told: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as stopped:
        Reading.of(manifest_of(reading=told))
    assert str(stopped.value).startswith("data/dataset.json: ")


# --- one definition -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(8, 50),
    width=st.integers(8, 50),
    size=st.integers(4, 40),
    scale=st.sampled_from([1.0, 1.05, 1.1]),
    shape=st.sampled_from(["square", "center_crop"]),
    channels=st.sampled_from([1, 3]),
    augment=st.sampled_from([None, "flip", "random_resized_crop"]),
)
def test_whatever_is_read_is_a_square_in_range(
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
    size: int,
    scale: float,
    shape: str,
    channels: int,
    augment: str | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    told = manifest_of(reading={"shape": shape, "channels": channels})
    chain = reader(told, image_size=size, in_channels=channels, scale=scale, augment=augment)
    image = chain({"image": str(path)})["image"]
    assert type(image) is Tensor
    assert image.shape == (channels, int(size * scale), int(size * scale))
    assert -1 <= image.min() <= image.max() <= 1


def test_the_reading_is_what_the_bundles_named_before(tmp_path: Path) -> None:
    """Its draws too, so that a seed gives the same images as in earlier days."""
    slices, photographs = (write_images(tmp_path / str(kind), slices=kind) for kind in (True, False))
    flip = RandFlipd(keys="image", prob=0.5, spatial_axis=1)
    size = {"keys": "image", "roi_size": [SIZE, SIZE]}
    short = [LoadPhotograph(in_channels=3), ResizeShortSided("image", size=SIZE)]
    cases: list[tuple[Path, int, str | None, list[Any]]] = [
        (slices, 1, None, [LoadSliced(image_size=SIZE)]),
        (slices, 1, "flip", [LoadSliced(image_size=SIZE), flip]),
        (photographs, 3, None, [*short, CenterSpatialCropd(**size)]),
        (photographs, 3, "flip", [*short, RandSpatialCropd(**size, random_size=False), flip]),
        (
            photographs,
            3,
            "random_resized_crop",
            [
                LoadPhotograph(in_channels=3),
                RandResizedCropd("image", size=SIZE, scale=(0.5, 1.0), ratio=(0.75, 4 / 3)),
                flip,
            ],
        ),
    ]
    for folder, channels, augment, transforms in cases:
        now = reader(folder, image_size=SIZE, in_channels=channels, augment=augment)
        old, new = (
            SliceDataset(dataset_dir=folder, split="training", transform=chain, seed=5)
            for chain in (Compose(transforms), now)
        )
        for index in range(12):
            assert torch.equal(torch.as_tensor(old[index]["image"]), new[index]["image"]), (augment, index)


def test_an_unknown_augmentation_is_one_line(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", slices=True)
    with pytest.raises(DataError, match='augment: found "mirror", expected flip, random_resized_crop or null'):
        reader(folder, image_size=SIZE, in_channels=1, augment="mirror")
    with pytest.raises(DataError, match='augment: found "flip", expected null where'):
        reader(folder, image_size=SIZE, in_channels=1, augment="flip", regions=True)
    for word in ("null", "None"):  # as MONAI's command line hands it on
        assert len(reader(folder, image_size=SIZE, in_channels=1, augment=word).transforms) == len(
            reader(folder, image_size=SIZE, in_channels=1).transforms
        )


def test_contrasts_to_stack_in_photographs_are_one_line(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", slices=True, reading=False)
    content = json.loads((folder / "dataset.json").read_text())
    del content["modality"]
    (folder / "dataset.json").write_text(json.dumps(content))
    chain = reader(folder, image_size=SIZE, in_channels=1)
    stacked = SliceDataset(dataset_dir=folder, split="test", stack_modalities=True, transform=chain)
    stacked.data[0]["image"] = [stacked.data[0]["image"]] * 2
    with pytest.raises(DataError, match=r'stack_modalities: .*says "reading": {"shape": "square"'):
        _ = stacked[0]


# --- every stage reads one image alike ----------------------------------------------------------------


def of_training(folder: Path, checkpoint: Path, output: Path, bundle: Path) -> Tensor:
    overrides = {**toy_config(folder, output), "resume": False, "augment": None}
    parser = workflow(bundle, "train.json", overrides).parser
    first, second = (parser.get_parsed_content(f"{part}#dataset") for part in ("train", "validate"))
    second.data = first.data
    assert torch.equal(first[0]["image"], second[0]["image"])
    return first[0]["image"]


def of_bundle(file: str) -> Callable[..., Tensor]:
    def read(folder: Path, checkpoint: Path, output: Path, bundle: Path) -> Tensor:
        overrides = evaluation(checkpoint, folder, output, split="training")
        return workflow(bundle, file, overrides).parser.get_parsed_content("dataset")[0]["image"]

    return read


def of_tokens(folder: Path, checkpoint: Path, output: Path, bundle: Path) -> Tensor:
    seen: list[Tensor] = []
    encode = encode_module.encode_views

    def watched(network: Any, images: Tensor, *rest: Any) -> Any:
        seen.append(images)
        return encode(network, images, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "encode_views", watched)
        EncodeTokens(checkpoint, folder, output, split=["training"], workers=0, device="cpu").run()
    return seen[0][0, 0]


def of_samples(folder: Path, checkpoint: Path, output: Path, bundle: Path) -> Tensor:
    network = feature_network("efficientnet-lite0")
    real = RealImages(
        manifest=load_manifest(folder),
        reader=ImageReader(network, torch.device("cpu"), 3, 0, lambda count: None),
        cache=ReferenceCache(output),
        image_size=SIZE,
    )
    return real.images("training")[0]["image"]


def of_codebook(folder: Path, checkpoint: Path, output: Path, bundle: Path) -> Tensor:
    """All images, in an order of its own."""
    seen: list[Tensor] = []
    deepest = FeatureNetwork.deepest

    def watched(self: FeatureNetwork, images: Tensor) -> Tensor:
        seen.append(images)
        return deepest(self, images)

    options = {"num_embeddings": 3, "grid": 1, "image_size": SIZE, "workers": 0, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureNetwork, "deepest", watched)
        FeatureCodebook(folder, output.with_suffix(".npz"), **options).run()
    return torch.cat(seen)


@pytest.mark.parametrize("slices", [True, False], ids=["slices", "photographs"])
def test_every_stage_reads_one_image_alike(slices: bool, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", slices=slices)
    bundle = BUNDLE if slices else IMAGENET
    small = {"max_epochs": 1, "batch_size": 3, "val_interval": 9}
    checkpoint = train(bundle, {**toy_config(folder, tmp_path / "run"), **small})
    stages = {
        "training": of_training,
        "evaluate.json": of_bundle("evaluate.json"),
        "inference.json": of_bundle("inference.json"),
        "encode-tokens": of_tokens,
        "evaluate-samples": of_samples,
    }
    images = {name: stage(folder, checkpoint, tmp_path / name, bundle) for name, stage in stages.items()}
    expected = images["training"]
    assert {name for name, image in images.items() if not torch.equal(image, expected)} == set()
    codebook = of_codebook(folder, checkpoint, tmp_path / "codebook", bundle)[:, : len(expected)]
    assert any(torch.equal(image, expected) for image in codebook)
    # And it is what the data set says, which Pillow computes up to rounding.
    with Image.open(folder / "images/training0.png") as stored:
        square = stored.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if not slices:
            square = stored.resize((48, SIZE), Image.Resampling.BICUBIC).crop((8, 0, 40, SIZE))
    by_hand = torch.from_numpy(np.asarray(square, np.float32) / 127.5 - 1).reshape(SIZE, SIZE, -1).permute(2, 0, 1)
    torch.testing.assert_close(expected, by_hand, atol=2 / 127.5, rtol=0)


# --- a checkpoint remembers ---------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_reading_and_another_shape_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slices = write_images(tmp_path / "slices", slices=True)
    plain = {**toy_config(slices, tmp_path / "run"), "max_epochs": 1, "batch_size": 3, "val_interval": 9}
    checkpoint = train(BUNDLE, plain)
    assert read_checkpoint(checkpoint)["data"]["reading"] == {
        **{"shape": "square", "image_size": SIZE, "in_channels": 1},
        **{"modalities": None, "stack_modalities": False},
    }
    other = write_images(tmp_path / "other", slices=True)
    content = json.loads((other / "dataset.json").read_text())
    content["reading"]["shape"] = "center_crop"
    (other / "dataset.json").write_text(json.dumps(content))
    said = f"found images that are read as center_crop, expected square, as {checkpoint} was trained on"
    with pytest.raises(VaevqMedError, match="--any-shape takes them") as stopped:
        EncodeTokens(checkpoint, other, tmp_path / "tokens", workers=0, device="cpu").run()
    assert said in str(stopped.value)
    assert "\n" not in str(stopped.value)
    EncodeTokens(checkpoint, other, tmp_path / "tokens", workers=0, device="cpu", any_shape=True).run()
    # The leak check comes after: the other set's patients are those of the split's names.
    overrides = evaluation(checkpoint, other, tmp_path / "run", tracking_uri="none")
    with pytest.raises(SystemExit):
        workflow(BUNDLE, "evaluate.json", overrides).run()
    assert f"{other}: {said}; --any_shape True takes them" in capsys.readouterr().err
    workflow(BUNDLE, "evaluate.json", {**overrides, "any_shape": True}).run()
    # Nor does a run go on with images of another shape.
    own = json.loads((slices / "dataset.json").read_text())
    content |= {key: own[key] for key in ("split_hash", "content_hash")}
    (other / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        workflow(BUNDLE, "train.json", {**plain, "dataset_dir": str(other), "max_epochs": 2})
    assert re.search("train#preprocessing is center_crop.* was square", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["simvq", "ema", "mgvq"])
def test_an_old_checkpoint_has_the_shape_of_its_transforms(name: str, tmp_path: Path) -> None:
    stored = StoredTokenizer(FIXTURES / f"{name}.pt")
    assert "reading" not in stored.data
    assert stored.shape == "square"
    state = read_checkpoint(FIXTURES / f"{name}.pt")
    for transforms, shape in (
        (["vaevq_med.data.LoadPhotograph", "vaevq_med.data.ResizeShortSided", "CenterSpatialCropd"], "center_crop"),
        (["vaevq_med.images.LoadSliced"], "square"),
        (["mine.Load"], None),
    ):
        config = json.loads(state["config"])
        config["validate"]["preprocessing"]["transforms"] = [{"_target_": target} for target in transforms]
        torch.save({**state, "config": json.dumps(config)}, tmp_path / "old.pt")
        assert StoredTokenizer(tmp_path / "old.pt").shape == shape
    with pytest.raises(CheckpointError, match="read as center_crop, expected square"):
        stored.check_shape("center_crop", Path("data"), "--any-shape")
    stored.check_shape("square", Path("data"), "--any-shape")
    stored.check_shape(None, Path("data"), "--any-shape")


def test_an_old_tokenizer_refuses_photographs_of_another_shape(tmp_path: Path) -> None:
    """Encoded until now as they had never been read in training."""
    photographs = write_images(tmp_path / "data", slices=False, reading=False)
    with pytest.raises(CheckpointError, match="read as center_crop, expected square"):
        EncodeTokens(FIXTURES / "simvq.pt", photographs, tmp_path / "tokens", workers=0, device="cpu").run()


def test_a_packed_bundle_keeps_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BundlePack("brats", tmp_path / "zoo", FIXTURES / "simvq.pt").run()
    configs = tmp_path / "zoo" / "configs"
    photographs = write_images(tmp_path / "data", slices=False)
    overrides = evaluation(tmp_path / "zoo/models/model.pt", photographs, tmp_path / "run", tracking_uri="none")
    with pytest.raises(SystemExit):
        workflow(configs, "evaluate.json", overrides).run()
    assert "read as center_crop, expected square" in capsys.readouterr().err


# --- what users have ----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["images", "data"])
def test_an_overlay_of_earlier_days_names_the_transforms_itself(package: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", slices=True)
    load = f"vaevq_med.{package}"
    overlay = {
        "train#preprocessing#transforms": [
            {"_target_": f"{load}.LoadPhotograph", "in_channels": "@in_channels"},
            {"_target_": f"{load}.RandResizedCropd", "keys": "image", "size": "@image_size", "scale": [0.2, 0.3]},
            {"_target_": "RandFlipd", "keys": "image", "prob": 0.5, "spatial_axis": 1},
        ],
        "validate#preprocessing#transforms": [
            {"_target_": f"{load}.LoadPhotograph", "in_channels": "@in_channels"},
            {"_target_": f"{load}.ResizeShortSided", "keys": "image", "size": "@image_size"},
            {"_target_": "CenterSpatialCropd", "keys": "image", "roi_size": "$[@image_size, @image_size]"},
        ],
    }
    (tmp_path / "mine.json").write_text(json.dumps(overlay))
    overrides = {**toy_config(folder, tmp_path / "run"), "max_epochs": 1, "batch_size": 3}
    checkpoint = train(BUNDLE, overrides, tmp_path / "mine.json")
    # What was done, and not what the data set says.
    assert StoredTokenizer(checkpoint).shape == "center_crop"


def test_an_old_evaluation_names_the_transforms_itself(tmp_path: Path) -> None:
    slices = tmp_path / "data"
    shutil.copytree(FIXTURES / "slices", slices)
    old = {
        "preprocessing#transforms": [
            {
                "_target_": "vaevq_med.data.LoadSliced",
                "image_size": "$@stored.value('image_size')",
                "in_channels": "$@stored.value('in_channels')",
                "label_map": "$engines.label_map(@dataset_dir)",
            }
        ]
    }
    overrides = evaluation(FIXTURES / "simvq.pt", slices, tmp_path / "run", split="training", tracking_uri="none")
    plain, named = (workflow(BUNDLE, "evaluate.json", {**overrides, **more}) for more in ({}, old))
    found = []
    for work in (plain, named):
        work.run()
        handler = work.parser.get_parsed_content("evaluation")
        assert isinstance(handler, EvaluationHandler)
        assert handler.report is not None
        found.append(handler.report.overall())
    assert found[0] == found[1]
