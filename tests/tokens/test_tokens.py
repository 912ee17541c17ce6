"""Token stores: what is in them, that they resume, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODALITIES, write_slice_dataset
from helpers.quantizer_cases import all_cases
from helpers.stores import SIMVQ, SMALL, encode, write_checkpoint
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import ten_crop
from typer.testing import CliRunner

from vaevq_med.cli import app as cli
from vaevq_med.core.errors import ItemError, VaevqMedError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import load_manifest
from vaevq_med.images.transforms import LoadSliced
from vaevq_med.networks.decoder import Decoder, ModulatedDecoder
from vaevq_med.networks.encoder import Encoder
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.tokens import encode as encode_tokens
from vaevq_med.tokens.encode import EncodeTokens
from vaevq_med.tokens.store import TokenDataset, index_type, load_token_store
from vaevq_med.tokens.views import LoadViews, plan_views
from vaevq_med.tokens.writer import STATE, TokenWriter
from vaevq_med.trained.network import StoredTokenizer

ALL_CASES = all_cases()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt")


def tokenizer_of(quantizer: Quantizer, *, modulated: bool = False) -> VisualTokenizer:
    small = {**SMALL, "channel_mult": tuple(SMALL["channel_mult"]), "attention_resolutions": ()}
    dim = quantizer.embedding_dim
    decoder = ModulatedDecoder(embedding_dim=dim, out_channels=1, **small) if modulated else None
    return VisualTokenizer(
        encoder=Encoder(in_channels=1, **small),
        decoder=decoder or Decoder(out_channels=1, **small),
        quantizer=quantizer,
        embedding_dim=dim,
    ).eval()


def images_of(dataset: Path, split: str) -> torch.Tensor:
    """What the BraTS bundle's evaluation reads."""
    items = SliceDataset(dataset_dir=dataset, split=split, transform=LoadSliced(image_size=32))
    return torch.stack([items[number]["image"] for number in range(len(items))])


def stored_values(output: Path, split: str, key: str) -> torch.Tensor:
    tokens = TokenDataset(tokens_dir=output, split=split)
    return torch.stack([tokens[number][key] for number in range(len(tokens))])


# --- what is stored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL_CASES, "simvq modulated", "fsq-projection modulated"])
def test_decoding_the_stored_indices_is_the_reconstruction_to_the_bit(
    name: str, checkpoint: Path, slice_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    quantizer = ALL_CASES[name.split()[0]].make()
    if not quantizer.is_discrete:
        quantizer.select_readout("hard")
    network = tokenizer_of(quantizer, modulated="modulated" in name)
    monkeypatch.setattr(StoredTokenizer, "network", lambda self: network)
    encode(checkpoint, slice_dataset, tmp_path / "tokens", split=["test"], batch_size=16)
    indices = stored_values(tmp_path / "tokens", "test", "indices")
    assert indices.shape == (16, 8, 8, quantizer.num_codebooks)
    assert len(indices.unique()) > 1
    with torch.inference_mode():
        assert torch.equal(network.decode_indices(indices), network(images_of(slice_dataset, "test")))


def test_a_store_says_what_made_it(checkpoint: Path, slice_dataset: Path, tmp_path: Path) -> None:
    report = encode(checkpoint, slice_dataset, tmp_path / "tokens")
    assert (report.written, report.reused) == (48, 0)
    store = load_token_store(tmp_path / "tokens")
    assert store.splits == ("training", "validation", "test")
    assert store.array("training").shape == (16, 2, 8, 8, 1)
    assert store.array("test").shape == (16, 1, 8, 8, 1)
    assert store.views("training") == ("whole", "whole flipped")
    assert store.array("test").dtype == np.uint8
    assert store.content["label"] == {"kind": "modality", "names": list(MODALITIES)}
    assert store.content["data"]["split_hash"] == "sha256:toy"
    stored = StoredTokenizer(checkpoint)
    assert store.tokenizer["content_hash"] == stored.content_hash
    assert (store.tokenizer["quantizer"], store.tokenizer["num_embeddings"], store.grid) == ("SimVQ", 32, (8, 8))
    entries = json.loads((slice_dataset / "dataset.json").read_text())["test"]
    for item, entry in zip(store.items("test"), entries, strict=True):
        expected = {key: entry[key] for key in ("patient", "modality", "label")}
        assert item == {"id": entry["image"], **expected}
    tokens = TokenDataset(tokens_dir=tmp_path / "tokens", split="test")
    assert [tokens[number]["label"] for number in range(4)] == [0, 1, 2, 3]
    assert tokens[0]["id"] == entries[0]["image"]
    assert tokens.num_classes == 4


def test_latents_are_the_mean_before_quantization(checkpoint: Path, slice_dataset: Path, tmp_path: Path) -> None:
    network = StoredTokenizer(checkpoint).network()
    with torch.inference_mode():
        encoded = network.encode(images_of(slice_dataset, "validation"))
    assert not isinstance(encoded, torch.Tensor)
    for dtype in ("float16", "float32"):
        output = tmp_path / dtype
        encode(checkpoint, slice_dataset, output, kind="latents", dtype=dtype, split=["validation"])
        values = stored_values(output, "validation", "latent")
        assert values.dtype == torch.float32
        assert torch.equal(values, encoded.mean.to(getattr(torch, dtype)).float())


def test_latents_beyond_float16_are_refused_and_stored_as_float32(slice_dataset: Path, tmp_path: Path) -> None:
    def far(network: VisualTokenizer) -> None:
        torch.nn.init.constant_(network.quant_conv.bias, 1e5)

    far_off = write_checkpoint(tmp_path / "far.pt", change=far)
    with pytest.raises(VaevqMedError, match=r"latent of 1\d{5} in .*expected at most 65504.*; name --dtype float32$"):
        encode(far_off, slice_dataset, tmp_path / "tokens", kind="latents", split=["test"])
    encode(far_off, slice_dataset, tmp_path / "wide", kind="latents", dtype="float32", split=["test"])
    assert float(stored_values(tmp_path / "wide", "test", "latent").min()) > 65504


def test_stacked_contrasts_have_no_label(slice_dataset: Path, tmp_path: Path) -> None:
    stacked = write_checkpoint(tmp_path / "stacked.pt", in_channels=2, stack_modalities=True, modalities=["t2w", "t1n"])
    encode(stacked, slice_dataset, tmp_path / "tokens", split=["test"])
    store = load_token_store(tmp_path / "tokens")
    assert store.content["label"] == {"kind": "none", "names": []}
    assert [item["modality"] for item in store.items("test")] == ["t2w+t1n"] * 4
    tokens = TokenDataset(tokens_dir=tmp_path / "tokens", split="test")
    assert (tokens[0]["label"], tokens.num_classes) == (0, 0)


@pytest.mark.parametrize(("num_embeddings", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_indices_have_the_smallest_sufficient_type(num_embeddings: int, dtype: str, tmp_path: Path) -> None:
    values = np.array([0, 1, 254, num_embeddings - 1]).reshape(1, 1, 2, 2, 1)
    write_store(tmp_path, values, num_embeddings)
    assert np.load(tmp_path / "test.npy").dtype == np.dtype(dtype)
    assert np.array_equal(TokenDataset(tokens_dir=tmp_path, split="test")[0]["indices"].numpy(), values[0, 0])


@pytest.mark.parametrize("grid", [(6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("kind", ["indices", "latents"])
def test_a_store_of_a_grid_of_any_rank(grid: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    shape = (2, 3, *grid, 2) if kind == "indices" else (2, 3, 4, *grid)  # [N, views, ...]
    values = np.arange(np.prod(shape)).reshape(shape)
    write_store(tmp_path, values, 1000, kind=kind, grid=grid)
    store = load_token_store(tmp_path)
    assert store.grid == grid
    assert json.loads((tmp_path / "tokens.json").read_text())["grid"] == list(grid)
    tokens = TokenDataset(tokens_dir=tmp_path, split="test", grid=list(grid))
    item = tokens[1][{"indices": "indices", "latents": "latent"}[kind]]
    assert item.shape == shape[2:]
    assert item.tolist() in values[1].tolist()
    with pytest.raises(VaevqMedError, match=re.escape(f"of grid {grid}, expected grid (3, 2)")):
        TokenDataset(tokens_dir=tmp_path, split="test", grid=(3, 2))


@pytest.mark.parametrize("grid", [(6,), (1, 2, 3)])
def test_generators_made_for_rows_and_columns_refuse_other_grids(grid: tuple[int, ...], tmp_path: Path) -> None:
    write_store(tmp_path, np.zeros((1, 1, *grid, 1), dtype=np.int64), 8, grid=grid)
    found = re.escape(f"tokens.json: found a grid of {'x'.join(map(str, grid))}, expected rows and columns, which ")
    for network in (
        LlamaGen(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2, num_classes=2),
        LatentDiffusionUNet(in_channels=4, num_classes=2, num_channels=32, channel_mult=(1,), num_res_blocks=1),
    ):
        with pytest.raises(VaevqMedError, match=f"{found}{type(network).__name__} is made for"):
            network.check_fit(load_token_store(tmp_path).content, "tokens.json")


def write_store(
    root: Path,
    values: np.ndarray,
    num_embeddings: int,
    label: int = 0,
    *,
    kind: str = "indices",
    grid: tuple[int, ...] | None = None,
) -> None:
    """A store of one split with the label names a and b."""
    header = {
        "format": 1,
        "kind": kind,
        "tokenizer": {
            "content_hash": "sha256:made",
            "quantizer": "SimVQ",
            "readout": None,
            "num_embeddings": num_embeddings,
            "num_codebooks": values.shape[-1],
            "embedding_dim": 4,
        },
        "grid": values.shape[2:4] if grid is None else grid,
        "dtype": index_type(num_embeddings) if kind == "indices" else "float32",
        "image_size": 8,
        "in_channels": 1,
        "label": {"kind": "class", "names": ["a", "b"]},
        "data": {"name": "toy", "content_hash": "", "split_hash": ""},
        "splits": {"test": {"shape": values.shape, "views": [f"view {n}" for n in range(values.shape[1])]}},
    }
    items = {"test": [{"id": f"{number}.png", "label": label} for number in range(len(values))]}
    with TokenWriter(root, header, items) as writer:
        writer.append("test", values)
        writer.finish()


# --- views ------------------------------------------------------------------------------------------


def test_the_flipped_view_is_that_of_the_mirror_image(checkpoint: Path, slice_dataset: Path, tmp_path: Path) -> None:
    encode(checkpoint, slice_dataset, tmp_path / "tokens", split=["training"])
    array = torch.from_numpy(load_token_store(tmp_path / "tokens").array("training").astype(np.int64))
    images = images_of(slice_dataset, "training")
    network = StoredTokenizer(checkpoint).network()
    with torch.inference_mode():
        assert torch.equal(array[:, 0], network.encode_indices(images))
        assert torch.equal(array[:, 1], network.encode_indices(images.flip(-1)))
    assert not torch.equal(array[:, 0], array[:, 1])


def test_ten_crops_agree_with_torchvision(slice_dataset: Path) -> None:
    views = plan_views(flip=True, ten_crop=True)
    entry = SliceDataset(dataset_dir=slice_dataset, split="training").data[1]
    cut = LoadViews(views, image_size=32, in_channels=1, manifest=load_manifest(slice_dataset))(entry)["image"]
    assert cut.shape == (20, 1, 32, 32)
    by_name = {view.name: crop for view, crop in zip(views, cut, strict=True)}
    for scale, side in (("1.1", 35), ("1.05", 33)):
        whole = LoadSliced(image_size=side)(entry)["image"]
        assert torch.equal(by_name[f"{scale} bottom-right"], whole[:, side - 32 :, side - 32 :])
        expected = ten_crop(whole, [32, 32])
        names = ("top-left", "top-right", "bottom-left", "bottom-right", "center")
        for name, crop in zip(names, expected[:5], strict=True):
            assert torch.equal(by_name[f"{scale} {name}"], crop)
        # A crop's mirror image is the mirror image's crop on the other side.
        mirrored = dict(zip(names, expected[5:], strict=True))
        assert torch.equal(by_name[f"{scale} top-left flipped"], mirrored["top-right"])
        assert torch.equal(by_name[f"{scale} bottom-right flipped"], mirrored["bottom-left"])


def write_photographs(root: Path, count: int = 3) -> Path:
    """Color images of 40 x 64 pixels with two classes, in the schema of ``imagenet-prepare``."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    entries = []
    for number in range(count):
        pixels = rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        entries.append({"image": f"images/{number}.png", "label": number % 2})
    manifest = {
        "name": "photographs",
        "channels_per_image": 3,
        "labels": {"0": "n01440764", "1": "n02102040"},
        "image_size": None,
        "content_hash": "sha256:photographs",
        **{"training": entries, "validation": [], "test": []},
    }
    (root / "dataset.json").write_text(json.dumps(manifest))
    return root


def test_photographs_are_cropped_and_have_classes(tmp_path: Path) -> None:
    dataset = write_photographs(tmp_path / "data")
    color = write_checkpoint(tmp_path / "color.pt", in_channels=3, image_size=40)
    encode(color, dataset, tmp_path / "tokens", flip=False)
    store = load_token_store(tmp_path / "tokens")
    assert store.splits == ("training",)
    assert store.content["label"] == {"kind": "class", "names": ["n01440764", "n02102040"]}
    tokens = TokenDataset(tokens_dir=tmp_path / "tokens")
    assert [tokens[number]["label"] for number in range(3)] == [0, 1, 0]
    pixels = np.stack([np.asarray(Image.open(dataset / f"images/{number}.png")) for number in range(3)])
    middle = torch.from_numpy(pixels[:, :, 12:52].astype(np.float32) / 255).permute(0, 3, 1, 2) * 2 - 1
    with torch.inference_mode():
        expected = StoredTokenizer(color).network().encode_indices(middle)
    assert torch.equal(stored_values(tmp_path / "tokens", "training", "indices"), expected)


def test_views_are_drawn_by_seed_item_and_epoch(tmp_path: Path) -> None:
    values = np.arange(5 * 4).reshape(5, 4, 1, 1, 1)
    write_store(tmp_path, values, 20)
    tokens = TokenDataset(tokens_dir=tmp_path, split="test", seed=3)
    assert (len(tokens), tokens.num_views) == (5, 4)
    drawn = [int(tokens[epoch * 5 + 2]["indices"]) for epoch in range(40)]
    assert set(drawn) == {8, 9, 10, 11}
    assert min(np.bincount(drawn)[8:]) >= 4
    assert drawn == [
        int(TokenDataset(tokens_dir=tmp_path, split="test", seed=3)[n * 5 + 2]["indices"]) for n in range(40)
    ]
    other = TokenDataset(tokens_dir=tmp_path, split="test", seed=4)
    assert drawn != [int(other[epoch * 5 + 2]["indices"]) for epoch in range(40)]


def test_a_worker_maps_the_file_itself(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 70000, (16, 1, 64, 64, 1))
    write_store(tmp_path, values, 70000)
    tokens = TokenDataset(tokens_dir=tmp_path, split="test")
    assert tokens.store.array("test").nbytes == 2**18
    sent = pickle.dumps(tokens)
    assert len(sent) < 2**14
    batch = next(iter(DataLoader(pickle.loads(sent), batch_size=16)))
    assert np.array_equal(batch["indices"].numpy(), values[:, 0])
    assert batch["label"].dtype == torch.int64


# --- resuming ---------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}


@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_ends_with_the_same_bytes(
    killed: bool, checkpoint: Path, slice_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"workers": 0, "device": "cpu", "batch_size": 10}
    encode(checkpoint, slice_dataset, tmp_path / "whole", **options)
    output, seen = tmp_path / "parts", []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) == 26:
            raise KeyboardInterrupt

    save = TokenWriter.save
    with monkeypatch.context() as patch:
        if killed:
            # What a killed process had in its buffers after it last saved may or may not be in the files.
            patch.setattr(encode_tokens, "_SAVE_EVERY", -1)
            patch.setattr(TokenWriter, "save", lambda self: save(self) if sum(seen) < 16 else None)
        with pytest.raises(KeyboardInterrupt):
            EncodeTokens(checkpoint, slice_dataset, output, **options).run(on_images=stop)
    with pytest.raises(VaevqMedError, match="found no finished token store"):
        load_token_store(output)
    if killed:
        with (output / STATE / "training.npy.part").open("ab") as part:
            part.write(b"torn")
    report = encode(checkpoint, slice_dataset, output, **options)
    # Five images of two views make a batch of ten, and ten images of one view.
    assert seen == [0, 5, 5, 5, 1, 10]
    assert report.reused == (15 if killed else 26)
    assert contents(output) == contents(tmp_path / "whole")
    assert not list((output / STATE).glob("*.part"))


def test_a_finished_store_is_left_alone_and_another_replaces_it_on_demand(
    checkpoint: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tokens"
    encode(checkpoint, slice_dataset, output, split=["test"])
    before = contents(output)
    report = encode(checkpoint, slice_dataset, output, split=["test"], batch_size=3)
    assert (report.written, report.reused) == (0, 16)
    assert contents(output) == before
    other = write_checkpoint(tmp_path / "other.pt", {**SIMVQ, "num_embeddings": 16})
    with pytest.raises(VaevqMedError, match=r"found a token store of tokenizer\.content_hash sha256:\w+.*--overwrite$"):
        encode(other, slice_dataset, output, split=["test"])
    assert contents(output) == before
    encode(other, slice_dataset, output, split=["validation"], overwrite=True)
    assert set(contents(output)) == {"tokens.json", "validation.npy"}
    assert load_token_store(output).tokenizer["num_embeddings"] == 16


def test_an_unfinished_store_of_other_settings_is_refused(
    checkpoint: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    def stop(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EncodeTokens(checkpoint, slice_dataset, tmp_path / "tokens", workers=0, device="cpu").run(on_images=stop)
    with pytest.raises(VaevqMedError, match=r"an unfinished token store of kind indices, expected latents; "):
        encode(checkpoint, slice_dataset, tmp_path / "tokens", kind="latents")


def test_the_tokenizers_hash_is_of_its_definition_and_weights(checkpoint: Path, tmp_path: Path) -> None:
    first = StoredTokenizer(checkpoint).content_hash
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "iteration": 7}, tmp_path / "later.pt")
    assert StoredTokenizer(tmp_path / "later.pt").content_hash == first

    def nudge(network: VisualTokenizer) -> None:
        with torch.no_grad():
            network.post_quant_conv.bias[0] += 1

    assert StoredTokenizer(write_checkpoint(tmp_path / "nudged.pt", change=nudge)).content_hash != first
    deviant = write_checkpoint(tmp_path / "deviant.pt", {**SIMVQ, "assignment": "posterior"})
    assert StoredTokenizer(deviant).content_hash != first


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"num_embeddings": 32}, "num_embeddings 20, expected num_embeddings 32"),
        ({"num_codebooks": 2}, "num_codebooks 1, expected num_codebooks 2"),
        ({"embedding_dim": 3}, "embedding_dim 4, expected embedding_dim 3"),
        ({"grid": [2, 3]}, r"grid \(2, 2\), expected grid \(2, 3\)"),
        ({"kind": "latents"}, "kind indices, expected kind latents"),
        ({"tokenizer_hash": "sha256:x"}, "tokenizer sha256:made, expected tokenizer sha256:x"),
        ({"num_classes": 1}, r"found label 1 of 0\.png, expected 0 to 0"),
        ({"split": "training"}, "found no split 'training', expected one of test"),
    ],
)
def test_another_store_than_wanted_is_refused(wanted: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_store(tmp_path, np.zeros((2, 1, 2, 2, 1), int), 20, label=1)
    right = {"num_embeddings": 20, "num_codebooks": 1, "embedding_dim": 4, "grid": [2, 2], "kind": "indices"}
    TokenDataset(tokens_dir=tmp_path, split="test", **right, num_classes=2, tokenizer_hash="sha256:made")
    with pytest.raises(VaevqMedError, match=said) as refused:
        TokenDataset(**{"tokens_dir": tmp_path, "split": "test", **wanted})
    assert "\n" not in str(refused.value)


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    def opened() -> TokenDataset:
        return TokenDataset(tokens_dir=tmp_path, split="test")

    with pytest.raises(VaevqMedError, match="found no finished token store, expected one made by: vaevq-med encode-"):
        opened()
    write_store(tmp_path, np.full((2, 1, 2, 2, 1), 19), 20, label=1)
    whole = (tmp_path / "test.npy").read_bytes()
    (tmp_path / "test.npy").write_bytes(whole[:-1])
    with pytest.raises(VaevqMedError, match=r"truncated array \(.*\), expected uint8 of 2x1x2x2x1"):
        opened()
    (tmp_path / "test.npy").write_bytes(whole + b"\0")
    with pytest.raises(VaevqMedError, match=f"found {len(whole) + 1} bytes, expected {len(whole)} for uint8 of"):
        opened()
    np.save(tmp_path / "test.npy", np.zeros((2, 1, 2, 2, 1), np.uint16))
    with pytest.raises(VaevqMedError, match="found uint16 of 2x1x2x2x1, expected uint8 of"):
        opened()
    (tmp_path / "test.npy").write_bytes(whole[:-1] + b"\x14")
    tokens = opened()
    assert int(tokens[0]["indices"].max()) == 19
    with pytest.raises(ItemError, match=r"found index 20 in 1\.png, expected 0 to 19"):
        tokens[1]
    (tmp_path / "test.npy").unlink()
    with pytest.raises(VaevqMedError, match="no such file"):
        opened()
    content = json.loads((tmp_path / "tokens.json").read_text())
    content["tokenizer"]["num_embeddings"] = 32
    (tmp_path / "tokens.json").write_text(json.dumps(content))
    with pytest.raises(VaevqMedError, match="a description that was changed"):
        opened()
    for text in ("{", "[]", '{"format": 2}'):
        (tmp_path / "tokens.json").write_text(text)
        with pytest.raises(VaevqMedError, match=r"unreadable file|format None|format 2, expected 1"):
            opened()


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (
            {"test": [{"id": "0.png", "label": 0}, {"id": "1.png", "label": 1}]},
            "items of split 'test' that were changed",
        ),
        ({"test": [{"id": "0.png", "label": 1}, {"id": "1.png"}]}, "items of split 'test' that were changed"),
        ({"test": [{"id": "0.png", "label": 1}, {"label": 1}]}, "items of split 'test' that were changed"),
        ({"test": [{"id": "0.png", "label": "1"}, {"id": "1.png", "label": 1}]}, "that were changed"),
        ({"test": [{"id": "0.png", "label": 1}, None]}, "that were changed"),
        ({"test": [{"id": "0.png", "label": 1}]}, "found 1 items of split 'test', expected 2"),
        ({"test": None}, "found 0 items of split 'test', expected 2"),
        (None, "found 0 items of split 'test', expected 2"),
    ],
)
def test_changed_items_are_refused(items: Any, said: str, tmp_path: Path) -> None:
    write_store(tmp_path, np.zeros((2, 1, 2, 2, 1)), 20, label=1)
    content = json.loads((tmp_path / "tokens.json").read_text())
    kept = content["items"]
    (tmp_path / "tokens.json").write_text(json.dumps({**content, "items": items}))
    with pytest.raises(VaevqMedError, match=said) as refused:
        load_token_store(tmp_path)
    assert "\n" not in str(refused.value)
    (tmp_path / "tokens.json").write_text(json.dumps({**content, "items": kept}))
    assert load_token_store(tmp_path).items("test") == kept["test"]


def refuse(said: str, checkpoint: Path, dataset: Path, output: Path, **options: Any) -> None:
    with pytest.raises(VaevqMedError, match=said) as refused:
        encode(checkpoint, dataset, output, **options)
    assert "\n" not in str(refused.value)
    assert not (output / "tokens.json").exists()


def test_options_out_of_range_are_refused(checkpoint: Path, slice_dataset: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"kind": "codes"}, "--kind: found 'codes', expected one of indices, latents"),
        ({"batch_size": 0}, "--batch-size: found 0"),
        ({"workers": -1}, "workers: found -1, expected 0 to 512"),
        ({"split": ["train"]}, "--split: found 'train', expected one of training"),
        ({"dtype": "float16"}, "--dtype: found 'float16' for indices"),
        ({"kind": "latents", "dtype": "int8"}, "--dtype: found 'int8', expected one of float16, float32"),
        ({"device": "abacus"}, "--device: found 'abacus'"),
        ({"weights": "best"}, "weights: found 'best'"),
        ({"readout": "hard"}, "readout is 'hard'; expected None"),
    ):
        refuse(said, checkpoint, slice_dataset, tmp_path / "tokens", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refuse("found a folder with other things", checkpoint, slice_dataset, tmp_path / "full", overwrite=True)
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"thesis.tex"}
    refuse("found no data set", checkpoint, tmp_path, tmp_path / "tokens")


def test_checkpoints_that_are_no_discrete_tokenizers_are_refused(slice_dataset: Path, tmp_path: Path) -> None:
    generator = tmp_path / "generator.pt"
    config = {"network_def": {"_target_": "vaevq_med.networks.Encoder"}, "image_size": 32, "in_channels": 1}
    torch.save({"network": {"weight": torch.zeros(1)}, "config": json.dumps(config)}, generator)
    refuse(r"found a checkpoint of vaevq_med\.networks\.Encoder, expected", generator, slice_dataset, tmp_path / "out")
    soft = write_checkpoint(
        tmp_path / "soft.pt", {**SIMVQ, "_target_": "vaevq_med.networks.quantizers.SoftVQ", "num_segments": 2}
    )
    refuse("found SoftVQ with read-out 'soft'.*; name --readout hard$", soft, slice_dataset, tmp_path / "out")
    encode(soft, slice_dataset, tmp_path / "hard", split=["test"], readout="hard")
    network = StoredTokenizer(soft, readout="hard").network()
    with torch.inference_mode():
        decoded = network.decode_indices(stored_values(tmp_path / "hard", "test", "indices"))
        assert torch.equal(decoded, network(images_of(slice_dataset, "test")))


def test_images_that_the_tokenizer_was_not_trained_on_are_refused(
    checkpoint: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    color = write_checkpoint(tmp_path / "color.pt", in_channels=3)
    refuse("found images of 1 channels, expected 3", color, slice_dataset, tmp_path / "out")
    own = write_checkpoint(tmp_path / "own.pt", in_channels=3, trained_on="sha256:toy")
    assert encode(own, slice_dataset, tmp_path / "own", split=["test"]).written == 16
    stacked = write_checkpoint(tmp_path / "stacked.pt", in_channels=3, stack_modalities=True)
    refuse("found images of 4 channels, expected 3", stacked, slice_dataset, tmp_path / "out")
    large = write_checkpoint(tmp_path / "large.pt", image_size=64)
    refuse("found images of 32 pixels, expected 64 or more", large, slice_dataset, tmp_path / "out")
    refuse("found images of 3 channels, expected 1", checkpoint, write_photographs(tmp_path / "p"), tmp_path / "out")


def test_bad_entries_are_refused_and_a_damaged_image_keeps_what_is_done(checkpoint: Path, tmp_path: Path) -> None:
    dataset = write_slice_dataset(tmp_path / "data", slices=1)
    manifest = json.loads((dataset / "dataset.json").read_text())
    wrong = json.loads(json.dumps(manifest))
    wrong["validation"][2]["label"] = 4
    (dataset / "dataset.json").write_text(json.dumps(wrong))
    refuse(r"found label 4 of images/.*, expected 0 to 3", checkpoint, dataset, tmp_path / "out")
    (dataset / "dataset.json").write_text(json.dumps({**manifest, "modality": {"1": "t1n", "2": "t1c"}}))
    refuse("found modality numbers 1, 2, expected 0 to 1", checkpoint, dataset, tmp_path / "out")
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    damaged = dataset / manifest["validation"][2]["image"]
    pixels = damaged.read_bytes()
    damaged.write_bytes(b"")
    refuse("unreadable image", checkpoint, dataset, tmp_path / "out", batch_size=2)
    damaged.write_bytes(pixels)
    assert encode(checkpoint, dataset, tmp_path / "out", batch_size=2).reused == 6


def test_the_command_reports_and_refuses_in_one_line(
    checkpoint: Path,
    slice_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["encode-tokens", str(checkpoint), str(slice_dataset), str(tmp_path / "tokens")]
    options = ["--split", "training", "--split", "test", "--ten-crop", "--no-flip", "--workers", "0", "--device", "cpu"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_tokens, "encode_views", interrupt)
        result = CliRunner().invoke(cli.app, [*arguments, *options])
    assert result.exit_code == 130
    assert "finished images are kept, and the same command goes on" in result.output
    result = CliRunner().invoke(cli.app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "32 images encoded, 0 were done" in result.output
    assert "training: 16 images in 10 views, uint8, 10.2 kB" in result.output
    assert "test: 16 images in 1 view, uint8, 1.0 kB" in result.output
    assert "indices of SimVQ: grid 8x8, K 32, G 1, D 4" in result.output
    assert "labels: modality (4)" in result.output
    monkeypatch.setattr(sys, "argv", ["vaevq-med", *arguments, "--workers", "0", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vaevq-med: output ")
    assert "found a token store of splits.training.shape [16, 10, 8, 8, 1], expected [16, 2, 8, 8, 1]" in line
