"""The codec on a GPU: what was compressed on either device decodes on the other, to the same indices.

``python -m pytest -m gpu tests/codec/test_codec_gpu.py`` on a machine with a GPU; elsewhere all are skipped, unless
``VAEVQ_TEST_DEVICE=cpu`` asks for a dry run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.index_stacks import random_model
from helpers.scans import CONTRASTS, write_case
from helpers.stores import write_checkpoint

from vaevq_med.codec.case import CompressedCase, read_description
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.work import compress, decompress

DEVICE = os.environ.get("VAEVQ_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
CASE = "BraTS-GLI-00000-000"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("cases"), CASE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt", modalities=[*CONTRASTS])


def compressed(scans: Path, checkpoint: Path, output: Path, device: str, **options: Any) -> bytes:
    compress(scans, output, CompressOptions(checkpoint=checkpoint, device=device, batch_size=4, **options)).run()
    return output.read_bytes()


def volumes(file: Path, checkpoint: Path, output: Path, device: str, **options: Any) -> dict[str, np.ndarray]:
    decompress(file, output, DecompressOptions(checkpoint=checkpoint, device=device, batch_size=4, **options)).run()
    return {path.name: np.asarray(nib.load(path).dataobj).astype(np.int64) for path in sorted(output.glob("*.nii.gz"))}


@pytest.mark.parametrize("coder", ["adaptive", "context"])
@pytest.mark.parametrize("maker", [DEVICE, "cpu"])
def test_a_file_decodes_alike_on_both_devices(
    coder: str, maker: str, scans: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = None
    if coder == "context":
        content = compressed(scans, checkpoint, tmp_path / "plain.vvq", "cpu")
        model = tmp_path / "context.safetensors"
        described = read_description("", content)["tokenizer"]
        replace(random_model(0, described["num_embeddings"]), tokenizer=described["hash"]).save(model)
    file = tmp_path / "case.vvq"
    compressed(scans, checkpoint, file, maker, coder=coder, model=model)
    found = {device: volumes(file, checkpoint, tmp_path / device, device, model=model) for device in {DEVICE, "cpu"}}
    assert [*found[DEVICE]] == [f"{CASE}-{contrast}.nii.gz" for contrast in sorted(CONTRASTS)]
    for name, voxels in found["cpu"].items():
        original = np.asarray(nib.load(scans / name).dataobj)
        # Sums of floating point differ by some 1e-6 of the window, so an integer by one, and that in few voxels.
        away = np.abs(found[DEVICE][name] - voxels)
        assert away.max() <= 1
        assert (away > 0).mean() < 0.01
        assert not found[DEVICE][name][original == 0].any()


def test_the_indices_that_are_coded_are_those_of_the_other_device_but_for_ties(
    scans: Path, checkpoint: Path, tmp_path: Path
) -> None:
    cases = [
        CompressedCase.from_bytes("", compressed(scans, checkpoint, tmp_path / f"{number}.vvq", device))
        for number, device in enumerate((DEVICE, "cpu"))
    ]
    for first, second in zip(cases[0].streams, cases[1].streams, strict=True):
        assert (first.indices != second.indices).mean() < 0.01
    for first, second in zip(cases[0].contrasts, cases[1].contrasts, strict=True):
        assert np.array_equal(first.mask, second.mask)
        assert (first.window, first.background) == (second.window, second.background)
