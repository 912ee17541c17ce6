"""What a tokenizer of slices makes of volumes once it is inflated, before any training, and what tiles along z change.

    python benchmarks/inflation.py CHECKPOINT DATASET --depth 32 --volumes 2

For the middle slices of the first volumes of the test split it prints PSNR over what is not black, the inter-slice
error and, against the same in one piece, the share of indices that tiles change and by how much the voxels differ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
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
from vaevq_med.tokens.volumes import decode_volume, encode_volume
from vaevq_med.trained.inflation import inflate
from vaevq_med.trained.network import StoredTokenizer


def inflated(stored: StoredTokenizer, flat: VisualTokenizer, z_steps: int, halving: str) -> VisualTokenizer:
    """The 3D network whose last so many steps halve z too."""
    definition: dict[str, Any] = stored.value("network_def")
    steps = len(definition["encoder"]["channel_mult"]) - 1
    downsampling = [[2 if step >= steps - z_steps else 1, 2, 2] for step in range(steps)]
    further = {"spatial_dims": 3, "within_slices": True, "downsampling": downsampling}
    parts = {part: {**definition[part], **further} for part in ("encoder", "decoder")}
    network: VisualTokenizer = build({**definition, **parts}, torch.nn.Module, own="vaevq_med.networks")
    inflate(network, flat.state_dict(), halving=halving)
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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--volumes", type=int, default=2)
    arguments = parser.parse_args()
    stored = StoredTokenizer(arguments.checkpoint)
    flat = stored.network()
    volumes = middles(arguments.dataset, stored, arguments.depth, arguments.volumes)

    def through(network: VisualTokenizer, **tiles: Any) -> Callable[[Tensor], Tensor]:
        return lambda volume: decode_volume(
            network, encode_volume(network, volume, **tiles), size=volume.shape[2:], **_windows(tiles)
        )

    count = f"{len(volumes)} volumes of {arguments.depth} slices"
    print(f"{arguments.checkpoint.name} at iteration {stored.iteration}, {count}")
    print("| network | voxels an index | PSNR | inter-slice error | s |\n| --- | --- | --- | --- | --- |", flush=True)
    networks: dict[str, VisualTokenizer] = {"2D": flat}
    networks |= {
        f"3D, z/{2**steps}, {halving}": inflated(stored, flat, steps, halving)
        for steps in (0, 1, 2, 3)
        for halving in (("mean", "center") if steps else ("mean",))
    }
    for name, network in networks.items():
        voxels = torch.tensor(network.factors).prod().item()
        psnr, flicker, seconds = figures(volumes, through(network))
        print(f"| {name} | {voxels} | {psnr:.2f} | {flicker:.5f} | {seconds:.1f} |", flush=True)
    network = networks["3D, z/2, mean"]
    whole = encode_volume(network, volumes[0])
    decoded = decode_volume(network, whole, size=volumes[0].shape[2:])
    grid = whole.shape[1:4]
    print("\n| z/2 in tiles of 4 positions along z, halo | indices changed |\n| --- | --- |", flush=True)
    for halo in (0, 1, 2, 4):
        found = encode_volume(network, volumes[0], tile=(4, *grid[1:]), halo=(halo, 0, 0))
        print(f"| {halo} | {float((found != whole).float().mean()):.5f} |", flush=True)
    print(
        "\n| windows along z, overlap | mean, largest difference, step at windows / elsewhere |\n| --- | --- |",
        flush=True,
    )
    for window, overlap in ((8, 0.25), (8, 0.5), (8, 0.75)):
        found = decode_volume(network, whole, size=volumes[0].shape[2:], tile=(window, *grid[1:]), overlap=overlap)
        apart = (found - decoded).abs()
        steps = found.diff(dim=2).abs().mean(dim=(0, 1, 3, 4)) / decoded.diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
        starts = [2 * start for start in range(0, grid[0] - window + 1, int(window * (1 - overlap))) if start]
        at = steps[[start - 1 for start in starts]].mean()
        print(f"| {window}, {overlap} | {apart.mean():.5f}, {apart.max():.3f}, {at:.3f} |", flush=True)


def _windows(tiles: Mapping[str, Any]) -> dict[str, Any]:
    return {"tile": tiles["tile"]} if "tile" in tiles else {}


if __name__ == "__main__":
    main()
