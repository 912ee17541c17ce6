"""The model card: filled from the run, honest about what is not known, without a patient's name."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FIXTURES, toy_config, write_slice_dataset
from helpers.bundles import quick, run_bundle

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import file_sha256
from vaevq_med.trained import StoredTokenizer
from vaevq_med.trained.card import foreign_packages
from vaevq_med.trained.figures import Evaluation
from vaevq_med.trained.pack import BundlePack

CHECKPOINT = FIXTURES / "simvq.pt"


def card_of(folder: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    """Its front matter, its tables' rows of two columns, and all of it."""
    text = (folder / "README.md").read_text()
    assert text == (folder / "docs/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    rows = dict(re.findall(r"^\| ([^|\n]+) \| ((?:[^|\n]|\\\|)+) \|$", body, flags=re.MULTILINE))
    return yaml.safe_load(front), rows, body


def record(folder: Path, values: list[tuple[str, float]], **provenance: Any) -> Path:
    """A record of an evaluation, of a patient and a PSNR an image."""
    mean = sum(value for _, value in values) / len(values)
    overall = {"psnr": {"value": mean, "std": 1.0, "n": len(values)}, "utilization": {"value": 0.5, "n": len(values)}}
    content = {
        "summary": {"overall": {**overall, "lpips": {"value": None, "n": 0}}},
        "provenance": {"split": "test", "split_hash": "sha256:toy", **provenance},
        "conventions": {"psnr": "dB | range_1"},
        "figures": [{"name": "psnr", "title": "PSNR (dB)"}],
    }
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(content))
    with (folder / "per_image.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["patient", "psnr"], *values])
    return folder / "metrics.json"


def test_it_says_what_the_network_is_and_what_is_unknown(tmp_path: Path) -> None:
    BundlePack("brats", tmp_path / "zoo", CHECKPOINT).run()
    front, rows, body = card_of(tmp_path / "zoo")
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "vaevq_med"
    assert "monai" in front["tags"]
    network = StoredTokenizer(CHECKPOINT).network()
    told = {
        "quantizer": "`SimVQ`",
        "codewords in a codebook, K": "8",
        "channels of the latent, D": "4",
        "indices at a position, G": "1",
        "input: channels, sides, range": "1, 32 x 32, [-1, 1]",
        "downsampling factor, f": "2 x 2",
        "bits a position": "3",
        "bits a pixel": "0.75",
        "parameters": f"{sum(parameter.numel() for parameter in network.parameters()):,}",
        "hash of definition and weights": f"`{StoredTokenizer(CHECKPOINT).content_hash}`",
        "SHA-256 of `models/model.pt`": f"`{file_sha256(tmp_path / 'zoo/models/model.pt')}`",
        "split hash": "`sha256:toy`",
        "steps": "1",
        "seed": "0",
        "patients of the training": "1",
        # The fixture is older than these.
        "name of the data set": "unknown",
        "recipe": "unknown",
        "hardware": "unknown",
        "time of its steps": "unknown",
    }
    assert {name: rows.get(name) for name in told} == told
    assert "| training | unknown | unknown |" in body
    assert "| `network_def#encoder#num_channels` | `4` | `128` |" in body
    assert "Unknown: the bundle was packed without a record" in body
    assert "not a medical device" in body
    assert "dataset_dir" not in body.replace("--dataset_dir DATA", "")


def test_it_is_filled_from_a_run_of_today(tmp_path: Path) -> None:
    dataset = write_slice_dataset(tmp_path / "data", slices=2)
    manifest = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**manifest, "recipe": {"name": "mine_<64>"}}))
    overrides = quick(toy_config(dataset, tmp_path / "run"))
    run_bundle("train.json", overrides, "vqgan", run_id="training")
    BundlePack("brats", tmp_path / "zoo", tmp_path / "run/checkpoints/best.pt").run()
    _, rows, body = card_of(tmp_path / "zoo")
    assert rows["method"] == "VQGAN"
    assert rows["name of the data set"] == "toy"
    assert rows["recipe"] == r"mine\_\<64\>"
    assert rows["steps"] == "2"  # eight images in batches of four
    assert rows["images seen"] == "8"
    assert rows["hardware"] == "cpu"
    assert "| training | 8 | 1 |\n| validation | 8 | 1 |\n| test | 8 | 1 |" in body
    assert "BraTS-GLI-0000" not in body
    assert str(tmp_path) not in (tmp_path / "zoo/models/trained.json").read_text() + body
    stored = StoredTokenizer(tmp_path / "zoo")
    assert stored.data["counts"]["test"] == {"images": 8, "patients": 1}
    assert stored.spent["images"] == 8


def test_figures_have_intervals_over_patients_by_hand(tmp_path: Path) -> None:
    """Of two patients, a draw has one, the other, or both: the ends of the interval are their means."""
    own = {"checkpoint_sha256": file_sha256(CHECKPOINT), "weights": "ema"}
    metrics = record(tmp_path / "a", [("anna", 20.0), ("anna", 24.0), ("bert", 30.0), ("bert", 34.0)], **own)
    BundlePack("brats", tmp_path / "zoo", CHECKPOINT, metrics=metrics).run()
    front, _, body = card_of(tmp_path / "zoo")
    assert front["metrics"] == ["psnr", "utilization"]
    assert "| PSNR (dB) | 27 | 22 to 32 | 4 |" in body
    assert "| utilization | 0.5 | none | 4 |" in body
    assert "95 % of 10,000 draws of patients" in body
    assert r"- psnr: dB \| range\_1" in body
    assert "anna" not in body
    assert json.loads((tmp_path / "zoo/configs/metadata.json").read_text())["eval_metrics"]["psnr"] == 27.0


def test_without_rows_or_with_those_of_other_figures_there_are_no_intervals(tmp_path: Path) -> None:
    metrics = record(tmp_path / "a", [("anna", 20.0), ("bert", 30.0)])
    (metrics.parent / "per_image.csv").write_text("patient,psnr\nanna,1.0\nbert,2.0\n")
    assert Evaluation.read(metrics).unit == ""
    (metrics.parent / "per_image.csv").unlink()
    assert [figure.value for figure in Evaluation.read(metrics).figures] == [25.0, 0.5]


@pytest.mark.parametrize(
    "provenance", [{"checkpoint_sha256": "0" * 64}, {"weights": "network"}], ids=["checkpoint", "weights"]
)
def test_figures_of_other_weights_are_refused(provenance: dict[str, Any], tmp_path: Path) -> None:
    metrics = record(tmp_path / "a", [("anna", 20.0)], **provenance)
    with pytest.raises(VaevqMedError, match="which is packed; evaluate this checkpoint") as caught:
        BundlePack("brats", tmp_path / "zoo", CHECKPOINT, metrics=metrics).run()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"summary": {"overall": {"psnr": 3}}}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(VaevqMedError, match=r"found no evaluation's record .*, expected a metrics\.json"):
        Evaluation.read(tmp_path / "metrics.json")


def test_texts_of_a_checkpoint_are_only_texts(tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    config = json.loads(state["config"])
    config |= {"_title_": "<b>Best</b>\n# of | all", "learning_rate": "$print('ran')", "experiment": "/home/me/secret"}
    state["config"] = json.dumps(config)
    torch.save(state, tmp_path / "a.pt")
    BundlePack("brats", tmp_path / "zoo", tmp_path / "a.pt").run()
    _, rows, body = card_of(tmp_path / "zoo")
    assert rows["method"].startswith(r"\<b\>Best\</b\> # of \|")
    assert "\n# of" not in body
    for path in (tmp_path / "zoo").rglob("*"):
        assert path.is_dir() or b"/home/me" not in path.read_bytes(), path


def test_what_a_training_started_from_is_told(tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    state["data"]["started_from"] = {"file": "photographs_best.pt", "sha256": "ab12"}
    torch.save(state, tmp_path / "a.pt")
    for name, checkpoint in (("zoo", tmp_path / "a.pt"), ("other", CHECKPOINT)):
        BundlePack("brats", tmp_path / name, checkpoint).run()
    assert card_of(tmp_path / "zoo")[1]["started from"] == r"photographs\_best.pt, SHA-256 `ab12`"
    assert card_of(tmp_path / "other")[1]["started from"] == "no file is recorded"


def test_weights_of_others_keep_their_license(tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    told = {"title": "VQModel of diffusers", "license": "theirs; see the card", "files": {"a.safetensors": "ab12"}}
    state["data"] = {"adopted": told}
    torch.save(state, tmp_path / "a.pt")
    BundlePack("brats", tmp_path / "zoo", tmp_path / "a.pt").run()
    front, _, body = card_of(tmp_path / "zoo")
    assert front["license"] == "other"
    assert "taken over: VQModel of diffusers, of a.safetensors (SHA-256 `ab12`)" in body
    assert "Their license: theirs; see the card. `LICENSE` is that of the code of vaevq_med alone." in body
    assert "Code and weights" not in body
    assert json.loads((tmp_path / "zoo/configs/metadata.json").read_text())["license"] == told["license"]


def test_packages_of_others_are_found_in_a_definition() -> None:
    definition = {"_target_": "vaevq_med.networks.A", "parts": [{"_target_": "mine.B"}, 3], "c": {"_target_": "a.b.C"}}
    assert foreign_packages(definition) == ["a", "mine"]
