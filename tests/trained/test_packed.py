"""A packed bundle is the checkpoint that it was made of: the same network and figures, and what was known of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FIXTURES, write_slice_dataset
from helpers.bundles import run_bundle
from helpers.segmenters import write_segmenter
from helpers.stores import write_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core import components
from vaevq_med.core.components import trust
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.evaluation.data import check_unseen
from vaevq_med.images.manifest import Manifest, load_manifest
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.tokens.encode import EncodeTokens
from vaevq_med.tokens.store import load_token_store
from vaevq_med.trained import (
    CheckpointError,
    StoredSegmenter,
    StoredTokenizer,
    read_checkpoint,
    read_trained,
    started_from,
)
from vaevq_med.trained.pack import BundlePack
from vaevq_med.trained.packed import HEADER
from vaevq_med.trained.patients import HASHES
from vaevq_med.trained.verify import BundleVerify

CHECKPOINT = FIXTURES / "simvq.pt"
PATIENT = "BraTS-GLI-00000"
"""The only one of its training."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "zoo"
    BundlePack("brats", folder, CHECKPOINT).run()
    return folder


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(packed, tmp_path / "own"))


def alter(path: Path, **values: Any) -> None:
    """Write other values into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "models/trained.json").read_text())


# --- one network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("simvq", "both"), ("ema", "pt"), ("mgvq", "safetensors")])
def test_every_form_is_the_network_of_the_checkpoint(name: str, kind: str, tmp_path: Path) -> None:
    checkpoint = FIXTURES / f"{name}.pt"
    expected = StoredTokenizer(checkpoint)
    weights = expected.network().state_dict()
    BundlePack("brats", tmp_path / "zoo", checkpoint, format=kind).run()
    models = tmp_path / "zoo/models"
    files = {"both": ["model.pt", "model.safetensors"]}.get(kind, [f"model.{kind}"])
    assert sorted(path.name for path in models.iterdir()) == [*files, "trained.json"]
    for path in (tmp_path / "zoo", *(models / file for file in files)):
        stored = StoredTokenizer(path)
        assert stored.content_hash == expected.content_hash
        for part, value in stored.network().state_dict().items():
            assert torch.equal(value, weights[part]), part
        assert (stored.iteration, stored.run_id, stored.shape) == (expected.iteration, expected.run_id, expected.shape)
        assert stored.data["split_hash"] == expected.data["split_hash"]
        assert len(stored.patients) == len(expected.patients)
        assert StoredTokenizer.of_hash(path, expected.content_hash) is not None


def test_a_safetensors_file_is_enough_by_itself(packed: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere.safetensors"
    shutil.copyfile(packed / "models/model.safetensors", alone)
    assert StoredTokenizer(alone).content_hash == StoredTokenizer(CHECKPOINT).content_hash
    assert len(StoredTokenizer(alone).patients) == 1
    shutil.copyfile(packed / "models/model.pt", tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match="found weights alone, without the settings"):
        StoredTokenizer(tmp_path / "elsewhere.pt")


def test_a_bundle_of_averages_has_no_others(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found a bundle of the averaged weights alone, expected the others"):
        StoredTokenizer(packed, weights="network")
    state = torch.load(CHECKPOINT, weights_only=True)
    state["ema"] = {name: value + 1 if value.is_floating_point() else value for name, value in state["ema"].items()}
    checkpoint = tmp_path / "a.pt"
    torch.save(state, checkpoint)
    BundlePack("brats", tmp_path / "raw", checkpoint, weights="network").run()
    raw = StoredTokenizer(checkpoint, weights="network").content_hash
    assert raw != StoredTokenizer(checkpoint).content_hash
    assert StoredTokenizer(tmp_path / "raw", weights="network").content_hash == raw
    assert json.loads((tmp_path / "raw/made_by.json").read_text())["weights"] == "network"


def test_a_bundle_is_packed_again_as_it_is(packed: Path, tmp_path: Path) -> None:
    BundlePack("brats", tmp_path / "again", packed).run()
    assert record_of(tmp_path / "again") == record_of(packed)


def test_a_segmentation_network_is_packed_alike(tmp_path: Path) -> None:
    recipe = {"name": "mine", "axis": 2}
    checkpoint = write_segmenter(tmp_path / "a.pt", recipe=recipe)
    BundlePack("segmentation", tmp_path / "zoo", checkpoint).run()
    stored = StoredSegmenter(tmp_path / "zoo")
    assert stored.content_hash == StoredSegmenter(checkpoint).content_hash
    assert stored.contrasts == ("t1n", "t1c", "t2w", "t2f")
    assert stored.data["recipe"] == recipe
    metadata = json.loads((tmp_path / "zoo/configs/metadata.json").read_text())["network_data_format"]
    assert metadata["inputs"]["image"]["spatial_shape"] == [3, 32, 32]
    assert metadata["outputs"]["pred"]["spatial_shape"] == [32, 32]
    assert len([*BundleVerify(tmp_path / "zoo").run()]) == 4
    with pytest.raises(CheckpointError, match="SliceSegmenter, expected that of "):
        BundlePack("brats", tmp_path / "other", checkpoint).run()


# --- the same figures ----------------------------------------------------------------------------------


def evaluated(checkpoint: Path, output: Path, dataset: Path) -> tuple[dict[str, Any], str]:
    """The summary and the rows of an evaluation."""
    overrides = {
        "checkpoint_path": str(checkpoint),
        "dataset_dir": str(dataset),
        "output_dir": str(output),
        "tracking_uri": "none",
        "device": "cpu",
        "num_workers": 0,
        "lpips_network": None,
        "fid_network": None,
    }
    run_bundle("evaluate.json", overrides, run_id="evaluating")
    folder = output / "evaluation/test"
    return json.loads((folder / "metrics.json").read_text())["summary"], (folder / "per_image.csv").read_text()


def test_packed_verified_and_moved_it_has_the_same_figures_to_the_bit(own: Path, tmp_path: Path) -> None:
    assert len([*BundleVerify(own).run()]) == 4
    moved = own.rename(tmp_path / "another place")
    dataset = FIXTURES / "slices"
    expected = evaluated(CHECKPOINT, tmp_path / "a", dataset)
    assert expected[0]["overall"]["psnr"]["n"] == 4
    assert evaluated(moved, tmp_path / "b", dataset) == expected
    assert evaluated(moved / "models/model.pt", tmp_path / "c", dataset) == expected


def test_commands_take_it_as_they_take_a_checkpoint(packed: Path, tmp_path: Path) -> None:
    hashes = []
    for name, path in (("a", CHECKPOINT), ("b", packed)):
        EncodeTokens(path, FIXTURES / "slices", tmp_path / name, workers=0, device="cpu").run()
        hashes.append(load_token_store(tmp_path / name).content_hash)
    assert hashes[0] == hashes[1]


def test_a_training_does_not_go_on_from_it(packed: Path) -> None:
    with pytest.raises(
        CheckpointError, match="found a folder, expected a checkpoint of a training run; a packed bundle"
    ):
        read_checkpoint(packed)
    with pytest.raises(CheckpointError, match="found no 'network' entry, expected a checkpoint written by training"):
        read_checkpoint(packed / "models/model.pt")


def test_a_training_starts_from_it(packed: Path) -> None:
    def fresh() -> VisualTokenizer:
        network = StoredTokenizer(CHECKPOINT).network()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        return network

    expected = started_from(fresh(), CHECKPOINT).state_dict()
    for name, value in started_from(fresh(), packed).state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert any(bool(value.any()) for value in expected.values())


OUTSIDE = """
import torch
from torch import nn

from vaevq_med.networks.quantizers import CodebookQuantizer


class Mine(CodebookQuantizer):
    def __init__(self, *, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.embedding = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def codebook(self):
        return self.embedding
"""


def test_code_of_others_goes_through_all_of_it_once_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "_named_by_user", set())
    (tmp_path / "outside_packed.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    quantizer = {"_target_": "outside_packed.Mine", "num_embeddings": 16, "embedding_dim": 4}
    checkpoint = write_checkpoint(tmp_path / "a.pt", quantizer)
    folder, dataset = tmp_path / "zoo", FIXTURES / "slices"
    refused = r"'outside_packed\.Mine', expected one of a trusted package .*--trusted outside_packed"
    with pytest.raises(VaevqMedError, match=refused):
        BundlePack("brats", folder, checkpoint).run()
    trust(["outside_packed"])
    BundlePack("brats", folder, checkpoint).run()
    monkeypatch.setattr(components, "_named_by_user", set())
    for act in (lambda: [*BundleVerify(folder).run()], lambda: StoredTokenizer(folder).network()):
        with pytest.raises(VaevqMedError, match=refused):
            act()
    card = (folder / "README.md").read_text()
    assert "vaevq-med --trusted outside_packed bundle verify FOLDER" in card
    assert "--trusted \"['outside_packed']\"" in card
    trust(["outside_packed"])
    assert len([*BundleVerify(folder).run()]) == 4
    moved = folder.rename(tmp_path / "moved")
    assert evaluated(moved, tmp_path / "b", dataset) == evaluated(checkpoint, tmp_path / "a", dataset)
    network = StoredTokenizer(moved).network()
    started = started_from(StoredTokenizer(checkpoint).network(), moved)
    assert torch.equal(started.quantizer.codebook(), network.quantizer.codebook())


def test_a_tokenizer_of_volumes_says_its_depth(tmp_path: Path) -> None:
    """Without it the evaluation of a packed one would be given single slices."""
    both = {"spatial_dims": 3, "within_slices": True}
    checkpoint = write_checkpoint(tmp_path / "a.pt", both=both, depth=4)
    BundlePack("brats", tmp_path / "zoo", checkpoint).run()
    assert StoredTokenizer(tmp_path / "zoo").value("depth") == 4
    metadata = json.loads((tmp_path / "zoo/configs/metadata.json").read_text())["network_data_format"]
    assert metadata["inputs"]["image"]["spatial_shape"] == [4, 32, 32]
    assert len([*BundleVerify(tmp_path / "zoo").run()]) == 4


# --- what travels along --------------------------------------------------------------------------------


def test_no_name_of_a_patient_and_no_path_is_in_any_file(packed: Path) -> None:
    assert json.loads(torch.load(CHECKPOINT, weights_only=True)["config"])["dataset_dir"] == "slices"
    for path in packed.rglob("*"):
        if path.is_file() and path.parent.name != "overlays":
            content = path.read_bytes()
            assert PATIENT.encode() not in content, path
            assert str(Path.cwd()).encode() not in content, path
    assert "patients" not in record_of(packed)["data"]
    assert "dataset_dir" not in record_of(packed)["config"]


def dealt(tmp_path: Path, **patients: str) -> Manifest:
    """A data set of other content, in which some patients have other names."""
    manifest = json.loads((write_slice_dataset(tmp_path / "data") / "dataset.json").read_text())
    for split, name in patients.items():
        for entry in manifest[split]:
            entry["patient"] = name
    (tmp_path / "data/dataset.json").write_text(
        json.dumps({**manifest, "content_hash": "other", "split_hash": "other"})
    )
    return load_manifest(tmp_path / "data")


@pytest.mark.parametrize("form", ["", "models/model.pt", "models/model.safetensors"])
def test_a_patient_of_the_training_is_refused_by_the_hash(form: str, packed: Path, tmp_path: Path) -> None:
    stored = StoredTokenizer(packed / form)
    manifest = dealt(tmp_path, training="anna", test=PATIENT)
    with pytest.raises(VaevqMedError, match=f"found patient {PATIENT}, whom .* was trained on, expected none"):
        check_unseen(SimpleNamespace(manifest=manifest, split="test"), stored)
    check_unseen(SimpleNamespace(manifest=manifest, split="validation"), stored)


def test_hashes_may_be_left_out(tmp_path: Path) -> None:
    command = ["bundle", "pack", "brats", str(tmp_path / "zoo"), "--checkpoint", str(CHECKPOINT), "--no-patients"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert HASHES not in record_of(tmp_path / "zoo")["data"]
    assert "no hashes either" in (tmp_path / "zoo/README.md").read_text()
    stored = StoredTokenizer(tmp_path / "zoo")
    assert len(stored.patients) == 0
    # The split is still known.
    manifest = load_manifest(FIXTURES / "slices")
    other = Manifest(manifest.path, {**manifest.content, "split_hash": "other"})
    with pytest.raises(VaevqMedError, match="dealt to other splits"):
        check_unseen(SimpleNamespace(manifest=other, split="test"), stored)


# --- what a stranger may have written ------------------------------------------------------------------


def _network(**quantizer: Any) -> Mapping[str, Any]:
    return {"_target_": "vaevq_med.networks.VisualTokenizer", "quantizer": quantizer}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format": 2}, r"trained\.json: format is 2; expected one of 1"),
        ({"iteration": -1}, r"trained\.json: iteration is -1"),
        ({"weights": "best"}, r"weights is \"best\"; expected one of ema, network"),
        ({"data": []}, "data is "),
        ({"config": None}, "config is null"),
        ({"extra": 1}, "extra is unknown"),
        (
            {"network": "sha256:0"},
            r"found weights or a network_def of sha256:\w{12}, expected sha256:0, as they were packed",
        ),
        ({"config": {"network_def": _network(_target_="os.system", command="touch ran")}}, "as they were packed"),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(values: dict[str, Any], said: str, own: Path) -> None:
    (own / "models/model.safetensors").unlink()
    alter(own / "models/trained.json", **values)
    with pytest.raises(CheckpointError, match=said) as caught:
        StoredTokenizer(own).network()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (
            _network(_target_="os.system", command="touch ran"),
            "found the component 'os.system', expected one of a trusted",
        ),
        ("$__import__('os').mkdir('ran')", "found the expression"),
        (_network(_target_="vaevq_med.networks.quantizers.SimVQ", num_embeddings="$1+1"), "found the expression"),
        (_network(_target_="vaevq_med.trained.pack.BundlePack"), "expected one of vaevq_med.networks"),
    ],
)
def test_what_a_record_names_is_not_run(definition: Any, said: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vaevq_med.trained.file import network_hash

    monkeypatch.chdir(own)
    (own / "models/model.pt").unlink()
    tensors = load_file(own / "models/model.safetensors")
    record = record_of(own)
    record |= {"config": {**record["config"], "network_def": definition}, "network": network_hash(definition, tensors)}
    save_file(tensors, own / "models/model.safetensors", metadata={HEADER: json.dumps(record)})
    with pytest.raises(VaevqMedError, match=said):
        StoredTokenizer(own).network()
    assert not (own / "ran").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rounds": 10**9}, "patient_hashes: rounds is 1000000000; expected 1 to 100000"),
        ({"method": "md5"}, "method is"),
        ({"digests": [1]}, "digests is"),
    ],
)
def test_hashes_that_are_none_are_refused(values: dict[str, Any], said: str, own: Path) -> None:
    (own / "models/model.safetensors").unlink()
    data = record_of(own)["data"]
    alter(own / "models/trained.json", data={**data, HASHES: {**data[HASHES], **values}})
    with pytest.raises(DataError, match=said):
        StoredTokenizer(own).patients  # noqa: B018


@pytest.mark.parametrize("text", ["{", "[]", "\x00", '"a"', "[" * 100_000])
def test_a_record_that_is_no_object_is_refused(text: str, own: Path) -> None:
    (own / "models/model.safetensors").unlink()
    (own / "models/trained.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trained\.json: ") as caught:
        StoredTokenizer(own)
    assert "\n" not in str(caught.value)


def test_altered_weights_are_refused(own: Path) -> None:
    path = own / "models/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="as they were packed: the file was altered, or is another bundle's"):
        read_trained(own)
    path.unlink()
    assert read_trained(own)["iteration"] == 1


# --- verify --------------------------------------------------------------------------------------------


def said_by_verify(folder: Path) -> str:
    found = CliRunner().invoke(app, ["bundle", "verify", str(folder)])
    if found.exception is None:
        return found.output
    assert isinstance(found.exception, VaevqMedError)
    assert "\n" not in str(found.exception)
    return str(found.exception)


def test_verify_tells_of_each_check(own: Path) -> None:
    lines = said_by_verify(own).splitlines()
    files = sum(path.is_file() for path in own.rglob("*")) - 1
    assert lines[0] == f"files: {files}, each as it was packed"
    assert lines[1].startswith(f"weights: those that were packed, {StoredTokenizer(CHECKPOINT).content_hash[:19]}")
    assert lines[3] == "network: an image of (1, 32, 32) gives (1, 32, 32), all finite"
    (own / "mine.txt").write_text("a file beside it is nobody's business")
    assert said_by_verify(own).splitlines() == lines


def test_verify_refuses_what_is_not_as_it_was_packed(own: Path) -> None:
    (own / "LICENSE").write_text("none")
    (own / "configs/train.json").unlink()
    assert "found 1 files missing (configs/train.json) and 1 files altered (LICENSE)" in said_by_verify(own)


def test_verify_goes_beyond_the_hashes(own: Path, tmp_path: Path) -> None:
    """Somebody who alters a file may alter its hash, too."""
    alter(own / "made_by.json", files={})
    path = own / "configs/metadata.json"
    whole = path.read_text()
    formats = json.loads(whole)["network_data_format"]
    formats["inputs"]["image"]["spatial_shape"] = [64, 64]
    alter(path, network_data_format=formats)
    assert "found images of (1, 64, 64), expected (1, 32, 32), which the network takes" in said_by_verify(own)
    path.write_text(whole)
    alter(path, task=3)
    assert "metadata.json: found task '3', expected a text" in said_by_verify(own)
    path.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != "authors"}))
    assert "metadata.json: found no authors, expected a text" in said_by_verify(own)
    path.write_text(whole)
    BundlePack("brats", tmp_path / "other", FIXTURES / "ema.pt").run()
    for name in ("model.pt", "model.safetensors", "trained.json"):
        shutil.copyfile(tmp_path / "other/models" / name, own / "models" / name)
    assert "made_by.json says" in said_by_verify(own)
    alter(own / "made_by.json", files={"../outside": "0"})
    assert "found the file '../outside', expected one inside the bundle" in said_by_verify(own)


def test_verify_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    assert "found a folder without models/model.safetensors or models/model.pt" in said_by_verify(tmp_path)
    assert "found no file, expected that of a packed bundle" in said_by_verify(tmp_path / "nowhere")
