"""Write each slice's tokens and reconstruction as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys as Keys
from numpy.typing import NDArray
from PIL import Image

from vaevq_med import __version__
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_binary_writer
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.maker import Maker
from vaevq_med.core.names import listed
from vaevq_med.trained.network import StoredTokenizer, network_hash
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator

_KINDS = {"indices": ".npy", "reconstructions": ".png"}
_REPLACE = "choose another --predictions_dir, or replace them with --overwrite True"


class PredictionWriter:
    """Write what an evaluator makes of each slice, under the slice's own relative path.

    ``indices/<path>.npy`` holds int32 ``[h, w, G]``, ``reconstructions/<path>.png`` 8 bit; of two or four channels each
    is a file of its own, ``<path>-channel0.png`` and so on. ``made_by.json`` says which network made them of which data
    and how; a folder has the files of one such maker only.

    Args:
        output_dir: root of the files.
        dataset_dir: root of the slice data set, to which the paths are relative.
        write: some of ``indices`` and ``reconstructions``, or one of them.
        stored: the checkpoint of the network, for the note.
        overwrite: replace what another network, other data or other settings made.

    Raises:
        VaevqMedError: ``write`` has something else; and when the evaluator starts, the folder has files of another
            maker, before anything is written.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        dataset_dir: str | Path,
        write: str | Sequence[str] = tuple(_KINDS),
        stored: StoredTokenizer | None = None,
        overwrite: bool = False,
    ) -> None:
        kinds = listed(write)
        unknown = [kind for kind in kinds if kind not in _KINDS]
        if unknown or not kinds:
            raise VaevqMedError(f"write: found {kinds}, expected some of {', '.join(_KINDS)}")
        self.output_dir = Path(output_dir)
        self.dataset_dir = Path(dataset_dir)
        self.write = tuple(kinds)
        self.stored = stored
        self.overwrite = overwrite
        self.folder = OutputFolder(self.output_dir, "", "inference", "predictions")

    def attach(self, engine: TokenizerEvaluator) -> None:
        """Register the events."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def maker(self, engine: TokenizerEvaluator) -> Maker:
        """What makes the files: which network, of which data, and how."""
        network: Any = engine.network
        dataset = getattr(engine.data_loader, "dataset", None)
        manifest = getattr(dataset, "manifest", None)
        stored, samples = self.stored, engine.quantize == "sample"
        depends = {
            "command": self.folder.command,
            "weights": network_hash(None, network.state_dict()),
            "readout": network.quantizer.readout,
            "data": None if manifest is None else manifest.content_hash,
            "channels": getattr(dataset, "channels", None),
            "quantize": engine.quantize,
            "seed": engine.seed if samples else None,
            "precision": "fp32" if engine.autocast_dtype is None else str(engine.autocast_dtype).removeprefix("torch."),
        }
        told: dict[str, Any] = {
            "version": __version__,
            "checkpoint": None,
            "checkpoint_sha256": None,
            "iteration": None,
        }
        if stored is not None:
            told |= {"checkpoint": stored.path.name, "checkpoint_sha256": stored.sha256, "iteration": stored.iteration}
        return Maker(self.folder, depends, self._written, told=told)

    def _written(self) -> Iterator[Path]:
        """The files that such a writer has left."""
        for kind, suffix in _KINDS.items():
            yield from (path for path in (self.output_dir / kind).rglob(f"*{suffix}") if path.is_file())

    def _target(self, kind: str, source: str) -> Path:
        path = self.output_dir / kind / Path(source).relative_to(self.dataset_dir).with_suffix(_KINDS[kind])
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _started(self, engine: TokenizerEvaluator) -> None:
        quantizer: Any = engine.network.quantizer
        if "indices" in self.write and not quantizer.num_codebooks:
            raise VaevqMedError(
                f"write: found indices of {type(quantizer).__name__}, which has none, expected reconstructions alone"
            )
        self.maker(engine).begin(_REPLACE, overwrite=self.overwrite)

    def _iteration_completed(self, engine: Engine) -> None:
        with self.folder.writing():
            self._write_batch(engine)

    def _write_batch(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        predictions = ((output[Keys.PRED].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
        indices = output["indices"].cpu().numpy().astype(np.int32) if "indices" in self.write else None
        for number, source in enumerate(batch["path"]):
            if indices is not None:
                with atomic_binary_writer(self._target("indices", source), durable=False) as file:
                    np.save(file, indices[number])
            if "reconstructions" in self.write:
                self._write_picture(predictions[number], self._target("reconstructions", source))

    @staticmethod
    def _write_picture(channels: NDArray[np.uint8], path: Path) -> None:
        pictures = {path: channels.transpose(1, 2, 0).squeeze()}
        if channels.shape[0] not in (1, 3):
            pictures = {path.with_name(f"{path.stem}-channel{n}.png"): one for n, one in enumerate(channels)}
        for place, picture in pictures.items():
            with atomic_binary_writer(place, durable=False) as file:
                Image.fromarray(picture).save(file, format="PNG")
