"""Rows of the ablation and the presets under one budget, on packed slices: PSNR, SSIM, distances, utilization.

Each row is the bundle's ``train.json`` with that row's overlay, trained by the bundle's own trainer for the same number
of steps from the same seed on the same batches, and evaluated (averaged weights) on the held-out subject::

    python benchmarks/gpu/tokenizer_study.py --pack data/sample --data slices.npz   # once, on the machine with the data
    python benchmarks/gpu/tokenizer_study.py --data slices.npz --steps 2000         # on a GPU
    python benchmarks/gpu/tokenizer_study.py --data slices.npz --small              # on a CPU

A row is ``[NAME=]OVERLAY[+OVERLAY...][,ID=VALUE...]``; ``train`` is the default without an overlay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _common import PackedSlices, configure, hardware, pack, prepare, write_json

from vaevq_med.engines import TokenizerEvaluator
from vaevq_med.losses.kl import content_mask, kl_per_token
from vaevq_med.metrics import EvaluationReport, ReconstructionEvaluation
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.tokenizer import VisualTokenizer

ROWS = (
    "M0=ablation_m0",
    "SimVQ=simvq",
    "M1=ablation_m1",
    "M2=ablation_m2",
    "M3=ablation_m3",
    "full=ablation_full",
    "released=released",
    "information_matched=information_matched",
)
COLUMNS = (
    ("psnr", "PSNR dB", "{:.2f}"),
    ("psnr_brain", "brain", "{:.2f}"),
    ("psnr_continuous", "continuous", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS-style", "{:.4f}"),
    ("rfid", "rFID", "{:.2f}"),
    ("utilization", "util.", "{:.3f}"),
    ("perplexity", "perpl.", "{:.0f}"),
    ("utilization_sample", "util. sample", "{:.3f}"),
    ("perplexity_sample", "perpl. sample", "{:.0f}"),
    ("kl", "KL nats", "{:.1f}"),
    ("kl_content", "KL content", "{:.1f}"),
    ("seconds", "s", "{:.0f}"),
)
SMALL: dict[str, Any] = {
    **{f"network_def#{part}#num_channels": 16 for part in ("encoder", "decoder")},
    **{f"network_def#{part}#channel_mult": [1, 2, 4] for part in ("encoder", "decoder")},
    **{f"network_def#{part}#num_res_blocks": 1 for part in ("encoder", "decoder")},
    **{f"network_def#{part}#attention_resolutions": [] for part in ("encoder", "decoder")},
    **{f"network_def#{part}#z_channels": 64 for part in ("encoder", "decoder")},
    "num_embeddings": 1024,
    "embedding_dim": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "ema_decay": 0.99,
    "discriminator_def#num_channels": 16,
    "discriminator_def#num_layers": 2,
}


def parse_row(text: str) -> tuple[str, list[str], dict[str, Any]]:
    """``NAME=a+b,id=value`` to the name, the overlays and the overrides."""
    head, *settings = text.split(",")
    name, _, overlays = head.rpartition("=")
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    chosen = [] if overlays in ("train", "") else overlays.split("+")
    return name or text, chosen, overrides


@torch.no_grad()
def evaluate(network: VisualTokenizer, data: PackedSlices, device: torch.device, batch_size: int) -> EvaluationReport:
    """The toolkit's evaluation of the averaged weights over the held-out slices."""
    features = feature_network("efficientnet-lite0").to(device)
    evaluation = ReconstructionEvaluation(
        num_embeddings=network.num_embeddings, lpips=features, fid=features, device=device
    )
    evaluator = TokenizerEvaluator(device=device, val_data_loader=[{}], network=network)
    evaluator.generator = torch.Generator(device).manual_seed(0)
    continuous, kl, kl_content = [], [], []
    for first in range(0, len(data), batch_size):
        items = [data[i] for i in range(first, min(first + batch_size, len(data)))]
        images = torch.stack([item["image"] for item in items]).to(device)
        output = evaluator.reconstruct(images)
        evaluation.update(
            images,
            output["pred"],
            output["indices"],
            metadata={
                "modality": [item["modality"] for item in items],
                "index": list(range(first, first + len(items))),
            },
            regions={"brain": images[:, 0] > -1},
            indices_sample=output.get("indices_sample"),
        )
        encoded = network.encode(images)
        if isinstance(encoded, DiagonalGaussian):
            error = ((output["pred_continuous"].clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
            continuous.append(-10 * error.log10())
            per_token = kl_per_token(encoded.mean, encoded.logvar)
            kl.append(per_token.flatten())
            kl_content.append(per_token[content_mask(images, per_token.shape[-2:])])
    report = evaluation.compute()
    extra = {"psnr_continuous": continuous, "kl": kl, "kl_content": kl_content}
    for name, parts in extra.items():
        if parts:
            report.summary["overall"][name] = {"value": float(torch.cat(parts).mean()), "n": len(data)}
    return report


def run_row(text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one row."""
    name, overlays, overrides = parse_row(text)
    steps = arguments.steps
    prepare(arguments.seed)
    machine = {"device": torch.device(arguments.device), "batch_size": arguments.batch_size, "seed": arguments.seed}
    shared: dict[str, Any] = {**machine, "val_interval": 10**6, "train#handlers": []}
    if arguments.small:
        shared |= SMALL
    else:
        shared |= {"precision": "bf16", "learning_rate": 4e-4, "warmup_steps": 200, "ema_decay": 0.995}
    parser: ConfigParser = configure(
        arguments.data, overlays, {**shared, **overrides}, steps=steps, image_size=arguments.size
    )
    adversarial = parser.get("objective#adversarial")
    if arguments.gan_start is None:
        parser["objective#adversarial"] = None
    elif adversarial is not None and adversarial["start_step"] > 0:
        parser["objective#adversarial#start_step"] = arguments.gan_start
    started = time.perf_counter()
    trainer = parser.get_parsed_content("train#trainer")
    trainer.run()
    ema = parser.get_parsed_content("ema")
    test = PackedSlices(file=arguments.data, split="test", image_size=arguments.size)
    report = evaluate(ema.module, test, machine["device"], arguments.batch_size)
    figures = report.overall() | {"seconds": time.perf_counter() - started}
    return {
        "row": name,
        "overlays": overlays,
        "overrides": overrides,
        "figures": figures,
        "last_terms": trainer.state.terms,
        "conventions": report.conventions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| row | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for row in rows:
        cells = [form.format(row["figures"][k]) if k in row["figures"] else "–" for k, _, form in COLUMNS]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="packed slices (.npz)")
    parser.add_argument("--pack", metavar="DATASET", type=Path, help="write --data from this slice data set, and stop")
    parser.add_argument("--pack-items", type=int, default=2000, help="training slices to pack")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gan-start", type=int, help="step from which the GAN takes part; without it there is none")
    parser.add_argument("--small", action="store_true", help="64 pixels, f = 4, K = 1,024, D = 16: for a CPU")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="tokenizer_study", help="name of the JSON file")
    parser.add_argument("--output", type=Path, help="folder of the JSON; by default $OUT, or the working directory")
    arguments = parser.parse_args()
    arguments.size = arguments.size or (64 if arguments.small else 256)
    arguments.steps = arguments.steps or (600 if arguments.small else 500)
    arguments.batch_size = arguments.batch_size or (4 if arguments.small else 16)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.pack:
        pack(arguments.pack, Path(arguments.data), arguments.size, {"training": arguments.pack_items, "test": 400})
        return
    done: list[dict[str, Any]] = []
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    for text in arguments.rows:
        done.append(run_row(text, arguments))
        write_json(arguments.name, {"hardware": hardware(), "settings": settings, "rows": done}, arguments.output)
        print(table(done[-1:]).splitlines()[-1], flush=True)
    print(f"\n{hardware()}; {arguments.steps} steps, batch {arguments.batch_size}, {arguments.size} pixels\n")
    print(table(done))


if __name__ == "__main__":
    main()
