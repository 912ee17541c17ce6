"""``vaevq-med adopt``: other people's tokenizers as checkpoints of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_HELP = ("-h", "--help")


def adopt(
    context: typer.Context,
    kind: Annotated[
        str, typer.Argument(metavar="KIND SOURCE OUTPUT ...", help="What SOURCE is: one that --list names.")
    ] = "",
    show: Annotated[bool, typer.Option("--list", help="List the kinds and end.")] = False,
) -> None:
    """Write the checkpoint of a tokenizer of another package or project, for every command that takes a checkpoint.

    SOURCE is a file or a folder on this machine, OUTPUT the checkpoint. Nothing is downloaded, and weights are read
    without running code. Each kind has options of its own: adopt KIND --help tells them.
    """
    if not show and (not kind or kind in _HELP):
        typer.echo(context.get_help())
        return
    from vaevq_med.foreign.registry import kind_of, known_kinds

    if show:
        for name, one in known_kinds().items():
            typer.echo(f"{name}: {one.title}\n  from {one.source}; {one.license}")
        typer.echo("\nThe options of a kind: vaevq-med adopt KIND --help")
        return
    command = _command(kind_of(kind))
    command.main(args=list(context.args), prog_name=f"vaevq-med adopt {kind}")


def _command(kind: Any) -> Any:
    """The command of a kind."""
    import typer.main

    from vaevq_med.cli.flags import with_flags

    def run(source: Path, output: Path, options: Any = None, overwrite: bool = False) -> None:
        from vaevq_med.foreign.adopt import Adopt

        report = Adopt(kind.name, source, output, options, overwrite).run()
        channels = {1: "gray", 3: "color"}.get(report.in_channels, f"{report.in_channels} channels")
        bits = "no indices" if report.bits is None else f"{report.bits:.4g} bits each"
        typer.echo(
            f"{report.output}: {report.parameters / 1e6:.1f} M parameters, {channels} at {report.image_size} pixels, "
            f"positions of {'x'.join(map(str, report.factors))}, {bits} ({report.quantizer})"
        )
        for note in report.notes:
            typer.echo(f"  {note}")

    run.__doc__ = f"{kind.title}: from {kind.source}.\n\n{kind.license[0].upper()}{kind.license[1:]}."
    # Not as texts, since what the source is said to be is the kind's.
    run.__annotations__ = {
        "source": Annotated[Path, typer.Argument(metavar="SOURCE", help=f"{kind.source[0].upper()}{kind.source[1:]}.")],
        "output": Annotated[Path, typer.Argument(metavar="OUTPUT", help="Checkpoint to write.")],
        "options": Any,
        "overwrite": Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")],
    }
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": list(_HELP)}
    )
    app.command()(with_flags(kind.options)(run))
    return typer.main.get_command(app)
