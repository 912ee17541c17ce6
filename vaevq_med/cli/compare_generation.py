"""``compare-generation`` on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaevq_med.cli.compare import (
    Bundle,
    DryRun,
    Images,
    MaxEpochs,
    OutputDir,
    Published,
    Steps,
    TrackingUri,
    execute,
    print_commands,
)

if TYPE_CHECKING:
    from vaevq_med.study.compare_generation import CompareGeneration
    from vaevq_med.study.rows import RowState


def compare_generation(
    tokenizers: Annotated[
        str, typer.Option(metavar="NAME=CHECKPOINT,...", help="Trained tokenizers; each serves all seeds.")
    ] = "",
    source: Annotated[
        Path | None, typer.Option("--from", help="Output folder of compare, whose tokenizer of each seed is taken.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods of --from; by default vqgan,vaevq.")] = "",
    generators: Annotated[str, typer.Option(help="llamagen (over indices), ldm (over latents).")] = "llamagen,ldm",
    bundle: Bundle = "brats",
    seeds: Annotated[str, typer.Option(help="Seeds of each row, separated by commas.")] = "0",
    max_epochs: MaxEpochs = None,
    steps: Steps = None,
    images: Images = None,
    overlay: Annotated[
        list[str] | None,
        typer.Option(help="Overlay of bundles/overlays/generation; 'small_cpu' takes each generator's own; repeat."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="[NAME:]ID=VALUE", help="Override of the trainings, or a name's; repeat."),
    ] = None,
    generate_set: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME:]ID=VALUE", help="Override of generate.json, e.g. ldm:num_steps=50; repeat."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Images that each row draws.")] = 5000,
    encode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'[NAME:] OPTIONS'", help="Further options of encode-tokens, e.g. 'llamagen: --ten-crop'."
        ),
    ] = None,
    evaluate: Annotated[str, typer.Option(help="Further options of evaluate-samples, in quotes.")] = "",
    dataset_dir: Annotated[Path | None, typer.Option(help="Folder of dataset.json; by default the bundle's.")] = None,
    output_dir: OutputDir = Path("outputs/compare-generation"),
    tracking_uri: TrackingUri = "sqlite:///mlflow.db",
    launch: Annotated[str, typer.Option(help="How to start a training, e.g. 'torchrun --nproc_per_node=8'.")] = "",
    checkpoint: Annotated[
        str, typer.Option(help="The generator's that draws: 'best' on validation, or 'last'.")
    ] = "best",
    published: Published = False,
    pictures: Annotated[int, typer.Option(min=0, help="Samples of each row in samples.png; 0 leaves it out.")] = 8,
    dry_run: DryRun = False,
) -> None:
    """Train generators over tokenizers' tokens, draw and evaluate images; write the table and a grid of samples.

    The same command goes on after an interruption and keeps what is finished. Exit code 0: all rows are there; 1: some
    failed; 2: nothing could be done; 130: interrupted.
    """
    from vaevq_med.study.compare_generation import CompareGeneration
    from vaevq_med.study.plan import Budget

    def make(update: Callable[[Sequence[RowState]], None]) -> CompareGeneration:
        return CompareGeneration(
            output=output_dir,
            tokenizers=tokenizers,
            source=source,
            methods=methods,
            generators=generators,
            bundle=bundle,
            seeds=seeds,
            budget=Budget(max_epochs, steps, images),
            overlays=tuple(overlay or ()),
            assignments=tuple(assignments or ()),
            sampling=tuple(generate_set or ()),
            num_samples=num_samples,
            encode=tuple(encode or ()),
            evaluate=evaluate,
            dataset_dir=dataset_dir,
            tracking_uri=tracking_uri,
            launch=launch,
            checkpoint=checkpoint,
            published=published,
            pictures=pictures,
            on_update=update,
        )

    if dry_run:
        print_commands(make(lambda states: None))
    else:
        execute(make, lambda command: command.run())
