"""How many images the default training takes at once on cards of several sizes, and its peak, counted without a GPU.

``python benchmarks/gpu/memory_table.py`` walks steps of ``bundles/brats/train.json`` with the GAN on and in bf16 on
fake CUDA tensors, in about a minute, and prints a Markdown table. Counted are the tensors that the host sees:
workspaces of the libraries and the gaps between blocks come on top.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from _fake_cuda import CONTEXT, FakeCuda, fake_cuda
from monai.bundle import ConfigParser

from vaevq_med.core.resources import bundle_path
from vaevq_med.training.micro_batches import _SHARE, fitting, saved_bytes, training_state_bytes
from vaevq_med.training.tokenizer import TokenizerTrainer

GIB = 2**30
BATCH_SIZE = 32


def default_trainer(image_size: int) -> TokenizerTrainer:
    """The trainer of ``train.json`` as it is, on no data, at the first iteration after the GAN's start."""
    parser = ConfigParser()
    parser.read_config(str(bundle_path("brats") / "train.json"))
    parser.update(
        {
            "device": torch.device("cuda", 0),
            "image_size": image_size,
            "precision": "bf16",
            "epoch_length": 10,
            "train#dataloader": [None] * 10,
            "train#handlers": [],
            "validate#dataloader": [None] * 10,
            "validate#handlers": [],
            # Where the grid of indices is, as at 256 pixels.
            "network_def#encoder#attention_resolutions": [image_size // 8],
            "network_def#decoder#attention_resolutions": [image_size // 8],
        }
    )
    trainer = parser.get_parsed_content("train#trainer")
    trainer.state.iteration = trainer.objective.adversarial.start_step + 1
    return trainer


def peak(mode: FakeCuda, trainer: TokenizerTrainer, image_size: int, batch_size: int) -> int:
    """The most bytes held at once in a step, once the optimizers have their state."""
    for count in [batch_size] if trainer.optimizer.state else [1, batch_size]:
        images = torch.zeros(count, 1, image_size, image_size, device="cuda:0")
        mode.peak = mode.held
        trainer._iteration(trainer, {"image": images})
        trainer.state.iteration += 1
    return mode.peak


def kept(trainer: TokenizerTrainer, image_size: int) -> tuple[int, int]:
    """Bytes that autograd keeps for an image, and what is held besides, as ``micro_batch_size: auto`` counts them."""
    trainer.network.train()
    images = torch.zeros(2, 1, image_size, image_size, device="cuda:0")
    one, two = (saved_bytes(lambda count=count: trainer._probe(images[:count])) for count in (1, 2))
    state = training_state_bytes([*trainer.network.parameters(), *trainer.discriminator.parameters()])
    return two - one, one - (two - one) + state


def main(
    cards: Annotated[list[int], typer.Option(help="GB of memory.")] = [12, 16, 24, 40, 80],  # noqa: B006
    sizes: Annotated[list[int], typer.Option(help="Pixels.")] = [256, 512],  # noqa: B006
) -> None:
    """Print the table."""
    print("| card | " + " | ".join(f"images at once, {size} pixels | peak GiB" for size in sizes) + " |")
    print("| ---: |" + " ---: | ---: |" * len(sizes))
    cells: dict[int, list[str]] = {card: [f"{card} GB"] for card in cards}
    for size in sizes:
        with fake_cuda(count_memory=True) as mode:
            trainer = default_trainer(size)
            held = mode.held
            per_image, besides = kept(trainer, size)
            peaks: dict[int, int] = {}
            for card in cards:
                free = int(_SHARE["cuda"] * (card * GIB - CONTEXT - held))
                count = fitting(BATCH_SIZE, besides, per_image, free)
                trainer.micro_batch_size = count
                if count not in peaks:
                    # One part of a batch: the others leave only their reconstructions behind.
                    peaks[count] = peak(mode, trainer, size, count)
                cells[card] += [str(count), f"{peaks[count] / GIB:.1f}"]
    for row in cells.values():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    typer.run(main)
