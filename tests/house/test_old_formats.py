"""Files of every format that a release wrote, of which ``test_pins.py`` has others, are read by the code of today.

The files and what they hold are those of ``tests/fixtures/make_formats.py``.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES

from vaevq_med.codec.case import CompressedCase
from vaevq_med.codec.coders.context_model import load_context_model
from vaevq_med.tokens.store import TokenDataset, load_token_store
from vaevq_med.trained import StoredSegmenter, StoredTokenizer

TOLD: dict[str, Any] = json.loads((FIXTURES / "formats.json").read_text())
SIMVQ = json.loads((FIXTURES / "pins.json").read_text())["content_hash"]["simvq"]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script that wrote the fixtures."""
    spec = importlib.util.spec_from_file_location("make_formats", FIXTURES / "make_formats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_format_has_its_file(make: ModuleType) -> None:
    assert set(TOLD) == set(make.MAKERS)
    assert all((FIXTURES / name).exists() for name in (*TOLD, "packed_v1"))


@pytest.mark.parametrize(
    "form", ["packed_v1", "packed_v1/models/model.pt", "packed_v2", "packed_v2/models/model.safetensors"]
)
def test_packed_bundles(form: str) -> None:
    stored = StoredTokenizer(FIXTURES / form)
    assert stored.content_hash == SIMVQ
    assert (stored.iteration, stored.value("image_size"), stored.shape) == (1, 32, "square")
    assert stored.data["split_hash"] == "sha256:toy"
    # The first did not say of whom it was.
    assert len(stored.patients) == (0 if "v1" in form else 1)
    assert all(parameter.isfinite().all() for parameter in stored.network().parameters())


def test_the_configuration_of_an_old_packed_bundle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the settings to the checkpoint itself, which the configurations of today leave to ``trained.json``."""
    from monai.bundle import ConfigWorkflow

    monkeypatch.chdir(FIXTURES / "packed_v1")
    overrides = {
        **{"dataset_dir": str(FIXTURES / "slices"), "output_dir": str(tmp_path), "tracking_uri": "none"},
        **{"device": "cpu", "num_workers": 0, "lpips_network": None, "fid_network": None, "split": "training"},
    }
    workflow = ConfigWorkflow(config_file="configs/evaluate.json", workflow_type="infer", **overrides)
    workflow.initialize()
    workflow.run()
    found = workflow.parser.get_parsed_content("evaluator").state.metrics
    expected = json.loads((FIXTURES / "pins.json").read_text())["evaluation"]
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=1e-4)


def test_a_segmentation_network() -> None:
    stored = StoredSegmenter(FIXTURES / "segmenter.pt")
    assert stored.content_hash == TOLD["segmenter.pt"]["content_hash"]
    assert stored.contrasts == ("t1n", "t1c", "t2w", "t2f")
    assert all(parameter.isfinite().all() for parameter in stored.network().parameters())


def test_a_context_model_of_the_codec() -> None:
    path = FIXTURES / "context_model.safetensors"
    assert zlib.crc32(path.read_bytes()) == TOLD["context_model.safetensors"]["crc32"]
    assert load_context_model(path).tokenizer == SIMVQ


def test_a_compressed_case_of_volumes(make: ModuleType) -> None:
    case = CompressedCase.from_bytes("case_v2.vvq", (FIXTURES / "case_v2.vvq").read_bytes())
    assert make.indices_of(case) == TOLD["case_v2.vvq"]["indices"]
    assert [contrast.name for contrast in case.contrasts] == ["t1n", "t1c"]


def test_a_data_set_of_photographs(make: ModuleType) -> None:
    assert make.pixels_of(FIXTURES / "pictures") == pytest.approx(TOLD["pictures"]["pixels"], abs=1e-3)


def test_a_token_store_of_volumes() -> None:
    store = load_token_store(FIXTURES / "tokens_volumes")
    assert store.content_hash == TOLD["tokens_volumes"]["content_hash"]
    array = np.ascontiguousarray(store.array("training"))
    assert zlib.crc32(array.tobytes()) == TOLD["tokens_volumes"]["crc32"]
    assert TokenDataset(tokens_dir=FIXTURES / "tokens_volumes", split="training")[0]["indices"].ndim == 4
