"""What ends a run that is not the code's fault: one line, exit code 2, and every file whole or as it was."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config
from helpers.bundles import evaluation_overrides, quick, run_bundle
from helpers.full_disk import fill
from torch.utils.data import get_worker_info

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.trained.pack import BundlePack
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator


def said(capsys: pytest.CaptureFixture[str], work: Callable[[], object]) -> str:
    """The one line that it ends with, after exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        work()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vaevq-med:")]
    return line


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".part", ".partial"))]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, slice_dataset: Path) -> dict[str, Any]:
    """A run whose disk was full for its second checkpoint, and for what it can do without."""
    toy = quick(toy_config(slice_dataset, tmp_path_factory.mktemp("failures") / "run"))
    toy["checkpoint_interval"] = 100
    with pytest.MonkeyPatch.context() as monkeypatch:
        fill(monkeypatch, "last.pt", "run.json", "reconstructions.png")
        with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as found:
            run_bundle("train.json", toy, run_id="training")
    toy["said"] = [line for line in stderr.getvalue().splitlines() if line.startswith("vaevq-med:")]
    toy["code"] = found.value.code
    return toy


def bare(toy: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in toy.items() if key not in ("said", "code")}


def test_a_full_disk_ends_training_in_one_line_and_leaves_the_last_good_checkpoint(stopped: dict[str, Any]) -> None:
    folder = Path(stopped["output_dir"])
    best, last = folder / "checkpoints" / "best.pt", folder / "checkpoints" / "last.pt"
    assert stopped["code"] == 2
    (line,) = stopped["said"]
    assert str(last) in line
    assert "No space left" in line
    assert f"--resume {best}" in line
    assert torch.load(best, weights_only=True)["iteration"] == 4
    assert not last.exists()
    # A picture and a record of the run are no reason to stop.
    assert not (folder / "run.json").exists()
    assert not (folder / "validation" / "reconstructions.png").exists()
    assert partial_files(folder) == []


def test_training_goes_on_from_what_the_full_disk_left(stopped: dict[str, Any]) -> None:
    best = Path(stopped["output_dir"]) / "checkpoints" / "best.pt"
    parser = run_bundle("train.json", {**bare(stopped), "max_epochs": 2, "resume": str(best)}, run_id="training")
    assert parser.get_parsed_content("train#trainer").state.iteration == 8
    assert torch.load(best.with_name("last.pt"), weights_only=True)["iteration"] == 8


def test_a_folder_that_vanishes_is_made_anew_with_its_best_checkpoint(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, evaluate = tmp_path / "run", TokenizerEvaluator.run

    def run(self: TokenizerEvaluator, global_epoch: int = 1) -> None:
        evaluate(self, global_epoch)
        if global_epoch == 2:
            shutil.rmtree(folder)

    monkeypatch.setattr(TokenizerEvaluator, "run", run)
    # The first epoch has the lowest PSNR.
    given = {**bare(stopped), "output_dir": str(folder), "max_epochs": 2, "checkpoint#mode": "min"}
    run_bundle("train.json", given, run_id="training")
    for name in ("best.pt", "last.pt"):
        assert torch.load(folder / "checkpoints" / name, weights_only=True)["iteration"] == 8


@pytest.mark.parametrize(
    ("file", "name", "told"),
    [
        ("evaluate.json", "metrics.json", "metrics.json"),
        ("inference.json", "BraTS-GLI-00002-100-t1n-z000.npy", "predictions"),
    ],
)
def test_a_full_disk_ends_evaluation_and_inference_in_one_line(
    file: str,
    name: str,
    told: str,
    stopped: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = evaluation_overrides(stopped)
    if file == "inference.json":
        del given["tracking_uri"]
    else:
        given |= {"lpips_network": None, "fid_network": None}
    fill(monkeypatch, name)
    line = said(capsys, lambda: run_bundle(file, given))
    assert told in line
    assert "No space left" in line
    assert list(Path(stopped["output_dir"]).rglob(name)) == []
    assert partial_files(Path(stopped["output_dir"])) == []


def test_a_killed_worker_ends_inference_in_one_line(
    stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(self: SliceDataset, index: int) -> None:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(SliceDataset, "__getitem__", killed)
    given = {**evaluation_overrides(stopped), "num_workers": 1}
    del given["tracking_uri"]
    assert "killed" in said(capsys, lambda: run_bundle("inference.json", given))


def test_the_last_good_checkpoint_is_named_once(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(self: TokenizerEvaluator, *_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(TokenizerEvaluator, "run", no_memory)
    given = {**bare(stopped), "output_dir": str(tmp_path / "run"), "checkpoint_interval": 3}
    line = said(capsys, lambda: run_bundle("train.json", given, run_id="training"))
    assert "memory" in line
    assert line.count("last good checkpoint") == 1
    assert line.count(str(tmp_path / "run" / "checkpoints" / "last.pt")) == 1


def test_a_full_disk_leaves_no_half_pack(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, "model.pt")
    checkpoint = Path(stopped["output_dir"]) / "checkpoints" / "best.pt"
    with pytest.raises(VaevqMedError, match="No space left"):
        BundlePack("brats", tmp_path / "pack", checkpoint).run()
    assert list(tmp_path.iterdir()) == []
