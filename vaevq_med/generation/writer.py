"""Write generated images as files, once each."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys as Keys
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from vaevq_med import __version__
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_bytes, atomic_write_text
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.maker import Maker
from vaevq_med.core.names import listed
from vaevq_med.core.options import expect, is_int
from vaevq_med.generation.plan import SamplePlan
from vaevq_med.generation.sampling import ImageSampler
from vaevq_med.images.generated import DRAWING_NAME, LIST_NAME, SETTINGS_NAME
from vaevq_med.training import distributed

KINDS = ("png", "npz")
_GRID_SAMPLES = 64
_REPLACE = "choose another --generated_dir, or replace them with --overwrite True"
_OWN = re.compile(
    r"\.?(\d{6,}(-channel\d)?\.(png|npz)|samples\.csv|grid\.png|generation\.json|drawing\.json)(\.part|\..*)?"
)


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def picture_grid(pictures: Sequence[NDArray[np.uint8]], columns: int, *, gap: int = 2) -> NDArray[np.uint8]:
    """Pictures of one shape, ``[H, W]`` or ``[H, W, 3]``, in rows, white between them.

    >>> picture_grid([np.zeros((2, 3), np.uint8)] * 3, columns=2, gap=1).shape
    (5, 7)
    """
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *pictures[0].shape[2:])
    sheet = np.full(shape, 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


class SampleWriter:
    """Write what an :class:`ImageSampler` draws; samples that are there already are not drawn again.

    ``000000.png`` and so on hold 8 bits (of two or four channels each is a file of its own, ``000000-channel0.png``),
    ``000000.npz``, if asked for, ``image`` float32 ``[C, H, W]`` in [-1, 1] and ``label``. ``samples.csv`` (file,
    number, label, name of the label, seed, and the inpainted image) lists those that are there, after each batch.
    ``generation.json``, what the samples depend on and how many there are to be, is written with the first batch, and
    ``grid.png``, the first 64, at the end, and with it ``drawing.json``, what drawing took
    (:meth:`ImageSampler.drawing`). Until the first batch is drawn nothing changes in the folder.

    Args:
        output_dir: folder of these files and no others.
        plan: what is drawn.
        settings: how it is drawn.
        provenance: what else the samples depend on: generator, tokenizer, precision.
        write: some of ``png`` and ``npz``, or one of them; the former is always among them.
        overwrite: replace samples of other settings.

    Raises:
        VaevqMedError: the folder holds other things, or samples of other settings, or cannot be written; or there are
            several processes.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        plan: SamplePlan,
        settings: Mapping[str, Any],
        provenance: Mapping[str, Any],
        write: str | Sequence[str] = ("png",),
        overwrite: bool = False,
    ) -> None:
        if distributed.world_size() > 1:
            raise VaevqMedError(
                f"generate: found {distributed.world_size()} processes, expected one; start it without torchrun"
            )
        kinds = listed(write)
        valid = "png" in kinds and all(kind in KINDS for kind in kinds)
        expect(valid, "write", write, "['png'] or ['png', 'npz']")
        expect(isinstance(overwrite, bool), "overwrite", overwrite, "True or False")
        self.output_dir = Path(output_dir)
        self.plan = plan
        self.write = tuple(kinds)
        self.record = json.loads(json.dumps({**provenance, **plan.describe(), **settings}))
        channels = int(plan.stored.tokens["in_channels"])
        self.suffixes = [".png"] if channels in (1, 3) else [f"-channel{number}.png" for number in range(channels)]
        self._rows: dict[int, list[Any]] = {}
        self._begun = False
        self.folder = OutputFolder(self.output_dir, "", "generate", "samples", LIST_NAME)
        told = {"num_samples": len(plan), "version": __version__}
        self.maker = Maker(self.folder, self.record, self._samples, note=SETTINGS_NAME, told=told)
        self.overwrite = overwrite
        with self.folder.writing():
            self._replaces = self._check()

    def _check(self) -> bool:
        """Whether what the folder holds is of other settings, and may be replaced."""
        folder = self.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        foreign = sorted(file.name for file in folder.iterdir() if not _OWN.fullmatch(file.name))
        if foreign:
            raise VaevqMedError(f"{folder}: found {foreign[0]}, expected generated samples or nothing")
        return self.maker.check(_REPLACE, overwrite=self.overwrite)

    def _samples(self) -> list[Path]:
        return [file for file in self.output_dir.iterdir() if file.suffix in (".png", ".npz")]

    def _begin(self) -> None:
        """Remove samples of other settings and take up those of the same.

        Another run may have begun in the folder while the first batch was drawn.
        """
        if self._check():
            for name in (LIST_NAME, DRAWING_NAME):
                (self.output_dir / name).unlink(missing_ok=True)
        self.maker.begin(_REPLACE, overwrite=self.overwrite)
        self._replaces = False
        missing = set(self.missing())
        self._rows = {number: self._row(number) for number in range(len(self.plan)) if number not in missing}
        self._begun = True

    def _paths(self, number: int) -> list[Path]:
        names = [*self.suffixes, *([".npz"] if "npz" in self.write else [])]
        return [self.output_dir / f"{number:06d}{suffix}" for suffix in names]

    def missing(self) -> list[int]:
        """Numbers of the samples that are still to be drawn."""
        numbers = range(len(self.plan))
        return [n for n in numbers if self._replaces or not all(path.is_file() for path in self._paths(n))]

    def loader(self, batch_size: int) -> DataLoader[dict[str, Any]]:
        """Batches of the plan's items that are :meth:`missing`.

        Args:
            batch_size: samples drawn at once.

        Raises:
            VaevqMedError: it is no whole number from 1.
        """
        expect(is_int(batch_size, 1, 2**31 - 1), "batch_size", batch_size, "a whole number from 1")
        return DataLoader(self.plan, batch_size=batch_size, sampler=self.missing())

    def attach(self, engine: Engine) -> None:
        """Register the events."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _iteration_completed(self, engine: Engine) -> None:
        with self.folder.writing():
            self._write_batch(engine)

    def _write_batch(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        if not self._begun:
            self._begin()
        images = output[Keys.PRED].cpu().numpy().astype(np.float32)
        for number, label, image in zip(batch["number"].tolist(), batch[Keys.LABEL].tolist(), images, strict=True):
            levels = ((image + 1) * 127.5).round().astype(np.uint8)
            pictures = [levels.transpose(1, 2, 0).squeeze()] if len(self.suffixes) == 1 else list(levels)
            paths = self._paths(number)
            for picture, path in zip(pictures, paths, strict=False):
                atomic_write_bytes(path, _png(picture), durable=False)
            if "npz" in self.write:
                buffer = io.BytesIO()
                np.savez(buffer, image=image, label=np.int64(label))
                atomic_write_bytes(paths[-1], buffer.getvalue(), durable=False)
            self._rows[number] = self._row(number)
        self._write_list()

    def _row(self, number: int) -> list[Any]:
        entry, names = self.plan.entry(number), self.plan.stored.label_names
        label = [entry["label"], names[entry["label"]]] if names else ["", ""]
        return [self._paths(number)[0].name, number, *label, entry["seed"], entry.get("source", "")]

    def _write_list(self) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["file", "number", "label", "name", "seed", "source"])
        rows.writerows(self._rows[number] for number in sorted(self._rows))
        atomic_write_text(self.output_dir / LIST_NAME, text.getvalue())

    def _completed(self, engine: Engine) -> None:
        with self.folder.writing():
            if not self._begun:
                self._begin()
            self._write_list()
            self._write_grid()
            drawing = engine.drawing() if isinstance(engine, ImageSampler) else None
            if drawing is not None:
                atomic_write_text(self.output_dir / DRAWING_NAME, json.dumps(drawing, indent=2) + "\n")

    def _write_grid(self) -> None:
        shown = range(min(_GRID_SAMPLES, len(self.plan)))
        pictures = [np.concatenate([np.asarray(Image.open(p)) for p in self._pngs(n)], axis=1) for n in shown]
        turns = len(self.plan.labels or ())
        columns = turns if 1 < turns <= 10 else 8
        sheet = picture_grid(pictures, min(columns, len(pictures)))
        atomic_write_bytes(self.output_dir / "grid.png", _png(sheet))

    def _pngs(self, number: int) -> list[Path]:
        return self._paths(number)[: len(self.suffixes)]
