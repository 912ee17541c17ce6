"""A file of weights, read without running any code of it; of a file that is something else, what it is.

PyTorch's archives and safetensors are told apart by their first bytes, whatever a file is called. The format of the
latter: the length of a header in eight bytes, the header as JSON, the tensors
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import in_one_line

_HEADER = 8
_LARGEST_HEADER = 100_000_000
"""Of a safetensors file, by its format."""
_LFS = b"version https://git-lfs.github.com/spec/v1"
_ZIP = b"PK\x03\x04"


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does, or is called one."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(_HEADER + 1)
    return len(start) > _HEADER and start[_HEADER:] == b"{" and _length(start) <= _LARGEST_HEADER


def read_weight_file(path: Path, expected: str, error: type[VaevqMedError] = VaevqMedError) -> Any:
    """What a file of weights holds, on the CPU: tensors by name of a safetensors file, else what was saved.

    Args:
        path: the file.
        expected: what it should be, for the message, e.g. ``a checkpoint``.
        error: the class of the error.

    Raises:
        VaevqMedError: there is no such file, or it is something else: a pointer of Git LFS, a web page, a program
            (TorchScript), a pickle that names functions or classes, a truncated or an altered file.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise error(f"{path}: found {found}, expected {expected}")
    other = _other_kind(path)
    if other is not None:
        raise error(f"{path}: found {other}, expected {expected}")
    try:
        return _load(path)
    except Exception as problem:
        if isinstance(problem, PermissionError | MemoryError):
            raise
        raise error(f"{path}: found {_what_failed(path, problem)}, expected {expected}") from problem


def header_of(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file, texts by name; empty where there are none, or it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _load(path: Path) -> Any:
    if is_safetensors(path):
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is refused is said in one line
        return torch.load(path, map_location="cpu", weights_only=True)


def _length(start: bytes) -> int:
    return int.from_bytes(start[:_HEADER], "little")


def _other_kind(path: Path) -> str | None:
    """What a file is, where its first bytes say that it holds no weights."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file"
    if start.startswith(_LFS):
        size = re.search(rb"size (\d+)", start)
        told = f" to {size[1].decode()} bytes" if size else ""
        return f"a pointer of Git LFS{told} in place of the weights (git lfs pull fetches them)"
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        return "a web page"
    return None


def _what_failed(path: Path, problem: Exception) -> str:
    """In words, why a file was not loaded."""
    said = str(problem)
    size = path.stat().st_size
    if is_safetensors(path):
        told = _short(said.removeprefix("Error while deserializing header: "))
        return f"a truncated or altered safetensors file of {size} bytes ({told})"
    named = re.search(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", said) or re.search(r"Trying to .*?([\w.]+)$", said)
    if named:
        return f"an unreadable file: a pickle that names {named[1]}, which is code and is not run"
    if "TorchScript" in said:
        return "an unreadable file: a TorchScript archive, which is a program"
    with path.open("rb") as file:
        start = file.read(4)
    if "unexpected EOF" in said or (start == _ZIP and not zipfile.is_zipfile(path)):
        return f"an unreadable file: an archive of {size} bytes that is truncated or altered"
    if start[:1] == b"\x80":
        return "an unreadable file: a pickle"
    if start != _ZIP:
        return "an unreadable file, neither an archive of PyTorch nor a safetensors file"
    return f"an unreadable file ({_short(said) or type(problem).__name__})"


def _short(said: str) -> str:
    """The first sentence of what a library says."""
    return in_one_line(re.split(r"\. |\n", said.strip())[0])[:120]
