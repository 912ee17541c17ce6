"""Runs that start from a file, keep parts as they are, or learn at two rates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config, trainer_of
from helpers.bundles import evaluation_overrides, quick, run_bundle
from ignite.engine import Events
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.trained.file import atomic_save, read_checkpoint
from vaevq_med.training.start import Start

PARTS = {
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
    "quantizer": ("quantizer.",),
    "latent": ("quant_conv.", "post_quant_conv."),
}


@pytest.fixture(scope="module")
def source(slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run of the default, of one channel."""
    config = quick(toy_config(slice_dataset, tmp_path_factory.mktemp("source") / "run"))
    trainer_of(config).run()
    return Path(config["output_dir"]) / "checkpoints" / "last.pt"


def config_of(slice_dataset: Path, output: Path, **further: Any) -> dict[str, Any]:
    return {**quick(toy_config(slice_dataset, output)), **further}


def test_a_run_starts_from_a_file_and_says_so_everywhere(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    config = config_of(
        slice_dataset,
        tmp_path / "run",
        init_from=str(source),
        num_embeddings=48,
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
    )
    trainer = trainer_of(config)
    told = capsys.readouterr().err
    assert "encoder: " in told
    assert "embedding is [32, 4] there, [48, 4] here" in told
    assert "discriminator and averages of the optimizers: new" in told
    before = read_checkpoint(source)["ema"]
    own = trainer.network.state_dict()
    assert all(torch.equal(own[name], before[name]) for name in own if not name.startswith("quantizer."))
    trainer.run()
    kept = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["data"]["started_from"]
    assert kept["data"]["patients"] == ["BraTS-GLI-00000"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())["started_from"]
    assert (run["file"], run["sha256"]) == ("last.pt", kept["sha256"])
    assert "data" not in run
    assert run["parts"]["quantizer"]["loaded"] == 0
    assert run["parts"]["encoder"]["new"] == 0
    (tracked,) = MlflowClient(config["tracking_uri"]).search_runs(["1"])
    assert tracked.data.tags["started_from.sha256"] == kept["sha256"]
    assert tracked.data.tags["started_from.quantizer"].startswith("4 left new")


def test_a_resumed_run_does_not_read_the_file_again(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "start.pt"
    copy.write_bytes(source.read_bytes())
    settings = {"init_from": str(copy), "loaded_learning_rate_ratio": 0.1, "num_embeddings": 48, "max_epochs": 2}
    lengths = {f"schedulers#{number}#total_steps": 8 for number in range(2)}
    whole = trainer_of(config_of(slice_dataset, tmp_path / "whole", **settings, **lengths), "vqgan")
    whole.run()
    halved = config_of(slice_dataset, tmp_path / "halved", **settings, **lengths)
    trainer_of({**halved, "max_epochs": 1}, "vqgan").run()
    copy.unlink()
    without = trainer_of({**halved, "init_from": None}, "vqgan")
    assert len(without.optimizer.param_groups[0]["params"]) == 1
    assert without.state.iteration == 4
    capsys.readouterr()
    resumed = trainer_of(halved, "vqgan")
    assert f"init_from {copy} is not read: the run goes on from" in capsys.readouterr().err
    assert resumed.state.iteration == 4
    resumed.run()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    kept = read_checkpoint(tmp_path / "halved" / "checkpoints" / "last.pt")["data"]["started_from"]
    assert kept == read_checkpoint(tmp_path / "whole" / "checkpoints" / "last.pt")["data"]["started_from"]
    with pytest.raises(SystemExit):
        trainer_of({**halved, "resume": False}, "vqgan")


def test_loaded_parts_learn_at_their_own_rate(source: Path, slice_dataset: Path, tmp_path: Path) -> None:
    """The rates by hand: warmed up over 2 of 4 steps to a peak of 1e-4, times the ratio where a part was loaded."""
    config = config_of(
        slice_dataset, tmp_path / "run", init_from=str(source), loaded_learning_rate_ratio=0.1, num_embeddings=48
    )
    trainer = trainer_of(config, "vqgan")
    new, loaded = trainer.optimizer.param_groups
    assert [one is trainer.network.quantizer.embedding for one in new["params"]] == [True]
    assert len(loaded["params"]) == len(list(trainer.network.parameters())) - 1
    rates: list[tuple[float, float]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: rates.append((trainer.state.terms["learning_rate"], trainer.state.terms["learning_rate_loaded"])),
    )
    trainer.run()
    assert rates[0] == pytest.approx((1e-4 / 3, 1e-5 / 3))
    assert rates[2] == pytest.approx((1e-4, 1e-5))
    assert all(slow == pytest.approx(fast / 10) for fast, slow in rates)


@pytest.mark.parametrize(
    ("overlay", "part"), [*(("coherent", part) for part in PARTS), ("vqgan", "quantizer"), ("mgvq", "quantizer")]
)
def test_a_frozen_part_stays_as_it_is_to_the_bit(overlay: str, part: str, slice_dataset: Path, tmp_path: Path) -> None:
    """Under weight decay, with averaged and revived codebooks, in the network and in its average."""
    sizes = {"num_embeddings": 16, "embedding_dim": 4, "network_def#quantizer#embedding_dim": 4}
    decay = {"optimizer#_target_": "torch.optim.AdamW", "optimizer#weight_decay": 0.5}
    if overlay == "mgvq":
        sizes |= {"network_def#quantizer#num_codebooks": 2, "network_def#quantizer#mask_probabilities": [0, 0.2]}
    config = config_of(slice_dataset, tmp_path / "run", freeze=part, **sizes, **decay)
    trainer = trainer_of(config, overlay)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.run()
    changed = {
        name
        for state in (trainer.network.state_dict(), trainer.ema.module.state_dict())
        for name, value in state.items()
        if not torch.equal(value, before[name])
    }
    assert not any(name.startswith(PARTS[part]) for name in changed)
    others = [prefix for name, prefix in PARTS.items() if name != part]
    assert all(any(name.startswith(prefix) for name in changed) for prefix in others)
    given = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert not any(id(one) in given for name, one in trainer.network.named_parameters() if name.startswith(PARTS[part]))


def test_other_parts_are_not_frozen_by_a_resumed_run(slice_dataset: Path, tmp_path: Path) -> None:
    config = config_of(slice_dataset, tmp_path / "run", freeze=["encoder"])
    trainer_of(config).run()
    with pytest.raises((SystemExit, VaevqMedError)):
        trainer_of({**config, "freeze": []})
    trainer_of(config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze": "encodr"}, "freeze: found 'encodr', expected some of encoder, decoder, quantizer, latent"),
        ({"freeze": ["encoder", "decoder", "latent"]}, "which leaves no parameter to train, expected fewer parts"),
        ({"init_parts": "encoder"}, "init_parts: found .* without init_from, expected a file"),
        (
            {"loaded_learning_rate_ratio": 0.0},
            "ratio: found 0.0, expected a finite number above 0",
        ),
        (
            {"loaded_learning_rate_ratio": float("inf")},
            "ratio: found inf, expected a finite number",
        ),
        (
            {"loaded_learning_rate_ratio": float("nan")},
            "ratio: found nan, expected a finite number",
        ),
        ({"init_from": 5}, "init_from: found 5, expected the name of a file or a folder"),
        (
            {"freeze": "quantizer", "codebook_init": "kmeans"},
            "codebook_init: found kmeans with the quantizer in fr",
        ),
        ({"init_from": "nowhere.pt"}, "nowhere.pt: found no checkpoint"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    options: dict[str, Any], said: str, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        trainer_of(config_of(slice_dataset, tmp_path / "run", **options))
    assert stopped.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("vaevq-med:")]
    assert re.search(said, line)


def test_a_part_that_was_left_new_is_not_frozen(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A codebook of another size does not fit; asked for, it would be frozen at its random start."""
    settings = {"init_from": str(source), "num_embeddings": 48, "freeze": ["quantizer"]}
    with pytest.raises(SystemExit) as stopped:
        trainer_of(config_of(slice_dataset, tmp_path / "run", **settings), "vqgan")
    assert stopped.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("vaevq-med:")]
    assert re.search(r"freeze: found quantizer, which .* does not fit \(\d+ left new", line)
    # Not asked for, it is frozen as it begins, as one says who wants that.
    network = trainer_of(
        config_of(slice_dataset, tmp_path / "other", init_parts=["encoder", "decoder", "latent"], **settings), "vqgan"
    ).network
    assert not network.quantizer.embedding.requires_grad


def test_an_adaptive_weight_needs_a_decoder_that_is_trained(
    slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**toy_config(slice_dataset, tmp_path / "run"), "freeze": "decoder"}
    with pytest.raises(SystemExit):
        trainer_of(config)
    assert "adaptive is true with a frozen decoder" in capsys.readouterr().err
    trainer_of({**config, "objective#adversarial#adaptive": False, "max_epochs": 1}).run()


def test_the_patients_of_the_start_are_no_test(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that started from another one has seen what that one was trained on."""
    config = config_of(slice_dataset, tmp_path / "run", init_from=str(source))
    trainer_of(config).run()
    without = {"lpips_network": None, "fid_network": None}
    run_bundle("evaluate.json", {**evaluation_overrides(config), **without}, run_id="evaluating")
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    state = read_checkpoint(path)
    state["data"]["started_from"]["data"]["patients"].append("BraTS-GLI-00002")
    atomic_save(state, path)
    with pytest.raises(SystemExit):
        run_bundle("evaluate.json", {**evaluation_overrides(config), **without}, run_id="evaluating")
    told = capsys.readouterr().err
    assert re.search(r"BraTS-GLI-00002, whom last.pt, which \S*best.pt started from, was trained on", told)


def test_a_run_without_a_file_has_one_group_as_before(slice_dataset: Path, tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    start = Start(directory=tmp_path)
    assert start.parameter_groups(start.network(network), 1e-3) == list(network.parameters())


def test_a_network_that_was_not_started_is_no_silent_loss(tmp_path: Path) -> None:
    start = Start(directory=tmp_path, freeze=["encoder"])
    with pytest.raises(VaevqMedError, match=r"network: found one that is not made by @start"):
        start.parameter_groups(nn.Linear(2, 2), 1e-3)


def test_a_packed_bundle_is_a_start_as_its_checkpoint_is(source: Path, slice_dataset: Path, tmp_path: Path) -> None:
    from vaevq_med.trained.pack import BundlePack

    BundlePack("brats", tmp_path / "packed", source).run()
    for place in (tmp_path / "packed", tmp_path / "packed" / "models" / "model.safetensors"):
        trainer = trainer_of(config_of(slice_dataset, tmp_path / "run", init_from=str(place)))
        before = read_checkpoint(source)["ema"]
        assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_clusters_do_not_take_the_place_of_a_loaded_codebook(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(slice_dataset, tmp_path / "run", init_from=str(source), codebook_init="kmeans")
    with pytest.raises(SystemExit):
        trainer_of(config)
    told = capsys.readouterr().err
    assert "codebook_init: found kmeans with a quantizer that was loaded from" in told
    assert "expected init_parts without quantizer, or codebook_init random" in told
    trainer_of({**config, "init_parts": ["encoder", "decoder", "latent"]})


def test_an_encoder_that_computes_something_else_is_no_start(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(slice_dataset, tmp_path / "run", init_from=str(source), init_parts=["encoder"])
    with pytest.raises(SystemExit):
        trainer_of({**config, "network_def#encoder#resampling": "magvit"})
    assert (
        "encoder: found resampling 'vqgan' in the network to start from, expected 'magvit'" in capsys.readouterr().err
    )


def test_a_convolution_that_was_left_new_has_the_new_rate(tmp_path: Path) -> None:
    network = nn.ModuleDict(
        {"encoder": nn.Linear(2, 2), "quant_conv": nn.Linear(2, 2), "post_quant_conv": nn.Linear(2, 2)}
    )
    start = Start(directory=tmp_path, learning_rate_ratio=0.5)
    start.record = {"parts": {"encoder": {"units": ["encoder"]}, "latent": {"units": ["quant_conv"]}}}
    new, loaded = start.parameter_groups(network, 1.0)
    assert {id(one) for one in new["params"]} == {id(one) for one in network["post_quant_conv"].parameters()}
    assert (len(loaded["params"]), loaded["lr"]) == (4, 0.5)


def test_a_start_that_has_seen_who_judges_it_is_told(
    source: Path, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of(config_of(slice_dataset, tmp_path / "clean", init_from=str(source)))
    assert "split, whom" not in capsys.readouterr().err
    state = read_checkpoint(source)
    state["data"]["patients"].append("BraTS-GLI-00001")
    atomic_save(state, tmp_path / "seen.pt")
    trainer_of(config_of(slice_dataset, tmp_path / "run", init_from=str(tmp_path / "seen.pt")))
    told = capsys.readouterr().err
    assert re.search(r"found patient BraTS-GLI-00001 in the (validation|test) split, whom seen.pt was trained on", told)


def test_a_vae_without_a_posterior_is_refused_when_it_is_built(
    slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(slice_dataset, tmp_path / "run")
    with pytest.raises(SystemExit):
        trainer_of({**config, "network_def#variational": False}, "kl_vae")
    assert "found a tokenizer with variational false, expected true" in capsys.readouterr().err
