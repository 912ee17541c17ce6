"""One step of each generator's sampling on fake CUDA tensors: no mixed devices, no wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.graphs import Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaevq_med.networks.generators.ddim import StaticPredictor, denoised, ldm_scheduler
from vaevq_med.networks.generators.drawing import TokenRule, draw_indices, filter_logits
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.generators.static_steps import StaticSteps


class Traffic(TorchDispatchMode):
    """Count operations that take something from one kind of device to another, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, found)) if isinstance(leaf, Tensor)]
        moving = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        self.moves += moving and len({tensor.device.type for tensor in tensors}) > 1
        return found


def on_fake_gpu(run: Callable[[], Any]) -> tuple[Any, int]:
    """What it gives, and how often something went from one kind of device to another."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Traffic() as traffic:
        return run(), traffic.moves


def test_the_counting_counts() -> None:
    assert on_fake_gpu(lambda: torch.zeros(2).cpu())[1] == 1
    assert on_fake_gpu(lambda: torch.zeros(2, device="cpu").to("cuda"))[1] == 1
    assert on_fake_gpu(lambda: torch.zeros(2).copy_(torch.ones(2)) * 2)[1] == 0
    with pytest.raises(DataDependentOutputException):
        on_fake_gpu(lambda: torch.zeros(1).item())
    with pytest.raises(DynamicOutputShapeException):
        on_fake_gpu(lambda: torch.zeros(2).nonzero())


@pytest.mark.parametrize("num_codebooks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inpaint", [False, True])
def test_a_step_of_llamagen(num_codebooks: int, dtype: torch.dtype, inpaint: bool) -> None:
    rule = TokenRule(guidance_scale=2.0, temperature=1.5, top_k=5, top_p=0.9)

    def run() -> tuple[Any, int]:
        sizes = {"num_embeddings": 11, "grid_size": (3, 5), "width": 32, "depth": 2, "num_heads": 2}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            network = LlamaGen(**sizes, num_classes=4, num_codebooks=num_codebooks).eval()
        finally:
            torch.set_default_dtype(before)
        steps = StaticSteps(network, rule, batch=3, inpaint=inpaint, bucket=8)
        with Traffic() as traffic:
            steps.step(0, 8, first=True)
            for place in range(1, 15):
                steps.step(place % num_codebooks, 8 * (place // 8 + 1))
        return steps.tokens, traffic.moves

    (tokens, moves), _ = on_fake_gpu(run)
    assert tokens.shape == (3, 15 * num_codebooks)
    assert tokens.device.type == "cuda"
    assert moves == 0


def test_a_run_of_llamagen() -> None:
    """All of the steps, with the draws of their random numbers, from classes and known tokens on the device."""

    def run() -> tuple[Any, int]:
        network = LlamaGen(num_embeddings=11, grid_size=4, width=16, depth=1, num_heads=2, num_classes=4).eval()
        steps = StaticSteps(network, TokenRule(), batch=3, inpaint=True, bucket=8, places_at_once=5)
        known = torch.zeros(3, 16) > 0, torch.zeros(3, 16, dtype=torch.int64)
        with Traffic() as traffic:
            return steps.run(torch.zeros(3, dtype=torch.int64), known), traffic.moves

    (tokens, moves), _ = on_fake_gpu(run)
    assert tokens.shape == (3, 16)
    assert moves == 0


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (4, 0.7)])
def test_filters_and_draws(top_k: int, top_p: float) -> None:
    drawn, moves = on_fake_gpu(lambda: draw_indices(filter_logits(torch.randn(3, 11), top_k=top_k, top_p=top_p)))
    assert drawn.shape == (3,)
    assert drawn.device.type == "cuda"
    assert moves == 0


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_steps_of_ldm(guided: bool, replayed: bool) -> None:
    def run(num_steps: int) -> tuple[Any, int]:
        network = LatentDiffusionUNet(
            in_channels=4, num_classes=3, num_channels=32, channel_mult=(1, 1), num_res_blocks=1, cross_attention_dim=8
        ).eval()
        with torch.device("cpu"):
            scheduler = ldm_scheduler()
            scheduler.num_inference_steps = num_steps
        times = [1 + step * (1000 // num_steps) for step in range(num_steps)][::-1]
        null_class = network.null_class if guided else None
        noise, labels = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
        with Traffic() as traffic:
            predict = StaticPredictor(network, Recorder()) if replayed else network
            return denoised(predict, noise, labels, scheduler, times, null_class, 1.5), traffic.moves

    for num_steps in (1, 3):
        (latent, moves), _ = on_fake_gpu(lambda num_steps=num_steps: run(num_steps))
        assert latent.shape == (2, 4, 8, 8)
        assert latent.device.type == "cuda"
        # The times, all together.
        assert moves == 1
