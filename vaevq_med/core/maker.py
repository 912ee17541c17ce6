"""What made the files of a folder: noted before the first is written, compared before others join them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import OutputFolder, difference

MADE_BY = "made_by.json"


@dataclass(frozen=True)
class Maker:
    """The checkpoint, the data and the settings that make the files of a folder, which are of one maker only.

    Attributes:
        folder: where the files go.
        depends: what they depend on, as plain values: files of two makers that differ in it are not mixed.
        files: finds the files in the folder that such a command writes, but for the note.
        note: name of the file that says all this.
        told: what the note says besides, e.g. the version, which may differ.
    """

    folder: OutputFolder
    depends: Mapping[str, Any]
    files: Callable[[], Iterable[Path]]
    note: str = MADE_BY
    told: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The note."""
        return self.folder.path / self.note

    def check(self, replace: str, *, overwrite: bool = False) -> bool:
        """Refuse files of another maker, or of one that nothing is known of.

        Args:
            replace: how to choose another folder, or replace what is there.
            overwrite: do not refuse them.

        Returns:
            Whether the folder is of another maker, whose files :meth:`begin` removes.

        Raises:
            DataError: naming the first thing that differs; or the folder cannot be read.
        """
        with self.folder.writing():
            known, expected = self._known(), json.loads(json.dumps(dict(self.depends)))
            if not overwrite and any(True for _ in self.files()):
                self.folder.refuse_other(known, expected, self.folder.kind, replace)
            return difference(known, expected) is not None

    def begin(self, replace: str, *, overwrite: bool = False) -> None:
        """Remove the files of another maker, where they may be replaced, and leave the note.

        Another run may have begun in the folder since it was checked.

        Args:
            replace: as in :meth:`check`.
            overwrite: as in :meth:`check`.

        Raises:
            DataError: as in :meth:`check`.
        """
        is_of_another = self.check(replace, overwrite=overwrite)
        with self.folder.writing():
            if is_of_another:
                # The old note goes last, so that a half-emptied folder is still of its maker.
                for file in [*self.files()]:
                    file.unlink()
            self.folder.path.mkdir(parents=True, exist_ok=True)
            record = {**self.depends, **(self.told or {})}
            atomic_write_text(self.path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def _known(self) -> dict[str, Any]:
        """What the note says of those who made the files."""
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {key: value for key, value in found.items() if key not in (self.told or {})}
        except (ValueError, AttributeError):
            return {self.note: "unreadable"}
