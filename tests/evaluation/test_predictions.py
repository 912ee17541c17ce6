"""What inference leaves in a folder: files of one network, of one data set, and a note that says so."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from helpers.bundles import run_bundle
from torch.utils.data import DataLoader

from vaevq_med import __version__
from vaevq_med.evaluation.predictions import PredictionWriter
from vaevq_med.evaluation.report import EvaluationReport
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of an inference of two test slices."""
    return {
        **{"checkpoint_path": str(FIXTURES / "simvq.pt"), "dataset_dir": str(FIXTURES / "slices")},
        **{"output_dir": str(tmp_path), "device": "cpu", "num_workers": 0, "max_items": 2, "write": "indices"},
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_bundle("inference.json", overrides)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_has_the_files_of_one_network(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "predictions" / "test"
    run_bundle("inference.json", settings)
    first, note = contents(folder), json.loads((folder / "made_by.json").read_text())
    assert len(first) == 3
    hashes = [hashlib.sha256((FIXTURES / f"{name}.pt").read_bytes()).hexdigest() for name in ("simvq", "ema")]
    assert (note["checkpoint_sha256"], note["version"], note["checkpoint"]) == (hashes[0], __version__, "simvq.pt")
    assert note["data"] == json.loads((FIXTURES / "slices" / "dataset.json").read_text())["content_hash"]
    # The same goes on, with more items too, and rewrites what is there alike.
    run_bundle("inference.json", {**settings, "max_items": 4})
    more = contents(folder)
    assert len(more) == 5
    assert {name: more[name] for name in first} == first
    # Another network is refused before anything is written, and replaces all of it where it may.
    other = {**settings, "checkpoint_path": str(FIXTURES / "ema.pt")}
    said = refusal(other, capsys)
    assert note["weights"][:40] in said
    assert "--overwrite True" in said
    assert contents(folder) == more
    run_bundle("inference.json", {**other, "overwrite": True})
    assert len(contents(folder)) == 3
    assert json.loads((folder / "made_by.json").read_text())["checkpoint_sha256"] == hashes[1]


def test_other_data_are_of_another_maker_and_a_copy_is_not(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_bundle("inference.json", settings)
    resliced = tmp_path / "resliced"
    shutil.copytree(FIXTURES / "slices", resliced)
    before = contents(tmp_path)
    run_bundle("inference.json", {**settings, "dataset_dir": str(resliced)})
    content = json.loads((resliced / "dataset.json").read_text())
    (resliced / "dataset.json").write_text(json.dumps({**content, "content_hash": "sha256:resliced"}))
    assert "data sha256:" in refusal({**settings, "dataset_dir": str(resliced)}, capsys)
    after = contents(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"resliced/dataset.json"}


def test_what_files_depend_on(tmp_path: Path) -> None:
    stored = StoredTokenizer(FIXTURES / "simvq.pt")
    network = stored.network()
    images = SliceDataset(dataset_dir=FIXTURES / "slices", split="test", stack_modalities=True)

    def depends(stored: StoredTokenizer | None = stored, **settings: Any) -> dict[str, Any]:
        loader: Any = DataLoader(images, batch_size=1)
        engine = TokenizerEvaluator(device="cpu", val_data_loader=loader, network=network, **settings)
        writer = PredictionWriter(output_dir=tmp_path, dataset_dir=FIXTURES / "slices", stored=stored)
        return dict(writer.maker(engine).depends)

    plain = depends()
    assert plain["channels"] == ["t1n", "t1c", "t2w", "t2f"]
    assert depends(seed=1) == plain  # nothing is drawn
    found = [plain, depends(quantize="sample"), depends(quantize="sample", seed=1), depends(precision="bf16")]
    assert len({json.dumps(one) for one in found}) == 4
    # A packed bundle of before names no checkpoint: the weights alone tell networks apart.
    assert depends(None) == plain
    next(network.parameters()).data += 1
    assert depends(None)["weights"] != plain["weights"]


def test_a_record_never_stands_beside_rows_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(value: float) -> EvaluationReport:
        overall = {"psnr": {"value": value, "n": 1}}
        return EvaluationReport({"overall": overall}, [{"psnr": value}], torch.zeros(1, 1))

    (tmp_path / "worst.png").write_text("of an earlier one")
    report(1).save(tmp_path)
    before = contents(tmp_path)
    # A disk that is full while the new one is written: the earlier record is whole.
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationReport, "_write_rows", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            report(2).save(tmp_path, beside=["worst.png"])
    assert contents(tmp_path) == before
    # A kill while it is put in place: no figures stand there.
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed_at("metrics.csv", os.replace))
        with pytest.raises(KeyboardInterrupt):
            report(2).save(tmp_path, beside=["worst.png"])
    assert {*contents(tmp_path)} == {"per_image.csv", "metrics.csv"}
    report(3).save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["summary"]["overall"]["psnr"]["value"] == 3


def killed_at(name: str, replace: Callable[..., None]) -> Callable[..., None]:
    def replaced(source: Path, target: Path) -> None:
        if Path(target).name == name and Path(source).parent != Path(target).parent:
            raise KeyboardInterrupt
        replace(source, target)

    return replaced


def test_files_of_which_nothing_is_known_are_not_added_to(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "predictions" / "test" / "indices" / "images" / "old.npy"
    old.parent.mkdir(parents=True)
    np.save(old, np.zeros(3))
    (old.parent / "notes.txt").write_text("mine")
    assert "unset" in refusal(settings, capsys)
    run_bundle("inference.json", {**settings, "overwrite": True})
    assert not old.exists()
    assert (old.parent / "notes.txt").exists()
