"""Work on a GPU that is launched once as a whole: CUDA graphs of functions without arguments, captured when warm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

Work = Callable[[], None]
"""It reads and writes tensors that stay where they are, and is the same sequence of operations at each call."""


class Graphs(Protocol):
    """How work is made warm and captured."""

    def warm_up(self, work: Work) -> None:
        """Do it once, so that what is prepared at first use is ready."""

    def capture(self, work: Work) -> Work:
        """Record it without doing it; what is returned does it."""


class CudaGraphs:
    """PyTorch's recipe for CUDA graphs: warm-up on a side stream, then a capture.

    The graphs share the memory of their intermediate values. They may, as none leaves a value there for another, and
    they run one after the other.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream()
            self._capturing = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """Do it once, on a side stream."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                work()
            current.wait_stream(self._side)

    def capture(self, work: Work) -> Work:
        """Its graph's replay."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: a data loader that pins memory in another one does no harm.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


class Replayed:
    """Do works, each under a key, again and again: eagerly at first, by replays of their graphs from then on.

    The warm-up is work that counts: each call does the work exactly once. Where a capture fails, a warning says so and
    everything is done eagerly from then on.

    Args:
        graphs: how to capture; None does everything eagerly.
        warm_ups: eager calls, of any keys, before the first capture; each key needs one of its own.

    Attributes:
        replays: calls so far that replayed a graph.
    """

    def __init__(self, graphs: Graphs | None, warm_ups: int = 3) -> None:
        self.replays = 0
        self._graphs = graphs
        self._warm_ups = warm_ups
        self._warm: set[Hashable] = set()
        self._warmed = 0
        self._captured: dict[Hashable, Work] = {}

    def __call__(self, key: Hashable, work: Work) -> None:
        """Do the work of a key, which is the same whenever that key is given."""
        if self._graphs is None:
            work()
            return
        if key not in self._captured:
            if key not in self._warm or self._warmed < self._warm_ups:
                self._warm.add(key)
                self._warmed += 1
                self._graphs.warm_up(work)
                return
            try:
                self._captured[key] = self._graphs.capture(work)
            except RuntimeError as error:
                warnings.warn(
                    f"no CUDA graph could be captured, and sampling goes on without, at a lower speed: {error}",
                    stacklevel=2,
                )
                self._graphs = None
                self._captured.clear()
                work()
                return
        self._captured[key]()
        self.replays += 1
