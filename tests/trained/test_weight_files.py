"""Files that hold no weights, or others: each is refused in one line that says what was found and what was expected."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import save_file
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import MissingWeightsError, VaevqMedError
from vaevq_med.networks.weights import read_weights
from vaevq_med.trained import CheckpointError, StoredTokenizer, read_checkpoint, read_trained

CHECKPOINT = FIXTURES / "simvq.pt"


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(300)}, str(path))


def _cut(path: Path) -> None:
    _safetensors(path)
    path.write_bytes(_half(path.read_bytes()))


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pointer": (
        "a.pt",
        lambda path: path.write_text(
            "version https://git-lfs.github.com/spec/v1\n"
            "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
        ),
        "found a pointer of Git LFS to 12345 bytes in place of the weights",
    ),
    "pointer of safetensors": (
        "a.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"),
        "found a pointer of Git LFS to 12 bytes",
    ),
    "pickle of code": ("a.pt", lambda path: torch.save({"network": _Runs()}, path), "a pickle that names posix.mkdir"),
    "bare pickle of code": ("a.pkl", lambda path: path.write_bytes(pickle.dumps({"network": _Runs()})), "a pickle"),
    "whole module": ("a.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path), "a pickle that names torch.nn"),
    "truncated archive": (
        "a.pt",
        lambda path: path.write_bytes(_half(CHECKPOINT.read_bytes())),
        f"an archive of {CHECKPOINT.stat().st_size // 2} bytes that is truncated or altered",
    ),
    "truncated safetensors": ("a.safetensors", _cut, "found a truncated or altered safetensors file of"),
    "empty": ("a.pt", lambda path: path.write_bytes(b""), "found an empty file"),
    "web page": ("a.pt", lambda path: path.write_text("<!DOCTYPE html><html></html>"), "found a web page"),
    "text": ("a.pt", lambda path: path.write_text("hello world"), "found an unreadable file, neither"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize(
    ("read", "error"),
    [(read_trained, CheckpointError), (read_checkpoint, CheckpointError), (read_weights, MissingWeightsError)],
)
def test_what_is_no_file_of_weights_is_refused_in_one_line(
    case: str, read: Callable[[Path], Any], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, write, said = BAD[case]
    write(tmp_path / name)
    with pytest.raises(error) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: found ")
    assert said in message
    assert ", expected a" in message
    assert "\n" not in message
    assert not (tmp_path / "ran").exists()


def test_weights_without_the_settings_of_their_training_are_refused(tmp_path: Path) -> None:
    _safetensors(tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(CheckpointError, match=r"found weights alone, .*, expected a checkpoint of a training run"):
            StoredTokenizer(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a folder without models/model\.safetensors or models/model\.pt"):
        StoredTokenizer(tmp_path)
    torch.save({"network": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="found a 'network' that is no state dictionary, expected tensors"):
        StoredTokenizer(tmp_path / "list.pt")


def test_another_architecture_is_named_by_its_first_tensors(tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    del state["ema"]
    network = state["network"]
    changed = next(name for name in network if name.startswith("encoder.") and network[name].ndim == 4)
    gone, more = [name for name in network if name.startswith("decoder.")][:2]
    network[changed] = torch.zeros(1, 2, 3)
    network["other"] = network.pop(gone)
    network.pop(more)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        StoredTokenizer(tmp_path / "a.pt").network()
    message = str(caught.value)
    assert (
        f"found another architecture in 'network' (no {gone} and 1 more; {changed} of shape [1, 2, 3], expected ["
        in message
    )
    assert "; the unknown other), expected the one that its own network_def describes" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["autoregressive", "ema"])
def test_commands_end_in_one_line_of_the_checkpoint_of_another_network(name: str, tmp_path: Path) -> None:
    pointer = tmp_path / "best.pt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    given = FIXTURES / f"{name}.pt" if name == "autoregressive" else pointer
    arguments = ["encode-tokens", str(given), str(FIXTURES / "slices"), str(tmp_path / "tokens")]
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, VaevqMedError)
    expected = "a checkpoint of vaevq_med.networks.LlamaGen" if name == "autoregressive" else "Git LFS to 5 bytes"
    assert expected in str(found.exception)
