"""``rate-distortion`` and ``tasks`` on the command line: a study of coded volumes, a line a record, and the table."""

from __future__ import annotations

import importlib
import time
from typing import Annotated, Any

import typer

from vaevq_med.cli.show import interruptible
from vaevq_med.core.errors import VaevqMedError

_RUNNERS = {
    "rate_distortion": ("vaevq_med.study.rates.run", "RunRates"),
    "tasks": ("vaevq_med.study.tasks.run", "RunTasks"),
}
"""By kind of study, what runs it."""
_FILE = typer.Argument(metavar="FILE", help="A study of bundles/studies/ by name, or a .yaml file.")
_DRY_RUN = typer.Option("--dry-run", help="Say how many records are there, and end.")
_SET = typer.Option("--set", metavar="FIELD=VALUE", help="In place of the file's: input=data; repeat.")


def rate_distortion(
    file: Annotated[str, _FILE] = "rate_distortion",
    dry_run: Annotated[bool, _DRY_RUN] = False,
    assignments: Annotated[list[str] | None, _SET] = None,
) -> None:
    """Code whole volumes with tokenizers and with the codecs of archives and video, and write their curves.

    The same command goes on after an interruption, and two at once share the work. Exit code 0: all records are there;
    1: some failed, or another call is at work on them; 2: nothing could be done; 130: interrupted.
    """
    _run_file(file, assignments, "rate_distortion", dry_run)


def tasks(
    file: Annotated[str, _FILE] = "tasks",
    dry_run: Annotated[bool, _DRY_RUN] = False,
    assignments: Annotated[list[str] | None, _SET] = None,
) -> None:
    """Ask what is left for a diagnosis in coded volumes: segmentation, radiomics, and lesions that are looked for.

    The same command goes on after an interruption, and two at once share the work. Exit code 0: all records are there;
    1: some failed, or another call is at work on them; 2: nothing could be done; 130: interrupted.
    """
    _run_file(file, assignments, "tasks", dry_run)


def _run_file(file: str, assignments: list[str] | None, kind: str, dry_run: bool) -> None:
    from vaevq_med.study.file import read_study

    chosen = read_study(file, assignments or ())
    if chosen.study != kind:
        raise VaevqMedError(f"study is {chosen.study}; expected {kind}")
    run(chosen, dry_run=dry_run)


def run(chosen: Any, *, dry_run: bool = False) -> None:
    """Run a study of coded volumes, print what it found, and end with its exit code.

    Args:
        chosen: as its file says.
        dry_run: say how many records are there alone.

    Raises:
        typer.Exit: with 0, or 1 where a record is missing, or 130 on an interrupt.
    """
    module, name = _RUNNERS[chosen.study]

    def say(line: str) -> None:
        typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)

    command = getattr(importlib.import_module(module), name)(chosen, say)
    if dry_run:
        typer.echo("\n".join(command.dry_run()))
        return
    with interruptible("finished records are kept, and the same command goes on"):
        report = command.run()
    if report.table:
        typer.echo(report.table, nl=False)
    for path in report.files:
        typer.echo(f"  {path}")
    for where, what in report.problems:
        typer.echo(f"vaevq-med: {where}: {what}", err=True)
    if report.busy:
        typer.echo(f"vaevq-med: another call is at work on {', '.join(report.busy)}", err=True)
    typer.echo(f"{report.output}: {report.expected - report.missing} of {report.expected} records are there")
    raise typer.Exit(1 if report.missing else 0)
