"""``rate-distortion`` on the command line: a study of that kind, a line a record, and the table."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from vaevq_med.core.errors import VaevqMedError


def rate_distortion(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A study of bundles/studies/ by name, or a .yaml file.")
    ] = "rate_distortion",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many records are there, and end.")] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="In place of the file's: input=data; repeat."),
    ] = None,
) -> None:
    """Code whole volumes with tokenizers and with the codecs of archives and video, and write their curves.

    The same command goes on after an interruption, and two at once share the work. Exit code 0: all records are there;
    1: some failed, or another call is at work on them; 2: nothing could be done; 130: interrupted.
    """
    from vaevq_med.study.file import read_study

    run(read_study(file, assignments or ()), dry_run=dry_run)


def run(chosen: object, *, dry_run: bool = False) -> None:
    """Run a study of rate against distortion, print what it found, and end with its exit code.

    Raises:
        typer.Exit: with 0, or 1 where a record is missing, or 130 on an interrupt.
        VaevqMedError: the study is of another kind.
    """
    from vaevq_med.study.rates.file import RateDistortionStudy

    if not isinstance(chosen, RateDistortionStudy):
        raise VaevqMedError(f"study is {getattr(chosen, 'study', '')}; expected rate_distortion")
    from vaevq_med.study.rates.run import RunRates

    def say(line: str) -> None:
        typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)

    command = RunRates(chosen, say)
    if dry_run:
        typer.echo("\n".join(command.dry_run()))
        return
    try:
        report = command.run()
    except KeyboardInterrupt:
        typer.echo("vaevq-med: interrupted; finished records are kept, and the same command goes on", err=True)
        raise typer.Exit(130) from None
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
