"""What is told in one line, and what is a fault of the code and keeps its traceback."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.full_disk import fill
from torch.utils.data import DataLoader, Dataset

from vaevq_med.cli import app
from vaevq_med.core.errors import DataError, as_item_error, dispensable, foreseen
from vaevq_med.trained.file import atomic_save


class Killed(Dataset[int]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def _of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1 GiB")


def _no_space() -> None:
    with Path("/dev/full").open("w") as file:
        file.write("a")


FORESEEN: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "disk": (_no_space, ("No space left on device", "same command")),
    "gone": (lambda: Path("no/such/file").read_text(), ("no/such/file", "No such file")),
    "numpy": (lambda: np.empty(1 << 50), ("memory", "batch size")),
    "torch": (lambda: torch.empty(1 << 50), ("memory", "batch size")),
    "gpu": (_of_a_gpu, ("memory of the GPU", "20.00 GiB")),
    "worker": (lambda: list(DataLoader(Killed(), num_workers=1)), ("worker", "killed", "number of workers")),
}


@pytest.mark.parametrize("name", FORESEEN)
def test_what_the_machine_refuses_is_one_line(name: str) -> None:
    cause, words = FORESEEN[name]
    with pytest.raises(Exception, match=r".") as found:
        cause()
    wrapped = RuntimeError("Failed to evaluate ConfigExpression")
    wrapped.__cause__ = found.value
    for error in (found.value, wrapped):
        line = foreseen(error)
        assert line is not None
        assert "\n" not in line
        assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.EDQUOT, "room"), (errno.EROFS, "closed"), (errno.EACCES, "closed"), (errno.EIO, "access")],
)
def test_an_error_of_the_system_names_the_file(number: int, word: str) -> None:
    line = foreseen(OSError(number, os.strerror(number), "run/last.pt")) or ""
    assert line.startswith("run/last.pt ")
    assert os.strerror(number) in line
    assert word in line


def test_a_fault_of_the_code_is_no_line() -> None:
    assert foreseen(KeyError("a")) is None
    assert foreseen(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    error = KeyError("a")
    error.__context__ = FileNotFoundError(2, "No such file", "optional.json")  # was dealt with
    assert foreseen(error) is None


def test_what_was_noted_is_told_at_the_end() -> None:
    error = DataError("a is b; expected c")
    error.add_note("the last good checkpoint is d")
    assert foreseen(error) == "a is b; expected c; the last good checkpoint is d"


def test_a_worker_tells_of_the_system_in_one_line() -> None:
    with pytest.raises(DataError, match=r"a\.png .*Permission denied"), as_item_error():
        raise PermissionError(errno.EACCES, "Permission denied", "a.png")


def test_work_goes_on_without_what_it_can_do_without(caplog: pytest.LogCaptureFixture) -> None:
    with dispensable("the picture"):
        _no_space()
    assert "the picture" in caplog.text
    with pytest.raises(KeyError), dispensable("the picture"):
        raise KeyError("a")


def test_a_checkpoint_that_finds_the_disk_full_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    atomic_save({"weights": torch.zeros(2)}, path)
    fill(monkeypatch, "last.pt")
    with pytest.raises(OSError, match="No space left") as found:
        atomic_save({"weights": torch.ones(100_000)}, path)
    assert found.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.zeros(2))


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), 2), (PermissionError(13, "no", "a"), 2), (KeyError("a"), 0)]
)
def test_the_command_line_ends_in_one_line_or_in_a_traceback(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit if code else KeyError) as stopped:
        app.main()
    if code:
        assert stopped.value.args == (code,)
        said = capsys.readouterr().err
        assert said.startswith("vaevq-med: ")
        assert said.count("\n") == 1
