"""The BraTS bundle as MONAI runs it, at toy size."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, OVERLAYS, toy_config
from helpers.bundles import evaluation_overrides, quick, run_bundle, states_equal
from helpers.tracked import open_run
from monai.bundle import ConfigParser, ConfigWorkflow

from vaevq_med.trained.file import atomic_save, read_checkpoint
from vaevq_med.training.config import ConfigError, check_config

NAMES = sorted(path.stem for path in OVERLAYS.glob("*.json"))
TERMS = ("reconstruction", "perceptual", "kl", "rcs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, slice_dataset: Path) -> tuple[dict[str, Any], ConfigParser]:
    """A toy run with tracking, finished."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = toy_config(slice_dataset, folder / "run")
    overrides["tracking_uri"] = f"sqlite:///{folder / 'mlflow.db'}"
    return overrides, run_bundle("train.json", overrides, run_id="training")


@pytest.mark.parametrize("file", ["train.json", "evaluate.json", "inference.json"])
def test_monai_finds_every_property(file: str, trained: tuple[dict[str, Any], ConfigParser]) -> None:
    overrides = dict(trained[0]) if file == "train.json" else evaluation_overrides(trained[0])
    if file == "inference.json":
        del overrides["tracking_uri"]
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / file),
        meta_file=str(BUNDLE / "metadata.json"),
        workflow_type="train" if file == "train.json" else "infer",
        **overrides,
    )
    workflow.initialize()
    assert not workflow.check_properties()


@pytest.mark.parametrize("name", NAMES)
def test_every_overlay_is_read_by_the_training_bundle(name: str) -> None:
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "train.json"), str(OVERLAYS / f"{name}.json")])
    check_config(parser.get())
    overlay = json.loads((OVERLAYS / f"{name}.json").read_text())
    for key in overlay.keys() - {"_notes_", "_title_"}:
        parser[key]


def test_the_coherent_overlay_is_the_default() -> None:
    plain, overlaid = ConfigParser(), ConfigParser()
    plain.read_config(str(BUNDLE / "train.json"))
    overlaid.read_config([str(BUNDLE / "train.json"), str(OVERLAYS / "coherent.json")])
    for key in ("network_def", "objective"):
        assert overlaid.get(key) == plain.get(key)


def test_the_page_of_the_overlays_tells_of_those_there_are() -> None:
    table = (OVERLAYS / "README.md").read_text().split("## VLQ over")[0]
    names = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    rows = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
    assert rows <= set(NAMES)
    assert [name for name in NAMES if not json.loads((OVERLAYS / f"{name}.json").read_text())["_notes_"]] == []
    assert len(rows) > 25


def test_training_logs_every_term_and_keeps_checkpoints(trained: tuple[dict[str, Any], ConfigParser]) -> None:
    overrides, parser = trained
    trainer = parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 2
    assert set(TERMS) < set(trainer.state.terms)
    assert all(math.isfinite(value) for value in trainer.state.terms.values())
    # The GAN starts at step 2 of 8.
    assert {"adversarial", "adaptive_weight", "discriminator_loss"} < set(trainer.state.terms)
    checkpoint = torch.load(Path(overrides["output_dir"]) / "checkpoints" / "last.pt", weights_only=True)
    assert checkpoint["iteration"] == trainer.state.iteration


def test_mlflow_run_holds_what_a_reader_needs(trained: tuple[dict[str, Any], ConfigParser]) -> None:
    from mlflow import MlflowClient

    overrides, parser = trained
    client = MlflowClient(overrides["tracking_uri"])
    (experiment,) = (e for e in client.search_experiments() if e.name == "vaevq_med brats")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["num_embeddings"] == "32"
    assert run.data.params["objective.weights.rcs"] == run.data.params["objective.weights.kl"] == "0.00024"
    assert run.data.tags["data.content_hash"] == "sha256:toy"
    assert "version.torch" in run.data.tags
    steps = parser.get_parsed_content("train#trainer").state.iteration
    for term in (*TERMS, "loss", "learning_rate"):
        history = client.get_metric_history(run.info.run_id, f"train/{term}")
        assert [point.step for point in history] == list(range(1, steps + 1)), term
    assert len(client.get_metric_history(run.info.run_id, "val/psnr")) == 2
    assert {item.path for item in client.list_artifacts(run.info.run_id, "checkpoints")} == {
        "checkpoints/best.pt",
        "checkpoints/last.pt",
    }
    names = {item.path for item in client.list_artifacts(run.info.run_id, "pictures/epoch_0002")}
    assert names == {"pictures/epoch_0002/codebook_usage.png", "pictures/epoch_0002/reconstructions.png"}
    assert "config.json" in {item.path for item in client.list_artifacts(run.info.run_id)}


def test_evaluation_writes_a_complete_record(trained: tuple[dict[str, Any], ConfigParser]) -> None:
    overrides, _ = trained
    run_bundle("evaluate.json", evaluation_overrides(overrides), run_id="evaluating")
    folder = Path(overrides["output_dir"]) / "evaluation" / "test"
    record = json.loads((folder / "metrics.json").read_text())
    overall = record["summary"]["overall"]
    assert overall["psnr"]["n"] == 16
    assert {"ssim", "lpips", "rfid", "utilization", "utilization_sample", "perplexity", "dead_codes"} < set(overall)
    assert set(record["summary"]["modality"]) == {"t1n", "t1c", "t2w", "t2f"}
    assert set(record["summary"]["region"]) == {"brain", "whole_tumor", "tumor_core", "enhancing_tumor"}
    provenance = record["provenance"]
    assert provenance["n"] == 16
    assert provenance["split_hash"] == "sha256:toy"
    assert len(provenance["checkpoint_sha256"]) == len(provenance["lpips_weights_sha256"]) == 64
    assert (folder / "best_median_worst.png").stat().st_size > 1000
    assert len((folder / "per_image.csv").read_text().splitlines()) == 17
    # What the evaluation says of the images is what one gets by hand from the written predictions.
    run_bundle("inference.json", {k: v for k, v in evaluation_overrides(overrides).items() if k != "tracking_uri"})
    predictions = Path(overrides["output_dir"]) / "predictions" / "test"
    indices = np.concatenate([np.load(path).ravel() for path in sorted(predictions.glob("indices/**/*.npy"))])
    assert len(np.unique(indices)) / 32 == pytest.approx(overall["utilization"]["value"])
    from PIL import Image

    errors = []
    for path in sorted((predictions / "reconstructions").glob("**/*.png")):
        original = next(Path(overrides["dataset_dir"]).glob(f"images/**/{path.name}"))
        difference = np.asarray(Image.open(path), float) - np.asarray(Image.open(original), float)
        errors.append(10 * np.log10(255**2 / np.mean(difference**2)))
    assert np.mean(errors) == pytest.approx(overall["psnr"]["value"], abs=1e-3)


def test_a_resumed_run_ends_bit_identical(toy_overrides: dict[str, Any], tmp_path: Path) -> None:
    whole = {**toy_overrides, "output_dir": str(tmp_path / "whole"), "checkpoint_interval": 1}
    run_bundle("train.json", whole, run_id="training")
    # Stop after iteration 3 of 8, in the middle of the first epoch and after the GAN's start.
    broken = {**whole, "output_dir": str(tmp_path / "broken")}
    files = str(BUNDLE / "train.json")
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **broken)
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")

    class Killed(BaseException):
        pass

    def kill(engine: Any) -> None:
        if engine.state.iteration == 3:
            raise Killed

    from ignite.engine import Events

    trainer.add_event_handler(Events.ITERATION_COMPLETED, kill)
    with pytest.raises(Killed):
        workflow.run()
    assert read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.pt")["iteration"] == 3
    parser = run_bundle("train.json", broken, run_id="training")
    assert parser.get_parsed_content("train#trainer").state.iteration == 8
    first, second = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    different = [key for key in first if not states_equal(first[key], second[key])]
    assert set(different) <= {"config", "extra"}
    assert {"network", "ema", "optimizer", "d_optimizer", "schedulers", "discriminator", "rng", "best"} < set(first)


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint_that_loads(toy_overrides: dict[str, Any]) -> None:
    overrides = {**toy_overrides, "max_epochs": 100000, "checkpoint_interval": 1, "val_interval": 1000000}
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(BUNDLE / "train.json")]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    last = Path(overrides["output_dir"]) / "checkpoints" / "last.pt"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1.5)
        os.kill(process.pid, signal.SIGKILL)
    checkpoint = read_checkpoint(last)
    assert checkpoint["iteration"] >= 1
    resumed = run_bundle("train.json", {**overrides, "max_epochs": checkpoint["iteration"] // 4 + 1}, run_id="training")
    trainer = resumed.get_parsed_content("train#trainer")
    assert trainer.state.iteration == (checkpoint["iteration"] // 4 + 1) * 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"max_epoch": 3}, "'max_epochs'"),
        ({"objective#weights#rsc": 1.0}, "'rcs'"),
        ({"network_def#quantizer#asignment": "posterior"}, "'assignment'"),
        ({"dataset_dir": "nowhere"}, "vaevq-med slice-extract"),
        ({"feature_network": "vgg", "feature_weights": "nowhere.pth"}, "nowhere.pth"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"max_epochs": 0}, "total_steps 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"checkpoint_interval": 0}, "checkpoint_interval"),
        ({"micro_batch_size": 0}, "found 0"),
        ({"micro_batch_size": 5}, "batch_size, 4"),
        ({"micro_batch_size": "many"}, "'many'"),
        ({"device": "cuda:0"}, "cuda:0"),
        ({"val_max_items": 0}, "max_items"),
        ({"network_def#variational": False}, "needs the encoder's posterior"),
        ({"image_size": 31}, "31"),
        ({"network_def#encoder#channel_mult": [1, ""]}, "Encoder"),
        ({"network_def#encoder#channel_mult": [1]}, "channel_mult"),
        ({"output_dir": "/proc/nowhere"}, "--output_dir"),
    ],
)
def test_a_mistake_ends_with_one_line(
    overrides: dict[str, Any], said: str, toy_overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_bundle("train.json", {**toy_overrides, **overrides}, run_id="training")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vaevq-med:")]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_training_with_one_line(
    workers: int, toy_overrides: dict[str, Any], slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(slice_dataset, tmp_path / "data")
    path = sorted((tmp_path / "data/images/BraTS-GLI-00000-100").glob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit) as stopped:
        run_bundle("train.json", {**toy_overrides, "dataset_dir": str(tmp_path / "data"), "num_workers": workers})
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("vaevq-med:")]
    assert len(lines) == 1
    assert lines[0].startswith(f"vaevq-med: {path}: found an unreadable image (")
    assert "Traceback" not in said


def test_check_config_names_the_nearest_id() -> None:
    with pytest.raises(ConfigError, match=r"'lr'.*did you mean 'rl'"):
        check_config({"rl": 1, "run": "$@rl", "lr": 2})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("vaevq_med.networks.quantizers.SimVq", "did you mean 'SimVQ'?"),
        ("vaevq_med.networks.quantizers.zzz.Q", "Python finds no vaevq_med.networks.quantizers.zzz"),
        (
            "my_quantizer.cosine.CosineVQ",
            "Python finds no my_quantizer.cosine; install its package, or name the folder that holds it in PYTHONPATH",
        ),
        ("torch.nn.Zebra", "torch.nn has no Zebra"),
    ],
)
def test_a_target_that_is_not_there_is_one_line(target: str, said: str) -> None:
    with pytest.raises(ConfigError) as stopped:
        check_config({"run": "$@network", "network": {"quantizer": {"_target_": target}}})
    assert str(stopped.value) == f"network#quantizer: found '{target}', expected a class or a function: {said}"


def test_a_term_that_goes_bad_stops_the_run_and_keeps_the_checkpoint(toy_overrides: dict[str, Any]) -> None:
    from vaevq_med.training.base import TrainingError

    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / "train.json"),
        workflow_type="train",
        # A given size: to choose one takes two more calls of each term.
        **{**toy_overrides, "checkpoint_interval": 1, "micro_batch_size": 4},
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    term = workflow.parser.get_parsed_content("objective").terms["rcs"]
    calls = []
    original = term.forward

    def spoiled(target: torch.Tensor, output: Any) -> torch.Tensor:
        calls.append(1)
        return original(target, output) * (math.nan if len(calls) == 4 else 1)

    term.forward = spoiled
    with pytest.raises(Exception, match="rcs = nan") as stopped:
        trainer.run()
    assert isinstance(stopped.value, TrainingError)
    checkpoint = read_checkpoint(Path(toy_overrides["output_dir"]) / "checkpoints" / "last.pt")
    assert checkpoint["iteration"] == 3
    assert all(torch.isfinite(value).all() for value in checkpoint["network"].values())


@pytest.mark.parametrize(("overlay", "factor"), [(None, 8), ("f4", 4), ("f16", 16)])
def test_the_backbone_is_the_preset_of_its_factor(overlay: str | None, factor: int) -> None:
    from vaevq_med.networks.encoder import vqgan_preset

    parser = ConfigParser()
    overlays = [] if overlay is None else [str(OVERLAYS / f"{overlay}.json")]
    parser.read_config([str(BUNDLE / "train.json"), *overlays])
    for part in ("encoder", "decoder"):
        for key, value in vqgan_preset(factor).items():
            found = parser.get_parsed_content(f"network_def#{part}#{key}", instantiate=False)
            assert (list(value) if isinstance(value, tuple) else value) == found, key


def test_a_device_may_be_a_plain_name(toy_overrides: dict[str, Any]) -> None:
    parser = run_bundle("train.json", {**quick(toy_overrides), "device": "cpu"}, run_id="training")
    assert parser.get_parsed_content("train#trainer").state.epoch == 1


def test_several_processes_need_ddp(
    toy_overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vaevq_med.training.distributed.world_size", lambda: 2)
    with pytest.raises(SystemExit) as stopped:
        run_bundle("train.json", toy_overrides, run_id="training")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "training_network: found TrainingForward in 2 processes" in said
    assert "pass the overlay multi_gpu" in said


def test_a_run_goes_on_from_the_best_checkpoint_where_only_that_is_left_and_refuses_other_feature_weights(
    toy_overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_bundle("train.json", {**toy_overrides, "max_epochs": 1}, run_id="training")
    checkpoints = Path(toy_overrides["output_dir"]) / "checkpoints"
    (checkpoints / "last.pt").unlink()
    run_bundle("train.json", {**toy_overrides, "learning_rate": 2e-4}, run_id="training")
    state = read_checkpoint(checkpoints / "last.pt")
    assert state["changes"][0]["iteration"] == 4  # and not 0: it did not begin anew
    assert state["iteration"] == 8
    (network,) = state["feature_weights"]
    atomic_save({**state, "feature_weights": {network: "of another file"}}, checkpoints / "last.pt")
    with pytest.raises(SystemExit):
        run_bundle("train.json", {**toy_overrides, "max_epochs": 3}, run_id="training")
    assert f"feature_weights is a file of {network}" in capsys.readouterr().err


def test_a_resumed_run_takes_and_notes_a_new_learning_rate_and_refuses_other_data(
    toy_overrides: dict[str, Any], slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_bundle("train.json", {**toy_overrides, "max_epochs": 1}, run_id="training")
    longer = {**toy_overrides, "learning_rate": 1e-6, "final_learning_rate_ratio": 1.0, "warmup_steps": 0}
    parser = run_bundle("train.json", longer, run_id="training")
    assert parser.get_parsed_content("train#trainer").state.terms["learning_rate"] == pytest.approx(1e-6)
    (change,) = read_checkpoint(Path(toy_overrides["output_dir"]) / "checkpoints" / "last.pt")["changes"]
    assert change["iteration"] == 4
    assert change["changed"].pop("learning_rate") == ["0.0001", "1e-06"]
    assert {*change["changed"]} == {"max_epochs", "final_learning_rate_ratio", "warmup_steps"}
    content = json.loads((slice_dataset / "dataset.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(slice_dataset, moved)
    (moved / "dataset.json").write_text(json.dumps({**content, "content_hash": "sha256:resliced"}))
    further = {**longer, "max_epochs": 3, "dataset_dir": str(moved)}
    with pytest.raises(SystemExit):
        run_bundle("train.json", further, run_id="training")
    assert re.search("sha256:resliced, was sha256:toy.*--resume False", capsys.readouterr().err)
    content |= {"training": content["test"], "test": content["training"], "split_hash": "sha256:other"}
    (moved / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run_bundle("train.json", further, run_id="training")
    assert "another split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_bundle("evaluate.json", evaluation_overrides({**toy_overrides, "dataset_dir": str(moved)}))
    assert "was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "payload",
    [
        {"_target_": "vaevq_med.networks.weights.torch.os.system", "command": "exit 3"},
        {"_target_": "vaevq_med.networks.VisualTokenizer", "_mode_": "callable"},
        {"_target_": "vaevq_med.networks.VisualTokenizer", "encoder": "$__import__('os').getpid()"},
    ],
)
def test_nothing_in_a_checkpoint_runs(
    payload: dict[str, Any], trained: tuple[dict[str, Any], ConfigParser], tmp_path: Path
) -> None:
    from vaevq_med.trained.file import CheckpointError
    from vaevq_med.trained.network import StoredTokenizer

    state = read_checkpoint(Path(trained[0]["output_dir"]) / "checkpoints" / "last.pt")
    state["config"] = json.dumps({**json.loads(state["config"]), "network_def": payload})
    torch.save(state, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="found"):
        StoredTokenizer(tmp_path / "evil.pt").network()


def test_a_checkpoint_of_another_format_is_refused(
    trained: tuple[dict[str, Any], ConfigParser], tmp_path: Path
) -> None:
    from vaevq_med.trained.file import CheckpointError

    state = read_checkpoint(Path(trained[0]["output_dir"]) / "checkpoints" / "last.pt")
    torch.save({**state, "format": 99}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="format 99, expected 1"):
        read_checkpoint(tmp_path / "new.pt")
    for config in ("no JSON", "[1]", 3):
        torch.save({**state, "config": config}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match="'config' that is no JSON object"):
            read_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["optimizer"]["state"][3].pop("exp_avg"),
        lambda state: state["optimizer"]["state"][3].update(exp_avg_sq=torch.zeros(7)),
        lambda state: state["optimizer"]["state"][3].update(step=torch.zeros(0)),
        lambda state: state.update(schedulers=[]),
        lambda state: state.update(rng="none"),
    ],
    ids=["an average is gone", "an average of another shape", "no count", "no schedules", "no generator"],
)
def test_a_damaged_state_is_not_gone_on_with(
    damage: Callable[[dict[str, Any]], Any],
    trained: tuple[dict[str, Any], ConfigParser],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = {**trained[0], "output_dir": str(tmp_path / "run")}
    checkpoints = shutil.copytree(Path(trained[0]["output_dir"]) / "checkpoints", tmp_path / "run" / "checkpoints")
    state = read_checkpoint(checkpoints / "last.pt")
    damage(state)
    torch.save(state, checkpoints / "last.pt")
    with pytest.raises(SystemExit) as stopped:
        run_bundle("train.json", {**overrides, "max_epochs": 3}, run_id="training")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vaevq-med:")]
    assert len(lines) == 1
    assert "last.pt" in lines[0]
    assert "cannot be taken up" in lines[0]


def test_mlflow_points_survive_a_failing_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from vaevq_med.training.tracking import MLflowTracker

    tracker = MLflowTracker(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker.start_run()
    with monkeypatch.context() as patch, tracker.guard():
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        tracker.log_metrics({"a": 1.0}, 1)
        tracker.flush()
    tracker.log_metrics({"a": 2.0}, 2)
    tracker.end_run("FINISHED")
    history = MlflowClient(tracker.tracking_uri).get_metric_history(tracker.run_id, "a")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0)]


def test_runs_that_start_together_make_one_mlflow_file(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(open_run, [uri] * 2))
    client = MlflowClient(uri)
    assert len(set(found)) == 2
    assert {client.get_run(run).data.params["set.network_def.variational"] for run in found} == {"true"}
