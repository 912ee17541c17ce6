"""What the parts of ``check.py`` share: images, the bundle's configuration around them, time and memory.

Imports that take long wait until they are needed, so that the machine's own figures are there first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _measure import seconds_of, synchronize
from _record import Record
from torch import Tensor


@dataclass
class Setting:
    """The default configuration at 256 pixels and batch 32, or a small one for a CPU.

    Attributes:
        arguments: of the command.
        record: where lines go.
        rate: bf16 products a second, FLOP/s, once measured.
        copy_rate: bytes that a copy within the memory reads and writes a second, once measured.
        kept: what a part leaves for the next.
    """

    arguments: argparse.Namespace
    record: Record
    rate: float | None = None
    copy_rate: float | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    _images: Tensor | None = None

    def __post_init__(self) -> None:
        self.small: bool = self.arguments.small
        self.device = torch.device(self.arguments.device)
        self.size = 64 if self.small else 256
        self.batch_size = 4 if self.small else 32

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def images(self) -> Tensor:
        """Two batches in [-1, 1] on the device, of the packed slices, or blobs where there are none."""
        if self._images is None:
            count = 2 * self.batch_size
            if self.arguments.data is None:
                images = blobs(count, self.size)
            else:
                from _common import PackedSlices

                data = PackedSlices(file=str(self.arguments.data), split="training", image_size=self.size)
                images = torch.stack([data[i * len(data) // count]["image"] for i in range(count)])
            self._images = images.to(self.device)
        return self._images

    def parser(self, steps: int, **overrides: Any) -> Any:
        """The bundle's configuration for so many steps on the images, GAN on from the first."""
        from _common import Batches, configure, prepare
        from tokenizer_study import SMALL

        prepare(0)
        batches = Batches(self.images, self.batch_size, steps)
        return configure(
            "",
            [],
            {
                **(SMALL if self.small else {}),
                "device": self.device,
                "batch_size": self.batch_size,
                "train#dataset": None,
                "validate#dataset": None,
                "sampler": None,
                "train#dataloader": batches,
                "train#handlers": [],
                "val_interval": 10**6,
                "objective#adversarial#start_step": 0,
                **overrides,
            },
            steps=steps,
            image_size=self.size,
        )

    def scratch(self, parser: Any) -> Path:
        """A configuration's folder, which is gone when the process ends."""
        return Path(parser.get_parsed_content("output_dir"))

    def synchronize(self) -> None:
        """Wait for the device."""
        synchronize(self.device)

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Most memory held since :meth:`reset_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None

    def seconds_of(self, call: Callable[[], object], repeats: int = 3) -> float:
        """The middle of so many timings, after one call that warms up."""
        return seconds_of(call, self.device, repeats)


def blobs(count: int, size: int) -> Tensor:
    """Smooth random images ``[N, 1, S, S]`` in [-1, 1], the same each time."""
    coarse = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1) * 2 - 1
