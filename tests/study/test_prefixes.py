"""Quality by how much of a code is kept: slots, stages and groups in one table, each as it is decoded by hand."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from helpers.stores import write_checkpoint
from helpers.transformers import write_slots
from torch import Tensor
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.reading import reader
from vaevq_med.networks.base import Tokenizer
from vaevq_med.study.rates.prefixes import Prefixes, prefix_counts
from vaevq_med.trained.network import StoredTokenizer

QUANTIZERS = "vaevq_med.networks.quantizers"
STAGE = {"_target_": f"{QUANTIZERS}.VectorQuantizer", "num_embeddings": 32, "embedding_dim": 4}
RVQ = {"_target_": f"{QUANTIZERS}.ResidualQuantizer", "stages": [STAGE], "num_codebooks": 3}
LEVELS = {
    "_target_": f"{QUANTIZERS}.ResidualTwoLevel",
    **{level: {**STAGE, "init": "normal"} for level in ("top", "bottom")},
    "gate": {"_target_": f"{QUANTIZERS}.gates.VarianceGate", "threshold": 1e-3},
}
MGVQ = {"_target_": f"{QUANTIZERS}.MGVQ", "num_embeddings": 16, "embedding_dim": 4, "num_codebooks": 2}
PLAIN: dict[str, Any] = {"whole": {"variational": False}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "rvq": write_checkpoint(folder / "rvq.pt", RVQ, **PLAIN),
        "mgvq": write_checkpoint(folder / "mgvq.pt", MGVQ, **PLAIN),
        "nested": write_slots(folder / "nested.pt"),
        "whole": write_slots(folder / "whole.pt", nested=False),
    }


def encoded(path: Path, dataset: Path) -> tuple[Tokenizer, Tensor, Tensor]:
    """The tokenizer, the images and their indices."""
    network = StoredTokenizer(path).network()
    read = reader(dataset, image_size=32, in_channels=1)
    slices = SliceDataset(dataset_dir=dataset, split="test", transform=read)
    images = torch.stack([slices[number]["image"] for number in range(len(slices))])
    with torch.no_grad():
        return network, images, network.encode_indices(images)


def by_hand(path: Path, dataset: Path, name: str, count: int) -> float:
    """The mean PSNR of the first parts, from indices."""
    network, images, indices = encoded(path, dataset)
    with torch.no_grad():
        first = indices[:, :, :count] if name in ("nested", "whole") else indices[..., :count]
        decoded = network.decode_indices(first)
    levels = [((one.clamp(-1, 1) + 1) * 127.5).round().double() for one in (images, decoded)]
    errors = (levels[0] - levels[1]).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(255**2 / errors)).mean())


def test_three_kinds_of_prefixes_in_one_table_and_figure(
    checkpoints: dict[str, Path], slice_dataset: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        app,
        ["prefixes", str(slice_dataset), str(tmp_path / "out"), *map(str, checkpoints.values()), "--device", "cpu"],
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out/prefixes.json").read_text())
    rows = {row["name"]: row for row in record["tokenizers"]}
    assert list(rows) == list(checkpoints)
    parts = {name: [point["parts"] for point in row["points"]] for name, row in rows.items()}
    assert parts == {"rvq": [1, 2, 3], "mgvq": [1, 2], "nested": list(range(1, 9)), "whole": [1]}
    # Positions times bits: 64 of 3 x 5, 64 of 2 x 4, and 8 of 5.
    bits = {name: row["points"][-1]["bits"] for name, row in rows.items()}
    assert bits == {"rvq": 960, "mgvq": 512, "nested": 40, "whole": 40}
    assert rows["nested"]["points"][2]["bits"] == pytest.approx(15)
    for name, count in (("rvq", 2), ("mgvq", 1), ("nested", 3), ("nested", 8)):
        (point,) = (point for point in rows[name]["points"] if point["parts"] == count)
        assert point["figures"]["psnr"]["n"] == 16
        expected = by_hand(checkpoints[name], slice_dataset, name, count)
        assert point["figures"]["psnr"]["mean"] == pytest.approx(expected, abs=1e-3)
    with (tmp_path / "out/prefixes.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 14
    assert {"psnr", "ssim", "psnr_brain"} < set(table[0])
    assert (tmp_path / "out/prefixes.png").stat().st_size > 1000
    assert "nested: SimVQ, a code of 8 parts, 16 images" in done.output
    assert "whole: SimVQ, a code of 1 part, 16 images" in done.output


@pytest.mark.parametrize("gated", [True, False])
def test_two_levels_are_the_top_code_or_all_of_them(gated: bool, slice_dataset: Path, tmp_path: Path) -> None:
    """Of 16 cells a picture, and of a share r that has bottom codes: 16 ((1 + 4 r) log2 32 + H(r)) bits on average."""
    quantizer = LEVELS if gated else {key: value for key, value in LEVELS.items() if key != "gate"}
    path = write_checkpoint(tmp_path / "levels.pt", quantizer, whole={"variational": False, "cell": 2})
    command = Prefixes(dataset=slice_dataset, output=tmp_path / "out", checkpoints=[path], device="cpu")
    (row,) = command.run().record["tokenizers"]
    _, _, indices = encoded(path, slice_dataset)
    assert indices.shape[1:] == (4, 4, 5)
    share = float((indices[..., 1] != 32).double().mean())
    assert (0.05 < share < 0.95) == gated
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share) if gated else 0
    assert [point["parts"] for point in row["points"]] == [1, 5]
    expected = [16 * 5, 16 * ((1 + 4 * share) * 5 + entropy)]
    assert [point["bits"] for point in row["points"]] == pytest.approx(expected)
    assert [point["bits_per_pixel"] * 32**2 for point in row["points"]] == pytest.approx(expected)
    of_top = row["points"][0]["figures"]["psnr"]["mean"]
    assert of_top == pytest.approx(by_hand(path, slice_dataset, "levels", 1), abs=1e-3)


def test_one_table_has_one_kind_of_images(checkpoints: dict[str, Path], slice_dataset: Path, tmp_path: Path) -> None:
    larger = write_checkpoint(tmp_path / "larger.pt", RVQ, **PLAIN, image_size=64)
    colored = write_checkpoint(tmp_path / "colored.pt", RVQ, **PLAIN, in_channels=3)
    for other, said in ((larger, "image_size 64, expected 32"), (colored, "in_channels 3, expected 1")):
        both = [checkpoints["rvq"], other]
        command = Prefixes(dataset=slice_dataset, output=tmp_path / "out", checkpoints=both, device="cpu")
        with pytest.raises(VaevqMedError, match=f"{other.name}: found {said} as of .*rvq.pt; one table takes one"):
            command.run()
    assert not (tmp_path / "out").exists()


def test_a_record_of_other_settings_is_not_replaced(
    checkpoints: dict[str, Path], slice_dataset: Path, tmp_path: Path
) -> None:
    command = Prefixes(
        dataset=slice_dataset, output=tmp_path / "out", checkpoints=[checkpoints["whole"]], device="cpu", max_items=4
    )
    record = command.run().record
    told = {"image_size": 32, "in_channels": 1, "modalities": None, "weights": "ema", "max_items": 4}
    assert {name: record[name] for name in told} == told
    assert record["any_shape"] is False
    assert command.run().record == record
    with pytest.raises(VaevqMedError, match="found prefixes of max_items 4, expected 3; choose another folder"):
        replace(command, max_items=3).run()
    with pytest.raises(VaevqMedError, match=r"found prefixes of tokenizers\.rvq unset, expected sha256"):
        replace(command, checkpoints=[checkpoints["rvq"]]).run()
    assert json.loads((tmp_path / "out/prefixes.json").read_text()) == json.loads(json.dumps(record))
    (tmp_path / "out/prefixes.json").write_text("{")
    with pytest.raises(VaevqMedError, match="found prefixes of data unset"):
        command.run()
    (tmp_path / "out/prefixes.json").unlink()
    with pytest.raises(VaevqMedError, match="found a folder with other things in it"):
        command.run()


def test_a_continuous_code_is_cut_too(slice_dataset: Path, tmp_path: Path) -> None:
    quantizer = {"_target_": f"{QUANTIZERS}.Continuous", "embedding_dim": 4}
    path = write_slots(tmp_path / "latents.pt", quantizer)
    command = Prefixes(dataset=slice_dataset, output=tmp_path / "out", checkpoints=[path], device="cpu", points=3)
    points = command.run().record["tokenizers"][0]["points"]
    assert [(point["parts"], point["bits"]) for point in points] == [(1, None), (3, None), (8, None)]
    assert len({point["figures"]["psnr"]["mean"] for point in points}) == 3


def test_numbers_of_parts() -> None:
    assert prefix_counts(1, 12) == [1]
    assert prefix_counts(128, 8) == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": 0}, "--points: found 0, expected 1 or more"),
        ({"output": FIXTURES / "simvq.pt"}, "found a file, expected a folder or nothing"),
        ({"checkpoints": [FIXTURES / "autoregressive.pt"]}, "autoregressive.pt: found a checkpoint of"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str, slice_dataset: Path, tmp_path: Path) -> None:
    whole = {"dataset": slice_dataset, "output": tmp_path / "out", "checkpoints": [FIXTURES / "simvq.pt"]}
    with pytest.raises(VaevqMedError, match=said):
        Prefixes(**{**whole, **options}).run()
    assert not (tmp_path / "out").exists()
