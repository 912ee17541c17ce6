"""Training throughput and peak memory of the bundle's default configuration: precision, compilation, memory format.

Each row trains the same configuration for a few steps on random images that are on the device already, so that neither
disk nor decoding is measured; the steps after the warm-up count::

    python benchmarks/gpu/throughput.py              # 256 pixels, batch 32, K = 16,384, D = 64
    python benchmarks/gpu/throughput.py --small      # a few seconds on a CPU
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _common import configure, hardware, prepare, write_json
from tokenizer_study import SMALL

ROWS: dict[str, dict[str, Any]] = {
    "fp32 (TF32)": {},
    "fp32 (TF32), channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels_last": {"precision": "bf16", "channels_last": True},
    "fp32 (TF32), compile": {"compile": True},
    "bf16, channels_last, compile": {"precision": "bf16", "channels_last": True, "compile": True},
}


class Batches:
    """The same batch again and again."""

    def __init__(self, images: Tensor, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return iter([{"image": self.images}] * self.count)


def run_row(overrides: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a step, images a second, peak memory of one configuration."""
    prepare(0)
    device = torch.device(arguments.device)
    steps = arguments.warmup + arguments.steps
    images = torch.rand(arguments.batch_size, 1, arguments.size, arguments.size, device=device) * 2 - 1
    parser = configure(
        "",
        [],
        {
            **(SMALL if arguments.small else {}),
            "device": device,
            "batch_size": arguments.batch_size,
            "train#dataset": None,
            "validate#dataset": None,
            "sampler": None,
            "train#dataloader": Batches(images, steps),
            "train#handlers": [],
            "val_interval": 10**6,
            "objective#adversarial#start_step": 0,
            **overrides,
        },
        steps=steps,
        image_size=arguments.size,
    )
    trainer = parser.get_parsed_content("train#trainer")
    moments: list[float] = []

    def mark(engine: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            if engine.state.iteration == arguments.warmup:
                torch.cuda.reset_peak_memory_stats()
        moments.append(time.perf_counter())

    from ignite.engine import Events

    trainer.add_event_handler(Events.ITERATION_COMPLETED, mark)
    started = time.perf_counter()
    trainer.run()
    seconds = (moments[-1] - moments[arguments.warmup - 1]) / arguments.steps
    figures = {
        "seconds_a_step": seconds,
        "images_a_second": arguments.batch_size / seconds,
        "first_step_seconds": moments[0] - started,
    }
    if device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def main() -> None:
    """Run the rows and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--small", action="store_true", help="64 pixels and a small network: for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="by default all; without a GPU no compilation")
    parser.add_argument("--output", type=Path, help="folder of the JSON; by default $OUT, or the working directory")
    arguments = parser.parse_args()
    arguments.size = arguments.size or (64 if arguments.small else 256)
    arguments.batch_size = arguments.batch_size or (4 if arguments.small else 32)
    names = arguments.rows or [n for n in ROWS if arguments.device == "cuda" or "compile" not in n]
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        rows[name] = run_row(ROWS[name], arguments)
        write_json(
            "throughput", {"hardware": hardware(), "batch_size": arguments.batch_size, "rows": rows}, arguments.output
        )
    print(f"\n{hardware()}; batch {arguments.batch_size}, {arguments.size} pixels, GAN on\n")
    print("| configuration | images/s | s/step | first step s | peak GiB | speed over the first row |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    base = next(iter(rows.values()))["images_a_second"]
    for name, f in rows.items():
        memory = f"{f['peak_gib']:.1f}" if "peak_gib" in f else "–"
        print(
            f"| {name} | {f['images_a_second']:.1f} | {f['seconds_a_step']:.3f} | {f['first_step_seconds']:.1f} | "
            f"{memory} | {f['images_a_second'] / base:.2f} |"
        )


if __name__ == "__main__":
    main()
