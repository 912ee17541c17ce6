"""The output folder of a command that prepares data: one run at a time, one recipe, nothing half written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text

RECIPE = "recipe.json"
REPORT = "report.json"
_RECIPE_HASH = "recipe.sha256"


class BusyError(DataError):
    """Another run is at work in an output folder."""


@dataclass(frozen=True)
class Workplace:
    """Where a command writes a data set.

    Attributes:
        output: the data set's folder.
        state: name of the folder in it that holds the records of finished work.
        command: the command, for messages.
        kind: what it writes, for messages, e.g. ``slices``.
        result: the file that is written last, and removed before anything else changes.
    """

    output: Path
    state: str
    command: str
    kind: str
    result: str = "dataset.json"

    def check(self, mark: str, made_by: str, *, overwrite: bool) -> None:
        """Refuse a folder with other things in it.

        Args:
            mark: hash of the recipe.
            made_by: what the recipe is called, for the message.
            overwrite: allow a folder that another recipe filled.

        Raises:
            DataError: the output is a file, holds something else, is another recipe's, or cannot be read.
        """
        output, state = self.output, self.output / self.state
        with self.writing():
            if output.exists() and not output.is_dir():
                raise DataError(f"output {output}: found a file, expected a folder or nothing")
            if output.is_dir() and not state.is_dir() and any(output.iterdir()):
                raise DataError(
                    f"output {output}: found a folder with other things in it, expected none, an empty one, or one of "
                    f"an earlier {self.command}"
                )
            if self._other_recipe(mark) and not overwrite:
                raise DataError(
                    f"output {output}: found {self.kind} made by another recipe, expected those of {made_by}; choose "
                    "another folder, or replace them with --overwrite"
                )

    def prepare(self, mark: str) -> None:
        """Remove what a killed run left, and note the recipe before the first result of it.

        Args:
            mark: hash of the recipe.
        """
        state = self.output / self.state
        with self.writing():
            for partial in state.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            temporary = [f".{name}.*" for name in (self.result, RECIPE, REPORT)]
            for file in [
                *state.glob(".*.json.*"),
                *state.glob(f".{_RECIPE_HASH}.*"),
                *(file for pattern in temporary for file in self.output.glob(pattern)),
            ]:
                file.unlink()
            if self._other_recipe(mark):
                (self.output / self.result).unlink(missing_ok=True)
            atomic_write_text(state / _RECIPE_HASH, mark + "\n")

    def free_bytes(self) -> int:
        """Space on the output's disk."""
        output = self.output.resolve()
        return shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say in one line that the output folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"output {self.output}: found it not writable ({error.strerror}), expected a folder with room to write"
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time in an output folder, where the platform has file locks.

        Raises:
            BusyError: another run is at work in it.
            DataError: it cannot be written.
        """
        state = self.output / self.state
        with self.writing():
            state.mkdir(parents=True, exist_ok=True)
            file = (state / "lock").open("w")
        with file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"output {self.output}: found another {self.command} at work in it, expected none"
                ) from None
            except (ImportError, OSError):
                pass
            yield

    def _other_recipe(self, mark: str) -> bool:
        """Whether the output folder was filled by another recipe."""
        file = self.output / self.state / _RECIPE_HASH
        return file.is_file() and file.read_bytes().strip() != mark.encode()
