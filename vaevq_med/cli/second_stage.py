"""Commands before and after a generator: tokens for its training, and figures of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.show import counted, interruptible, readable_size, watched
from vaevq_med.evaluation.options import EvaluateOptions
from vaevq_med.tokens.options import EncodeOptions, Split


@with_flags(EncodeOptions)
def encode_tokens(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a trained tokenizer, or a packed bundle.")
    ],
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the token store.")],
    options: EncodeOptions,
    kind: Annotated[
        Literal["indices", "latents"],
        typer.Option(help="Indices, or latents before quantization (the posterior's mean)."),
    ] = "indices",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a token store of other settings.")] = False,
) -> None:
    """Write every image's indices or latents, with labels and the tokenizer's hash, for training a generator.

    Exit code 0: all is done; 2: nothing could be done, or an image could not be read; 130: interrupted. What is done is
    kept, and the same command goes on.
    """
    from vaevq_med.tokens.encode import EncodeTokens

    command = EncodeTokens(checkpoint, dataset, output, kind=kind, overwrite=overwrite, **vars(options))
    with watched("image", "images") as (bar, start, _):
        report = command.run(on_start=start, on_images=lambda count: bar.advance(bar.task_ids[0], count))
    store = report.store
    height, width = store.grid
    tokenizer = store.tokenizer
    typer.echo(f"{store.root}: {report.written:,} images encoded, {report.reused:,} were done")
    for name in store.splits:
        array = store.array(name)
        views = len(store.views(name))
        typer.echo(
            f"  {name}: {len(array):,} images in {views} view{'s' if views != 1 else ''}, "
            f"{array.dtype.name}, {readable_size(array.nbytes)}"
        )
    typer.echo(
        f"  {store.kind} of {tokenizer['quantizer']}: grid {height}x{width}, K {tokenizer['num_embeddings']:,}, "
        f"G {tokenizer['num_codebooks']}, D {tokenizer['embedding_dim']}"
    )
    names = f" ({len(store.label_names):,})" if store.label_names else ""
    typer.echo(f"  labels: {store.content['label']['kind']}{names}")


def cluster_codebook(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a trained tokenizer.")],
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="Folder of the token store of its indices.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write, .npz.")],
    num_clusters: Annotated[int, typer.Option(help="Clusters of each codebook.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of k-means.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")] = False,
) -> None:
    """Cluster a tokenizer's codewords, weighted by their use, for the generator coarse_to_fine.

    Exit code 0: the file is written; 2: nothing could be done.
    """
    from vaevq_med.tokens.clusters import ClusterCodebook

    report = ClusterCodebook(checkpoint, tokens, output, num_clusters, seed, overwrite).run()
    books = f" in each of {report.num_codebooks} codebooks" if report.num_codebooks > 1 else ""
    typer.echo(f"{output}: {report.num_embeddings:,} codewords in {num_clusters:,} clusters{books}")
    typer.echo(f"  the largest has {report.largest:,}; {report.used:.1%} of the codewords are used in training")
    typer.echo(f"Use it with --clusters {output} --num_clusters {num_clusters} and generation/coarse_to_fine.json.")


def reduce_codebook(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a trained tokenizer, or a packed bundle.")
    ],
    tokens: Annotated[
        Path,
        typer.Argument(
            metavar="TOKENS",
            help="Token store that it made: of indices, to cluster codewords by use; of latents, to cluster those.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Checkpoint to write.")],
    num_embeddings: Annotated[int, typer.Option(help="Codewords of the new one, at most as many as before.")],
    seed: Annotated[int, typer.Option(help="Seed of k-means.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Give a trained tokenizer fewer codewords, for another rate; what is written is a checkpoint as any other.

    Exit code 0: the file is written; 2: nothing could be done.
    """
    from vaevq_med.tokens.reduction import ReduceCodebook

    report = ReduceCodebook(checkpoint, tokens, output, num_embeddings, seed, overwrite).run()
    typer.echo(
        f"{output}: {report.num_embeddings:,} codewords became {report.reduced:,}, by clusters of {report.source}"
    )
    alike = "" if report.distinct == report.reduced else f"; only {report.distinct:,} of them are distinct"
    typer.echo(f"  {report.bits:.2f} bits a position{alike}")
    typer.echo("Evaluate it as it is, or fine-tune it with --init_from and the overlay vqgan.")


def token_bits(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a trained generator.")],
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="Token store of its tokenizer.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write, .json.")],
    split: Annotated[Split, typer.Option(help="Of the store. Test is what no training has seen.")] = "test",
    weights: Annotated[Literal["ema", "network"], typer.Option(help="The averaged weights, or the last.")] = "ema",
    draws: Annotated[
        int | None, typer.Option(help="Draws of time and corruption for each image, of a token diffusion. Default: 2.")
    ] = None,
    max_items: Annotated[int | None, typer.Option(help="Look at this many images, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str | None, typer.Option(help="By default the GPU, where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what OUTPUT holds, in place of a line.")] = False,
) -> None:
    """Measure how many bits a generator spends on a token of images that it has not seen.

    Exit code 0: the file is written; 2: nothing could be done; 130: interrupted, and nothing is written.
    """
    import json

    from vaevq_med.evaluation.token_bits import HELD_OUT_BITS, TokenBits

    command = TokenBits(
        checkpoint=checkpoint,
        tokens=tokens,
        output=output,
        split=split,
        weights=weights,
        draws=draws,
        max_items=max_items,
        batch_size=batch_size,
        seed=seed,
        device=device,
        overwrite=overwrite,
    )
    with interruptible("nothing was written"), counted() as counting:
        record = command.run(**counting).record
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    among = record["provenance"]
    over = f" [{record['interval'][0]:.3f}, {record['interval'][1]:.3f}]" if record["interval"] else ""
    patients = f" of {among['patients']} patients" if among["patients"] else ""
    at_most = "" if record["likelihood"] == "exact" else "at most "
    typer.echo(
        f"{output}: {at_most}{record[HELD_OUT_BITS]:.3f}{over} bits a token of {record['uniform_bits']:.2f}, "
        f"{among['n']:,} images{patients}, split {split}"
    )


@with_flags(EvaluateOptions)
def evaluate_samples(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Folder of PNG files; samples.csv (file,label) gives labels.")
    ],
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output_dir: Annotated[Path, typer.Option(help="Folder of metrics.json, memorization.csv and memorization.png.")],
    options: EvaluateOptions,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that decoded the samples: look among training images as it reconstructs them."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what metrics.json holds, in place of a table.")
    ] = False,
) -> None:
    """Measure generated images (gFID, precision, recall) and find those that copy training images.

    Exit code 0: all is measured, whatever the figures; 2: nothing could be done; 130: interrupted. The features of the
    real images are kept for the next run.
    """
    import json

    from vaevq_med.evaluation.generation import EvaluateSamples, table

    command = EvaluateSamples(samples, dataset, output_dir, tokenizer=tokenizer, **vars(options))
    with interruptible("features of splits that were read whole are kept"), counted() as counting:
        report = command.run(**counting)
    if as_json:
        typer.echo(json.dumps(report.record, indent=2))
        return
    typer.echo(f"{report.output}: {report.record['provenance']['n']:,} samples")
    for line in table(report.record):
        typer.echo(f"  {line}")
