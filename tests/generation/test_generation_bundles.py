"""Both generators as their bundle files train them and draw from them, at toy size."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BUNDLE, MODALITIES, OVERLAYS
from helpers.bundles import TOY, states_equal
from helpers.generator_overlays import generator_kind
from helpers.graphs import Recorder
from helpers.processes import gradients
from helpers.stores import encode, write_checkpoint
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.generation.plan import SamplePlan, resolve_labels
from vaevq_med.generation.sampling import ImageSampler
from vaevq_med.generation.writer import picture_grid
from vaevq_med.networks.generators.autoregressive import autoregressive_draws, generate_indices
from vaevq_med.networks.generators.ddim import generate_images, ldm_scheduler
from vaevq_med.networks.generators.drawing import draw_indices
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.generators.static_steps import StepStore
from vaevq_med.tokens.store import TokenDataset, load_token_store
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.trained.network import StoredGenerator
from vaevq_med.training.config import check_config
from vaevq_med.training.generator_evaluator import GeneratorEvaluator
from vaevq_med.training.optim import decay_groups
from vaevq_med.training.second_stage import prepared_generator, tokens_validation_split

KINDS = ("autoregressive", "diffusion")
STORES = {"autoregressive": "indices", "diffusion": "latents"}


def workflow_of(file: str, overrides: dict[str, Any], run_id: str = "run") -> ConfigWorkflow:
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / file),
        meta_file=str(BUNDLE / "metadata.json"),
        logging_file=str(BUNDLE / "logging.conf"),
        run_id=run_id,
        workflow_type="train" if file.startswith("train") else "infer",
        **overrides,
    )
    workflow.initialize()
    return workflow


def run_bundle(file: str, overrides: dict[str, Any], run_id: str = "run") -> ConfigParser:
    workflow = workflow_of(file, overrides, run_id)
    workflow.run()
    workflow.finalize()
    return workflow.parser


def refusal(file: str, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the bundle ends with."""
    with pytest.raises(SystemExit) as stopped:
        run_bundle(file, overrides)
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("vaevq-med:"))
    return line


def toy(kind: str, tokens_dir: Path, output_dir: Path) -> dict[str, Any]:
    return {
        "tokens_dir": str(tokens_dir),
        "output_dir": str(output_dir),
        "tracking_uri": "none",
        "device": "cpu",
        "max_epochs": 2,
        "batch_size": 4,
        "micro_batch_size": "auto",
        "num_workers": 0,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "checkpoint_interval": 3,
        "val_max_items": 4,
        **TOY[kind],
    }


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt")


@pytest.fixture(scope="module")
def stores(tokenizer_path: Path, slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Indices and latents of the toy slices: 8x8 positions, K = 32, D = 4, 16 training images in two views."""
    root = tmp_path_factory.mktemp("stores")
    for kind, what in STORES.items():
        encode(tokenizer_path, slice_dataset, root / kind, kind=what)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def trained(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConfigParser]:
    """A toy run of each kind; the autoregressive one is tracked."""
    root = tmp_path_factory.mktemp("trained")
    overrides = {kind: toy(kind, stores[kind], root / kind) for kind in KINDS}
    overrides["autoregressive"]["tracking_uri"] = f"sqlite:///{root / 'mlflow.db'}"
    return {kind: run_bundle(f"train_{kind}.json", overrides[kind], "training") for kind in KINDS}


@pytest.fixture(scope="module")
def checkpoints(trained: dict[str, ConfigParser]) -> dict[str, Path]:
    return {kind: Path(parser["output_dir"]) / "checkpoints" / "best.pt" for kind, parser in trained.items()}


@pytest.fixture
def drawing(checkpoints: dict[str, Path], tokenizer_path: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Overrides of ``generate.json`` for a kind."""

    def overrides(kind: str, **further: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"num_steps": 3} if kind == "diffusion" else {}
        return {
            "checkpoint_path": str(checkpoints[kind]),
            "tokenizer_path": str(tokenizer_path),
            "generated_dir": str(tmp_path / "generated"),
            "device": "cpu",
            "num_samples": 5,
            "batch_size": 3,
            **settings,
            **further,
        }

    return overrides


def pictures(folder: Path) -> dict[str, bytes]:
    """What is in the folder, but for the seconds that it took."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "drawing.json"}


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_what_generation_needs(
    kind: str, trained: dict[str, ConfigParser], stores: dict[str, Path], tokenizer_path: Path
) -> None:
    parser = trained[kind]
    trainer = parser.get_parsed_content("train#trainer")
    assert (trainer.state.epoch, trainer.state.iteration) == (2, 8)
    assert {"loss", "gradient_norm", "learning_rate"} < set(trainer.state.terms)
    folder = Path(parser["output_dir"])
    state = read_checkpoint(folder / "checkpoints" / "last.pt")
    described, store = state["data"]["tokens"], load_token_store(stores[kind])
    assert described["kind"] == STORES[kind]
    assert described["content_hash"] == store.content_hash
    assert described["label"]["names"] == list(MODALITIES)
    assert (described["grid"], described["image_size"], described["in_channels"]) == ([8, 8], 32, 1)
    tokenizer = described["tokenizer"]
    assert [tokenizer[key] for key in ("num_embeddings", "num_codebooks", "embedding_dim")] == [32, 1, 4]
    assert state["data"]["patients"] == ["BraTS-GLI-00000"]
    stored = StoredGenerator(folder / "checkpoints" / "last.pt")
    assert stored.network().num_classes == 4
    assert stored.tokenizer(tokenizer_path).num_embeddings == 32
    summary = json.loads((folder / "run.json").read_text())
    assert not [key for key in summary if key.startswith("bits")]
    assert (summary["images"], summary["parameters"]) == (32, sum(p.numel() for p in trainer.network.parameters()))


def test_mlflow_holds_the_run(trained: dict[str, ConfigParser], stores: dict[str, Path]) -> None:
    from mlflow import MlflowClient

    parser = trained["autoregressive"]
    client = MlflowClient(parser["tracking_uri"])
    (experiment,) = (e for e in client.search_experiments() if e.name == "vaevq_med brats generation")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["num_embeddings"] == "32"
    assert run.data.tags["tokens.content_hash"] == load_token_store(stores["autoregressive"]).content_hash
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 8
    losses, perplexities = (
        [point.value for point in client.get_metric_history(run.info.run_id, f"val/{name}")]
        for name in ("loss", "perplexity")
    )
    assert len(losses) == 2
    assert perplexities == pytest.approx([math.exp(loss) for loss in losses])


@pytest.mark.parametrize("file", ["train_autoregressive.json", "train_diffusion.json", "generate.json"])
def test_monai_finds_every_property(
    file: str, stores: dict[str, Path], drawing: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    kind = "diffusion" if "diffusion" in file else "autoregressive"
    overrides = drawing(kind) if file == "generate.json" else toy(kind, stores[kind], tmp_path / "run")
    assert not workflow_of(file, overrides).check_properties()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bit_identical(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    whole = {
        **toy(kind, stores[kind], tmp_path / "whole"),
        "micro_batch_size": 2 if kind == "autoregressive" else "auto",
    }
    run_bundle(f"train_{kind}.json", whole)
    broken = {**whole, "output_dir": str(tmp_path / "broken")}
    workflow = workflow_of(f"train_{kind}.json", broken)
    trainer = workflow.parser.get_parsed_content("train#trainer")

    class Killed(BaseException):
        pass

    def kill(engine: Any) -> None:
        if engine.state.iteration == 4:
            raise Killed

    trainer.add_event_handler(Events.ITERATION_COMPLETED, kill)
    with pytest.raises(Killed):
        workflow.run()
    # Iteration 4 is lost: the checkpoint is that of iteration 3.
    assert read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.pt")["iteration"] == 3
    run_bundle(f"train_{kind}.json", broken)
    first, second = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "broken"))
    assert {key for key in first if not states_equal(first[key], second[key])} <= {"config", "extra"}
    assert first["iteration"] == 8
    assert not states_equal(first["network"], first["ema"])


@pytest.mark.parametrize(("kind", "epochs", "share"), [("autoregressive", 15, 0.4), ("diffusion", 5, 0.6)])
def test_the_loss_falls_on_images_that_are_all_alike(
    kind: str, epochs: int, share: float, stores: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(stores[kind], tmp_path / "tokens")
    file = tmp_path / "tokens" / "training.npy"
    values = np.load(file)
    np.save(file, np.broadcast_to(values[:1, :1], values.shape).copy())
    overrides = {**toy(kind, tmp_path / "tokens", tmp_path / "run"), "max_epochs": epochs, "val_interval": 100}
    workflow = workflow_of(f"train_{kind}.json", overrides)
    losses: list[float] = []
    trainer = workflow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.terms["loss"]))
    workflow.run()
    assert np.mean(losses[-10:]) < share * losses[0]


def test_best_is_the_lowest_loss(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(GeneratorEvaluator, "_summarize", lambda self: self.state.metrics.update(loss=next(said)))
    overrides = {**toy("autoregressive", stores["autoregressive"], tmp_path / "run"), "max_epochs": 3}
    run_bundle("train_autoregressive.json", overrides)
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert best["best"] == {"metric": "loss", "value": 1.0, "epoch": 2}
    assert best["iteration"] == 8


def test_validation_is_the_cross_entropy_of_the_averaged_weights(
    trained: dict[str, ConfigParser], stores: dict[str, Path]
) -> None:
    parser = trained["autoregressive"]
    network = parser.get_parsed_content("ema").module
    items = TokenDataset(tokens_dir=stores["autoregressive"], split="validation")
    # Four of the 16, evenly spaced.
    batch = [items[number] for number in (0, 5, 10, 15)]
    indices = torch.stack([item["indices"] for item in batch])
    logits = network.eval()(indices, torch.tensor([item["label"] for item in batch]))
    expected = F.cross_entropy(logits.flatten(0, -2).double(), indices.flatten())
    metrics = parser.get_parsed_content("validate#evaluator").state.metrics
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_validation_draws_the_same_noise_each_time(trained: dict[str, ConfigParser]) -> None:
    evaluator = trained["diffusion"].get_parsed_content("validate#evaluator")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        evaluator.run()
        found.append(evaluator.state.metrics["loss"])
        assert torch.initial_seed() == seed
    assert found[0] == found[1]
    evaluator.seed += 1
    evaluator.run()
    evaluator.seed -= 1
    assert evaluator.state.metrics["loss"] != found[0]


def test_the_scale_factor_is_that_of_the_training_latents(
    checkpoints: dict[str, Path], stores: dict[str, Path]
) -> None:
    items = TokenDataset(tokens_dir=stores["diffusion"], split="training")
    latents = np.stack([items[number]["latent"].numpy() for number in range(16)]).astype(np.float64)
    state = read_checkpoint(checkpoints["diffusion"])
    for weights in ("network", "ema"):
        assert state[weights]["scale_factor"].item() == pytest.approx(1 / latents.std(ddof=1), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_refuses_what_does_not_fit(
    kind: str, stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, overrides = f"train_{kind}.json", toy(kind, stores[kind], tmp_path / "run")
    other = next(path for name, path in stores.items() if name != kind)
    assert "kind" in refusal(file, {**overrides, "tokens_dir": str(other)}, capsys)
    assert "encode-tokens" in refusal(file, {**overrides, "tokens_dir": str(tmp_path)}, capsys)
    assert "num_classes 4" in refusal(file, {**overrides, "network_def#num_classes": 7}, capsys)
    assert "fp32, bf16" in refusal(file, {**overrides, "precision": "fp8"}, capsys)
    data = {key: value for key, value in overrides.items() if key != "tokens_dir"}
    assert str(tmp_path / "nope") in refusal(file, {**data, "dataset_dir": str(tmp_path / "nope")}, capsys)
    assert "val_interval: found 0, expected 1 or more" in refusal(file, {**overrides, "val_interval": 0}, capsys)
    assert "learning_rate: found -1, expected a number" in refusal(file, {**overrides, "learning_rate": -1}, capsys)
    assert "device: found 'foo'" in refusal(file, {**overrides, "device": "foo"}, capsys)
    assert "max_epochs: found 'two', expected a whole" in refusal(file, {**overrides, "max_epochs": "two"}, capsys)
    if kind == "autoregressive":
        assert "num_embeddings 32" in refusal(file, {**overrides, "network_def#num_embeddings": 64}, capsys)
        assert "grid [8, 8]" in refusal(file, {**overrides, "network_def#grid_size": [4, 4]}, capsys)
    else:
        deep = {**overrides, "network_def#channel_mult": [1] * 5}
        assert "grid of 8x8, expected multiples of 16" in refusal(file, deep, capsys)
        assert "num_train_timesteps: found 0" in refusal(file, {**overrides, "num_train_timesteps": 0}, capsys)
        blocks = {**overrides, "network_def#num_res_blocks": "two"}
        assert "num_res_blocks: found 'two', expected a whole number" in refusal(file, blocks, capsys)


def test_a_resume_with_another_noise_schedule_is_refused(
    stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {**toy("diffusion", stores["diffusion"], tmp_path / "run"), "max_epochs": 1}
    run_bundle("train_diffusion.json", overrides)
    longer = {**overrides, "max_epochs": 2}
    shorter = {**longer, "num_train_timesteps": 400}
    assert "num_train_timesteps is 400, was 1000" in refusal("train_diffusion.json", shorter, capsys)
    other = {**longer, "scheduler#_target_": "monai.networks.schedulers.DDIMScheduler"}
    assert ": scheduler is monai.networks.schedulers" in refusal("train_diffusion.json", other, capsys)
    run_bundle("train_diffusion.json", longer)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 8


def test_a_preset_is_drawn_from(
    stores: dict[str, Path], drawing: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    preset = {"network_def#_target_": "vaevq_med.networks.LlamaGen.preset", "network_def#name": "S"}
    sizes = {f"network_def#{key}": None for key in ("width", "depth", "num_heads")}
    overrides = {**toy("autoregressive", stores["autoregressive"], tmp_path / "run"), **preset, **sizes}
    run_bundle("train_autoregressive.json", {**overrides, "max_epochs": 1, "epoch_length": 1})
    checkpoint = tmp_path / "run" / "checkpoints" / "best.pt"
    run_bundle("generate.json", drawing("autoregressive", checkpoint_path=str(checkpoint), num_samples=2))
    assert len(list((tmp_path / "generated").glob("0*.png"))) == 2
    network = StoredGenerator(checkpoint).network()
    assert isinstance(network, LlamaGen)
    assert (network.class_embedding.embedding_dim, len(network.blocks), network.num_heads) == (384, 12, 6)


def test_a_resume_with_another_token_store_is_refused(
    stores: dict[str, Path],
    tokenizer_path: Path,
    slice_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = {**toy("autoregressive", stores["autoregressive"], tmp_path / "run"), "max_epochs": 1}
    run_bundle("train_autoregressive.json", overrides)
    encode(tokenizer_path, slice_dataset, tmp_path / "other", flip=False)
    changed = {**overrides, "max_epochs": 2, "tokens_dir": str(tmp_path / "other")}
    assert "another token store" in refusal("train_autoregressive.json", changed, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_trains_and_draws_like_fp32(
    kind: str,
    stores: dict[str, Path],
    drawing: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    losses, images = [], []
    for precision in ("fp32", "bf16"):
        overrides = {**toy(kind, stores[kind], tmp_path / precision), "precision": precision, "val_interval": 100}
        parser = run_bundle(f"train_{kind}.json", {**overrides, "max_epochs": 1})
        losses.append(parser.get_parsed_content("train#trainer").state.terms["loss"])
        folder = tmp_path / f"drawn_{precision}"
        settings = {"guidance_scale": 1.0} if kind == "diffusion" else {"top_k": 1}
        run_bundle("generate.json", drawing(kind, precision=precision, generated_dir=str(folder), **settings))
        images.append(np.stack([np.asarray(Image.open(folder / f"{n:06d}.png"), float) for n in range(5)]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    # Most pixels agree: rounding moves a few indices to another codeword.
    assert np.mean(np.abs(images[0] - images[1]) < 8) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_gradients_of_one(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    parts = ("token", "residual", "ffn", "label") if kind == "autoregressive" else ()
    dropouts = {f"network_def#{part}_dropout": 0.0 for part in parts}
    overrides = {
        **toy(kind, stores[kind], tmp_path / "one"),
        **dropouts,
        "max_epochs": 1,
        "epoch_length": 1,
        "val_interval": 100,
        "max_grad_norm": None,
    }
    found = []
    for processes in (1, 2):
        overrides |= {"batch_size": 4 // processes, "output_dir": str(tmp_path / f"of{processes}")}
        overlays = ["generation/generator_multi_gpu"] if processes > 1 else []
        output = tmp_path / f"{processes}.pt"
        found.append(gradients(processes, overrides, overlays, output, file=f"train_{kind}.json"))
    one, two = (result["network"] for result in found)
    assert one.keys() == two.keys()
    # Attention to one class has none of queries and keys, and groups of one channel lose what shifts a channel.
    alive = [bool(gradient.abs().max() > 1e-6) for gradient in one.values()]
    assert np.mean(alive) > (0.7 if kind == "diffusion" else 0.99)
    for name, gradient in one.items():
        # Sums in fp32 over other parts of the batch differ by some 3e-7.
        torch.testing.assert_close(two[name], gradient, atol=5e-7, rtol=1e-3)


def test_several_processes_need_ddp(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vaevq_med.training.distributed.world_size", lambda: 2)
    overrides = toy("autoregressive", stores["autoregressive"], tmp_path / "run")
    assert "generator_multi_gpu" in refusal("train_autoregressive.json", overrides, capsys)


def test_generation_takes_one_process(
    drawing: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vaevq_med.training.distributed.world_size", lambda: 2)
    assert "found 2 processes, expected one" in refusal("generate.json", drawing("autoregressive"), capsys)


# --- parts ------------------------------------------------------------------------------------------


def test_only_matrices_decay() -> None:
    network = LatentDiffusionUNet(in_channels=4, num_channels=32, channel_mult=(1, 1), num_res_blocks=1)
    decayed, others = decay_groups(network, 0.05)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(network.parameters()))
    # LlamaGen: the scales of its norms, two a block and the last one.
    llama = LlamaGen(num_embeddings=8, grid_size=2, width=8, depth=3, num_heads=2)
    assert len(decay_groups(llama, 0.05)[1]["params"]) == 7


def test_without_validation_images_training_images_are_validated_on(
    tokenizer_path: Path, slice_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode(tokenizer_path, slice_dataset, tmp_path / "tokens", split=["training"])
    assert tokens_validation_split(tmp_path / "tokens") == "training"
    assert "training images are validated on" in caplog.text


def test_a_network_that_draws_nothing_is_no_generator(stores: dict[str, Path]) -> None:
    dataset = TokenDataset(tokens_dir=stores["diffusion"], split="training", kind="latents")
    with pytest.raises(VaevqMedError, match="Linear"):
        prepared_generator(torch.nn.Linear(1, 1), dataset)  # type: ignore[arg-type]


def test_a_grid_of_pictures_places_each() -> None:
    found = picture_grid([np.full((1, 2), value, np.uint8) for value in (1, 2, 3)], columns=2, gap=1)
    assert found.tolist() == [[1, 1, 255, 2, 2], [255] * 5, [3, 3, 255, 255, 255]]


@pytest.mark.parametrize("overlay", sorted(path.stem for path in (OVERLAYS / "generation").glob("*.json")))
def test_every_overlay_is_read(overlay: str) -> None:
    """By the files whose kind its network or its name says, or, of another name, by one of them."""
    path = OVERLAYS / "generation" / f"{overlay}.json"
    of_network = generator_kind(path)
    kinds = [of_network] if of_network else [k for k in KINDS if overlay.startswith((f"{k}_", "generator_"))]
    for bundle in (BUNDLE, BUNDLE.parent / "imagenet"):
        refused = []
        for kind in kinds or KINDS:
            parser = ConfigParser()
            parser.read_config([str(bundle / f"train_{kind}.json"), str(path)])
            try:
                check_config(parser.get())
            except VaevqMedError as error:
                refused.append(str(error))
            for key in json.loads(path.read_text()).keys() - {"_notes_", "_title_"}:
                assert parser[key] is not None
        assert refused == [] if kinds else len(refused) < len(KINDS), refused


@pytest.mark.parametrize(("size", "millions"), [("s", 34.2), ("l", 342.9), ("xl", 774.7)])
def test_overlays_have_the_published_sizes(size: str, millions: float) -> None:
    parser = ConfigParser()
    overlay = OVERLAYS / "generation" / f"autoregressive_{size}.json"
    parser.read_config([str(BUNDLE / "train_autoregressive.json"), str(overlay)])
    parser.update({"num_embeddings": 16384, "num_codebooks": 1, "grid_size": [16, 16], "num_classes": 1000})
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_the_defaults_are_the_published_sizes() -> None:
    config = {kind: json.loads((BUNDLE / f"train_{kind}.json").read_text())["network_def"] for kind in KINDS}
    with torch.device("meta"):
        options = {k: v for k, v in config["autoregressive"].items() if not str(v).startswith("@") and k[0] != "_"}
        llama = LlamaGen(num_embeddings=16384, grid_size=16, num_classes=1000, **options)
        options = {k: v for k, v in config["diffusion"].items() if not str(v).startswith("@") and k[0] != "_"}
        unet = LatentDiffusionUNet(in_channels=3, num_classes=1000, **options)
    sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (llama, unet.unet)]
    assert sizes == pytest.approx([110.9, 400.9], abs=0.05)


# --- generation -------------------------------------------------------------------------------------


def drawn_by_hand(kind: str, checkpoint: Path, tokenizer_path: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    """The averaged network's samples, each drawn by itself from the seed in the table."""
    stored = StoredGenerator(checkpoint)
    network, tokenizer = stored.network(), stored.tokenizer(tokenizer_path)
    images = []
    for row in rows:
        label, generator = torch.tensor([int(row["label"])]), torch.Generator().manual_seed(int(row["seed"]))
        if isinstance(network, LlamaGen):
            indices = generate_indices(network, labels=label, guidance_scale=2.0, generator=[generator])
            images.append(tokenizer.decode_indices(indices))
        else:
            images.append(
                generate_images(
                    network,
                    tokenizer,
                    label,
                    grid_size=(8, 8),
                    scheduler=ldm_scheduler(),
                    num_steps=3,
                    guidance_scale=1.5,
                    generator=[generator],
                )
            )
    return torch.cat(images).detach().clamp(-1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_seed_and_number_alone(
    kind: str,
    drawing: Callable[..., dict[str, Any]],
    checkpoints: dict[str, Path],
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "generated"
    run_bundle("generate.json", drawing(kind, write=["png", "npz"]), "generating")
    with (folder / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{number:06d}.png" for number in range(5)]
    assert [row["name"] for row in rows] == [*MODALITIES, MODALITIES[0]]
    expected = drawn_by_hand(kind, checkpoints[kind], tokenizer_path, rows)
    for number, row in enumerate(rows):
        levels = np.asarray(Image.open(folder / row["file"])).astype(int)
        assert np.abs(levels - ((expected[number, 0].numpy() + 1) * 127.5)).max() <= 1
        with np.load(folder / f"{number:06d}.npz") as arrays:
            np.testing.assert_allclose(arrays["image"], expected[number].numpy(), atol=1e-4)
            assert arrays["label"] == int(row["label"])
    # Five pictures of 32 pixels in four columns, one a label.
    assert Image.open(folder / "grid.png").size == (4 * 34 - 2, 2 * 34 - 2)
    raw = tmp_path / "raw"
    run_bundle("generate.json", drawing(kind, weights="network", generated_dir=str(raw)))
    assert (raw / "000000.png").read_bytes() != (folder / "000000.png").read_bytes()


def test_the_steps_of_a_gpu_serve_every_batch(
    drawing: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static steps, with a stand-in for the graphs: those of the first batch, captured once, draw the second too."""
    folder = tmp_path / "generated"
    overrides = drawing("autoregressive", num_samples=6, precision="fp32")
    run_bundle("generate.json", overrides)
    before = pictures(folder)
    recorder = Recorder()
    original = LlamaGen.draws

    def with_store(self: LlamaGen, tokenizer: Any, *, settings: Any, **arguments: Any) -> Any:
        return autoregressive_draws(self, tokenizer, settings, StepStore(graphs=recorder))

    monkeypatch.setattr(LlamaGen, "draws", with_store)
    run_bundle("generate.json", {**overrides, "generated_dir": str(tmp_path / "replayed")})
    assert recorder.captures == 1
    # What "auto" comes to is recorded, and on a CPU that is fp32.
    monkeypatch.setattr(LlamaGen, "draws", original)
    run_bundle("generate.json", drawing("autoregressive", num_samples=6, generated_dir=str(tmp_path / "auto")))
    assert pictures(tmp_path / "replayed") == pictures(tmp_path / "auto") == before


def test_generation_goes_on_where_it_stood(
    drawing: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "generated"
    overrides = drawing("autoregressive")
    run_bundle("generate.json", overrides)
    before = pictures(folder)
    (folder / "000003.png").unlink()
    drawn: list[int] = []
    original = ImageSampler.sample

    def counted(self: ImageSampler, labels: torch.Tensor, *rest: Any) -> torch.Tensor:
        drawn.append(len(labels))
        return original(self, labels, *rest)

    monkeypatch.setattr(ImageSampler, "sample", counted)
    run_bundle("generate.json", overrides)
    assert (drawn, pictures(folder)) == ([1], before)
    told = json.loads((folder / "drawing.json").read_text())
    assert told["batch_size"] == 1
    assert told["network_calls"] == 8 * 8  # positions of a picture
    run_bundle("generate.json", overrides)
    assert (drawn, pictures(folder)) == ([1], before)
    # Where nothing is drawn, what was told remains.
    assert json.loads((folder / "drawing.json").read_text()) == told
    run_bundle("generate.json", {**overrides, "num_samples": 6})
    assert drawn == [1, 1]
    said = refusal("generate.json", {**overrides, "seed": 1}, capsys)
    assert "samples of seed 0, expected 1; choose" in said
    run_bundle("generate.json", {**overrides, "seed": 1, "overwrite": True})
    assert not (folder / "000005.png").exists()
    assert (folder / "000000.png").read_bytes() != before["000000.png"]


class Interrupted:
    """Draw some batches, then Ctrl-C."""

    def __init__(self, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = batches
        original = ImageSampler.sample

        def sample(sampler: ImageSampler, *arguments: Any) -> torch.Tensor:
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
            self.left -= 1
            return original(sampler, *arguments)

        monkeypatch.setattr(ImageSampler, "sample", sample)

    def run(self, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
        try:
            with pytest.raises(SystemExit) as stopped:
                run_bundle("generate.json", overrides)
        finally:
            signal.signal(signal.SIGINT, before)
        assert stopped.value.code == 130
        said = capsys.readouterr().err
        assert "vaevq-med: interrupted; the same command goes on\n" in said
        assert "Traceback" not in said
        assert "terminating" not in said


def test_an_interrupted_run_lists_what_is_drawn(
    drawing: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, whole = tmp_path / "generated", tmp_path / "whole"
    overrides = drawing("autoregressive", write="png")
    run_bundle("generate.json", {**overrides, "generated_dir": str(whole)})
    with monkeypatch.context() as patched:
        Interrupted(1, patched).run(overrides, capsys)
    with (folder / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(MODALITIES[:3])
    assert [row["file"] for row in rows] == sorted(path.name for path in folder.glob("0*.png"))
    with monkeypatch.context() as patched:
        Interrupted(0, patched).run({**overrides, "batch_size": 1}, capsys)
        (folder / "000001.png").unlink()
        Interrupted(1, patched).run({**overrides, "batch_size": 1}, capsys)
    with (folder / "samples.csv").open() as file:
        assert [row["number"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    run_bundle("generate.json", overrides)
    assert pictures(folder) == pictures(whole)


def test_an_overwrite_that_is_refused_loses_nothing(
    drawing: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = drawing("autoregressive")
    run_bundle("generate.json", overrides)
    before = pictures(tmp_path / "generated")
    overrides |= {"overwrite": True, "seed": 1}
    for wrong in (
        {"temperature": 0},
        {"tokenizer_path": "nowhere.pt"},
        {"batch_size": 0},
        {"precision": "fp8"},
        {"device": "nowhere"},
        {"overwrite": "yes"},
    ):
        refusal("generate.json", {**overrides, **wrong}, capsys)
        assert pictures(tmp_path / "generated") == before
    with monkeypatch.context() as patched:
        Interrupted(0, patched).run(overrides, capsys)
    assert pictures(tmp_path / "generated") == before
    run_bundle("generate.json", overrides)
    after = pictures(tmp_path / "generated")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def test_a_run_that_another_one_has_overtaken_is_refused(
    drawing: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, other = tmp_path / "generated", tmp_path / "other"
    overrides = drawing("autoregressive")
    run_bundle("generate.json", {**overrides, "seed": 1, "generated_dir": str(other)})
    original = ImageSampler.sample

    def overtaken(sampler: ImageSampler, *arguments: Any) -> torch.Tensor:
        shutil.copytree(other, folder, dirs_exist_ok=True)
        return original(sampler, *arguments)

    monkeypatch.setattr(ImageSampler, "sample", overtaken)
    assert "samples of seed 1, expected 0; choose" in refusal("generate.json", overrides, capsys)
    assert pictures(folder) == pictures(other)


def test_inpainting_takes_the_image_itself(
    checkpoints: dict[str, Path],
    stores: dict[str, Path],
    tokenizer_path: Path,
    slice_dataset: Path,
    tmp_path: Path,
) -> None:
    stored = StoredGenerator(checkpoints["autoregressive"])
    inpaint: dict[str, Any] = {"inpaint_split": "training", "inpaint_box": [0, 0, 8, 8]}
    plan = SamplePlan(stored=stored, num_samples=18, inpaint_tokens=stores["autoregressive"], **inpaint)
    array = np.load(stores["autoregressive"] / "training.npy")
    assert array.shape[:2] == (16, 2)
    assert (array[:, 0] != array[:, 1]).any()
    # After the last image comes the first again, with other random numbers.
    known = torch.stack([plan[number]["known"] for number in range(18)])
    np.testing.assert_array_equal(known, array[[*range(16), 0, 1], 0])
    assert plan.entry(16)["source"] == plan.entry(0)["source"]
    assert plan.entry(16)["seed"] != plan.entry(0)["seed"]
    encode(tokenizer_path, slice_dataset, tmp_path / "crops", ten_crop=True)
    with pytest.raises(VaevqMedError, match="expected that; make a store without --ten-crop"):
        SamplePlan(stored=stored, num_samples=1, inpaint_tokens=tmp_path / "crops", **inpaint)


def test_inpainting_keeps_what_the_box_does_not_touch(
    drawing: Callable[..., dict[str, Any]],
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vaevq_med.networks.tokenizer import VisualTokenizer

    found: list[torch.Tensor] = []
    original = VisualTokenizer.decode_indices

    def decode(self: VisualTokenizer, indices: torch.Tensor) -> torch.Tensor:
        found.append(indices)
        return original(self, indices)

    monkeypatch.setattr(VisualTokenizer, "decode_indices", decode)
    # Positions are 4 pixels wide: rows 2 to 4 and columns 1 and 2 are touched.
    inpaint = {"inpaint_tokens": str(stores["autoregressive"]), "inpaint_box": [8, 7, 17, 12]}
    run_bundle("generate.json", drawing("autoregressive", **inpaint))
    items = TokenDataset(tokens_dir=stores["autoregressive"], split="test")
    known = torch.stack([items[number]["indices"] for number in range(5)])
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[2:5, 1:3] = True
    indices = torch.cat(found)
    assert torch.equal(indices[:, ~touched], known[:, ~touched])
    assert not torch.equal(indices[:, touched], known[:, touched])
    with (tmp_path / "generated" / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [items[number]["id"] for number in range(5)]
    assert [int(row["label"]) for row in rows] == [items[number]["label"] for number in range(5)]
    for box in ([8, 7, 8, 12], [0, 0, 33, 8], [1, 2, 3], 10, ["a", 0, 10, 10], [0.9, 0.9, 10.9, 10.9]):
        changed = drawing("autoregressive", **{**inpaint, "inpaint_box": box})
        assert "inpaint_box" in refusal("generate.json", changed, capsys)
    assert "both or neither" in refusal("generate.json", drawing("autoregressive", inpaint_box=[0, 0, 8, 8]), capsys)
    said = refusal("generate.json", drawing("diffusion", **inpaint), capsys)
    assert "found LatentDiffusionUNet, a generator of latents, expected one that inpaints (CoarseFirst, C" in said


def test_two_codebooks_four_channels_and_no_labels(
    slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantizer = {
        "_target_": "vaevq_med.networks.quantizers.FactorizedQuantizer",
        "num_embeddings": 8,
        "embedding_dim": 4,
        "num_codebooks": 2,
    }
    tokenizer = write_checkpoint(tmp_path / "tokenizer.pt", quantizer, in_channels=4, stack_modalities=True)
    encode(tokenizer, slice_dataset, tmp_path / "tokens")
    training = {**toy("autoregressive", tmp_path / "tokens", tmp_path / "run"), "batch_size": 2, "max_epochs": 1}
    parser = run_bundle("train_autoregressive.json", training)
    network = parser.get_parsed_content("network")
    assert (network.num_codebooks, network.num_classes, network.sequence_length) == (2, 0, 128)
    drawing = {
        "output_dir": str(tmp_path / "run"),
        "tokenizer_path": str(tokenizer),
        "device": "cpu",
        "num_samples": 2,
    }
    run_bundle("generate.json", drawing)
    folder = tmp_path / "run" / "generated"
    names = [f"{number:06d}-channel{channel}.png" for number in range(2) for channel in range(4)]
    assert sorted(path.name for path in folder.glob("0*.png")) == names
    with (folder / "samples.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["", ""]
    # Two samples in a row, the four channels of each side by side.
    assert Image.open(folder / "grid.png").size == (2 * 4 * 32 + 2, 32)
    assert "without labels" in refusal("generate.json", {**drawing, "guidance_scale": 2.0}, capsys)
    assert "without labels" in refusal("generate.json", {**drawing, "labels": 0}, capsys)


def test_a_generator_for_each_sample_draws_its_row() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    together = draw_indices(logits, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = [draw_indices(logits[i], torch.Generator().manual_seed(5 + i)) for i in range(3)]
    assert together.tolist() == [int(index) for index in alone]
    network = LlamaGen(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2)
    with pytest.raises(VaevqMedError, match="found 1 generators"):
        generate_indices(network, num_samples=2, generator=[torch.Generator()])


def test_labels_are_found_by_name_and_number() -> None:
    names = ("crane", "tench", "crane")
    assert resolve_labels(["tench", 2], names) == [1, 2]
    assert resolve_labels("tench", names) == [1]
    assert resolve_labels(None, ()) == [0]
    with pytest.raises(VaevqMedError, match="numbers 0, 2"):
        resolve_labels("crane", names)


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("autoregressive", {"labels": ["t1x"]}, "did you mean 't1n'"),
        ("autoregressive", {"dataset_dir": "tokens"}, "one of inpaint_tokens and inpaint_box"),
        ("autoregressive", {"inpaint_split": "test"}, "inpaint_split: found 'test' without inpaint_tokens"),
        ("autoregressive", {"labels": 4}, "0 to 3"),
        ("autoregressive", {"labels": []}, "empty list"),
        ("autoregressive", {"num_steps": 10}, "num_steps"),
        ("diffusion", {"temperature": 0.9}, "temperature"),
        ("diffusion", {"num_steps": 1000}, "1 to 999"),
        ("diffusion", {"num_steps": 300}, "expected e.g. 250 or 333"),
        ("diffusion", {"num_steps": 2.5}, "num_steps: found 2.5, expected a whole number"),
        ("diffusion", {"quantize": "no"}, "expected True or False"),
        ("diffusion", {"guidance_scale": "two"}, "expected a number"),
        ("autoregressive", {"guidance_scale": -1}, "guidance_scale: found -1, expected a number from 0 to 10000"),
        ("diffusion", {"guidance_scale": 1e39}, "guidance_scale: found 1e+39, expected a number from 0 to 10000"),
        ("autoregressive", {"temperature": 0}, "temperature: found 0, expected a number from 0.001 to 1000"),
        ("autoregressive", {"temperature": 1e-39}, "temperature: found 1e-39, expected a number from 0.001 to 1000"),
        ("autoregressive", {"top_k": 2.5}, "top_k: found 2.5, expected a whole number"),
        ("autoregressive", {"top_p": 0.0}, "top_p"),
        ("autoregressive", {"num_samples": 0}, "num_samples"),
        ("autoregressive", {"num_samples": "abc"}, "expected a whole number"),
        ("autoregressive", {"batch_size": 0}, "batch_size: found 0, expected a whole number from 1"),
        ("autoregressive", {"seed": -1}, "seed: found -1, expected a whole number from 0"),
        ("autoregressive", {"seed": "abc"}, "expected a whole number"),
        ("autoregressive", {"device": "foo"}, "--device: found 'foo'"),
        ("autoregressive", {"device": "cuda:99"}, "--device: found 'cuda:99'"),
        ("autoregressive", {"write": ["jpg"]}, "png"),
        ("autoregressive", {"write": "npz"}, "write: found \"npz\", expected ['png']"),
        ("autoregressive", {"weights": "best"}, "'ema' or 'network'"),
        ("autoregressive", {"checkpoint_path": "nowhere.pt"}, "no checkpoint"),
    ],
)
def test_generation_refuses_settings(
    kind: str,
    overrides: dict[str, Any],
    said: str,
    drawing: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said in refusal("generate.json", drawing(kind, **overrides), capsys)


def test_generation_refuses_the_wrong_checkpoints(
    drawing: Callable[..., dict[str, Any]],
    checkpoints: dict[str, Path],
    tokenizer_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = read_checkpoint(tokenizer_path)
    changed["network"]["quant_conv.bias"] += 1
    torch.save(changed, tmp_path / "other.pt")
    other = drawing("autoregressive", tokenizer_path=str(tmp_path / "other.pt"))
    assert "found another tokenizer" in refusal("generate.json", other, capsys)
    swapped = drawing("autoregressive", checkpoint_path=str(tokenizer_path))
    assert "expected a generator's" in refusal("generate.json", swapped, capsys)
    swapped = drawing("autoregressive", tokenizer_path=str(checkpoints["diffusion"]))
    assert "expected that of a tokenizer, such as vaevq_med.networks.VisualTokenizer" in refusal(
        "generate.json", swapped, capsys
    )
    unscaled = read_checkpoint(checkpoints["diffusion"])
    missing = drawing("diffusion", checkpoint_path=str(tmp_path / "unscaled.pt"))
    for factor, said in ((math.nan, "no scale factor"), (0.0, "the scale factor 0"), (-1.0, "the scale factor -1")):
        unscaled["ema"]["scale_factor"].fill_(factor)
        torch.save(unscaled, tmp_path / "unscaled.pt")
        line = refusal("generate.json", missing, capsys)
        assert line.startswith(f"vaevq-med: {tmp_path / 'unscaled.pt'}: found {said}; expected one")
    del unscaled["ema"]["scale_factor"]
    torch.save(unscaled, tmp_path / "unscaled.pt")
    line = refusal("generate.json", missing, capsys)
    assert line.startswith(f"vaevq-med: {tmp_path / 'unscaled.pt'}: ")
    assert "scale_factor" in line
    misfit = read_checkpoint(checkpoints["autoregressive"])
    misfit["data"]["tokens"]["grid"] = [4, 4]
    torch.save(misfit, tmp_path / "misfit.pt")
    refused = drawing("autoregressive", checkpoint_path=str(tmp_path / "misfit.pt"))
    assert "found tokens of grid [4, 4], expected grid [8, 8]" in refusal("generate.json", refused, capsys)
    folder = tmp_path / "generated"
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal("generate.json", drawing("autoregressive"), capsys)
