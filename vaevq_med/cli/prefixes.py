"""``prefixes`` on the command line: quality by how much of each code is kept, a line a point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.show import counted, interruptible
from vaevq_med.study.rates.prefix_options import PrefixOptions


@with_flags(PrefixOptions)
def prefixes(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the record, the table and the figure.")],
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Trained tokenizers, or packed bundles.")
    ],
    options: PrefixOptions,
) -> None:
    """Decode the first parts of images' codes: stages of RVQ, groups of MGVQ, nested slots, the top code of two levels.

    All tokenizers stand in one table and one figure, over the bits that the kept parts take; they have images of one
    size. Exit code 0: done; 2: nothing could be done; 130: interrupted.
    """
    from vaevq_med.study.rates.prefix_report import lines
    from vaevq_med.study.rates.prefixes import Prefixes

    command = Prefixes(dataset=dataset, output=output, checkpoints=checkpoints, **vars(options))
    with interruptible("nothing was written"), counted() as counting:
        report = command.run(**counting)
    for line in lines(report.record):
        typer.echo(line)
    typer.echo(f"{report.output}: written")
