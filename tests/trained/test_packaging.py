"""The wheel, the packed bundle, and what MONAI's own checks say of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, toy_config
from helpers.bundles import evaluation_overrides, run_bundle
from monai.bundle import ckpt_export, onnx_export, verify_metadata, verify_net_in_out
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.trained.network import StoredTokenizer

SCHEMA = {
    "type": "object",
    "required": [
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
        *("task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": {
        "version": {"type": "string"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {
                "additionalProperties": {
                    "type": "object",
                    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
                }
            },
        },
    },
}


@pytest.mark.slow
def test_the_wheel_carries_bundles_and_recipes_under_one_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"vaevq_med", "vaevq_med-0.1.0.dist-info"}
    code = (
        "from vaevq_med.core.resources import bundle_path, recipe_path, study_path; "
        "print(bundle_path('brats') / 'train.json', recipe_path('brats24/axial_256'), study_path('table1'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [Path(path).is_relative_to(tmp_path / "site" / "vaevq_med") for path in found] == [True] * 3
    assert all(Path(path).is_file() for path in found)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, slice_dataset: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("packed")
    overrides = {**toy_config(slice_dataset, folder / "run"), "max_epochs": 1}
    run_bundle("train.json", overrides, run_id="training")
    checkpoint = folder / "run" / "checkpoints" / "last.pt"
    result = CliRunner().invoke(app, ["bundle", "pack", "brats", str(folder / "zoo"), "--checkpoint", str(checkpoint)])
    assert result.exit_code == 0, result.output
    return folder / "zoo", overrides


def test_monai_verifies_and_exports_a_packed_bundle(packed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = packed
    metadata = str(root / "configs" / "metadata.json")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=metadata, filepath=str(tmp_path / "schema.json"))
    shared = {
        "net_id": "network_def",
        "meta_file": metadata,
        "config_file": str(root / "configs" / "inference.json"),
        "bundle_root": str(root),
    }
    verify_net_in_out(**shared, device="cpu")
    export = {**shared, "ckpt_file": str(root / "models" / "model.pt"), "use_trace": True}
    ckpt_export(**export, filepath=str(tmp_path / "model.ts"), input_shape=[1, 1, 32, 32])
    onnx_export(**export, filepath=str(tmp_path / "model.onnx"), input_shape=[1, 1, 32, 32])
    images = 2 * torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.inference_mode():
        expected = StoredTokenizer(root).network().eval()(images)
        scripted = torch.jit.load(tmp_path / "model.ts")(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scripted, expected, rtol=0, atol=1e-5)
    evaluator = ReferenceEvaluator(str(tmp_path / "model.onnx"))  # in NumPy, operator by operator
    (computed,) = evaluator.run(None, {evaluator.input_names[0]: images.numpy()})
    np.testing.assert_allclose(computed, expected.numpy(), rtol=0, atol=1e-4)


def test_a_packed_bundle_infers_what_its_run_does(
    packed: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.bundle import ConfigWorkflow

    root, overrides = packed
    common = {k: v for k, v in evaluation_overrides(overrides).items() if k != "tracking_uri"}
    own = {**common, "checkpoint_path": str(Path(overrides["output_dir"]) / "checkpoints" / "last.pt")}
    run_bundle("inference.json", {**own, "output_dir": str(tmp_path / "own")})
    monkeypatch.chdir(root)
    workflow = ConfigWorkflow(
        config_file="configs/inference.json",
        meta_file="configs/metadata.json",
        logging_file="configs/logging.conf",
        workflow_type="infer",
        **{**common, "output_dir": str(tmp_path / "zoo")},
    )
    workflow.initialize()
    workflow.run()
    files = sorted(p.relative_to(tmp_path / "own") for p in (tmp_path / "own").rglob("*.npy"))
    assert len(files) == 16
    assert all((tmp_path / "own" / f).read_bytes() == (tmp_path / "zoo" / f).read_bytes() for f in files)


def test_pack_refuses_a_folder_in_use(packed: tuple[Path, dict[str, Any]]) -> None:
    root, overrides = packed
    checkpoint = str(Path(overrides["output_dir"]) / "checkpoints" / "last.pt")
    result = CliRunner().invoke(app, ["bundle", "pack", "brats", str(root), "--checkpoint", checkpoint])
    assert isinstance(result.exception, VaevqMedError)
    assert "found something there" in str(result.exception)
    made = json.loads((root / "made_by.json").read_text())
    assert made["network"] == StoredTokenizer(checkpoint).content_hash
    assert made["trained_on"]["content_hash"] == "sha256:toy"
