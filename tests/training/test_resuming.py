"""Which runs are the same one, and what a run that goes on notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import BUNDLE, FIXTURES, OVERLAYS, toy_config
from helpers.fake_mlflow import FakeServer
from ignite.engine import Engine
from monai.bundle import ConfigParser
from torch import Tensor

from vaevq_med.images.dataset import SliceDataset
from vaevq_med.trained.file import CheckpointError, read_checkpoint
from vaevq_med.training.checkpoint import TrainingCheckpoint, load_optimizer
from vaevq_med.training.current import plain_config
from vaevq_med.training.resuming import RunRecord, changes, check_same, difference, expressions
from vaevq_med.training.tracking import MLflowTracker


def record(dataset: Path, overrides: dict[str, Any], *overlays: str, file: str = "train.json") -> RunRecord:
    """What a checkpoint of the bundle would say, but for its data."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / file), *(str(OVERLAYS / f"{name}.json") for name in overlays)])
    toy = toy_config(dataset, Path("out")) if file == "train.json" else {"tokens_dir": str(dataset)}
    parser.update({**toy, **overrides})
    return RunRecord(plain_config(parser))


@pytest.fixture(scope="module")
def images(slice_dataset: Path) -> SliceDataset:
    return SliceDataset(dataset_dir=slice_dataset, split="training")


CHAIN = [{"_target_": "vaevq_med.images.LoadSliced", "image_size": 32, "in_channels": 1}]
MIRRORED = {"_target_": "RandFlipd", "keys": "image", "prob": 0.5, "spatial_axis": 1}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"modalities": ["t2f"]}, "modalities is ['t2f'], was ['t1c', 't1n', 't2f', 't2w']"),
        ({"stack_modalities": True}, "stack_modalities is True, was False"),
        ({"augment": None}, "augment is None, was flip"),
        ({"train#preprocessing#scale": 2.0}, "train#preprocessing#scale is 2.0, was 1.0"),
        (
            {"train#preprocessing": {"_target_": "Compose", "transforms": CHAIN}},
            "train#preprocessing is ['LoadSliced']",
        ),
        (
            {"train#preprocessing": {"_target_": "Compose", "transforms": [*CHAIN, {**MIRRORED, "prob": 1.0}]}},
            "train#preprocessing is RandFlipd(",
        ),
        ({"optimizer#_target_": "torch.optim.SGD"}, "optimizer is torch.optim.SGD, was torch.optim.Adam"),
        ({"train#dataset#max_items": 3}, "train#dataset#max_items is 3, was None"),
        ({"image_size": 64}, "image_size is 64, was 32"),
        ({"seed": 1}, "seed is 1, was 0"),
        ({"num_embeddings": 64}, "num_embeddings is 64, was 32"),
        ({"network_def#quantize_from": "sample"}, "network_def#quantize_from is sample, was mean"),
        ({"network_def#quantizer#decay": 0.5}, "network_def#quantizer#decay is 0.5, was "),
        ({"objective#weights#dcr": 0.1}, "objective#weights#dcr is 0.1, was 0.0"),
        ({"objective#weights#kl": 0}, "objective#weights#kl is 0, was 0.00024"),
        ({"objective#terms#reconstruction#kind": "l1"}, "objective#terms#reconstruction#kind is l1, was l2"),
        ({"feature_network": "vgg"}, "feature_network is vgg, was efficientnet-lite0"),
        ({"objective#adversarial": None}, "objective#adversarial is None, was vaevq_med"),
        ({"discriminator_def#num_layers": 2}, "discriminator_def#num_layers is 2, was 1"),
    ],
)
def test_what_makes_it_another_run_is_named(
    overrides: dict[str, Any], named: str, slice_dataset: Path, images: SliceDataset
) -> None:
    before, now = record(slice_dataset, {}), record(slice_dataset, overrides)
    assert (difference(before, now, images) or "").startswith(named)
    assert difference(now, before, images) is not None
    with pytest.raises(CheckpointError, match=r"last\.pt.*--resume False") as refused:
        check_same(Path("last.pt"), before, now, images, "start anew with --resume False")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_epochs": 9, "learning_rate": 1e-6, "warmup_steps": 0, "ema_decay": 0.5, "max_grad_norm": None},
        {"num_workers": 3, "batch_size": 5, "micro_batch_size": 1, "precision": "bf16", "device": "cuda:1"},
        {"dataset_dir": "elsewhere", "output_dir": "there", "tracking_uri": "x", "resume": "auto", "_notes_": "other"},
        {"objective#weights#kl": 1e-3, "objective#weights#reconstruction": "$1 / 2"},
        {"objective#adversarial#weight": 0.1, "objective#adversarial#start_step": 7},
        {"objective#terms#dcr": None, "objective#terms#codebook#name": "other", "objective#weights#codebook": None},
        {"feature_weights": "elsewhere/weights.pth"},
        {"modalities": ["t2f", "t1n", "t2w", "t1c"]},
        {
            "network_def#encoder#in_channels": 1,
            "network_def#quantizer#_target_": "vaevq_med.networks.quantizers.CoherentVQ",
        },
        {"network_def#encoder#_notes_": "words", "network_def#quantizer#embedding_dim": "@network_def#embedding_dim"},
        {"train#dataset#_target_": "vaevq_med.data.SliceDataset", "train#dataset#max_items": None},
        {"train#preprocessing": {"_target_": "Compose", "transforms": [*CHAIN, MIRRORED]}},
        {"train#preprocessing#regions": False, "network_def#encoder#channel_mult": ["@in_channels", 2]},
    ],
)
def test_what_is_the_same_run_goes_on(overrides: dict[str, Any], slice_dataset: Path, images: SliceDataset) -> None:
    before, now = record(slice_dataset, {}), record(slice_dataset, overrides)
    assert difference(before, now, images) is None
    assert difference(now, before, images) is None


def test_an_optimizer_takes_up_averages_and_this_runs_settings() -> None:
    def trained(weight: Tensor, steps: int, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()

    weight = torch.ones(3, requires_grad=True)
    first = torch.optim.Adam([weight], lr=0.1, betas=(0.5, 0.9))
    trained(weight, 4, first)
    second = torch.optim.Adam([weight], lr=0.2, betas=(0.9, 0.99), weight_decay=0.01)
    load_optimizer(second, first.state_dict())
    group = second.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.9, 0.99), 0.01)
    assert int(second.state[weight]["step"]) == 4
    assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])


def test_expressions_are_compared_by_what_they_came_to(slice_dataset: Path, images: SliceDataset) -> None:
    plain = record(slice_dataset, {})
    written = record(slice_dataset, {"num_embeddings": "$2 ** 5"}).config
    assert "num_embeddings" in {*expressions(written)}
    assert difference(plain, RunRecord(written, {"num_embeddings": 32}), images) is None
    assert "was 32" in str(difference(plain, RunRecord(written, {"num_embeddings": 16}), images))
    # Of a checkpoint that does not say what they came to, the words have to be the same.
    assert difference(RunRecord(written), RunRecord(written, {"num_embeddings": 32}), images) is None
    assert difference(RunRecord(written), plain, images) is not None
    halves = [
        record(slice_dataset, {"num_embeddings": "$2 * @embedding_dim", "embedding_dim": n}).config for n in (4, 8)
    ]
    assert "embedding_dim" in str(
        difference(RunRecord(halves[0]), RunRecord(halves[1], {"num_embeddings": 16}), images)
    )


def test_a_method_is_not_gone_on_with_as_another(slice_dataset: Path, images: SliceDataset) -> None:
    paper, fsq = (record(slice_dataset, {}, name) for name in ("paper", "fsq"))
    assert "network_def" in str(difference(paper, fsq, images))
    rows = [record(slice_dataset, {}, name) for name in ("ablation_m2", "ablation_m3")]
    assert str(difference(*rows, images)).startswith("objective#weights#")


@pytest.mark.parametrize("file", ["train_autoregressive.json", "train_diffusion.json"])
def test_a_generator_goes_on_with_its_tokens_and_loss(file: str, slice_dataset: Path) -> None:
    before = record(slice_dataset, {}, file=file)
    assert difference(before, record(slice_dataset, {"tokens_dir": "copy", "device": "cpu"}, file=file)) is None
    changed = {"loss_def#network": "@network_def"}
    assert str(difference(before, record(slice_dataset, changed, file=file))).startswith("loss_def#network")
    tokens = {"content_hash": "sha256:a", "tokenizer": {"content_hash": "sha256:t"}}
    others = [
        {**tokens, "content_hash": "sha256:b"},
        {"content_hash": "sha256:b", "tokenizer": {"content_hash": "sha256:u"}},
    ]
    said = [
        difference(RunRecord(before.config, {}, {"tokens": tokens}), RunRecord(before.config, {}, {"tokens": other}))
        for other in others
    ]
    assert "sha256:b" in str(said[0])
    assert "sha256:a" in str(said[0])
    assert "tokenizer sha256:u, was sha256:t" in str(said[1])


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({"content_hash": "a"}, {"content_hash": "a"}, True),
        ({"content_hash": "a"}, {"content_hash": "b"}, False),
        ({"content_hash": "a", "split_hash": "s"}, {"content_hash": "a", "split_hash": "t"}, False),
        ({}, {"content_hash": "b"}, True),  # a checkpoint of before that was noted
        ({"content_hash": "a"}, {"content_hash": ""}, True),  # a list by hand
    ],
)
def test_data_are_the_same_by_their_content(before: dict[str, str], now: dict[str, str], same: bool) -> None:
    assert (difference(RunRecord({}, {}, before), RunRecord({}, {}, now)) is None) == same


def test_a_checkpoint_of_before_goes_on_under_todays_names(slice_dataset: Path, images: SliceDataset) -> None:
    state = read_checkpoint(FIXTURES / "simvq.pt")
    old = json.loads(state["config"])
    assert old["train"]["preprocessing"]["_target_"] == "Compose"
    bundle = record(slice_dataset, {}, "simvq").config
    today = {**old, "train": {**old["train"], **{key: bundle["train"][key] for key in ("dataset", "preprocessing")}}}
    today |= {"augment": "flip", "stack_modalities": False, "train_patients": 1.0}
    assert difference(RunRecord(old), RunRecord(today), images) is None
    assert "RandFlipd" in str(difference(RunRecord(old), RunRecord({**today, "augment": None}), images))


def test_changes_are_told_by_id_and_kept_short() -> None:
    before = {"a": {"b": [1, 2], "_notes_": "x"}, "run": ["$1"], "rate": 1, "old": None}
    now = {"a": {"b": [1, 3], "_notes_": "y"}, "run": ["$2"], "rate": 1, "new": "z" * 999}
    assert changes(before, now) == {
        "a#b": ["[1, 2]", "[1, 3]"],
        "old": ["None", "unset"],
        "new": ["unset", "z" * 200],
    }


def test_changes_become_tags_of_the_tracked_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = TrainingCheckpoint(directory=tmp_path, sampler=None)
    checkpoint.extra = {"mlflow_run_id": "run0"}
    rates = {"learning_rate": ["1", "2"]}
    checkpoint.changes = [{"iteration": 4, "changed": rates}, {"iteration": 4, "changed": {"max_epochs": ["1", "3"]}}]
    server = FakeServer()
    run = server.create_run("7", 0, {}, "before")
    monkeypatch.setattr(mlflow, "MlflowClient", server)
    tracker = MLflowTracker(tracking_uri="http://mlflow.example", checkpoint=checkpoint)
    engine = Engine(lambda *_: None)
    tracker.attach(engine)
    engine.run([0], max_epochs=0)
    assert run.data.tags == {"changed.4": "learning_rate 1 -> 2; max_epochs 1 -> 3"}


def test_a_run_that_starts_anew_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    class Trainer:
        """What a checkpoint asks of one, without a network."""

        def check_terms(self) -> None: ...

    def saved(resume: Any, name: str) -> set[str]:
        (tmp_path / "best.pt").write_bytes(b"of another run")
        checkpoint = TrainingCheckpoint(directory=tmp_path, sampler=None, resume=resume)
        checkpoint.state_dict = lambda engine: {"network": {}}  # type: ignore[method-assign]
        checkpoint.best = {"value": 1.0} if name == "best.pt" else None
        checkpoint.save(Trainer(), name)  # type: ignore[arg-type]
        checkpoint.save(Trainer())  # type: ignore[arg-type]
        return {path.name for path in tmp_path.iterdir()}

    assert saved(False, "last.pt") == {"last.pt"}
    assert saved(False, "best.pt") == {"last.pt", "best.pt"}
    assert saved("auto", "last.pt") == {"last.pt", "best.pt"}
