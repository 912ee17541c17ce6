"""``vaevq-med compare``, ``ablate`` and ``sweep`` at toy size; the rows run the real bundle, in this process."""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLE, toy_config
from helpers.bundles import flags
from helpers.study_makers import make
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.cli.study import status_table
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.study import rows as rows_module
from vaevq_med.study.bundle import Bundle
from vaevq_med.study.command import RunStudy
from vaevq_med.study.file import Budget, read_study
from vaevq_med.study.rows import STATE, RowState, call, error_line, last_line
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.training.config import check_config

ABLATION = ["ablation_m0", "simvq", "ablation_m1", "ablation_m2", "ablation_m3", "ablation_full"]


class Runner:
    """Runs the commands of rows in this process, and notes them."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fail: dict[str, str] = {}
        self.interrupt_at = 0

    def __call__(self, command: list[str], log: Path, on_line: Any) -> int:
        self.commands.append(command)
        if len(self.commands) == self.interrupt_at:
            raise KeyboardInterrupt
        values = flags(command)
        for name, said in self.fail.items():
            if f"/{name}/" in values["output_dir"]:
                log.write_text(f"$ {shlex.join(command)}\nTraceback\nvaevq-med: {said}\n")
                return 2
        run_id = command[command.index("run") + 1]
        files = values.pop("config_file")
        workflow = ConfigWorkflow(
            config_file=files, run_id=run_id, workflow_type="train" if run_id == "training" else "infer", **values
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        log.write_text("done\n")
        on_line("done")
        return 0

    def trained(self) -> list[str]:
        """Folders that training commands named."""
        return ["/".join(Path(flags(c)["output_dir"]).parts[-2:]) for c in self.commands if "training" in c]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    fake = Runner()
    monkeypatch.setattr(rows_module, "call", fake)
    return fake


def assignments(*without: str) -> list[str]:
    """Overrides of toy size, without what takes seconds: rFID, validation pictures."""
    small = toy_config(Path(), Path())
    small |= {"val_interval": 1000, "fid_network": None, "objective#weights#perceptual": 0.0}
    without += ("dataset_dir", "output_dir", "tracking_uri", "max_epochs")
    return [f"{key}={value}" for key, value in small.items() if key not in without]


def toy(dataset: Path, output: Path, **options: Any) -> RunStudy:
    """Methods at toy size, one epoch, untracked."""
    chosen = {"kind": "compare", "methods": "vqgan,vaevq", "tracking_uri": "none", "pictures": 2, "checkpoint": "last"}
    chosen |= {"assignments": assignments()} | ({} if {"steps", "images"} & {*options} else {"max_epochs": 1})
    return make(output=output, dataset_dir=dataset, **{**chosen, **options})


@pytest.mark.slow
def test_a_comparison_from_rows_to_tables(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    seen: list[str] = []
    command = toy(
        slice_dataset,
        tmp_path / "out",
        tracking_uri=uri,
        published=True,
        on_update=lambda states: seen.append(" ".join(state.status for state in states)),
    )
    report = command.run()
    assert report.failed == []
    assert list(dict.fromkeys(seen)) == [
        *("training waiting", "evaluating waiting", "finished waiting"),
        *("finished training", "finished evaluating", "finished finished"),
    ]
    assert {path.name for path in report.files} == {
        *("table.md", "table.csv", "table.tex", "results.json", "utilization.png", "reconstructions.png")
    }
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    for name, overlay in (("vqgan", "vqgan"), ("vaevq", "paper")):
        row = tmp_path / "out" / name / "seed_0"
        measured = json.loads((row / "evaluation/metrics.json").read_text())["summary"]["overall"]
        for metric in ("psnr", "ssim", "lpips", "utilization", "perplexity"):
            assert float(table[name][metric]) == pytest.approx(measured[metric]["value"]), metric
        checkpoint = read_checkpoint(row / "checkpoints" / "last.pt")
        # K = 32 is 5 bits for each 2 x 2 pixels; buffers, which nothing trains, are no parameters.
        assert float(table[name]["bits_per_position"]) == 5.0
        assert float(table[name]["bits_per_pixel"]) == 1.25
        frozen = sum(value.numel() for key, value in checkpoint["network"].items() if key.endswith("basis"))
        total = sum(value.numel() for value in checkpoint["network"].values())
        assert float(table[name]["parameters"]) == total - frozen
        assert float(table[name]["images_per_second"]) > 0
        assert float(table[name]["peak_memory_bytes"]) > 1e7
        assert table[name]["overlays"] == overlay
        cost = json.loads((row / "run.json").read_text())
        assert (cost["iterations"], cost["images"]) == (4, 16)
    assert table["vqgan"]["utilization_paper"] == "3.4"
    assert "one patient" in (tmp_path / "out" / "table.md").read_text()
    with Image.open(tmp_path / "out" / "reconstructions.png") as picture:
        assert picture.size[1] > picture.size[0]
    client = MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "vaevq_med brats")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["compare vqgan, vaevq"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["vaevq/psnr"] == pytest.approx(float(table["vaevq"]["psnr"]))
    for child in ("vqgan seed 0", "vaevq seed 0"):
        assert runs[child].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "table.md" in {item.path for item in client.list_artifacts(parent.info.run_id)}

    # The same command trains nothing, keeps the rows and the MLflow run, and writes the same table.
    before = len(runner.commands)
    again = command.run()
    assert [state.status for state in again.states] == ["kept", "kept"]
    assert len(runner.commands) == before
    assert again.table == report.table
    assert len(client.search_runs([experiment.experiment_id])) == 3

    # Another budget, another seed's overrides or a changed overlay do not mix with it.
    for changed, said in (
        ({"max_epochs": 2}, "1 epoch, expected 2 epochs"),
        ({"assignments": [*assignments(), "ema_decay=0.5"]}, "ema_decay unset, expected 0.5"),
        ({"checkpoint": "best"}, "last, expected best"),
    ):
        with pytest.raises(VaevqMedError, match=said) as refused:
            toy(slice_dataset, tmp_path / "out", **changed).run()
        assert "\n" not in str(refused.value)


def test_an_interrupted_comparison_goes_on(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    runner.interrupt_at = 3  # the second row's training
    command = toy(slice_dataset, tmp_path / "out", pictures=0)
    with pytest.raises(KeyboardInterrupt):
        command.run()
    assert json.loads((tmp_path / "out/vqgan/seed_0/row.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "out/vaevq/seed_0/row.json").read_text())["status"] == "started"
    stamp = (tmp_path / "out/vqgan/seed_0/checkpoints/last.pt").stat().st_mtime_ns
    runner.commands.clear()
    runner.interrupt_at = 0
    report = command.run()
    assert runner.trained() == ["vaevq/seed_0"]
    assert [state.status for state in report.states] == ["kept", "finished"]
    assert (tmp_path / "out/vqgan/seed_0/checkpoints/last.pt").stat().st_mtime_ns == stamp
    # A method more keeps the two; one whose overlay has changed since does not.
    report = toy(slice_dataset, tmp_path / "out", pictures=0, methods="vqgan,vaevq,simvq").run()
    assert runner.trained() == ["vaevq/seed_0", "simvq/seed_0"]
    record = tmp_path / "out/vqgan/seed_0/row.json"
    changed = json.loads(record.read_text())
    changed["settings"]["train"]["objective"]["weights"]["commitment"] = 0.1
    changed["hash"] = "0" * 64
    record.write_text(json.dumps(changed))
    with pytest.raises(VaevqMedError, match=r"commitment 0.1, expected 0.25; choose another output"):
        command.run()


def test_a_failing_row_is_reported_and_the_others_go_on(
    runner: Runner, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.fail = {"vqgan": "iteration 3: found loss = nan, expected finite numbers"}
    command = toy(slice_dataset, tmp_path / "out", pictures=1)
    report = command.run()
    assert [state.status for state in report.states] == ["failed", "finished"]
    (failed,) = report.failed
    assert failed.detail == ("training ended with exit code 2: iteration 3: found loss = nan, expected finite numbers")
    assert failed.log == tmp_path / "out/vqgan/seed_0/training.log"
    assert "Missing: vqgan seed 0" in report.table
    # The next call tries it again.
    runner.fail = {}
    assert [state.status for state in command.run().states] == ["finished", "kept"]


def test_the_command_line_says_what_failed(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    runner.fail = {"vqgan": "out of luck"}
    command = ["compare", "--methods", "vqgan", "--dataset-dir", str(slice_dataset), "--tracking-uri", "none"]
    done = CliRunner().invoke(app, [*command, "--output-dir", str(tmp_path / "out"), "--max-epochs", "1"])
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if line.startswith("vaevq-med:")]
    assert lines == [
        "vaevq-med: vqgan seed 0: training ended with exit code 2: out of luck; "
        f"see {tmp_path / 'out/vqgan/seed_0/training.log'}"
    ]
    assert not (tmp_path / "out" / "table.md").exists()


def test_two_calls_do_not_train_a_row_twice(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    command = toy(slice_dataset, tmp_path / "out", pictures=0)
    with (
        OutputFolder(tmp_path / "out", STATE, "compare", "rows").lock(),
        pytest.raises(VaevqMedError, match="found another compare at work in it") as refused,
    ):
        command.run()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "comparison.json").exists()
    # A task of an array job goes on beside another one, and not on the same row.
    with OutputFolder(tmp_path / "out/vqgan/seed_0", STATE, "compare", "rows").lock():
        (busy,) = command.run_task(0).failed
        assert "out/vqgan/seed_0: found another compare at work" in busy.detail
        assert runner.commands == []
        assert command.run_task(1).failed == []
    assert runner.trained() == ["vaevq/seed_0"]


def test_a_sweep_draws_its_curves(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    command = toy(
        *(slice_dataset, tmp_path / "out"),
        kind="sweep",
        methods="simvq,fq",
        num_embeddings="16,64",
        assignments=assignments("num_embeddings"),
        pictures=0,
    )
    report = command.run()
    assert runner.trained() == [f"{name}/seed_0" for name in ("simvq_k16", "simvq_k64", "fq_k16", "fq_k64")]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        assert [float(row["bits_per_position"]) for row in csv.DictReader(file)] == [4.0, 6.0, 8.0, 12.0]
    assert report.table.count("K counts") == 1
    assert "FQ: K counts the codewords of one of its 2 stages or groups." in report.table
    assert tmp_path / "out" / "sweep.png" in report.files


@pytest.mark.slow
def test_the_documented_command_in_processes_of_its_own(slice_dataset: Path, tmp_path: Path) -> None:
    command = toy(
        *(slice_dataset, tmp_path / "out"),
        methods="simvq",
        checkpoint="best",
        pictures=1,
        published=True,
        assignments=["modalities=['t1c']", *assignments("fid_network", "val_interval")],
    )
    report = command.run()
    assert report.failed == []
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    measured = json.loads((tmp_path / "out/simvq/seed_0/evaluation/metrics.json").read_text())
    assert float(row["rfid"]) == pytest.approx(measured["summary"]["overall"]["rfid"]["value"])
    assert (row["method"], row["rfid_paper"]) == ("simvq", "4.36 (derived)")
    log = (tmp_path / "out/simvq/seed_0/training.log").read_text()
    assert log.startswith("$ ")
    assert " -m monai.bundle run training --config_file " in log
    assert (tmp_path / "out" / "reconstructions.png").stat().st_size > 1000


# --- plan -------------------------------------------------------------------------------------------


def titles(dataset: Path, *assignments: str, methods: str = "softvq", **options: Any) -> dict[str, str]:
    """Title of each row by its name."""
    chosen = {"kind": "compare", "methods": methods, "assignments": assignments, "dataset_dir": dataset, **options}
    return {method.name: method.title for method in make(output=Path("out"), **chosen).plan.methods}


def test_a_bundle_that_trains_no_tokenizers_is_refused_in_a_line(slice_dataset: Path) -> None:
    with pytest.raises(VaevqMedError, match=r"segmentation: found no objective in train\.json, expected a bundle of"):
        assert make("compare", Path("out"), methods="vqgan", dataset_dir=slice_dataset, bundle="segmentation").plan


def test_a_title_that_says_the_read_out_stays(slice_dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    method = "{name: softvq, title: SoftVQ (hard), set: {readout: hard}}"
    file.write_text(f"study: tokenizers\nname: one\noutput: out\ndataset_dir: {slice_dataset}\nmethods:\n- {method}\n")
    assert [method.title for method in RunStudy(read_study(str(file))).plan.methods] == ["SoftVQ (hard)"]


def test_methods_are_the_overlays_of_the_bundle(slice_dataset: Path) -> None:
    plan = make("compare", Path("out"), methods="vqgan, vaevq,mine=simvq+f16", dataset_dir=slice_dataset).plan
    vqgan, vaevq, mine = plan.methods
    assert (vqgan.title, vaevq.title, mine.title) == ("VQGAN", "VAEVQ", "mine")
    assert (vaevq.overlays, mine.overlays) == (("paper",), ("simvq", "f16"))
    ablation = make("ablate", Path("out"), dataset_dir=slice_dataset).plan.methods
    assert [method.name for method in ablation] == ABLATION
    assert [method.title for method in ablation] == [
        *("M0: VQGAN", "SimVQ", "M1: + VLQ", "M2: + VLQ, RCS", "M3: + VLQ, DCR", "full: + VLQ, RCS, DCR")
    ]
    for text, said in (
        ("vgqan", "did you mean 'vqgan'"),
        ("a=simvq+fsqq", "'fsqq'"),
        ("vqgan,vqgan", "more than once"),
        (" ,", "at least 1 item"),
        ("../x=vqgan", r"name is \"../x\"; expected letters"),
    ):
        with pytest.raises(VaevqMedError, match=said):
            titles(slice_dataset, methods=text)


def test_methods_of_the_same_overlays_and_other_settings_have_titles_of_their_own(slice_dataset: Path) -> None:
    found = titles(slice_dataset, "paper:ema_decay=0.5", methods="vaevq,paper,vqgan")
    assert [*found.values()] == ["VAEVQ (vaevq)", "VAEVQ (paper)", "VQGAN"]


def test_columns_of_the_same_title_are_all_drawn(tmp_path: Path) -> None:
    from vaevq_med.evaluation.pictures import comparison_grid

    images = torch.zeros(1, 1, 8, 8)
    widths = []
    for names in ("a", "ab"):
        columns = dict.fromkeys(names, images)
        comparison_grid(images, columns, titles=dict.fromkeys(names, "x"), labels=["i"], path=tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as picture:
            widths.append(picture.size[0])
    assert widths[1] > widths[0]


def test_a_bundle_may_be_a_folder(tmp_path: Path) -> None:
    assert Bundle.find(str(BUNDLE)).read("train.json") == Bundle.find("brats").read("train.json")
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(VaevqMedError, match=r"no evaluate\.json"):
        Bundle.find(str(tmp_path))
    with pytest.raises(VaevqMedError, match="expected one of brats"):
        Bundle.find("bratz")


def test_both_bundles_can_be_compared(slice_dataset: Path, tmp_path: Path) -> None:
    command = make("compare", tmp_path, bundle="imagenet", methods="vqgan,vaevq", dataset_dir=slice_dataset)
    training, evaluation = command.plan.rows()[1].commands().values()
    names = [Path(file).relative_to(BUNDLE.parent).as_posix() for file in flags(training)["config_file"]]
    assert names == ["imagenet/train.json", "overlays/paper.json"]
    parser = ConfigParser()
    parser.read_config(flags(training)["config_file"])
    handlers = [handler["_target_"] for handler in parser.get()["train"]["handlers"]]
    assert "vaevq_med.training.RunSummary" in handlers
    assert flags(evaluation)["config_file"] == str(BUNDLE.parent / "imagenet" / "evaluate.json")


@pytest.mark.parametrize("text", ["", "a", "1,-1", "1.5"])
def test_seeds_are_whole_numbers(text: str) -> None:
    with pytest.raises(VaevqMedError, match="seeds"):
        make("compare", Path("out"), seeds=text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"assignments": ("max_epoch=2",)}, "did you mean 'max_epochs'"),
        ({"assignments": ("seed=2",)}, "found 'seed', which the comparison sets itself"),
        ({"assignments": ("max_epochs=2",)}, "'max_epochs', which the comparison sets"),
        ({"assignments": ("learning_rate",)}, "ID=VALUE"),
        ({"assignments": ("vqgam:batch_size=2",)}, "expected one of vqgan, simvq"),
        ({"max_epochs": 1, "steps": 2}, "max_epochs and steps; expected one"),
        ({"max_epochs": None, "images": 0}, "images is 0; expected 1 or more"),
        ({"checkpoint": "worst"}, "checkpoint is .worst.; expected 'best' or 'last'"),
        ({"overlays": ("small_cpuu",)}, "small_cpu"),
        ({"dataset_dir": Path("nowhere")}, "vaevq-med slice-extract"),
        ({"kind": "sweep", "num_embeddings": "1"}, "num_embeddings.0. is 1; expected at least 2"),
        ({"assignments": ("network_def#quantiser#x=2",)}, "has a place for"),
        ({"assignments": ("vqgan:num_features=2",)}, "num_features"),
        ({"kind": "sweep", "num_embeddings": "4", "assignments": ("num_embeddings=8",)}, "sets itself"),
        ({"kind": "sweep", "num_embeddings": "4", "assignments": ("vqgan:num_embeddings=8",)}, "sets itself"),
        ({"launch": "torchrun '"}, "launch: found"),
        ({"kind": "sweep", "num_embeddings": "4", "methods": "fsq"}, "method fsq: .* levels and embedding_dim fix,"),
        (
            {"kind": "sweep", "num_embeddings": "4", "methods": "vqgan,ifsq"},
            "method ifsq: .* levels and embedding_dim fix,",
        ),
        (
            {"kind": "sweep", "num_embeddings": "4", "methods": "a=lfq"},
            "method a: .* num_embeddings and embedding_dim fix,",
        ),
        ({"kind": "sweep", "num_embeddings": "64,8192", "methods": "fvq"}, "fvq_k8192 seed 0: num_embeddings"),
        ({"kind": "sweep", "num_embeddings": "8", "methods": "vqgan_lc"}, "vqgan_lc_k8 seed 0: .*features.npz"),
        ({"methods": "vaevq,paper"}, "found vaevq and paper, two names of paper with the same settings"),
        ({"methods": "simvq,vqgan,a=simvq"}, "found simvq and a, two names of simvq"),
        ({"kind": "sweep", "num_embeddings": "4", "methods": "vaevq,paper"}, "found vaevq_k4 and paper_k4"),
        ({"seeds": "0,4294967296"}, "seeds.1. is 4294967296; expected less than or equal to 4294967295"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    options: dict[str, Any], said: str, slice_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(VaevqMedError, match=said) as stopped:
        make(
            **{
                **{"kind": "compare", "output": tmp_path / "out", "dataset_dir": slice_dataset},
                **{"methods": "vqgan,simvq", "max_epochs": 1, **options},
            }
        ).dry_run()
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_or_an_output_that_is_a_file_is_one_line(slice_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = toy(slice_dataset, tmp_path / "file")
    with pytest.raises(VaevqMedError, match="not writable"):
        blocked.run()
    command = toy(slice_dataset, tmp_path)
    for text in ("[1]", '{"a": 1}', "{", '{"shared": 3}'):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(VaevqMedError, match="expected a record of vaevq-med"):
            command.dry_run()
    (tmp_path / "comparison.json").unlink()
    row = command.plan.rows()[0]
    row.evaluation.mkdir(parents=True)
    (row.folder / "row.json").write_text('{"hash": "a", "status": "finished", "settings": 3}')
    with pytest.raises(VaevqMedError, match=r"row\.json: found no hash and status and settings"):
        command.dry_run()
    (row.evaluation / "metrics.json").write_text('{"summary": ')
    with pytest.raises(VaevqMedError, match="vqgan seed 0: found a damaged evaluation"):
        rows_module.read_result(row)


@pytest.mark.parametrize(
    ("budget", "epochs", "length"),
    [
        (Budget(max_epochs=3), 3, 4),
        (Budget(steps=9), 2, 4),
        (Budget(steps=3), 1, 3),
        (Budget(steps=100), 25, 4),
        (Budget(images=40), 2, 5),
        (Budget(images=1), 1, 1),
    ],
)
def test_a_budget_is_what_the_run_resolves(
    budget: Budget, epochs: int, length: int, slice_dataset: Path, tmp_path: Path
) -> None:
    """16 training slices in batches of 4: 4 steps an epoch."""
    command = toy(slice_dataset, tmp_path, **{"max_epochs": None, **budget.model_dump()})
    training = command.plan.rows()[0].commands()["training"]
    values = flags(training)
    parser = ConfigParser()
    parser.read_config(values.pop("config_file"))
    parser.update(values)
    check_config(parser.get())
    assert parser.get_parsed_content("max_epochs") == epochs
    assert parser.get_parsed_content("epoch_length") == length


def test_an_empty_split_is_found_before_anything_is_trained(slice_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(slice_dataset, tmp_path / "data")
    content = json.loads((tmp_path / "data/dataset.json").read_text())
    (tmp_path / "data/dataset.json").write_text(json.dumps({**content, "test": []}))
    command = make("compare", tmp_path / "out", methods="vqgan", dataset_dir=tmp_path / "data", tracking_uri="none")
    with pytest.raises(VaevqMedError, match="found an empty split 'test', on which every row is evaluated"):
        command.run()
    assert not (tmp_path / "out/vqgan").exists()


def test_commands_carry_what_each_file_knows(slice_dataset: Path, tmp_path: Path) -> None:
    command = make(
        "compare",
        tmp_path / "out",
        methods="vqgan",
        seeds="3",
        overlays=("small_cpu",),
        assignments=("learning_rate=1e-3", "vqgan:batch_size=2", "max_items=5", "network_def#encoder#num_channels=8"),
        dataset_dir=slice_dataset,
        launch="torchrun --nproc_per_node=8",
        checkpoint="last",
    )
    training, evaluation = command.plan.rows()[0].commands("abc").values()
    assert training[:5] == ["torchrun", "--nproc_per_node=8", "-m", "monai.bundle", "run"]
    values = flags(training)
    names = [Path(file).stem for file in values["config_file"]]
    assert names == ["train", "small_cpu", "multi_gpu", "vqgan"]
    assert values["seed"] == 3
    assert values["parent_run_id"] == "abc"
    assert values["output_dir"] == str(tmp_path / "out/vqgan/seed_3")
    assert (values["learning_rate"], values["batch_size"], values["network_def#encoder#num_channels"]) == (1e-3, 2, 8)
    assert "max_items" not in values
    values = flags(evaluation)
    assert (values["batch_size"], values["max_items"]) == (2, 5)
    assert values["checkpoint_path"] == "$@output_dir + '/checkpoints/last.pt'"
    assert "learning_rate" not in values
    assert "seed" not in values


def test_all_methods_of_a_seed_share_everything_but_the_method(slice_dataset: Path, tmp_path: Path) -> None:
    rows = make("compare", tmp_path, methods="vqgan,simvq,vaevq", dataset_dir=slice_dataset).plan.rows()
    settings = [row.settings()["train"] for row in rows]
    different = {key for other in settings[1:] for key in other if other[key] != settings[0].get(key)}
    assert different <= {"network_def", "objective"}
    for one in settings:
        for key in ("encoder", "decoder"):
            assert one["network_def"][key] == settings[0]["network_def"][key]
        assert one["objective"]["adversarial"] == settings[0]["objective"]["adversarial"]


def test_dry_run_prints_commands_and_writes_nothing(slice_dataset: Path, tmp_path: Path) -> None:
    command = ["ablate", "--dataset-dir", str(slice_dataset), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(app, [*command, "--seeds", "0,1", "--steps", "10"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line for line in lines if line.startswith("#")][:6] == [
        *(f"# {name} seed 0" for name in ABLATION),
    ]
    assert lines[18] == "# ablation_m0 seed 1"
    assert len(lines) == 36
    assert not (tmp_path / "out").exists()


def test_a_slurm_script_has_a_task_a_row(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    command = toy(slice_dataset, tmp_path / "out", seeds="0,1", published=True)
    script = command.script()
    assert "#SBATCH --array=0-3" in script
    # Without a number of tasks sbatch refuses GPUs a task.
    assert {"#SBATCH --nodes=1", "#SBATCH --ntasks=1", "#SBATCH --gpus-per-task=1"} <= set(script.splitlines())
    assert "# task 3: vaevq seed 1" in script
    (line,) = (line for line in script.splitlines() if line.startswith("exec "))
    words = shlex.split(line.replace('"$SLURM_ARRAY_TASK_ID"', "1"))
    assert words[1:5] == [sys.executable, "-m", "vaevq_med.cli.app", "study"]
    done = CliRunner().invoke(app, words[4:])
    assert done.exit_code == 0, done.output
    assert runner.trained() == ["vaevq/seed_0"]
    assert not (tmp_path / "out" / "table.md").exists()
    with pytest.raises(VaevqMedError, match="row or task 4: expected 0 to 3"):
        command.run_task(4)


@pytest.mark.parametrize(
    ("launch", "gpus", "is_distributed"),
    [
        ("torchrun --nproc_per_node=8", 8, True),
        ("srun /opt/bin/torchrun --nproc-per-node 4", 4, True),
        (f"{sys.executable} -m torch.distributed.run --nproc_per_node=2", 2, True),
        ("torchrun --nproc_per_node=gpu", 1, True),
        ("nice -n 5 python", 1, False),
    ],
)
def test_torchrun_is_known_wherever_it_stands(
    launch: str, gpus: int, is_distributed: bool, slice_dataset: Path, tmp_path: Path
) -> None:
    command = make("compare", tmp_path / "out", methods="vqgan", dataset_dir=slice_dataset, launch=launch)
    assert command.plan.composed(command.plan.methods[0]) == (*(["multi_gpu"] if is_distributed else []), "vqgan")
    script = command.script().splitlines()
    assert {f"#SBATCH --gpus-per-task={gpus}", f"#SBATCH --cpus-per-task={8 * gpus}"} <= set(script)


@pytest.mark.parametrize("content", ['{"a":', "[1]", '{"network_def": 3}'])
def test_an_overlay_that_is_none_is_one_line(content: str, slice_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "brats")
    (tmp_path / "brats/overlays").mkdir()
    (tmp_path / "brats/overlays/mine.json").write_text(content)
    # What it says of the network is read by a sweep alone; a row's own run refuses it otherwise.
    for kind in ("sweep",) if "network_def" in content else ("compare", "sweep"):
        sizes = {"num_embeddings": "8"} if kind == "sweep" else {}
        bundle = {"bundle": str(tmp_path / "brats"), "methods": "mine", "dataset_dir": slice_dataset}
        command = make(kind, tmp_path / "out", **bundle, **sizes)
        with pytest.raises(VaevqMedError, match="mine") as stopped:
            command.dry_run()
        assert "\n" not in str(stopped.value)


def test_slurm_reads_the_log_of_a_folder_with_blanks(
    slice_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = toy(slice_dataset, Path('a "50%" b')).script()
    (line,) = (line for line in script.splitlines() if line.startswith("#SBATCH --output="))
    # sbatch reads double quotes and backslashes as a shell does.
    assert shlex.split(line, comments=False)[1:] == [f'--output={tmp_path}/a "50%%" b/slurm_%A_%a.log']
    with pytest.raises(VaevqMedError, match="without backslashes"):
        toy(slice_dataset, Path("a\\b")).script()


# --- processes --------------------------------------------------------------------------------------


def test_a_command_runs_with_its_output_in_a_file(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    program = (
        "import sys; print('step 1'); print('vaevq-med: found x, expected y', file=sys.stderr); print('bye'); exit(2)"
    )
    assert call([sys.executable, "-c", program], log, lambda line: None) == 2
    assert log.read_text().startswith("$ ")
    assert error_line(log) == "found x, expected y"
    start = log.stat().st_size
    assert call([sys.executable, "-c", "raise ValueError('no')"], log, lambda line: None) == 1
    assert error_line(log, start) == "ValueError: no"
    assert last_line(log) == "ValueError: no"
    start = log.stat().st_size
    assert call([sys.executable, "-c", "exit(3)"], log, lambda line: None) == 3
    assert error_line(log, start) == "no output"
    with pytest.raises(VaevqMedError, match="no program 'no-such-launcher'"):
        call(["no-such-launcher"], log, lambda line: None)


def test_an_interruption_waits_for_the_checkpoint(tmp_path: Path) -> None:
    program = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.3); pathlib.Path(sys.argv[1]).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )

    def interrupt(line: str) -> None:
        if line == "ready":
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            call([sys.executable, "-c", program, str(tmp_path / "saved")], tmp_path / "a.log", interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def test_the_live_table_shows_each_row_as_it_stands(slice_dataset: Path, tmp_path: Path) -> None:
    rows = make("compare", tmp_path, methods="vqgan,simvq", dataset_dir=slice_dataset).plan.rows()
    states = [RowState(rows[0], "training", 83.0, "train 3/8  loss [0.5]"), RowState(rows[1])]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_table(states, console.width))
    lines = [line.split() for line in console.export_text().splitlines()[1:]]
    assert lines == [
        ["vqgan", "seed", "0", "training", "1:23", "train", "3/8", "loss", "[0.5]"],
        ["simvq", "seed", "0", "waiting"],
    ]


@pytest.mark.slow
def test_every_readout_of_a_quantizer_has_a_row_and_one_training(
    runner: Runner, slice_dataset: Path, tmp_path: Path
) -> None:
    command = toy(slice_dataset, tmp_path / "out", methods="softvq")
    assert [row.label for row in command.plan.rows()] == ["softvq seed 0", "softvq_hard seed 0"]
    report = command.run()
    assert report.failed == []
    assert runner.trained() == ["softvq/seed_0"]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    readouts = {}
    for name in ("softvq", "softvq_hard"):
        record = json.loads((tmp_path / "out" / name / "seed_0/evaluation/metrics.json").read_text())
        readouts[name] = record["provenance"]["readout"]
        assert float(table[name]["psnr"]) == pytest.approx(record["summary"]["overall"]["psnr"]["value"])
    assert readouts == {"softvq": "soft", "softvq_hard": "hard"}
    assert table["softvq"]["psnr"] != table["softvq_hard"]["psnr"]
    assert table["softvq"]["parameters"] == table["softvq_hard"]["parameters"]
    assert (table["softvq"]["bits_per_position"], table["softvq_hard"]["bits_per_position"]) == ("", "5.0")
    (soft,) = (line for line in report.table.splitlines() if line.startswith("| SoftVQ (soft) "))
    assert "**" not in soft
    assert "SoftVQ (soft): continuous" in report.table
    # One task of an array job does both; what is there is kept, also in a folder that was moved.
    (tmp_path / "out").rename(tmp_path / "moved")
    again = toy(slice_dataset, tmp_path / "moved", methods="softvq").run_task(0)
    assert [state.status for state in again.states] == ["kept", "kept"]
    # Figures of weights that are gone are not kept.
    shutil.rmtree(tmp_path / "moved" / "softvq")
    metrics = tmp_path / "moved/softvq_hard/seed_0/evaluation/metrics.json"
    record = json.loads(metrics.read_text())
    record["provenance"]["checkpoint_sha256"] = "of other weights"
    metrics.write_text(json.dumps(record))
    again = toy(slice_dataset, tmp_path / "moved", methods="softvq").run_task(0)
    assert [state.status for state in again.states] == ["finished", "finished"]


def test_a_readout_waits_for_its_training(runner: Runner, slice_dataset: Path, tmp_path: Path) -> None:
    runner.fail["softvq"] = "no"
    report = toy(slice_dataset, tmp_path / "out", methods="softvq", pictures=0).run()
    assert [state.detail for state in report.failed] == [
        "training ended with exit code 2: no",
        "softvq seed 0 is not finished, which this row decodes",
    ]
    record = json.loads((tmp_path / "out/softvq_hard/seed_0/row.json").read_text())
    assert (record["status"], record["error"]) == ("failed", report.failed[1].detail)


def test_which_readouts_have_rows(slice_dataset: Path) -> None:
    both = {"softvq": "SoftVQ (soft)", "softvq_hard": "SoftVQ (hard)"}
    assert titles(slice_dataset) == both
    assert titles(slice_dataset, methods="simvq") == {"simvq": "SimVQ"}
    assert titles(slice_dataset, "softvq:readout=hard") == {"softvq": "SoftVQ (hard)"}
    # Trained on the hard read-out: the soft one is the other.
    hard = "softvq:network_def#quantizer#readout=hard"
    assert titles(slice_dataset, hard) == {"softvq": "SoftVQ (hard)", "softvq_soft": "SoftVQ (soft)"}
    # Another quantizer in the overlay's place, and the overlay shared by all.
    other = "softvq:network_def#quantizer#_target_=vaevq_med.networks.quantizers.SimVQ"
    assert titles(slice_dataset, other) == {"softvq": "SoftVQ"}
    assert list(titles(slice_dataset, methods="x=small_cpu", overlays=("softvq",))) == ["x", "x_hard"]
    # Named by hand, as two trainings.
    assert list(titles(slice_dataset, "b:readout=hard", methods="a=softvq,b=softvq")) == ["a", "b"]
    given = titles(slice_dataset, "softvq_hard:readout=hard", methods="softvq,softvq_hard=softvq")
    assert list(given) == ["softvq", "softvq_hard"]


def test_a_sweep_sets_the_size_of_every_stage(slice_dataset: Path) -> None:
    command = make("sweep", Path("out"), methods="rvq", num_embeddings="16,64", dataset_dir=slice_dataset)
    assert [method.num_embeddings for method in command.plan.methods] == [16, 64]


def test_a_sweep_has_a_line_for_each_readout(slice_dataset: Path) -> None:
    command = make("sweep", Path("out"), methods="softvq", num_embeddings="64,128", dataset_dir=slice_dataset)
    assert [(method.family, method.title) for method in command.plan.methods] == [
        ("softvq", "SoftVQ (soft), K = 64"),
        ("softvq_hard", "SoftVQ (hard), K = 64"),
        ("softvq", "SoftVQ (soft), K = 128"),
        ("softvq_hard", "SoftVQ (hard), K = 128"),
    ]


def test_a_bundle_without_readouts_is_compared(slice_dataset: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(BUNDLE, own)
    evaluate = json.loads((own / "evaluate.json").read_text())
    del evaluate["readout"]
    (own / "evaluate.json").write_text(json.dumps(evaluate))
    assert list(titles(slice_dataset, bundle=str(own))) == ["softvq"]
