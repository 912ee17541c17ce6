"""Files of pretrained weights: which, where they are looked for, and what to do when one is missing.

Nothing here downloads. A file is found by the path given, in ``~/.cache/vaevq_med/weights``, or where torch hub keeps
what other programs have fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.errors import MissingWeightsError
from vaevq_med.core.files import file_sha256
from vaevq_med.networks.weight_file import read_weight_file

WEIGHTS_DIR = Path("~/.cache/vaevq_med/weights")
_OFFLINE = "offline alternative: efficientnet-lite0, which comes with the installation"


@dataclass(frozen=True)
class WeightFile:
    """Weights of a feature network.

    Attributes:
        network: name of the feature network.
        file: file name.
        sha256: first hexadecimal digits of the file's SHA-256 as published (torch's convention puts them into the
            file's name); empty where the publisher gives none.
        source: who publishes it.
        purpose: what it is used for.
    """

    network: str
    file: str
    sha256: str
    source: str
    purpose: str


WEIGHT_FILES: Mapping[str, WeightFile] = {
    file.network: file
    for file in (
        WeightFile("vgg", "vgg16-397923af.pth", "397923af", "torchvision, VGG16 IMAGENET1K_V1", "LPIPS, the paper's"),
        WeightFile("alex", "alexnet-owt-7be5be79.pth", "7be5be79", "torchvision, AlexNet IMAGENET1K_V1", "LPIPS"),
        WeightFile(
            "squeeze", "squeezenet1_1-b8a52dc0.pth", "b8a52dc0", "torchvision, SqueezeNet1_1 IMAGENET1K_V1", "LPIPS"
        ),
        WeightFile(
            "inception",
            "weights-inception-2015-12-05-6726825d.pth",
            "6726825d",
            "torch-fidelity v0.2.0, Inception of the FID paper",
            "rFID and gFID of published work",
        ),
        WeightFile(
            "radimagenet",
            "ResNet50.pt",
            "",
            "RadImageNet, ResNet50 of the PyTorch release",
            "rFID and a perceptual distance of radiological features",
        ),
    )
}


def candidates(file: WeightFile) -> list[Path]:
    """Where a file is looked for, in order, when no path is given."""
    return [WEIGHTS_DIR.expanduser() / file.file, Path(torch.hub.get_dir()) / "checkpoints" / file.file]


@lru_cache(maxsize=32)
def _digest(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits; remembered while the file does not change."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


def find_weights(name: str, path: str | Path | None = None) -> Path:
    """The weights file of a feature network.

    Args:
        name: a key of :data:`WEIGHT_FILES`.
        path: a file to use instead of the usual places; its hash is not checked.

    Raises:
        MissingWeightsError: there is none, or one found in a usual place has another hash than the published one.
    """
    file = WEIGHT_FILES[name]
    if path is not None:
        if not Path(path).is_file():
            raise MissingWeightsError(f"{path}: found no file, expected the weights of {name!r} ({file.file})")
        return Path(path)
    for candidate in candidates(file):
        if candidate.is_file():
            digest = sha256_of(candidate)
            if not digest.startswith(file.sha256):
                raise MissingWeightsError(
                    f"{candidate}: found SHA-256 {digest[:16]}..., expected {file.sha256}...; fetch it again, or pass "
                    "its path if you mean it"
                )
            return candidate
    checksum = f"SHA-256 {file.sha256}..." if file.sha256 else "SHA-256 not published"
    raise MissingWeightsError(
        f"feature network {name!r}: found no weights, expected {file.file} ({file.source}; {checksum}) in "
        f"{WEIGHTS_DIR}, or its path; {_OFFLINE}"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dictionary from a file of PyTorch or of safetensors, without unpickling code.

    Raises:
        MissingWeightsError: the file is not one.
    """
    state: Any = read_weight_file(path, "a state dictionary", MissingWeightsError)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MissingWeightsError(f"{path}: found no tensors by name, expected a state dictionary")
    return dict(state)
