"""The ``vaevq-med`` command line: flags to commands, expected errors to one line and exit code 2.

Each command imports what it runs when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vaevq_med.errors import VaevqMedError

app = typer.Typer(
    name="vaevq-med",
    help="Discrete visual tokenizers for medical images, around VAEVQ (arXiv 2511.06863), on MONAI.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from vaevq_med import __version__

        typer.echo(f"vaevq-med {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


# --- data preparation -------------------------------------------------------------------------------


# --- synthetic subjects -----------------------------------------------------------------------------


@app.command()
def phantom(
    output: Annotated[Path, typer.Argument(help="Folder to write the cases into.")],
    subjects: Annotated[int, typer.Option(help="Patients to make; every third has two timepoints.")] = 6,
    seed: Annotated[int, typer.Option(help="Another seed makes other patients.")] = 0,
    shape: Annotated[str, typer.Option(help="Voxels of a volume; fewer are larger ones.")] = "182,218,182",
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
) -> None:
    """Write synthetic brains with a tumor, in BraTS 2024 layout and naming."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vaevq_med.apps.phantom import Phantom, parse_shape
    from vaevq_med.data.phantom import PhantomConfig

    command = Phantom(output, subjects, PhantomConfig(shape=parse_shape(shape), seed=seed), workers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("synthetic cases", total=command.num_cases)
        report = command.run(on_case=lambda name: progress.update(task, advance=1))
    typer.echo(f"{report.output}: cases {len(report.cases)}, subjects {report.subjects}")


# --- feature-network weights ------------------------------------------------------------------------


# --- demo and bundles -------------------------------------------------------------------------------


@app.command()
def demo(
    output: Path = typer.Option(Path("demo"), help="Folder of everything that the demo writes."),
    subjects: int = typer.Option(6, min=3, help="Synthetic subjects to make."),
    epochs: int | None = typer.Option(None, min=1, help="Epochs to train; by default the overlay's."),
    seed: int = typer.Option(0, help="Seed of the subjects and of the training."),
) -> None:
    """Make synthetic brains, extract slices, train and evaluate a small VAEVQ: some minutes, no GPU."""
    from rich.console import Console

    from vaevq_med.apps.demo import Demo

    console = Console(highlight=False)

    def announce(title: str, command: str) -> None:
        console.print(f"\n[bold]{title}[/bold]\n  $ {command}", soft_wrap=True)

    report = Demo(output, subjects=subjects, epochs=epochs, seed=seed, announce=announce).run()
    console.print("\n[bold]Over the test subject[/bold]")
    for name, value in report.metrics.items():
        console.print(f"  {name:<28}{value:10.4f}")
    for picture in report.pictures:
        console.print(f"  picture: {picture}", soft_wrap=True)
    console.print("\nBrowse the run with:")
    console.print(f"  mlflow ui --backend-store-uri {report.tracking_uri}", soft_wrap=True)


def main() -> None:
    """Run the command line; an expected error ends with one line on stderr and exit code 2."""
    try:
        app()
    except VaevqMedError as error:
        typer.echo(f"vaevq-med: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
