"""What a training run cost, in one small file beside its checkpoints."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events

from vaevq_med.core.errors import dispensable
from vaevq_med.core.files import atomic_write_text
from vaevq_med.training import distributed
from vaevq_med.training.base import BaseTrainer
from vaevq_med.training.checkpoint import TrainingCheckpoint

_KEY = "run_summary"


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Most memory this process has held so far, in bytes, and whose memory that is.

    Args:
        device: a GPU, whose allocations are counted; otherwise the process' resident memory is.

    Returns:
        The bytes, None where the operating system does not say, and ``"cuda"`` or ``"process"``.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)), "cuda"
    try:
        import resource
    except ImportError:
        return None, "process"
    import psutil

    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    # The system brings its maximum up to date now and then only.
    return max(peak, psutil.Process().memory_info().rss), "process"


class RunSummary:
    """Write the run's size, rate, speed and peak memory, after each epoch and at the end.

    Speed counts the time from asking for a batch to the end of its step, and neither validation nor checkpoints; the
    first step of each process, which warms up, is left out. A resumed run goes on counting where its checkpoint stood.

    The file holds ``parameters`` (those that are trained; a discriminator's are not counted), of a tokenizer
    ``bits_per_position`` and ``bits_per_pixel``, of a generator of tokens ``token_bits`` (the least that a validation
    found), ``iterations``, ``images``, ``images_per_second`` (None after a
    single step), ``peak_memory_bytes`` (of the main process), ``peak_memory_of`` (``cuda`` or ``process``),
    ``processes``, ``device``, the ``micro_batch_size`` and ``precision`` that ``auto`` came to, and ``started_from``,
    the file that the run started from and what became of each part, where there is one.

    Args:
        path: JSON file to write, atomically.
        checkpoint: the run's checkpoint handler, which carries the counts over an interruption; it has to be attached
            after this one.
    """

    def __init__(self, *, path: str | Path, checkpoint: TrainingCheckpoint | None = None) -> None:
        self.path = Path(path)
        self.checkpoint = checkpoint
        self._counts: dict[str, Any] = {}
        self._asked = 0.0
        self._first = True

    def attach(self, engine: BaseTrainer) -> None:
        """Register the events, on the main process."""
        if not distributed.is_main():
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._batch_asked)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED | Events.TERMINATE, self._write)

    def _started(self, engine: BaseTrainer) -> None:
        stored = self.checkpoint.extra.get(_KEY, {}) if self.checkpoint is not None else {}
        self._counts = {"images": 0, "timed_images": 0, "timed_seconds": 0.0, "peak_memory": 0, **stored}
        self._counts["device"] = self._device(engine)
        self._first = True

    @staticmethod
    def _device(engine: BaseTrainer) -> str:
        """What it trains on: the name of a GPU, or ``cpu``."""
        device = engine.state.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def _batch_asked(self, engine: BaseTrainer) -> None:
        self._asked = time.perf_counter()

    def _iteration_completed(self, engine: BaseTrainer) -> None:
        images = engine.state.batch_images * distributed.world_size()
        counts = self._counts
        counts["images"] += images
        if not self._first:
            counts["timed_images"] += images
            counts["timed_seconds"] += time.perf_counter() - self._asked
        self._first = False
        counts["peak_memory"] = max(counts["peak_memory"], peak_memory(engine.state.device)[0] or 0)
        if self.checkpoint is not None:
            self.checkpoint.extra[_KEY] = dict(counts)

    def _validated(self, name: str) -> float | None:
        """A figure of the last validation, None before one or where it has no such figure."""
        evaluator = None if self.checkpoint is None else self.checkpoint.evaluator
        return None if evaluator is None else evaluator.state.metrics.get(name)

    def _write(self, engine: BaseTrainer) -> None:
        device, counts = engine.state.device, self._counts
        bits = self._validated("token_bits")
        if bits is not None:
            counts["token_bits"] = min(bits, counts.get("token_bits", bits))
            if self.checkpoint is not None:
                self.checkpoint.extra[_KEY] = dict(counts)
        timed = counts["timed_images"] and counts["timed_seconds"]
        record = {
            "parameters": sum(p.numel() for p in engine.network.parameters() if p.requires_grad),
            **engine.summary(),
            **({"token_bits": counts["token_bits"]} if "token_bits" in counts else {}),
            "iterations": engine.state.iteration,
            "images": counts["images"],
            "images_per_second": counts["timed_images"] / counts["timed_seconds"] if timed else None,
            "peak_memory_bytes": counts["peak_memory"] or None,
            "peak_memory_of": peak_memory(device)[1],
            "processes": distributed.world_size(),
            "micro_batch_size": engine.micro_batch_size,
            "precision": "fp32" if engine.autocast_dtype is None else "bf16",
            "device": self._device(engine),
        }
        if self.checkpoint is not None and self.checkpoint.started_from:
            record["started_from"] = self.checkpoint.started_from
        with dispensable("this record of the run"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path, json.dumps(record, indent=2) + "\n")
