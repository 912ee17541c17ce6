"""``vaevq-med bundle``: the MONAI bundles, packed and found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the bundle: brats, imagenet or segmentation.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of a training run, or a packed bundle; by default outputs/NAME/checkpoints/best.pt."
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="'ema', the averaged weights, or 'network'.")] = "ema",
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="An evaluation's metrics.json, for the metadata and the model card; with per_image.csv beside it the "
            "figures have intervals."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option(help="Of the weights: 'pt', which MONAI's tools load, 'safetensors', or 'both'.")
    ] = "both",
    patients: Annotated[
        bool,
        typer.Option(
            "--patients/--no-patients",
            help="Let a hash of each patient of the training travel along, by which an evaluation refuses them; names "
            "never do.",
        ),
    ] = True,
) -> None:
    """Write a trained network in the layout of MONAI's model zoo: configs/, models/, a model card, docs/, LICENSE."""
    from vaevq_med.trained.pack import BundlePack

    trained = checkpoint or Path("outputs", name, "checkpoints", "best.pt")
    report = BundlePack(name, output, trained, weights, metrics, format, patients).run()
    typer.echo(f"{report.output}: {len(report.files)} files")
    typer.echo(f"Look whether it is whole, wherever it is: vaevq-med bundle verify {report.output}")
    typer.echo(f"Use it with: cd {report.output} && python -m monai.bundle run --config_file configs/inference.json")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A packed bundle.")],
) -> None:
    """Look whether a packed bundle is whole: hashes of its files, weights, metadata, an image through the network."""
    from vaevq_med.trained.verify import BundleVerify

    for line in BundleVerify(folder).run():
        typer.echo(line)


def where(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the bundle: brats, imagenet or segmentation.")],
) -> None:
    """Print where an installed bundle is."""
    from vaevq_med.core.resources import bundle_path

    typer.echo(bundle_path(name))
