"""The ``vaevq-med`` command line: flags to commands, expected errors to one line and exit code 2.

Each command imports what it runs when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys

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
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


# --- data preparation -------------------------------------------------------------------------------


# --- synthetic subjects -----------------------------------------------------------------------------


# --- feature-network weights ------------------------------------------------------------------------


# --- demo and bundles -------------------------------------------------------------------------------


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
