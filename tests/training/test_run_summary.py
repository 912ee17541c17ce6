"""``run.json``: what a training run cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.bundles import run_bundle

from vaevq_med.trained.file import read_checkpoint
from vaevq_med.training.summary import peak_memory


def test_a_resumed_run_goes_on_counting(toy_overrides: dict[str, Any]) -> None:
    overrides = {**toy_overrides, "val_interval": 1000, "objective#weights#perceptual": 0.0}
    path = Path(overrides["output_dir"]) / "run.json"
    run_bundle("train.json", {**overrides, "max_epochs": 1}, run_id="training")
    first = json.loads(path.read_text())
    assert (first["iterations"], first["images"], first["processes"]) == (4, 16, 1)
    parser = run_bundle("train.json", overrides, run_id="training")
    second = json.loads(path.read_text())
    assert (second["iterations"], second["images"]) == (8, 32)
    assert second["peak_memory_bytes"] >= first["peak_memory_bytes"]
    # One step a process warms up: 3 + 3 of 8 steps are timed.
    counts = read_checkpoint(path.parent / "checkpoints" / "last.pt")["extra"]["run_summary"]
    assert counts["timed_images"] == 24
    assert second["images_per_second"] == pytest.approx(24 / counts["timed_seconds"])
    network = parser.get_parsed_content("network")
    # 32 codewords are 5 bits, for each 2 x 2 pixels.
    assert (second["bits_per_position"], second["bits_per_pixel"]) == (5.0, 1.25)
    assert second["parameters"] == sum(p.numel() for p in network.parameters())
    assert (second["device"], second["peak_memory_of"]) == ("cpu", "process")


def test_peak_memory_is_at_least_what_is_held_now() -> None:
    held = psutil.Process().memory_info().rss
    peak, whose = peak_memory(torch.device("cpu"))
    assert whose == "process"
    assert peak is not None
    # What Python frees in between is not held any more.
    assert held - 2**20 <= peak < 1 << 40


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_its_allocations() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    block = torch.empty(1 << 24, dtype=torch.uint8, device="cuda")
    peak, whose = peak_memory(block.device)
    assert (whose, peak) == ("cuda", held + (1 << 24))
