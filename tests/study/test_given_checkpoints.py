"""Rows of a comparison that are not trained: checkpoints as they are, of other people's tokenizers too."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config
from helpers.bundles import flags
from helpers.study_makers import make
from monai.bundle import ConfigWorkflow
from monai.networks.nets import VQVAE, AutoencoderKL

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.foreign.adopt import Adopt
from vaevq_med.foreign.registry import kind_of
from vaevq_med.study import rows as rows_module
from vaevq_med.study.command import RunStudy
from vaevq_med.study.file import check_study

VQ = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [8],
    "num_res_layers": 1,
    "num_res_channels": [8],
    "downsample_parameters": [[2, 4, 1, 1]],
    "upsample_parameters": [[2, 4, 1, 1, 0]],
    "num_embeddings": 8,
    "embedding_dim": 4,
}
KL = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": [1, 1],
    "channels": [8, 8],
    "attention_levels": [False, False],
    "latent_channels": 3,
    "norm_num_groups": 8,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}


@pytest.fixture
def foreign(tmp_path: Path) -> dict[str, Path]:
    """Two tokenizers of MONAI with random weights."""
    found = {}
    torch.manual_seed(0)
    for name, kind, network, arguments in (("vqvae", "monai-vqvae", VQVAE, VQ), ("kl", "monai-kl", AutoencoderKL, KL)):
        torch.save(network(**arguments).state_dict(), tmp_path / f"{name}_weights.pt")
        (tmp_path / f"{name}.json").write_text(json.dumps(arguments))
        options: dict[str, Any] = {"image_size": 32, "config": tmp_path / f"{name}.json"}
        options |= {"latent_range": "-3,3"} if kind == "monai-kl" else {}
        found[name] = tmp_path / f"{name}.pt"
        Adopt(kind, tmp_path / f"{name}_weights.pt", found[name], kind_of(kind).options(**options)).run()
    return found


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that rows ran, in this process."""
    found: list[str] = []

    def call(command: list[str], log: Path, on_line: Any) -> int:
        values, run_id = flags(command), command[command.index("run") + 1]
        found.append(f"{run_id} {Path(values['output_dir']).parent.name}")
        kind = "train" if run_id == "training" else "infer"
        workflow = ConfigWorkflow(config_file=values.pop("config_file"), run_id=run_id, workflow_type=kind, **values)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        log.write_text("done\n")
        return 0

    monkeypatch.setattr(rows_module, "call", call)
    return found


def study(dataset: Path, output: Path, tokenizers: str, **options: Any) -> RunStudy:
    small = toy_config(Path(), Path()) | {
        "val_interval": 1000,
        "fid_network": None,
        "objective#weights#perceptual": 0.0,
    }
    without = ("dataset_dir", "output_dir", "tracking_uri", "max_epochs")
    chosen: dict[str, Any] = {
        "kind": "compare",
        "methods": "vqgan",
        "tracking_uri": "none",
        "pictures": 2,
        "checkpoint": "last",
        "max_epochs": 1,
        "assignments": [f"{key}={value}" for key, value in small.items() if key not in without],
    }
    return make(output=output, dataset_dir=dataset, tokenizers=tokenizers, **{**chosen, **options})


def test_foreign_tokenizers_beside_ours_in_one_table(
    slice_dataset: Path, tmp_path: Path, foreign: dict[str, Path], commands: list[str]
) -> None:
    named = ",".join(f"{name}={path}" for name, path in foreign.items())
    report = study(slice_dataset, tmp_path / "out", named, seeds="0,1").run()
    assert report.failed == []
    # One row of what is given, whatever the seeds, and one of its latent without int8.
    assert commands == [
        *("training vqgan", "evaluating vqgan", "evaluating vqvae", "evaluating kl", "evaluating kl_soft"),
        *("training vqgan", "evaluating vqgan"),
    ]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    # K = 8 a position of 2 x 2 pixels; three channels of int8; nothing of what has no indices.
    assert float(table["vqvae"]["bits_per_position"]) == 3.0
    assert float(table["vqvae"]["bits_per_pixel"]) == 0.75
    assert float(table["kl"]["bits_per_position"]) == 24.0
    assert table["kl_soft"]["bits_per_position"] == ""
    # But for its codebook, which the adapter holds apart, the network's own parameters.
    own = VQVAE(**VQ)
    assert float(table["vqvae"]["parameters"]) == sum(p.numel() for p in own.parameters())
    for name in ("vqvae", "kl"):
        record = json.loads((tmp_path / "out" / name / "seed_0" / "evaluation" / "metrics.json").read_text())
        assert float(table[name]["psnr"]) == pytest.approx(record["summary"]["overall"]["psnr"]["value"])
        assert record["provenance"]["adopted"]["files"].keys() == {f"{name}_weights.pt", f"{name}.json"}
    told = (tmp_path / "out" / "table.md").read_text()
    assert "vqvae: adopted from VQVAE of MONAI (vqvae" in told.replace("\\", "")
    assert "not trained here; range of its latent given" in told
    assert (tmp_path / "out" / "reconstructions.png").is_file()
    commands.clear()
    assert study(slice_dataset, tmp_path / "out", named, seeds="0,1").run().failed == []
    assert commands == []
    foreign["vqvae"].write_bytes(foreign["kl"].read_bytes())
    with pytest.raises(VaevqMedError, match=r"found a row with .*; choose another output"):
        study(slice_dataset, tmp_path / "out", named, seeds="0,1").run()


def test_what_a_given_row_cannot_have(slice_dataset: Path, tmp_path: Path, foreign: dict[str, Path]) -> None:
    content: dict[str, Any] = {"study": "tokenizers", "output": str(tmp_path / "out")}
    given = {"name": "a", "checkpoint": str(foreign["vqvae"])}
    with pytest.raises(VaevqMedError, match=r"a with overlays and a checkpoint; expected one of them"):
        check_study({**content, "methods": [{**given, "overlays": ["vqgan"]}]}, "it")
    with pytest.raises(
        VaevqMedError, match="a with a checkpoint, whose codebook has its size; expected a study without"
    ):
        check_study({**content, "methods": [given], "sweep": {"num_embeddings": [8, 16]}}, "it")
    with pytest.raises(VaevqMedError, match="tokenizers: found 'a', expected NAME=CHECKPOINT"):
        study(slice_dataset, tmp_path / "out", "a")
    twice = f"a={foreign['vqvae']},b={foreign['vqvae']}"
    with pytest.raises(VaevqMedError, match=r"found a and b, two names of .*vqvae.pt with the same settings"):
        _ = study(slice_dataset, tmp_path / "out", twice).plan
    with pytest.raises(VaevqMedError, match="found no checkpoint, expected one written by training"):
        _ = study(slice_dataset, tmp_path / "out", f"a={tmp_path / 'none.pt'}").plan
    with pytest.raises(VaevqMedError, match=r"found the unknown id 'learning_rate', expected one of evaluate\.json"):
        _ = study(slice_dataset, tmp_path / "out", f"a={foreign['vqvae']}", assignments=["a:learning_rate=1e-3"]).plan
