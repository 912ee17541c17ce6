"""Writing a token store, image after image, so that an interrupted run goes on where it stood."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import OutputFolder
from vaevq_med.images.manifest import SPLITS
from vaevq_med.tokens.store import FILE_NAME, TokenStore, header_hash, items_hash, load_token_store, stored_type

STATE = ".encode-tokens"
_PROGRESS = "progress.json"


def array_head(shape: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """What a ``.npy`` file starts with.

    Args:
        shape: of the array.
        dtype: of the array.
    """
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()


class TokenWriter:
    """Fills the arrays of a store, which is a store only once it is finished.

    While it is written, a folder of work in progress holds each split's array, as far as it goes, and how much of it is
    safely on the disk. A context manager: while it is open no other one fills the folder, and leaving it, however,
    keeps what was appended.

    Args:
        root: folder of the store.
        header: the description without hashes; each of its ``splits`` has ``shape`` and ``views``.
        items: of each split, in the order of its array.
        overwrite: let go of what is there, whatever it is of.

    Raises:
        DataError: when it is entered: the folder holds something else, or a store of other settings, or another run is
            at work in it.
    """

    def __init__(
        self,
        root: Path,
        header: Mapping[str, Any],
        items: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        overwrite: bool = False,
    ) -> None:
        self.root = root
        self.items = items
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        for split, described in self.header["splits"].items():
            described["items_sha256"] = items_hash(items[split])
        self.dtype = stored_type(self.header["dtype"])
        self.folder = OutputFolder(root, STATE, "encode-tokens", "tokens", FILE_NAME, copies=True)
        self.overwrite = overwrite
        self._files: dict[str, BinaryIO] = {}
        self._open = contextlib.ExitStack()
        self.finished: TokenStore | None = None
        self.done = dict.fromkeys(self.header["splits"], 0)

    @property
    def state(self) -> Path:
        """The folder of work in progress."""
        return self.folder.records

    def __enter__(self) -> TokenWriter:
        self.folder.check()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.folder.lock())
            stack.enter_context(self.folder.writing())
            self.folder.begin()
            self._take_up()
            stack.callback(self._close)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _take_up(self) -> None:
        """Find out how far an earlier run came."""
        if self.overwrite:
            self._clear()
        elif (self.root / FILE_NAME).exists():
            self.finished = self._check_finished()
        elif (self.state / _PROGRESS).is_file():
            self._resume()
        if self.finished is None:
            self._record()

    def _close(self) -> None:
        try:
            if self.finished is None:
                self.save()
        finally:
            while self._files:
                with contextlib.suppress(OSError):
                    self._files.popitem()[1].close()

    def append(self, split: str, values: NDArray[Any]) -> None:
        """Write the next images of a split.

        Args:
            split: one of the header's.
            values: ``[n, views, ...]``.

        Raises:
            DataError: the shape is not that of the header, or a value is not finite in the type of the store.
        """
        expected = tuple(self.header["splits"][split]["shape"][1:])
        if values.shape[1:] != expected:
            raise DataError(
                f"{self.root}: found an image's tokens of shape {list(values.shape[1:])}, expected {list(expected)}"
            )
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if self.dtype.kind == "f" and not np.isfinite(stored).all():
            finite = bool(np.isfinite(values).all())
            found = f"a latent of {np.abs(values).max():g}" if finite else "a latent that is not finite"
            most = f"at most {np.finfo(self.dtype).max:g}, which {self.dtype.name} holds"
            wider = "; name --dtype float32" if finite and self.dtype.itemsize == 2 else ""
            raise DataError(
                f"{self.root}: found {found} in {self.items[split][self.done[split]]['id']} or close by, expected "
                f"{most}{wider}"
            )
        self._file(split).write(stored.tobytes())
        self.done[split] += len(values)

    def save(self) -> None:
        """Put on the disk what was appended, then how much that is."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._record()

    def finish(self) -> TokenStore:
        """Put the arrays in place and describe them.

        Raises:
            DataError: a split has fewer images than it should.
        """
        for split, described in self.header["splits"].items():
            if self.done[split] != described["shape"][0]:
                raise DataError(f"{self.root}: found {self.done[split]} images, expected {described['shape'][0]}")
            self._file(split)
        self.save()
        header = json.loads(json.dumps(self.header))
        for split, described in header["splits"].items():
            self._files.pop(split).close()
            if self._part(split).exists():
                os.replace(self._part(split), self._place(split))
            with self._place(split).open("rb") as array:
                described["sha256"] = hashlib.file_digest(array, "sha256").hexdigest()
        self._describe({**header, "content_hash": header_hash(header)})
        (self.state / _PROGRESS).unlink()
        self.finished = load_token_store(self.root)
        return self.finished

    def _describe(self, header: Mapping[str, Any]) -> None:
        """Write ``tokens.json``, one item a line."""
        head = json.dumps(header, indent=1, ensure_ascii=False)
        splits = (
            f"  {json.dumps(split)}: [\n"
            + ",\n".join(f"   {json.dumps(item, ensure_ascii=False)}" for item in items)
            + "\n  ]"
            for split, items in self.items.items()
        )
        text = head.removesuffix("\n}") + ',\n "items": {\n' + ",\n".join(splits) + "\n }\n}\n"
        atomic_write_text(self.root / FILE_NAME, text)

    def _part(self, split: str) -> Path:
        return self.state / f"{split}.npy.part"

    def _place(self, split: str) -> Path:
        return self.root / f"{split}.npy"

    def _file(self, split: str) -> BinaryIO:
        """A split's file, which ends after the images that are done."""
        if split not in self._files:
            shape = self.header["splits"][split]["shape"]
            head = array_head(shape, self.dtype)
            path = self._place(split) if self._place(split).exists() else self._part(split)
            file = path.open("r+b" if path.exists() else "w+b")
            self._files[split] = file
            if file.read(len(head)) != head:
                file.seek(0)
                file.write(head)
                self.done[split] = 0
            row = int(np.prod(shape[1:])) * self.dtype.itemsize
            self.done[split] = min(self.done[split], (file.seek(0, os.SEEK_END) - len(head)) // row)
            file.truncate(len(head) + self.done[split] * row)
            file.seek(0, os.SEEK_END)
        return self._files[split]

    def _record(self) -> None:
        record = {"header": self.header, "done": self.done}
        atomic_write_text(self.state / _PROGRESS, json.dumps(record, indent=1) + "\n")

    def _refuse(self, what: str, found: Mapping[str, Any]) -> None:
        replace = "choose another folder, or replace it with --overwrite"
        self.folder.refuse_other(found, self.header, what, replace)

    def _check_finished(self) -> TokenStore:
        store = load_token_store(self.root)
        header = {key: value for key, value in store.content.items() if key not in ("content_hash", "items")}
        header["splits"] = {
            split: {key: value for key, value in described.items() if key != "sha256"}
            for split, described in header["splits"].items()
        }
        self._refuse("a token store", header)
        for split in store.splits:
            store.array(split)
        self.done = {split: described["shape"][0] for split, described in self.header["splits"].items()}
        return store

    def _resume(self) -> None:
        path = self.state / _PROGRESS
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            header, done = dict(record["header"]), {split: int(record["done"][split]) for split in record["done"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: found an unreadable record ({error}), expected that of an interrupted run; start anew with "
                "--overwrite"
            ) from None
        self._refuse("an unfinished token store", header)
        self.done = done
        for split in self.done:
            self._file(split)

    def _clear(self) -> None:
        """Let go of a store, or of what there is of one."""
        for split in SPLITS:
            self._place(split).unlink(missing_ok=True)
            self._part(split).unlink(missing_ok=True)
        (self.root / FILE_NAME).unlink(missing_ok=True)
        (self.state / _PROGRESS).unlink(missing_ok=True)
