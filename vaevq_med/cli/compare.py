"""``compare``, ``ablate`` and ``sweep`` on the command line: their options, the live table, what is printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vaevq_med.core.errors import VaevqMedError

if TYPE_CHECKING:
    from rich.table import Table

    from vaevq_med.study.command import CompareReport, Comparison
    from vaevq_med.study.compare import Compare
    from vaevq_med.study.rows import RowState

Bundle = Annotated[str, typer.Option(help="Name of an installed bundle, or a bundle's folder.")]
Methods = Annotated[
    str, typer.Option(help="Overlays of the bundle, separated by commas; NAME=OVERLAY+OVERLAY joins several.")
]
Seeds = Annotated[str, typer.Option(help="Seeds of each method, separated by commas.")]
MaxEpochs = Annotated[int | None, typer.Option(help="Budget: epochs. Without a budget, the bundle's.")]
Steps = Annotated[int | None, typer.Option(help="Budget: optimizer steps.")]
Images = Annotated[int | None, typer.Option(help="Budget: training images seen.")]
Overlays = Annotated[list[str] | None, typer.Option("--overlay", help="Overlay of every row, e.g. small_cpu; repeat.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="[METHOD:]ID=VALUE", help="Override of every row, or of a method's; repeat."),
]
DatasetDir = Annotated[Path | None, typer.Option(help="Folder of dataset.json; by default the bundle's.")]
OutputDir = Annotated[Path, typer.Option(help="Folder of everything that is written.")]
TrackingUri = Annotated[str, typer.Option(help="MLflow; 'none' turns it off.")]
Launch = Annotated[str, typer.Option(help="How to start a row, e.g. 'torchrun --nproc_per_node=8'.")]
Checkpoint = Annotated[str, typer.Option(help="Which checkpoint is evaluated: 'best' on validation, or 'last'.")]
Published = Annotated[bool, typer.Option("--published", help="Set the paper's figures in columns of their own.")]
Pictures = Annotated[int, typer.Option(min=0, help="Images of the figure of reconstructions; 0 leaves it out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands of every row and end.")]
Slurm = Annotated[
    Path | None, typer.Option(help="Write a SLURM array script with a task a training ('-' prints it) and end.")
]
RowNumber = Annotated[
    int | None, typer.Option("--row", help="Do this training only, from 0, and evaluate it: a task of an array job.")
]

_SQLITE = "sqlite:///mlflow.db"
_METHODS = "vqgan,simvq,vaevq"


def compare(
    methods: Methods = _METHODS,
    bundle: Bundle = "brats",
    seeds: Seeds = "0",
    max_epochs: MaxEpochs = None,
    steps: Steps = None,
    images: Images = None,
    overlay: Overlays = None,
    assignments: Assignments = None,
    dataset_dir: DatasetDir = None,
    output_dir: OutputDir = Path("outputs/compare"),
    tracking_uri: TrackingUri = _SQLITE,
    launch: Launch = "",
    checkpoint: Checkpoint = "best",
    published: Published = False,
    pictures: Pictures = 6,
    dry_run: DryRun = False,
    slurm: Slurm = None,
    row: RowNumber = None,
) -> None:
    """Train and evaluate tokenizers under one budget; write the table, its statistics and the figures.

    The same command goes on after an interruption and keeps what is finished. Exit code 0: all rows are there; 1: some
    failed; 2: nothing could be done; 130: interrupted.
    """
    _execute(
        *("compare", dry_run, slurm, row),
        budget=(max_epochs, steps, images),
        methods=methods,
        bundle=bundle,
        seeds=seeds,
        overlays=tuple(overlay or ()),
        assignments=tuple(assignments or ()),
        dataset_dir=dataset_dir,
        output=output_dir,
        tracking_uri=tracking_uri,
        launch=launch,
        checkpoint=checkpoint,
        published=published,
        pictures=pictures,
    )


def ablate(
    bundle: Bundle = "brats",
    seeds: Seeds = "0",
    max_epochs: MaxEpochs = None,
    steps: Steps = None,
    images: Images = None,
    overlay: Overlays = None,
    assignments: Assignments = None,
    dataset_dir: DatasetDir = None,
    output_dir: OutputDir = Path("outputs/ablate"),
    tracking_uri: TrackingUri = _SQLITE,
    launch: Launch = "",
    checkpoint: Checkpoint = "best",
    published: Published = False,
    pictures: Pictures = 6,
    dry_run: DryRun = False,
    slurm: Slurm = None,
    row: RowNumber = None,
) -> None:
    """Run the ablation (VQGAN; VLQ; VLQ + RCS; VLQ + DCR; all three), as ``compare`` does."""
    _execute(
        *("ablate", dry_run, slurm, row),
        budget=(max_epochs, steps, images),
        bundle=bundle,
        seeds=seeds,
        overlays=tuple(overlay or ()),
        assignments=tuple(assignments or ()),
        dataset_dir=dataset_dir,
        output=output_dir,
        tracking_uri=tracking_uri,
        launch=launch,
        checkpoint=checkpoint,
        published=published,
        pictures=pictures,
    )


def sweep(
    num_embeddings: Annotated[str, typer.Option(help="Codebook sizes K, separated by commas.")],
    methods: Methods = _METHODS,
    bundle: Bundle = "brats",
    seeds: Seeds = "0",
    max_epochs: MaxEpochs = None,
    steps: Steps = None,
    images: Images = None,
    overlay: Overlays = None,
    assignments: Assignments = None,
    dataset_dir: DatasetDir = None,
    output_dir: OutputDir = Path("outputs/sweep"),
    tracking_uri: TrackingUri = _SQLITE,
    launch: Launch = "",
    checkpoint: Checkpoint = "best",
    pictures: Pictures = 0,
    dry_run: DryRun = False,
    slurm: Slurm = None,
    row: RowNumber = None,
) -> None:
    """Run each method at several codebook sizes, as ``compare`` does; draw utilization, rFID and PSNR over K."""
    _execute(
        *("sweep", dry_run, slurm, row),
        budget=(max_epochs, steps, images),
        num_embeddings=num_embeddings,
        methods=methods,
        bundle=bundle,
        seeds=seeds,
        overlays=tuple(overlay or ()),
        assignments=tuple(assignments or ()),
        dataset_dir=dataset_dir,
        output=output_dir,
        tracking_uri=tracking_uri,
        launch=launch,
        checkpoint=checkpoint,
        pictures=pictures,
    )


def _execute(
    kind: str,
    dry_run: bool,
    slurm: Path | None,
    row: int | None,
    *,
    budget: tuple[int | None, int | None, int | None],
    **options: Any,
) -> None:
    from vaevq_med.study.compare import Compare
    from vaevq_med.study.plan import Budget

    def make(update: Callable[[Sequence[RowState]], None]) -> Compare:
        return Compare(kind=kind, budget=Budget(*budget), on_update=update, **options)

    if dry_run:
        print_commands(make(lambda states: None))
        return
    if slurm is not None:
        text = make(lambda states: None).script()
        if str(slurm) == "-":
            typer.echo(text, nl=False)
        else:
            try:
                slurm.parent.mkdir(parents=True, exist_ok=True)
                slurm.write_text(text)
            except OSError as error:
                raise VaevqMedError(f"--slurm {slurm}: found it not writable ({error.strerror})") from None
            typer.echo(
                f"{slurm}: submit it with sbatch; then, for tables and figures, the same command without --slurm"
            )
        return
    execute(make, lambda command: command.run() if row is None else command.run_row(row))


def print_commands(command: Comparison) -> None:
    """Print what each row would run."""
    for label, lines in command.dry_run():
        typer.echo(f"# {label}")
        for line in lines:
            typer.echo(line)


_Command = TypeVar("_Command", bound="Comparison")


def execute(
    make: Callable[[Callable[[Sequence[RowState]], None]], _Command], run: Callable[[_Command], CompareReport]
) -> None:
    """Run a comparison under a live table of its rows, print what it found, and end with its exit code.

    Args:
        make: the comparison that tells a function of its rows.
        run: run it.

    Raises:
        typer.Exit: with 0, or 1 where a row failed, or 130 on an interrupt.
    """
    try:
        with _live_rows() as update:
            report = run(make(update))
    except KeyboardInterrupt:
        typer.echo("vaevq-med: interrupted; finished rows are kept, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    _print(report)
    raise typer.Exit(1 if report.failed else 0)


def _print(report: CompareReport) -> None:
    if report.table:
        typer.echo("\n" + report.table, nl=False)
    for path in report.files:
        typer.echo(f"  {path}")
    for state in report.failed:
        log = "" if state.log is None else f"; see {state.log}"
        typer.echo(f"vaevq-med: {state.row.label}: {state.detail}{log}", err=True)
    typer.echo(f"{report.output}: {len(report.states) - len(report.failed)} of {len(report.states)} rows are there")


@contextmanager
def _live_rows() -> Iterator[Callable[[Sequence[RowState]], None]]:
    """A table of the rows that follows them on a terminal; a line a change of status elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda states: live.update(_status_table(states, console.width))
        return
    seen: dict[str, str] = {}

    def say(states: Sequence[RowState]) -> None:
        for state in states:
            if state.status != seen.get(state.row.label, "waiting"):
                seen[state.row.label] = state.status
                console.print(f"{time.strftime('%H:%M:%S')} {state.row.label}: {state.status}", markup=False)

    yield say


def _status_table(states: Sequence[RowState], width: int) -> Table:
    from rich.markup import escape
    from rich.table import Table

    colors = {"waiting": "dim", "failed": "red"}
    colors |= dict.fromkeys(("encoding", "training", "generating", "evaluating"), "cyan")
    table = Table(box=None, pad_edge=False)
    for title in ("row", "status", "time", ""):
        table.add_column(title, no_wrap=True)
    for state in states:
        minutes, seconds = divmod(int(state.seconds), 60)
        color = colors.get(state.status, "green")
        table.add_row(
            escape(state.row.label),
            f"[{color}]{state.status}[/{color}]",
            f"{minutes}:{seconds:02d}" if state.seconds else "",
            escape(state.detail[: max(20, width - 50)]),
        )
    return table
