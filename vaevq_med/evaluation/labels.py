"""Write the label map of each segmented slice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.utils.enums import CommonKeys as Keys
from PIL import Image

from vaevq_med import __version__
from vaevq_med.core.files import atomic_binary_writer
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.maker import Maker
from vaevq_med.evaluation.segmentation import slices_of_batch
from vaevq_med.images.regions import region_labels, to_labels
from vaevq_med.trained.network import network_hash
from vaevq_med.trained.segmenter import StoredSegmenter
from vaevq_med.training.segmentation_evaluator import SegmentationEvaluator

_REPLACE = "choose another --predictions_dir, or replace them with --overwrite True"


class LabelWriter:
    """Write what a :class:`SegmentationEvaluator` finds in each slice as ``labels/CASE/CASE-zNNN.png``, 8 bit.

    The values are those of the data set's label map. ``made_by.json`` says which network made them of which data; a
    folder has the files of one such maker only.

    Args:
        output_dir: root of the files.
        dataset: what the evaluator reads.
        stored: the checkpoint of the network, for the note.
        overwrite: replace what another network or other data made.

    Raises:
        VaevqMedError: the data set has no label map; when the evaluator starts, the folder has files of another maker,
            before anything is written.
    """

    def __init__(
        self, *, output_dir: str | Path, dataset: Any, stored: StoredSegmenter | None = None, overwrite: bool = False
    ) -> None:
        self.output_dir = Path(output_dir)
        self.dataset = dataset
        self.stored = stored
        self.overwrite = overwrite
        self.regions = region_labels(dataset.manifest)
        self.folder = OutputFolder(self.output_dir, "", "inference", "predictions")

    def attach(self, engine: SegmentationEvaluator) -> None:
        """Register the events."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def _started(self, engine: SegmentationEvaluator) -> None:
        network: Any = engine.network
        depends = {
            "command": self.folder.command,
            "weights": network_hash(None, network.state_dict()),
            "data": self.dataset.manifest.content_hash,
            "channels": self.dataset.channels,
            "precision": "fp32" if engine.autocast_dtype is None else str(engine.autocast_dtype).removeprefix("torch."),
        }
        told: dict[str, Any] = {"version": __version__, "checkpoint": None, "iteration": None}
        if self.stored is not None:
            told |= {"checkpoint": self.stored.path.name, "iteration": self.stored.iteration}
        Maker(self.folder, depends, self._written, told=told).begin(_REPLACE, overwrite=self.overwrite)

    def _written(self) -> Iterator[Path]:
        """The files that such a writer has left."""
        yield from (path for path in (self.output_dir / "labels").rglob("*.png") if path.is_file())

    def _iteration_completed(self, engine: SegmentationEvaluator) -> None:
        batch = engine.state.batch
        with self.folder.writing():
            for item, number, _, masks in slices_of_batch(engine.state.output[Keys.PRED] > 0.5, batch):
                case = str(batch["case"][item])
                path = self.output_dir / "labels" / case / f"{case}-z{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                labels = to_labels(masks.cpu(), self.regions).numpy()
                with atomic_binary_writer(path, durable=False) as file:
                    Image.fromarray(labels).save(file, format="PNG")
