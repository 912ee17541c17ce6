"""The tables of small studies whose rows are faked, held to what they were before there were study files."""

from __future__ import annotations

import csv
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from helpers.stores import write_checkpoint
from PIL import Image
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.study import rows as rows_module

PINNED = FIXTURES / "studies"
PATIENTS = [f"P{number}" for number in range(7) for _ in range(2)]
CONVENTIONS = {"rfid": "of a fake", "lpips": "of a fake", "gfid": "of a fake", "memorization": "near"}


def number(*parts: object) -> float:
    """A figure in [0, 1) that its names decide."""
    return zlib.crc32(" ".join(map(str, parts)).encode()) / 2**32


def fake(command: list[str], log: Path, on_line: Any) -> int:
    """Write what a command of a row leaves behind."""
    log.write_text("done\n")
    if "run" not in command:
        if command[3] == "evaluate-samples":
            evaluation = Path(command[command.index("--output-dir") + 1])
            figures = {name: {"value": number(evaluation.parts[-3:], name)} for name in ("gfid", "precision", "recall")}
            provenance = {"n": 50, "n_reference": 160, "split": "training"}
            shares = {space: {"share": number(evaluation.parts[-3:], space)} for space in ("feature", "pixel")}
            write(evaluation, figures, provenance | {"feature_weights_sha256": "ab"}, memorization=shares)
        return 0
    words = command[command.index("run") + 2 :]
    values = dict(zip(words[::2], words[1::2], strict=True))
    folder = Path(values["--output_dir"])
    who = folder.parts[-2:]
    if "training" in command:
        cost = {"parameters": int(1e6 * number(who)), "images_per_second": 100 * number(who, "speed"), "device": "cpu"}
        cost |= {"peak_memory_bytes": int(1e9 * number(who, "memory")), "peak_memory_of": "process", "iterations": 200}
        folder.joinpath("run.json").write_text(json.dumps({**cost, "bits_per_position": 12, "bits_per_pixel": 0.1875}))
        folder.joinpath("checkpoints").mkdir(exist_ok=True)
        folder.joinpath("checkpoints", "best.pt").touch()
    elif "generating" in command:
        folder.joinpath("generated").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(folder / "generated" / "000000.png")
        folder.joinpath("generated", "samples.csv").write_text("file,number,label,name\n000000.png,0,1,t1c\n")
    else:
        images = [
            {"index": i, "path": f"{i}.png", "patient": patient}
            | {name: number(who, i, name) for name in ("psnr", "ssim", "lpips")}
            for i, patient in enumerate(PATIENTS)
        ]
        gated = ("mean_bits",) if folder.parent.name.startswith("gate_") else ()
        names = ("psnr", "ssim", "lpips", "rfid", "utilization", *gated)
        figures = {name: {"value": number(who, name)} for name in names}
        soft = folder.parent.name == "softvq" or "softvq_k" in folder.parent.name
        told = {"n": len(images), "split": "test", "is_discrete": not soft or values.get("--readout") == "hard"}
        write(folder / "evaluation", figures, told, images)
    return 0


def write(
    folder: Path, figures: Any, provenance: Any, images: list[dict[str, Any]] | None = None, **further: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"summary": {"overall": figures}, "provenance": provenance, "conventions": CONVENTIONS, **further}
    folder.joinpath("metrics.json").write_text(json.dumps(record))
    if images:
        with folder.joinpath("per_image.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, [*images[0]])
            table.writeheader()
            table.writerows(images)


STUDIES = {
    "compare": [
        *("compare", "--methods", "vqgan,vaevq,softvq,mine=simvq+vlq", "--seeds", "0,1", "--published"),
        *("--steps", "200", "--overlay", "small_cpu", "--set", "batch_size=4", "--set", "mine:learning_rate=1e-3"),
        *("--set", "mine:objective#adversarial#start_step=500"),
    ],
    "ablate": ["ablate", "--published", "--images", "1000", "--checkpoint", "last"],
    "sweep": ["sweep", "--methods", "vaevq,softvq", "--num-embeddings", "64,128", "--max-epochs", "1"],
    "compare_generation": [
        *("compare-generation", "--seeds", "0,1", "--published", "--num-samples", "50", "--overlay", "small_cpu"),
        *("--generate-set", "ldm:num_steps=50", "--generate-set", "vaevq:guidance_scale=2.0"),
        *("--encode", "llamagen: --ten-crop", "--evaluate", "--neighbors 5"),
    ],
}


@pytest.fixture
def options(slice_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of every study: faked rows, no MLflow run and no pictures."""
    monkeypatch.setattr(rows_module, "call", fake)
    folders = ["--dataset-dir", str(slice_dataset), "--output-dir", str(tmp_path)]
    return [*folders, "--tracking-uri", "none", "--pictures", "0"]


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_what_they_were(name: str, options: list[str], tmp_path: Path) -> None:
    if name == "compare_generation":
        quantizer = {"_target_": "vaevq_med.networks.quantizers.VectorQuantizer", "num_embeddings": 32}
        checkpoint = write_checkpoint(tmp_path.with_suffix(".pt"), {**quantizer, "embedding_dim": 4})
        options += ["--tokenizers", f"vqgan={checkpoint},vaevq={checkpoint}"]
    done = CliRunner().invoke(app, [*STUDIES[name], *options])
    assert done.exit_code == 0, done.output
    for kind in ("md", "csv", "tex"):
        assert (tmp_path / f"table.{kind}").read_text() == (PINNED / f"{name}.{kind}").read_text(), kind
    record = json.loads((tmp_path / "results.json").read_text())["table"]
    assert record == json.loads((PINNED / f"{name}.json").read_text())


@pytest.mark.parametrize("gated", [True, False])
def test_the_mean_bits_of_a_gate_are_a_column_where_a_row_has_them(
    gated: bool, options: list[str], tmp_path: Path
) -> None:
    methods = "vaevq,gate_posterior" if gated else "vaevq,two_level_residual"
    done = CliRunner().invoke(app, ["compare", "--methods", methods, *options, "--max-epochs", "1"])
    assert done.exit_code == 0, done.output
    with (tmp_path / "table.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert ("Mean bits per position" in (tmp_path / "table.md").read_text()) == gated
    assert ("mean_bits" in table["vaevq"]) == gated
    if gated:
        assert table["vaevq"]["mean_bits"] == ""
        assert float(table["gate_posterior"]["mean_bits"]) == number(("gate_posterior", "seed_0"), "mean_bits")


def test_a_reference_adds_its_sections_to_the_same_table(options: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*STUDIES["compare"], *options, "--reference", "vaevq"])
    assert done.exit_code == 0, done.output
    before, after = (PINNED / "compare.md").read_text(), (tmp_path / "table.md").read_text()
    assert after.startswith(before)
    for heading in ("VAEVQ minus each rival", "Seeds apart"):
        assert f"## {heading}\n" in after.replace(" (paper)", ""), after
    reference = json.loads((tmp_path / "results.json").read_text())["reference"]
    assert (reference["name"], reference["unit"], reference["groups"]) == ("vaevq", "patients", 7)
    assert [rival["name"] for rival in reference["rivals"]] == ["vqgan", "softvq_hard", "mine"]
    assert {rival["figures"]["psnr"]["n"] for rival in reference["rivals"]} == {14}
    assert "reference: vaevq" in (tmp_path / "study.yaml").read_text()
