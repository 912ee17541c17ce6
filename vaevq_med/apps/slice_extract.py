"""``vaevq-med slice-extract``: a folder of cases to a data set of 2D slices."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vaevq_med.data.brats import Case, CaseSearch, find_cases, read_cases
from vaevq_med.data.labels import BRATS2024, label_map
from vaevq_med.data.manifest import FILE_NAME, SPLITS, atomic_write_text, split_hash, write_manifest
from vaevq_med.data.recipes import Recipe, load_recipe
from vaevq_med.data.slices import STATE, CaseRecord, extract_case, fingerprint, read_record
from vaevq_med.data.splits import count_patients, split_by_file, split_by_hash
from vaevq_med.errors import DataError

_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_RECIPE = "recipe.json"
_REPORT = "report.json"
_RECIPE_HASH = "recipe.sha256"
_MAX_WORKERS = 512
_VERSIONS = ("vaevq_med", "monai", "torch", "numpy", "nibabel", "SimpleITK", "pillow")


@dataclass(frozen=True)
class SliceReport:
    """What a run did.

    Attributes:
        output: the data set's folder.
        written: cases sliced now.
        reused: cases that an earlier run had finished.
        skipped: case and what is wrong with it.
        notes: what a user should know besides.
        slices: images in each split.
        patients: patients in each split.
        modalities: images of each contrast.
    """

    output: Path
    written: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    slices: dict[str, int]
    patients: dict[str, int]
    modalities: dict[str, int]


@dataclass(frozen=True)
class SlicePlan:
    """What a run would do.

    Attributes:
        cases: cases to slice.
        reused: cases that an earlier run has finished.
        skipped: case and what is wrong with it, as far as names tell.
        notes: what a user should know besides.
        patients: patients in each split.
        measured_on: the case that the estimates come from, or None where there is nothing to do.
        images: estimated images to write.
        bytes: estimated space that they take.
        free_bytes: space that there is.
    """

    cases: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    patients: dict[str, int]
    measured_on: str | None
    images: int
    bytes: int
    free_bytes: int


@dataclass(frozen=True)
class SliceExtract:
    """Slice every case below a folder.

    Attributes:
        input: folder of cases, searched under any nesting.
        output: folder of the data set.
        recipe: what is done to each case.
        workers: processes, or None for one a core.
        split_file: patients' splits, instead of the recipe's rule.
        cases: CSV of paths, for a layout that the search does not know.
        label_map: what the segmentations' values mean, where the file names tell it wrongly.
        overwrite: replace a data set that another recipe made.
    """

    input: Path
    output: Path
    recipe: Recipe = field(default_factory=lambda: load_recipe("brats24/axial_256"))
    workers: int | None = None
    split_file: Path | None = None
    cases: Path | None = None
    label_map: str | None = None
    overwrite: bool = False

    def plan(self) -> SlicePlan:
        """Find out what :meth:`run` would do, and slice one case into a temporary folder to see what it takes.

        Raises:
            DataError: input, output or an option is not what was expected.
        """
        search = self._search()
        splits = self._splits(search.cases)
        target = self._target_map(search.cases)
        self._check_output()
        todo = [case for case in search.cases if not self._finished(case, target)]
        skipped = list(search.problems)
        measured, images, size = None, 0, 0
        for case in todo:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / STATE).mkdir()
                outcome = _extract(case, self.recipe, Path(folder), target)
            if isinstance(outcome, CaseRecord):
                measured, images, size = case.name, len(outcome.entries), outcome.bytes
                break
            skipped.append((case.name, self._problem(outcome, case.name) or ""))
        remaining = len(todo) - (len(skipped) - len(search.problems))
        if len(search.cases) - len(todo) + remaining == 0:
            raise self._nothing(skipped)
        existing = next(path for path in (self.output.resolve(), *self.output.resolve().parents) if path.exists())
        return SlicePlan(
            cases=remaining,
            reused=len(search.cases) - len(todo),
            skipped=tuple(skipped),
            notes=tuple(search.notes),
            patients=count_patients(splits),
            measured_on=measured,
            images=images * remaining,
            bytes=size * remaining,
            free_bytes=shutil.disk_usage(existing).free,
        )

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_case: Callable[[str], None] = lambda case: None,
        on_skip: Callable[[str, str], None] = lambda case, reason: None,
    ) -> SliceReport:
        """Slice the cases, then write the datalist and the report.

        A case that cannot be read is skipped, the others go on. Interrupted, it leaves finished cases only, and the
        next run does the rest.

        Args:
            on_start: called once with the number of cases to slice.
            on_case: called with the name of each case that is done.
            on_skip: called with the name of each case that is skipped, and the reason.

        Raises:
            DataError: input, output or an option is not what was expected, every case was skipped, or the disk is
                full.
            KeyboardInterrupt: interrupted; the cases being sliced are finished first.
        """
        search = self._search()
        for name, reason in search.problems:
            on_skip(name, reason)
        splits = self._splits(search.cases)
        target = self._target_map(search.cases)
        self._check_output()
        with self._lock():
            self._prepare_output()
            todo = [case for case in search.cases if not self._finished(case, target)]
            problems = dict(search.problems)
            with contextlib.closing(self._extract_all(todo, target, on_start)) as outcomes:
                for name, problem in outcomes:
                    if problem is None:
                        on_case(name)
                    else:
                        problems[name] = problem
                        on_skip(name, problem)
            done = [case for case in search.cases if case.name not in problems]
            if not done:
                raise self._nothing(list(problems.items()))
            return self._finish(
                search, done, problems, splits, target, written=len({c.name for c in todo} - set(problems))
            )

    def _search(self) -> CaseSearch:
        if self.label_map is not None:
            label_map(self.label_map)
        if self.workers is not None and not 1 <= self.workers <= _MAX_WORKERS:
            raise DataError(f"workers: found {self.workers}, expected 1 to {_MAX_WORKERS}")
        if self.cases is not None:
            return read_cases(self.cases, self.input, self.recipe.modalities, label_map=self.label_map)
        return find_cases(self.input, self.recipe.modalities, label_map=self.label_map, exclude=self.output)

    def _splits(self, cases: Sequence[Case]) -> dict[str, str]:
        patients = sorted({case.patient for case in cases})
        if self.split_file is not None:
            return split_by_file(patients, self.split_file)
        return split_by_hash(patients, self.recipe.split)

    @staticmethod
    def _target_map(cases: Sequence[Case]) -> str:
        """The label map that every segmentation is written in: their own if they share one, or BraTS 2024's."""
        names = {case.label_map for case in cases if case.segmentation is not None}
        return names.pop() if len(names) == 1 else BRATS2024.name

    def _finished(self, case: Case, target: str) -> bool:
        try:
            mark = fingerprint(case, self.recipe, target)
        except DataError:
            return False
        record = read_record(self.output, case.name)
        return record is not None and record.fingerprint == mark

    def _check_output(self) -> None:
        output, state = self.output, self.output / STATE
        with self._writing():
            if output.exists() and not output.is_dir():
                raise DataError(f"output {output}: found a file, expected a folder or nothing")
            if output.is_dir() and not state.is_dir() and any(output.iterdir()):
                raise DataError(
                    f"output {output}: found a folder with other things in it, expected none, an empty one, or one of "
                    "an earlier slice-extract"
                )
            if self._other_recipe() and not self.overwrite:
                raise DataError(
                    f"output {output}: found slices made by another recipe, expected those of {self.recipe.name} at "
                    f"{self.recipe.size} pixels as {self.recipe.format}; choose another folder, or replace them with "
                    "--overwrite"
                )

    def _other_recipe(self) -> bool:
        """Whether the slices in the output folder were made by another recipe."""
        file = self.output / STATE / _RECIPE_HASH
        return file.is_file() and file.read_bytes().strip() != self.recipe.image_hash.encode()

    def _prepare_output(self) -> None:
        """Remove what a killed run left, and note the recipe before the first slice of it."""
        state = self.output / STATE
        with self._writing():
            for partial in state.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            temporary = [f".{name}.*" for name in (FILE_NAME, _RECIPE, _REPORT)]
            for file in [
                *state.glob(".*.json.*"),
                *state.glob(f".{_RECIPE_HASH}.*"),
                *(file for pattern in temporary for file in self.output.glob(pattern)),
            ]:
                file.unlink()
            if self._other_recipe():
                (self.output / FILE_NAME).unlink(missing_ok=True)
            atomic_write_text(state / _RECIPE_HASH, self.recipe.image_hash + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in one line that the output folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"output {self.output}: found it not writable ({error.strerror}), expected a folder with room to write"
            ) from None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One run at a time in an output folder, where the platform has file locks."""
        state = self.output / STATE
        with self._writing():
            state.mkdir(parents=True, exist_ok=True)
            file = (state / "lock").open("w")
        with file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"output {self.output}: found another slice-extract at work in it, expected none"
                ) from None
            except (ImportError, OSError):
                pass
            yield

    def _extract_all(
        self, todo: Sequence[Case], target: str, on_start: Callable[[int], None]
    ) -> Generator[tuple[str, str | None], None, None]:
        """Case names as they get done, each with what is wrong with it, or None."""
        workers = min(self.workers or _cores(), len(todo))
        if workers <= 1:
            on_start(len(todo))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for case in todo:
                    yield case.name, self._problem(_extract(case, self.recipe, self.output, target), case.name)
            finally:
                torch.set_num_threads(threads)
            return
        # A fork costs nothing and is safe while this is the only thread, which is so on the command line.
        fork = sys.platform == "linux" and threading.active_count() == 1
        context = multiprocessing.get_context("fork" if fork else "spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
        try:
            futures: dict[Future[CaseRecord | tuple[str, bool]], str] = {
                pool.submit(_extract, case, self.recipe, self.output, target): case.name for case in todo
            }
            on_start(len(todo))
            for future in as_completed(futures):
                yield futures[future], self._problem(future.result(), futures[future])
        except BrokenProcessPool:
            raise DataError(
                "found a worker killed, probably for want of memory; try fewer --workers. The finished cases are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _nothing(self, problems: Sequence[tuple[str, str]]) -> DataError:
        return DataError(
            f"input {self.input}: found no case that could be sliced ({len(problems)} skipped), expected at least one"
        )

    @staticmethod
    def _problem(outcome: CaseRecord | tuple[str, bool], case: str) -> str | None:
        if isinstance(outcome, CaseRecord):
            return None
        reason, fatal = outcome
        if fatal:
            raise DataError(f"case {case}: {reason}; the finished cases are kept, the same command goes on from there")
        return reason

    def _finish(
        self,
        search: CaseSearch,
        done: Sequence[Case],
        problems: dict[str, str],
        splits: dict[str, str],
        target: str,
        written: int,
    ) -> SliceReport:
        """Write datalist, recipe and report from the records."""
        digest = hashlib.sha256(self.recipe.image_hash.encode())
        slices = dict.fromkeys(SPLITS, 0)
        modalities = dict.fromkeys(self.recipe.modalities, 0)
        digests: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for case in done:
            record = self._record(case)
            digest.update(f"{case.name} {record.digest}\n".encode())
            split = splits[case.patient]
            slices[split] += len(record.entries)
            for entry in record.entries:
                modalities[entry["modality"]] += 1
                digests[split].append({"image": entry["image"]})
        labels = label_map(target)
        content: dict[str, Any] = {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "tensorImageSize": "2D",
            "modality": {str(number): name for number, name in enumerate(self.recipe.modalities)},
            "channels_per_image": 1,
            "label_map": {region: list(values) for region, values in labels.regions.items()},
            "segmentation_labels": {str(value): name for value, name in labels.labels.items()},
            "image_size": self.recipe.size,
            "format": self.recipe.format,
            "recipe": self.recipe.to_dict(),
            "versions": {name: version(name) for name in _VERSIONS},
            "content_hash": f"sha256:{digest.hexdigest()}",
            "split_hash": split_hash(digests),
        }
        for split in SPLITS:
            cases = [case for case in done if splits[case.patient] == split]
            content[split] = (entry for case in cases for entry in self._record(case).entries)
        patients = count_patients({case.patient: splits[case.patient] for case in done})
        notes = list(search.notes)
        empty = [split for split in SPLITS if not patients[split]]
        if empty:
            notes.append(f"no patient fell into {' or '.join(empty)}; --split-file names the patients of each split")
        others = sorted(self._folders() - {case.name for case in done})
        if others:
            notes.append(f"folders of cases that are not part of this data set were left: {len(others)} ({others[0]})")
        report = SliceReport(
            output=self.output,
            written=written,
            reused=len(done) - written,
            skipped=tuple(sorted(problems.items())),
            notes=tuple(notes),
            slices=slices,
            patients=patients,
            modalities=modalities,
        )
        with self._writing():
            atomic_write_text(self.output / _RECIPE, json.dumps(self.recipe.to_dict(), indent=2) + "\n")
            atomic_write_text(self.output / _REPORT, _report_text(report, len(done)))
            write_manifest(self.output, content)
        return report

    def _record(self, case: Case) -> CaseRecord:
        record = read_record(self.output, case.name)
        if record is None:
            raise DataError(
                f"case {case.name}: found its slices changed while this ran, expected nobody else to write there"
            )
        return record

    def _folders(self) -> set[str]:
        images = self.output / "images"
        return {path.name for path in images.iterdir()} if images.is_dir() else set()


def _report_text(report: SliceReport, cases: int) -> str:
    """The report as JSON; nothing of it depends on which run sliced which case."""
    content = {
        "cases": cases,
        "patients": report.patients,
        "slices": report.slices,
        "modalities": report.modalities,
        "skipped": [{"case": name, "reason": reason} for name, reason in report.skipped],
        "notes": list(report.notes),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _extract(case: Case, recipe: Recipe, output: Path, target: str) -> CaseRecord | tuple[str, bool]:
    """Slice a case; what went wrong comes back as a line, and whether there is no use in going on."""
    try:
        return extract_case(case, recipe, output, target)
    except DataError as error:
        return str(error), False
    except OSError as error:
        if error.errno in _FATAL:
            return f"found no room or no permission to write ({error.strerror}), expected a disk with free space", True
        return f"found a file that cannot be read or written ({error.strerror or error}), expected access to it", False
    except (MemoryError, RuntimeError) as error:  # torch raises the latter where memory lacks
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        return f"found a case that cannot be computed ({lines[0][:160]}), expected one that fits into memory", False


def _cores() -> int:
    """Cores that this process may use, which a cluster's scheduler sets."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _start_worker(parent: int) -> None:
    """Leave interrupts to the parent, use one thread, and end when the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
