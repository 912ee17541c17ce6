"""Run by torchrun in test_distributed.py: one training iteration, then save the gradients."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from vaevq_med.networks.generators import losses as diffusion
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.training.distributed import is_main


def deterministic_sample(
    self: DiagonalGaussian, generator: torch.Generator | None = None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """In place of noise, which every process draws for itself."""
    return self.mean + 0.5 * self.std


class SameDraws:
    """torch for ``losses.diffusion``: one time and one noise for every image, and no label dropped."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randint(self, high: int, size: tuple[int, ...], **_: Any) -> torch.Tensor:
        return torch.full(size, high // 2)

    def randn(self, shape: torch.Size, **_: Any) -> torch.Tensor:
        return torch.linspace(-2, 2, shape[1:].numel()).cos().view(shape[1:]).expand(shape)

    def rand(self, *size: int, **_: Any) -> torch.Tensor:
        return torch.ones(size)


def wake(network: torch.nn.Module) -> None:
    """Fill what starts as zero, below which there would be no gradient."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))


def note_threads(path: Path) -> None:
    """Write the names of the threads that are left, where the system tells them."""
    tasks = Path("/proc/self/task")
    path.write_text("\n".join(task.joinpath("comm").read_text().strip() for task in tasks.glob("*")))


def main(files: list[str], overrides: dict[str, Any], output: str) -> None:
    """Train one iteration and write what a comparison needs."""
    torch.set_num_threads(1)
    # What is registered first is called last: this is how the process goes.
    atexit.register(note_threads, Path(f"{output}.threads_of_{os.environ.get('RANK', 0)}"))
    DiagonalGaussian.sample = deterministic_sample  # type: ignore[method-assign]
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **overrides)
    workflow.initialize()
    if not files[0].endswith("/train.json"):
        diffusion.torch = SameDraws()  # type: ignore[attr-defined]
        wake(workflow.parser.get_parsed_content("network"))
    workflow.run()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    if is_main():
        discriminator = getattr(trainer.discriminator, "module", trainer.discriminator)
        torch.save(
            {
                "network": {n: p.grad for n, p in trainer.network.named_parameters() if p.grad is not None},
                "discriminator": {n: p.grad for n, p in discriminator.named_parameters()} if discriminator else {},
                "terms": dict(trainer.state.terms),
                "iteration": trainer.state.iteration,
            },
            output,
        )
    workflow.finalize()


if __name__ == "__main__":
    import json

    main(*json.loads(sys.argv[1]))
