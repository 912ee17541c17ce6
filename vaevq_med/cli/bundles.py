"""``vaevq-med bundle``: the MONAI bundles, packed and found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the bundle: brats or imagenet.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of a training run; by default outputs/NAME/checkpoints/best.pt.")
    ] = None,
    weights: Annotated[str, typer.Option(help="'ema', the averaged weights, or 'network'.")] = "ema",
    metrics: Annotated[Path | None, typer.Option(help="An evaluation's metrics.json, for the metadata.")] = None,
) -> None:
    """Write a trained tokenizer in the layout of MONAI's model zoo: configs/, models/model.pt, docs/, LICENSE."""
    from vaevq_med.trained.pack import BundlePack

    trained = checkpoint or Path("outputs", name, "checkpoints", "best.pt")
    report = BundlePack(name, output, trained, weights, metrics).run()
    typer.echo(f"{report.output}: {len(report.files)} files")
    typer.echo(f"Use it with: cd {report.output} && python -m monai.bundle run --config_file configs/inference.json")


def where(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the bundle: brats or imagenet.")],
) -> None:
    """Print where an installed bundle is."""
    from vaevq_med.core.resources import bundle_path

    typer.echo(bundle_path(name))
