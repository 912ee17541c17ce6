"""``study`` on the command line, and the older commands that stand for one: the live table, what is printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaevq_med.cli import rates
from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.makers import Maker
from vaevq_med.cli.show import interruptible
from vaevq_med.core.errors import VaevqMedError

if TYPE_CHECKING:
    from rich.table import Table

    from vaevq_med.study.command import StudyReport
    from vaevq_med.study.file import Study
    from vaevq_med.study.rows import RowState


def study(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A study of bundles/studies/ by name, or a .yaml file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands of every row and end.")] = False,
    slurm: Annotated[
        Path | None, typer.Option(help="Write a SLURM array script with a task a training ('-' prints it) and end.")
    ] = None,
    task: Annotated[
        int | None, typer.Option(help="Do this training only, from 0, and evaluate it: a task of an array job.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="In place of the file's: budget.steps=100; repeat."),
    ] = None,
) -> None:
    """Run the comparison that a file describes: train, evaluate, and write the table, its statistics and the figures.

    The same command goes on after an interruption and keeps what is finished. Exit code 0: all rows are there; 1: some
    failed; 2: nothing could be done; 130: interrupted.
    """
    from vaevq_med.study.file import Study, read_study

    chosen = read_study(file, assignments or ())
    if isinstance(chosen, Study):
        run(chosen, dry_run=dry_run, slurm=slurm, task=task)
    elif slurm is not None or task is not None:
        raise VaevqMedError(
            f"{'--slurm' if slurm is not None else '--task'}: found a study that trains nothing; expected "
            "neither, since calls side by side share its work"
        )
    else:
        rates.run(chosen, dry_run=dry_run)


def maker(kind: type[Maker]) -> Callable[..., Any]:
    """The command that makes a study of its flags and runs it."""

    def command(options: Any) -> None:
        chosen = options.study()
        if options.show_study:
            typer.echo(chosen.text(), nl=False)
        else:
            slurm, row = getattr(options, "slurm", None), getattr(options, "row", None)
            run(chosen, dry_run=options.dry_run, slurm=slurm, task=row)

    command.__doc__ = kind.__doc__
    return with_flags(kind)(command)


def run(chosen: Study, *, dry_run: bool = False, slurm: Path | None = None, task: int | None = None) -> None:
    """Run a study under a live table of its rows, print what it found, and end with its exit code.

    Raises:
        typer.Exit: with 0, or 1 where a row failed, or 130 on an interrupt.
    """
    from vaevq_med.study.command import RunStudy

    if dry_run:
        for label, lines in RunStudy(chosen).dry_run():
            typer.echo("\n".join([f"# {label}", *lines]))
        return
    if slurm is not None:
        _write_script(slurm, RunStudy(chosen).script())
        return
    with interruptible("finished rows are kept, and the same command goes on"), _live_rows() as update:
        command = RunStudy(chosen, update)
        report = command.run() if task is None else command.run_task(task)
    _print(report)
    raise typer.Exit(1 if report.failed else 0)


def _write_script(path: Path, text: str) -> None:
    if str(path) == "-":
        typer.echo(text, nl=False)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise VaevqMedError(f"--slurm {path}: found it not writable ({error.strerror})") from None
    typer.echo(f"{path}: submit it with sbatch; then, for tables and figures, the same command without --slurm")


def _print(report: StudyReport) -> None:
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
            yield lambda states: live.update(status_table(states, console.width))
        return
    seen: dict[str, str] = {}

    def say(states: Sequence[RowState]) -> None:
        for state in states:
            if state.status != seen.get(state.row.label, "waiting"):
                seen[state.row.label] = state.status
                console.print(f"{time.strftime('%H:%M:%S')} {state.row.label}: {state.status}", markup=False)

    yield say


def status_table(states: Sequence[RowState], width: int) -> Table:
    """The rows of a study, their status and how long each has taken, for a terminal of so many columns."""
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
