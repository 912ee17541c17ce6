"""Write each slice's tokens and reconstruction as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys as Keys
from numpy.typing import NDArray
from PIL import Image

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_binary_writer

_KINDS = ("indices", "reconstructions")


class PredictionWriter:
    """Write what an evaluator makes of each slice, under the slice's own relative path.

    ``indices/<path>.npy`` holds int32 ``[h, w, G]``, ``reconstructions/<path>.png`` 8 bit; of two or four channels each
    is a file of its own, ``<path>-channel0.png`` and so on.

    Args:
        output_dir: root of the files.
        dataset_dir: root of the slice data set, to which the paths are relative.
        write: some of ``indices`` and ``reconstructions``.
    """

    def __init__(self, *, output_dir: str | Path, dataset_dir: str | Path, write: Sequence[str] = _KINDS) -> None:
        unknown = [kind for kind in write if kind not in _KINDS]
        if unknown or not write:
            raise VaevqMedError(f"write: found {list(write)}, expected some of {', '.join(_KINDS)}")
        self.output_dir = Path(output_dir)
        self.dataset_dir = Path(dataset_dir)
        self.write = tuple(write)

    def attach(self, engine: Engine) -> None:
        """Register the event."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def _target(self, kind: str, source: str, suffix: str) -> Path:
        path = self.output_dir / kind / Path(source).relative_to(self.dataset_dir).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _iteration_completed(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        predictions = ((output[Keys.PRED].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
        indices = output["indices"].cpu().numpy().astype(np.int32)
        for number, source in enumerate(batch["path"]):
            if "indices" in self.write:
                with atomic_binary_writer(self._target("indices", source, ".npy"), durable=False) as file:
                    np.save(file, indices[number])
            if "reconstructions" in self.write:
                self._write_picture(predictions[number], self._target("reconstructions", source, ".png"))

    @staticmethod
    def _write_picture(channels: NDArray[np.uint8], path: Path) -> None:
        if channels.shape[0] in (1, 3):
            pictures = {path: channels.transpose(1, 2, 0).squeeze()}
        else:
            pictures = {path.with_name(f"{path.stem}-channel{n}.png"): channel for n, channel in enumerate(channels)}
        for target, picture in pictures.items():
            with atomic_binary_writer(target, durable=False) as file:
                Image.fromarray(picture).save(file, format="PNG")
