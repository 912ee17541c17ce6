"""``vaevq-med compress``, ``decompress`` and ``reconstruct``: what each does to a case, on its options."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vaevq_med.codec.case import CompressedCase, check_names, format_of, read_description
from vaevq_med.codec.case_work import CaseWork
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.registry import make_coder
from vaevq_med.codec.compress import Compressed, check_contrasts, compress_case
from vaevq_med.codec.container import SUFFIX
from vaevq_med.codec.decompress import restore, window
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.geometry import check_invertible
from vaevq_med.codec.inputs import find_inputs, fingerprint
from vaevq_med.codec.job import Job, Made, Work
from vaevq_med.codec.masks import CELLS
from vaevq_med.codec.model import Model, wanted
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.preview import preview
from vaevq_med.codec.quality import compare
from vaevq_med.core.errors import DataError
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

if TYPE_CHECKING:
    pass


@functools.lru_cache(maxsize=1)
def _model(
    checkpoint: Path,
    weights: str,
    readout: str | None,
    device: str | None,
    batch_size: int,
    codebooks: int | None = None,
) -> Model:
    """A tokenizer, read once a process."""
    stored = StoredTokenizer(checkpoint, weights=weights, readout=readout)
    return Model(stored, device=device, batch_size=batch_size, codebooks=codebooks)


def _tokenizer_of(options: CompressOptions) -> tuple[Any, ...]:
    """What :func:`_model` takes."""
    device = options.device, options.batch_size
    return options.checkpoint, options.weights, options.readout, *device, options.codebooks


@functools.lru_cache(maxsize=1)
def _model_of(checkpoint: Path, described: str, device: str | None, batch_size: int) -> Model:
    """The tokenizer that files were made with, read once a process."""
    return Model(wanted(json.loads(described), checkpoint), device=device, batch_size=batch_size)


@functools.lru_cache(maxsize=1)
def _coder(name: str, model: Path | None, *tokenizer: Any) -> IndexCoder:
    """An entropy coder for the indices of a tokenizer, read once a process; see :func:`_model`."""
    found = _model(*tokenizer)
    return make_coder(name, found.description, model, network=found.network)


@dataclass(frozen=True)
class Compress(CaseWork):
    """A case to one file.

    Attributes:
        options: of the command.
        recipe: with the contrasts, of the tokenizer's image size.
        cases: by name.
        settings: what every file depends on.
        preview: add a picture.
    """

    command: ClassVar[str] = "compress"
    writes: ClassVar[str] = "compressed cases"
    segmented: ClassVar[str] = "not compressed"
    """What happens to segmentations."""

    options: CompressOptions
    preview: bool = False

    @classmethod
    def of(cls, source: Path, output: Path, options: CompressOptions, *, preview: bool = False) -> Compress:
        """What is to be done.

        Args:
            source: a volume, a DICOM series, a case, or a folder of cases.
            output: where to; it may lie inside of the source.
            options: of the command.
            preview: add a picture.

        Raises:
            VaevqMedError: an option, the checkpoint or the source is not what was expected.
        """
        from vaevq_med.images.nifti import check_orientation
        from vaevq_med.prepare.volumes.discarded import check_accepted

        options.check()
        source = Path(os.path.abspath(source))  # of which "." has a name, and a link keeps its own
        if options.assume_orientation is not None:
            check_orientation(options.assume_orientation)
        check_accepted(options.accept or ())
        recipe = Recipe.load(options.recipe)
        check_invertible(recipe)
        search, recipe = find_inputs(
            source,
            recipe,
            modality=options.modality,
            cases=options.cases,
            series=options.series,
            exclude=output.resolve(),
        )
        tokenizer = _tokenizer_of(options)
        model = _model(*tokenizer)
        recipe = recipe.changed(size=model.image_size)
        told = check_contrasts(model, recipe.modalities, any_contrast=options.any_contrast)
        coder = _coder(options.coder, options.model, *tokenizer)
        segmented = sum(case.segmentation is not None for case in search.units)
        if segmented:
            told.append(f"segmentations are {cls.segmented}; {segmented} of {len(search.units)} cases have one")
        settings = {
            "format": format_of(model.description, CELLS[options.mask]),
            "tokenizer": model.description,
            "recipe": recipe.image_hash,
            "coder": [coder.name, dict(coder.settings)],
            "rate_weight": options.rate_weight,
            "orientation": options.assume_orientation,
        }
        cell = CELLS[options.mask]
        if cell != 1:  # named only here, so that folders of exact masks that were made before go on
            settings["cell"] = cell
        return cls(
            options,
            recipe,
            {case.name: case for case in search.units},
            settings,
            tuple(search.problems),
            (*search.notes, *told),
            preview,
        )

    def fingerprint(self, unit: str) -> str:
        """Of the case's files and the settings."""
        return fingerprint(self.cases[unit], self.recipe.modalities, [self.mark, self.preview])

    def make(self, unit: str, threads: int) -> Made:
        """Compress a case."""
        done, model = self._compress(unit, threads, keep=self.preview)
        files = {f"{unit}{SUFFIX}": done.content}
        if self.preview:
            case = CompressedCase.from_bytes(unit, done.content, model=self.options.model)
            results = {
                case.contrasts[number].name: window(case, one, number)
                for one in restore(case, model)
                for number in one.contrasts
            }
            files[f"{unit}.png"] = preview(done.originals, results)
        return Made(files, done.figures, done.notes)

    def _compress(self, unit: str, threads: int, *, keep: bool) -> tuple[Compressed, Model]:
        options = self.options
        tokenizer = _tokenizer_of(options)
        model, coder = _model(*tokenizer), _coder(options.coder, options.model, *tokenizer)
        model.threads = threads
        if model.description != self.settings["tokenizer"]:
            raise DataError(f"{options.checkpoint}: found it changed while this ran, expected it to stay as it is")
        done = compress_case(
            self.cases[unit],
            self.recipe,
            model,
            coder,
            orientation=options.assume_orientation,
            accept=options.accept or (),
            rate_weight=options.rate_weight,
            cell=CELLS[options.mask],
            keep=keep,
        )
        return done, model


@dataclass(frozen=True)
class Reconstruct(Compress):
    """A case to one file and back, with figures of what was lost; its segmentation is copied."""

    command: ClassVar[str] = "reconstruct"
    writes: ClassVar[str] = "reconstructed cases"
    segmented: ClassVar[str] = "copied as they are"

    def place(self, unit: str, file: str) -> str:
        """A folder for each case."""
        return f"{unit}/{file}"

    def copied(self, unit: str) -> Mapping[str, Path]:
        """The segmentation under its own name, or as ``CASE-seg`` where a volume has that, as in the Decathlon."""
        from vaevq_med.prepare.volumes.case import strip_suffix

        case = self.cases[unit]
        if case.segmentation is None:
            return {}
        path = case.segmentation.path
        if all(path.name != volume.path.name for volume in case.images.values()):
            return {path.name: path}
        stem = strip_suffix(path.name) or path.stem
        return {f"{unit}-seg{path.name[len(stem) :]}": path}

    def make(self, unit: str, threads: int) -> Made:
        """Compress a case, decompress the bytes, and compare."""
        done, model = self._compress(unit, threads, keep=True)
        start, before = time.monotonic(), model.seconds
        case = CompressedCase.from_bytes(unit, done.content, model=self.options.model)
        files: dict[str, bytes] = {}
        results, quality, spent = {}, {}, 0.0
        for one in restore(case, model):
            files[one.original.name] = one.original.content(one.stored)
            paused = time.monotonic()
            for number in one.contrasts:
                name = case.contrasts[number].name
                result = window(case, one, number)
                quality[name] = compare(done.originals[name], result, done.foregrounds[name])
                if self.preview:
                    results[name] = result
            spent += time.monotonic() - paused
        seconds, network = time.monotonic() - start - spent, model.seconds - before
        files[f"{unit}{SUFFIX}"] = done.content
        if self.preview:
            files[f"{unit}.png"] = preview(done.originals, results)
        told = {"decompress_seconds": round(seconds, 3), "decompress_network_seconds": round(network, 3)}
        return Made(files, {**done.figures, **told, "quality": quality}, done.notes)


@dataclass(frozen=True)
class Decompress(Work):
    """A file to the volumes of its case.

    Attributes:
        options: of the command.
        files: by name, without the suffix.
        flat: whether the volumes go into the output itself, and not into a folder of each case.
        output: the file of the one volume that is wanted, or None for folders.
    """

    command: ClassVar[str] = "decompress"
    kind: ClassVar[str] = "file"
    writes: ClassVar[str] = "decompressed volumes"

    options: DecompressOptions
    files: Mapping[str, Path]
    flat: bool
    output: Path | None = None

    @classmethod
    def of(cls, source: Path, output: Path, options: DecompressOptions) -> Decompress:
        """What is to be done.

        Args:
            source: a compressed file, or a folder of them.
            output: a folder, or, of one volume, a file.
            options: of the command.

        Raises:
            DataError: there is no compressed file.
        """
        options.check()
        if source.is_dir():
            files = {path.stem: path for path in sorted(source.glob(f"*{SUFFIX}")) if not path.name.startswith(".")}
            if not files:
                raise DataError(f"input {source}: found no file *{SUFFIX} in it, expected some, or one by its name")
        elif source.is_file():
            files = {source.stem: source}
        else:
            raise DataError(f"input {source}: found nothing, expected a file that vaevq-med compress wrote")
        return cls(options, files, not source.is_dir(), output if is_volume(output) else None)

    @property
    def mark(self) -> str:
        """The same for all: what a file holds says everything."""
        return hashlib.sha256(b"decompress").hexdigest()

    @property
    def device_type(self) -> str:
        """Where the network runs."""
        return named_device(self.options.device).type

    def units(self) -> Sequence[str]:
        """Names of the files."""
        return [*self.files]

    def fingerprint(self, unit: str) -> str:
        """Of the file's bytes."""
        return hashlib.sha256(self._read(unit)).hexdigest()

    def place(self, unit: str, file: str) -> str:
        """A folder for each case, or none."""
        return file if self.flat else f"{unit}/{file}"

    def make(self, unit: str, threads: int) -> Made:
        """Decompress a file."""
        start = time.monotonic()
        path, content = self.files[unit], self._read(unit)
        described = read_description(path.name, content)["tokenizer"]
        checkpoint = self._checkpoint(path, described)
        options = self.options
        text = json.dumps(described, sort_keys=True)
        try:
            model = _model_of(checkpoint, text, options.device, options.batch_size)
        except CodecError as error:
            raise CodecError(f"{path.name}: {error}") from None
        model.threads, before = threads, model.seconds
        case = CompressedCase.from_bytes(path.name, content, model=options.model)
        self._check_output(case)
        check_names(file.name for file in case.files)
        files = {one.original.name: one.original.content(one.stored) for one in restore(case, model)}
        figures = {
            "bytes": len(content),
            "volumes": len(files),
            "seconds": round(time.monotonic() - start, 3),
            "network_seconds": round(model.seconds - before, 3),
        }
        return Made(files, figures)

    def _read(self, unit: str) -> bytes:
        try:
            return self.files[unit].read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.files[unit]}: found an unreadable file ({error.strerror}), expected access"
            ) from None

    def _checkpoint(self, path: Path, described: Mapping[str, Any]) -> Path:
        if self.options.checkpoint is not None:
            return self.options.checkpoint
        beside = path.parent / Path(described["file"]).name
        if not beside.exists():
            raise CodecError(
                f"{path.name}: found no {beside.name} beside it, expected the checkpoint of the tokenizer "
                f"{described['hash']} there or named with --checkpoint"
            )
        return beside

    def _check_output(self, case: CompressedCase) -> None:
        """Refuse a name that the one volume cannot have."""
        if self.output is None:
            return
        if len(case.files) != 1:
            raise DataError(
                f"output {self.output}: found {len(case.files)} volumes, expected one for a file; name a folder"
            )
        form = case.files[0]
        suffix = {"nifti": ".nii.gz" if form.compressed else ".nii", "metaimage": ".mha", "nrrd": ".nrrd"}[form.kind]
        if not self.output.name.lower().endswith(suffix):
            raise DataError(
                f"output {self.output}: found this name, expected one that ends with {suffix}, as the original"
            )


def is_volume(output: Path) -> bool:
    """Whether an output's name is that of a volume."""
    from vaevq_med.prepare.volumes.case import strip_suffix

    return strip_suffix(output.name) is not None and not output.is_dir()


def compress(
    source: Path, output: Path, options: CompressOptions, *, preview: bool = False, overwrite: bool = False
) -> Job:
    """The job of ``vaevq-med compress``: into a file where the output ends with ``.vvq``, else into a folder.

    Args:
        source: see :meth:`Compress.of`.
        output: likewise.
        options: of the command.
        preview: add a picture.
        overwrite: replace what is there.
    """
    work = Compress.of(source, output, options, preview=preview)
    return Job(work, output, options.workers, overwrite, single=output.suffix.lower() == SUFFIX)


def reconstruct(
    source: Path, output: Path, options: CompressOptions, *, preview: bool = False, overwrite: bool = False
) -> Job:
    """The job of ``vaevq-med reconstruct``, into a folder.

    Args:
        source: see :meth:`Compress.of`.
        output: likewise.
        options: of the command.
        preview: add a picture.
        overwrite: replace what is there.
    """
    work = Reconstruct.of(source, output, options, preview=preview)
    return Job(work, output, options.workers, overwrite)


def decompress(source: Path, output: Path, options: DecompressOptions, *, overwrite: bool = False) -> Job:
    """The job of ``vaevq-med decompress``: into a file where the output ends as a volume's does, else into a folder.

    Args:
        source: see :meth:`Decompress.of`.
        output: likewise.
        options: of the command.
        overwrite: replace what is there.
    """
    work = Decompress.of(source, output, options)
    single = work.output is not None
    if single and source.is_dir():
        raise DataError(f"output {output}: found a file's name, expected a folder for those of {source}")
    return Job(work, output, options.workers, overwrite, single=single)
