"""What a tokenizer of slices makes of volumes once it is inflated; what tiles along z change for one of volumes.

    python benchmarks/inflation.py CHECKPOINT DATASET --depth 32 --volumes 2

For the middle slices of the first volumes of the test split it prints, of a tokenizer of slices, PSNR over what is not
black and the inter-slice error of the networks that start from it; of a tokenizer of volumes, against the same in one
piece, the share of indices that tiles change and by how much windows change the voxels.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.components import build
from vaevq_med.images.dataset import SliceDataset, runs_of
from vaevq_med.images.reading import reader
from vaevq_med.metrics.reconstruction import to_unit
from vaevq_med.metrics.volumes import inter_slice_error
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.tokens.volumes import decode_volume, encode_volume, factors_of
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.trained.starting import take_weights


def inflated(stored: StoredTokenizer, flat: VisualTokenizer, z_steps: int, halving: str) -> VisualTokenizer:
    """The 3D network whose last so many steps halve z too."""
    definition: dict[str, Any] = stored.value("network_def")
    steps = len(definition["encoder"]["channel_mult"]) - 1
    downsampling = [[2 if step >= steps - z_steps else 1, 2, 2] for step in range(steps)]
    further = {"spatial_dims": 3, "within_slices": True, "downsampling": downsampling}
    parts = {part: {**definition[part], **further} for part in ("encoder", "decoder")}
    network: VisualTokenizer = build({**definition, **parts}, torch.nn.Module, own="vaevq_med.networks")
    take_weights(network, flat.state_dict(), halving=halving)
    return network.eval()


def middles(dataset: Path, stored: StoredTokenizer, depth: int, count: int) -> list[Tensor]:
    """The middle slices ``[1, 1, depth, S, S]`` of the first contrast-volumes of different cases."""
    read = reader(dataset, image_size=int(stored.value("image_size")), in_channels=1)
    entries = SliceDataset(dataset_dir=dataset, split="test").data
    runs = {str(run[0]["case"]): run for run in reversed(runs_of(entries)) if len(run) >= depth}
    found = []
    for run in list(runs.values())[:count]:
        first = (len(run) - depth) // 2
        found.append(torch.stack([read(entry)["image"] for entry in run[first : first + depth]], dim=1).unsqueeze(0))
    return found


def figures(volumes: list[Tensor], through: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """Mean PSNR over what is not black, mean inter-slice error, seconds a volume."""
    psnr, flicker, started = [], [], time.perf_counter()
    for volume in volumes:
        x, y = to_unit(volume), to_unit(through(volume))
        psnr.append(float(-10 * (x - y)[x > 0].square().mean().log10()))
        flicker.append(float(inter_slice_error(x, y)))
    count = len(volumes)
    return sum(psnr) / count, sum(flicker) / count, (time.perf_counter() - started) / count


def starts(stored: StoredTokenizer, flat: VisualTokenizer, volumes: list[Tensor]) -> None:
    """Print what inflated networks make of the volumes, before any training."""
    print("| network | voxels an index | PSNR | inter-slice error | s |\n| --- | --- | --- | --- | --- |", flush=True)
    networks: dict[str, VisualTokenizer] = {"2D": flat}
    networks |= {
        f"3D, z/{2**steps}, {halving}": inflated(stored, flat, steps, halving)
        for steps in range(len(stored.value("network_def")["encoder"]["channel_mult"]))
        for halving in (("mean", "center") if steps else ("mean",))
    }
    for name, network in networks.items():
        psnr, flicker, seconds = figures(volumes, partial(through, network))
        print(f"| {name} | {math.prod(network.factors)} | {psnr:.2f} | {flicker:.5f} | {seconds:.1f} |", flush=True)


def seams(network: VisualTokenizer, volume: Tensor) -> None:
    """Print which indices tiles along z change, and by how much windows change the voxels."""
    whole = encode_volume(network, volume)
    decoded = decode_volume(network, whole, size=volume.shape[2:])
    grid, factor = whole.shape[1:4], factors_of(network)[0]
    print("| tiles of 2 positions along z, halo | share of indices changed |\n| --- | --- |", flush=True)
    for halo in (0, 1, 2, 4):
        found = encode_volume(network, volume, tile=(2, *grid[1:]), halo=(halo, 0, 0))
        print(f"| {halo} | {float((found != whole).float().mean()):.5f} |", flush=True)
    print(
        "\n| windows of 4 positions along z, overlap | mean difference | largest | steps of z at windows over others |"
    )
    print("| --- | --- | --- | --- |", flush=True)
    for overlap in (0.25, 0.5, 0.75):
        found = decode_volume(network, whole, size=volume.shape[2:], tile=(4, *grid[1:]), overlap=overlap)
        apart = (found - decoded).abs()
        steps = found.diff(dim=2).abs().mean(dim=(0, 1, 3, 4)) / decoded.diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
        places = [factor * first - 1 for first in range(0, grid[0] - 3, int(4 * (1 - overlap))) if first]
        print(f"| {overlap} | {apart.mean():.5f} | {apart.max():.4f} | {steps[places].mean():.3f} |", flush=True)


def through(network: VisualTokenizer, volume: Tensor) -> Tensor:
    """A volume through the codebook."""
    return decode_volume(network, encode_volume(network, volume), size=volume.shape[2:])


def main() -> None:
    """Print the table of starts of a tokenizer of slices, or that of seams of one of volumes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--volumes", type=int, default=2)
    arguments = parser.parse_args()
    stored = StoredTokenizer(arguments.checkpoint)
    network = stored.network()
    volumes = middles(arguments.dataset, stored, arguments.depth, arguments.volumes)
    count = f"{len(volumes)} volumes of {arguments.depth} slices"
    print(f"{arguments.checkpoint.name} at iteration {stored.iteration}, {count}", flush=True)
    if network.takes_volumes:
        seams(network, volumes[0])
    else:
        starts(stored, network, volumes)


if __name__ == "__main__":
    main()
