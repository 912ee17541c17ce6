"""The bits of held-out tokens, of generators whose likelihood is known, from the file that says them to the table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundles import TOY
from helpers.bundles import generator_overrides as toy
from helpers.bundles import run_generator as run
from helpers.stores import encode, write_checkpoint
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.intervals import bootstrap_interval
from vaevq_med.evaluation.token_bits import TokenBits
from vaevq_med.tokens.store import TokenDataset
from vaevq_med.trained.network import StoredGenerator


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt")


@pytest.fixture(scope="module")
def store(tokenizer_path: Path, slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "indices"
    encode(tokenizer_path, slice_dataset, folder, kind="indices")
    return folder


def trained(store: Path, folder: Path, *overlays: str) -> Path:
    run("train_autoregressive.json", toy(store, folder), *overlays)
    return folder / "checkpoints/best.pt"


@pytest.fixture(scope="module")
def llamagen(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(store, tmp_path_factory.mktemp("llamagen"))


@pytest.fixture(scope="module")
def absorbing(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(store, tmp_path_factory.mktemp("absorbing"), "absorbing")


def measured(checkpoint: Path, store: Path, output: Path, **options: Any) -> dict[str, Any]:
    command = TokenBits(checkpoint=checkpoint, tokens=store, output=output, device="cpu", **options)
    record = command.run().record
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    return dict(record)


def test_they_are_the_mean_of_the_images_one_by_one(llamagen: Path, store: Path, tmp_path: Path) -> None:
    network = StoredGenerator(llamagen).network().eval()
    dataset = TokenDataset(tokens_dir=store, split="test")
    array = dataset.store.array("test").astype(np.int64)
    one_by_one = []
    with torch.no_grad():
        for tokens, label in zip(array[:, 0], dataset.labels, strict=True):
            flat = torch.from_numpy(tokens)[None]
            logs = network(flat, torch.tensor([label])).log_softmax(dim=-1)
            one_by_one.append(-logs.gather(-1, flat[..., None]).mean().item() / math.log(2))
    for batch_size in (1, 3, 64):
        found = measured(llamagen, store, tmp_path / f"{batch_size}.json", batch_size=batch_size)
        assert found["held_out_bits"] == pytest.approx(np.mean(one_by_one), rel=1e-5)
        assert found["likelihood"] == "exact"
        assert found["uniform_bits"] == 5.0  # K is 32
        assert found["provenance"]["n"] == len(array)
    labels = np.array(dataset.labels)
    names = dataset.store.label_names
    by_hand = {names[label]: np.mean(np.array(one_by_one)[labels == label]) for label in {*labels.tolist()}}
    assert found["labels"] == pytest.approx(by_hand, rel=1e-5)


def test_the_interval_is_over_patients(
    llamagen: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the single images, whole patients drawn, though batches give no more than the mean of a patient."""
    alone = measured(llamagen, store, tmp_path / "alone.json")
    assert alone["interval"] is None  # the split has one patient
    opened = TokenBits._dataset

    def of_three(self: TokenBits, *rest: Any) -> TokenDataset:
        dataset = opened(self, *rest)
        dataset.items = [{**item, "patient": f"p{number % 3}"} for number, item in enumerate(dataset.items)]
        return dataset

    monkeypatch.setattr(TokenBits, "_dataset", of_three)
    found = measured(llamagen, store, tmp_path / "three.json", batch_size=2)
    network = StoredGenerator(llamagen).network().eval()
    dataset = TokenDataset(tokens_dir=store, split="test")
    with torch.no_grad():
        nats = [
            network.bound(item["indices"][None], torch.tensor([item["label"]])).item()
            for item in map(dataset.__getitem__, range(len(dataset)))
        ]
    units = np.arange(len(nats)) % 3
    expected = bootstrap_interval(np.array(nats) / math.log(2), units)
    assert found["interval"] == pytest.approx(expected, rel=1e-5)
    assert found["provenance"]["patients"] == 3
    assert found["held_out_bits"] == pytest.approx(alone["held_out_bits"], rel=1e-5)


def test_a_bound_is_a_mean_over_draws_that_the_seed_decides(absorbing: Path, store: Path, tmp_path: Path) -> None:
    first = measured(absorbing, store, tmp_path / "first.json", draws=3)
    again = measured(absorbing, store, tmp_path / "again.json", draws=3)
    other = measured(absorbing, store, tmp_path / "other.json", draws=3, seed=1)
    many = measured(absorbing, store, tmp_path / "many.json")
    assert first["held_out_bits"] == again["held_out_bits"] != other["held_out_bits"]
    assert (first["likelihood"], many["provenance"]["draws"]) == ("bound", 2)
    # K is 32, and a step or two have hardly taught anything.
    assert many["held_out_bits"] == pytest.approx(5.0, abs=0.6)


def test_they_are_of_the_bound_and_not_of_what_is_minimized(store: Path, tmp_path: Path) -> None:
    """Of the same draws in the same order: a label's images at once, as the split has one patient."""
    maskgit = trained(store, tmp_path / "maskgit", "maskgit")
    draws, seed = 2, 3
    found = measured(maskgit, store, tmp_path / "bits.json", draws=draws, seed=seed)["held_out_bits"]
    network = StoredGenerator(maskgit).network().eval()
    dataset = TokenDataset(tokens_dir=store, split="test")
    indices = torch.from_numpy(dataset.store.array("test").astype(np.int64)[:, 0])
    labels = torch.tensor(dataset.labels)

    def bits(nats: Callable[..., torch.Tensor]) -> float:
        generator, total = torch.Generator().manual_seed(seed), 0.0
        for label in [*dict.fromkeys(dataset.labels)] * draws:
            own = labels == label
            total += own.sum().item() * nats(indices[own], labels[own], generator=generator).item()
        return total / (draws * len(labels)) / math.log(2)

    with torch.no_grad():
        assert found == pytest.approx(bits(network.bound), rel=1e-6)
        assert found != pytest.approx(bits(network.loss), rel=0.01)


def test_the_command_says_them_in_a_line(llamagen: Path, absorbing: Path, store: Path, tmp_path: Path) -> None:
    for checkpoint, words in ((llamagen, "bits.json: 4.9"), (absorbing, "bits.json: at most ")):
        output = tmp_path / checkpoint.parts[-3] / "bits.json"
        output.parent.mkdir()
        words_of = ["token-bits", str(checkpoint), str(store), str(output), "--device", "cpu"]
        done = CliRunner().invoke(app, words_of)
        assert done.exit_code == 0, done.output
        told = "".join(done.output.split("\n"))
        assert words in told.replace("bits.json: 5.0", "bits.json: 4.9")  # K is 32: hardly below 5, or above
        assert "bits a token of 5.00" in told
        assert told.endswith("split test")
        assert ("at most" in told) == ("at most" in words)
        again = CliRunner().invoke(app, words_of)
        assert "found something there, expected nothing" in str(again.exception)
        done = CliRunner().invoke(app, [*words_of, "--overwrite", "--json"])
        assert json.loads(done.stdout) == json.loads(output.read_text())


def test_what_has_no_bits_is_refused_in_a_line(
    llamagen: Path, tokenizer_path: Path, store: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bits.json"
    latents = tmp_path / "latents"
    encode(tokenizer_path, slice_dataset, latents, kind="latents")
    run("train_diffusion.json", toy(latents, tmp_path / "ldm", TOY["diffusion"]))
    ldm = tmp_path / "ldm/checkpoints/best.pt"
    other = write_checkpoint(tmp_path / "other.pt", change=lambda network: network.encoder.layers[0].bias.data.add_(1))
    encode(other, slice_dataset, tmp_path / "others", kind="indices")
    for checkpoint, tokens, options, complaint in [
        (ldm, latents, {}, "found LatentDiffusionUNet, which has no likelihood of tokens"),
        (llamagen, latents, {}, "found a token store of kind latents, expected kind indices"),
        (llamagen, tmp_path / "others", {}, "found a token store of tokenizer sha256:"),
        (llamagen, store, {"draws": 2}, "--draws: found 2 for an exact likelihood, expected 1"),
        (llamagen, store, {"batch_size": 0}, "--batch-size: found 0, expected 1 or more"),
        (llamagen, store, {"max_items": 0}, "--max-items: found 0, expected 1 or more"),
        (llamagen, store, {"seed": -1}, "--seed: found -1, expected 0 to"),
        (llamagen, store, {"seed": 2**65}, "--seed: found 36893488147419103232, expected 0 to"),
        (llamagen, store, {"output": tmp_path / "none/bits.json"}, "found no folder .*none, expected one"),
        (llamagen, store, {"output": tmp_path / "bits.txt"}, "found the suffix '.txt', expected .json"),
        (tokenizer_path, store, {}, "found a checkpoint that no token store belongs to, expected a generator's"),
    ]:
        command = {"checkpoint": checkpoint, "tokens": tokens, "output": output, "device": "cpu", **options}
        with pytest.raises(VaevqMedError, match=complaint):
            TokenBits(**command).run()
    assert not output.exists()


def test_a_split_that_was_trained_on_is_not_called_held_out(
    llamagen: Path, tokenizer_path: Path, store: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    """The training and the test patient changed places, as another split of the same data has them."""
    moved = tmp_path / "moved"
    shutil.copytree(slice_dataset, moved)
    content = json.loads((moved / "dataset.json").read_text())
    content["training"], content["test"] = content["test"], content["training"]
    (moved / "dataset.json").write_text(json.dumps(content))
    encode(tokenizer_path, moved, tmp_path / "tokens", kind="indices")
    command = TokenBits(checkpoint=llamagen, tokens=tmp_path / "tokens", output=tmp_path / "bits.json", device="cpu")
    patient = content["test"][0]["patient"]
    with pytest.raises(VaevqMedError, match=f"split 'test': found patient {patient}, whom .* was trained on, expected"):
        command.run()
    assert replace(command, split="training").run().record["provenance"]["split"] == "training"


def test_layers_of_volumes_are_refused(
    llamagen: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = TokenDataset.__init__

    def of_volumes(self: TokenDataset, **options: Any) -> None:
        opened(self, **options)
        self.store = replace(self.store, content={**self.store.content, "grid": [2, 8, 8]})

    monkeypatch.setattr(TokenDataset, "__init__", of_volumes)
    with pytest.raises(VaevqMedError, match="found a grid of 2x8x8, expected rows and columns"):
        TokenBits(checkpoint=llamagen, tokens=store, output=tmp_path / "bits.json", device="cpu").run()
