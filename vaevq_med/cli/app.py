"""The ``vaevq-med`` command line: its commands, and foreseen errors to one line and exit code 2.

Each command imports what it runs when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Annotated

import typer

from vaevq_med.cli import bundles, codec, makers, prepare, rates, second_stage, tasks
from vaevq_med.cli import study as studies
from vaevq_med.cli.adopt import adopt
from vaevq_med.cli.demo import demo
from vaevq_med.cli.overlays import overlays
from vaevq_med.cli.prefixes import prefixes
from vaevq_med.cli.probe import probe
from vaevq_med.cli.weights import weights
from vaevq_med.core.errors import foreseen

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
    trusted: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE",
            help="A package whose networks a checkpoint may name, beside this one and those that are installed as "
            "components of it; repeatable, before the command. Its code runs.",
        ),
    ] = None,
) -> None:
    from vaevq_med.core.components import trust

    trust(trusted or ())


app.command("slice-extract")(prepare.slice_extract)
app.command("imagenet-prepare")(prepare.imagenet_prepare)
app.command()(prepare.prepare)
app.command("audit-split")(prepare.audit_split)
app.command()(prepare.phantom)
app.command("label-maps")(prepare.label_maps)
app.command()(weights)
app.command("feature-codebook")(prepare.feature_codebook)
app.command("cluster-codebook")(second_stage.cluster_codebook)
app.command("reduce-codebook")(second_stage.reduce_codebook)
app.command("encode-tokens")(second_stage.encode_tokens)
app.command("token-bits")(second_stage.token_bits)
app.command("evaluate-samples")(second_stage.evaluate_samples)
app.command()(codec.compress)
app.command()(codec.decompress)
app.command()(codec.reconstruct)
app.command("index-model")(codec.index_model)
app.command()(tasks.segment)
app.command()(demo)
_rest = {"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True}
app.command(context_settings={**_rest, "help_option_names": []})(adopt)
app.command()(overlays)
app.command("study")(studies.study)
app.command("rate-distortion")(rates.rate_distortion)
app.command()(rates.tasks)
app.command()(probe)
app.command()(prefixes)
for _kind in (makers.Compare, makers.Ablate, makers.Sweep, makers.CompareGeneration):
    app.command(_kind.command)(studies.maker(_kind))

_bundle = typer.Typer(help="Work with the MONAI bundles.", no_args_is_help=True)
_bundle.command("pack")(bundles.pack)
_bundle.command("verify")(bundles.verify)
_bundle.command("path")(bundles.where)
app.add_typer(_bundle, name="bundle")


def main() -> None:
    """Run the command line; a foreseen error ends with one line on stderr and exit code 2."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        app()
    except KeyboardInterrupt:  # before the command itself could say what is left
        typer.echo("vaevq-med: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except RecursionError:
        typer.echo("vaevq-med: found a file nested too deeply to read", err=True)
        sys.exit(2)
    except Exception as error:
        line = foreseen(error)
        if line is None:
            raise
        with contextlib.suppress(OSError):  # the terminal's log may be on the full disk, too
            typer.echo(f"vaevq-med: {line}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
