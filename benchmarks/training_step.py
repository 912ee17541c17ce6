"""A training step of each method beside the first one's, without the GAN: seconds and peak memory, as ratios.

The steps of all methods take turns in one process, so that what else the machine does falls on all alike::

    python benchmarks/training_step.py                      # on a GPU: train.json's sizes, a batch of 32
    python benchmarks/training_step.py --small              # on a CPU: 64 pixels, width 16, K = 1,024, one thread
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _measure import PeakMemory, hardware, synchronize

from vaevq_med.core.resources import bundle_path, overlay_path
from vaevq_med.networks.tokenizer import TrainingForward

SMALL = {"overlays": ["small_cpu"], "image_size": 64, "batch_size": 16}


class Step:
    """The training step of an overlay on random images, as the bundle builds it."""

    def __init__(self, overlay: str, arguments: argparse.Namespace) -> None:
        root = bundle_path("brats")
        small = SMALL if arguments.small else {"overlays": []}
        parser = ConfigParser()
        names = [*small["overlays"], overlay]  # type: ignore[misc]
        parser.read_config([str(root / "train.json"), *(str(overlay_path(name, root)) for name in names)])
        parser.update({key: value for key, value in small.items() if key != "overlays"})
        parser.update({"device": arguments.device, "objective#adversarial": None})
        torch.manual_seed(0)
        self.device = torch.device(arguments.device)
        self.network = parser.get_parsed_content("network").train()
        self.forward = TrainingForward(self.network)
        self.objective = parser.get_parsed_content("objective").to(self.device).train()
        self.optimizer = torch.optim.Adam([p for p in self.network.parameters() if p.requires_grad], lr=1e-4)
        size, batch = (parser.get_parsed_content(name) for name in ("image_size", "batch_size"))
        self.images = torch.rand(arguments.batch_size or batch, 1, size, size, device=self.device) * 2 - 1
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """One update."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.forward(self.images)
            total = self.objective.generator(self.images, output).total
        total.backward()
        self.optimizer.step()

    def timed(self) -> None:
        """One update, with what it took of the GPU's time or, without one, of this process's."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        synchronize(self.device)
        started = clock()
        self()
        synchronize(self.device)
        self.seconds.append(clock() - started)


def main() -> None:
    """Print a row for each method and store all in ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--methods", nargs="+", default=["simvq", "paper", "coherent"], help="overlays; the first is 1")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    steps = {name: Step(name, arguments) for name in arguments.methods}
    memory = {}
    for name, step in steps.items():
        step()  # makes the optimizer's state, and on a GPU the libraries' plans
        with PeakMemory(step.device) as peak:
            step()
        memory[name] = peak.mib
    for _ in range(arguments.repeats):
        for step in steps.values():
            step.timed()
    first = next(iter(steps))
    rows: dict[str, Any] = {}
    print("| method | seconds a step | times the first | MiB a step adds | times the first |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, step in steps.items():
        ratio = statistics.median(mine / other for mine, other in zip(step.seconds, steps[first].seconds, strict=True))
        rows[name] = {"seconds": step.seconds, "ratio": ratio, "memory_mib": memory[name]}
        print(
            f"| {name} | {statistics.median(step.seconds):.3f} | {ratio:.3f} | {memory[name]:.0f} | "
            f"{memory[name] / max(memory[first], 1):.3f} |"
        )
    if arguments.output:
        record = {"hardware": hardware(arguments.device), "command": " ".join(sys.argv), "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
