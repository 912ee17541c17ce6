"""Codebooks that start at centers of the latents of a few batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config, trainer_of
from helpers import ddp_codebook_start
from helpers.bundles import quick
from helpers.processes import run_in_two
from ignite.engine import Events

from vaevq_med.trained.file import read_checkpoint


def config_of(dataset: Path, output: Path, **further: Any) -> dict[str, Any]:
    return {**quick(toy_config(dataset, output)), "codebook_init": "kmeans", "codebook_init_batches": 2, **further}


def at_start(trainer: Any, look: Any) -> list[Any]:
    """What a look at the trainer gives once it has started, before the first step."""
    seen: list[Any] = []
    trainer.add_event_handler(Events.EPOCH_STARTED(once=1), lambda: seen.append(look()))
    return seen


def distances(trainer: Any) -> float:
    """The mean squared distance of the latents of the first two batches to their nearest codewords."""
    network = trainer.network.eval()
    batches = [next(iter(trainer.data_loader))["image"]]
    with torch.no_grad():
        z = network.encode_stage_2_inputs(torch.cat(batches)).movedim(1, -1).flatten(0, -2)
        return torch.cdist(z, network.quantizer.codebook()).square().min(dim=1).values.mean().item()


@pytest.mark.parametrize("overlay", ["vqgan", "vqgan_ema", "simvq", "coherent"])
def test_the_first_step_finds_codewords_among_the_latents(overlay: str, slice_dataset: Path, tmp_path: Path) -> None:
    found = {}
    for init in ("random", "kmeans"):
        config = config_of(slice_dataset, tmp_path / init, codebook_init=init, epoch_length=1)
        config["network_def#encoder#num_channels"] = config["network_def#decoder#num_channels"] = 8
        trainer = trainer_of(config, overlay)
        seen = at_start(trainer, lambda trainer=trainer: distances(trainer))
        trainer.run()
        found[init] = seen[0]
    assert found["kmeans"] < found["random"] / 5


def test_training_sees_the_batches_that_it_would_have_seen(slice_dataset: Path, tmp_path: Path) -> None:
    """And the same codebook comes out twice."""
    seen: dict[str, list[torch.Tensor]] = {}
    codebooks = []
    for name, init in {"random": "random", "one": "kmeans", "two": "kmeans"}.items():
        trainer = trainer_of(config_of(slice_dataset, tmp_path / name, codebook_init=init, epoch_length=2), "vqgan")
        images = seen.setdefault(name, [])
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda e, to=images: to.append(e.state.batch["image"]))
        codebooks.append(at_start(trainer, lambda of=trainer: of.network.quantizer.codebook().detach().clone()))
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(seen["random"], seen["one"], strict=True))
    assert torch.equal(codebooks[1][0], codebooks[2][0])
    assert not torch.equal(codebooks[0][0], codebooks[1][0])


def test_a_resumed_run_keeps_its_codebook(slice_dataset: Path, tmp_path: Path) -> None:
    lengths = {f"schedulers#{number}#total_steps": 8 for number in range(2)}
    whole = trainer_of(config_of(slice_dataset, tmp_path / "whole", max_epochs=2, **lengths), "vqgan_ema")
    whole.run()
    config = config_of(slice_dataset, tmp_path / "halved", **lengths)
    trainer_of(config, "vqgan_ema").run()
    resumed = trainer_of({**config, "max_epochs": 2}, "vqgan_ema")
    resumed.run()
    assert torch.equal(resumed.network.quantizer.codebook(), whole.network.quantizer.codebook())
    kept = read_checkpoint(tmp_path / "halved" / "checkpoints" / "last.pt")["extra"]["codebook_init"]
    assert kept == {"init": "kmeans", "latents": 2 * 4 * 16 * 16}


def test_a_quantizer_without_a_codebook_says_so(
    slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(slice_dataset, tmp_path / "run", num_embeddings=15360, embedding_dim=5)
    trainer_of(config, "fsq").run()
    assert "codebook_init kmeans: FSQ has no codewords that can be put anywhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"codebook_init": "k-means"}, "codebook_init is 'k-means'; expected"),
        ({"codebook_init_batches": 0}, "codebook_init_batches: found 0, expected 1 or more"),
    ],
)
def test_other_settings_are_refused(
    options: dict[str, Any], said: str, slice_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        trainer_of(config_of(slice_dataset, tmp_path / "run", **options))
    assert said in capsys.readouterr().err


def test_fewer_latents_than_codewords_are_refused_in_one_line(slice_dataset: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(slice_dataset, tmp_path / "run", num_embeddings=4096), "vqgan")
    with pytest.raises(
        Exception, match=r"found 2048 latents in 2 batches, expected at least 4096, one a codeword"
    ) as e:
        trainer.run()
    assert "\n" not in str(e.value)


def test_two_processes_have_the_centers_of_both(tmp_path: Path) -> None:
    first, second = run_in_two(ddp_codebook_start, tmp_path)
    assert torch.equal(first["centers"], second["centers"])
    assert first["seen"] == second["seen"] == 80
    found = first["centers"].sort(dim=0).values
    torch.testing.assert_close(found, torch.arange(8.0).view(8, 1).expand(8, 2) * 10, atol=0.1, rtol=0)
