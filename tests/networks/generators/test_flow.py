"""Rectified flow where the velocity is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.networks.schedulers.rectified_flow import RFlowScheduler
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.ddim import denoised, ldm_scheduler
from vaevq_med.networks.generators.flow import EulerSteps, FlowPath, FlowTransformer, FlowUNet
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.generators.losses import FlowLoss, LatentLoss


def integrated(velocity: Any, noise: Tensor, num_steps: int) -> Tensor:
    steps = EulerSteps(num_steps, FlowPath())
    return denoised(
        lambda x, timesteps, context: velocity(x, timesteps / 1000), noise, None, steps, steps.timesteps.tolist()
    )


def test_one_step_reaches_a_point() -> None:
    """All of the data at c: the velocity (x - c) / t is constant along each way."""
    noise = torch.randn(3, 2, 4, 4)
    found = integrated(lambda x, t: (x - 1.5) / t, noise, 1)
    torch.testing.assert_close(found, torch.full_like(noise, 1.5))


@pytest.mark.parametrize("std", [0.3, 2.0])
def test_gaussian_data_come_out_with_their_deviation(std: float) -> None:
    """E[e - x_0 | x_t] = x_t (t - (1 - t) s^2) / (t^2 + (1 - t)^2 s^2), and the flow maps e to s e."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2)

    noise = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    errors = [(integrated(velocity, noise, steps) / noise - std).abs().max().item() for steps in (100, 200)]
    assert errors[1] < 0.02
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)  # Euler's order


def test_the_way_is_that_of_monai() -> None:
    peer, path = RFlowScheduler(num_train_timesteps=1000), FlowPath()
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    times = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(path.noisy(latents, noise, times), peer.add_noise(latents, noise, 1000 * times))
    peer.set_timesteps(4)
    steps = EulerSteps(4, path)
    assert peer.timesteps.tolist() == steps.timesteps.tolist()
    # MONAI's velocity points to the data.
    own, expected = steps.step(noise, 500.0, latents)[0], peer.step(-noise, 500, latents)[0]
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(path.noisy(latents, noise, times * 0 + 1) - path.velocity(latents, noise), latents)


class Known(nn.Module):
    """A network that gives what it is told, and keeps what it was given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.null_class, self.predicts = answer, 3, "velocity"
        self.given: dict[str, Tensor] = {}

    def measured_scale_factor(self) -> float:
        return 2.0

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        self.given = {"x": x, "timesteps": timesteps, "context": context}
        return self.answer(x, timesteps)


def test_the_loss_by_hand() -> None:
    values, labels = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    source = torch.Generator().manual_seed(4)
    times = 1 / (1 + (-torch.randn(5, generator=source)).exp())
    noise = torch.randn(values.shape, generator=source)
    network = Known(lambda x, t: torch.zeros_like(x))
    loss = FlowLoss(network=network, scheduler=FlowPath(100), direction_weight=0.5).eval()  # type: ignore[arg-type]
    found = loss(values, labels, torch.Generator().manual_seed(4))
    velocity = noise - 2 * values
    torch.testing.assert_close(found, velocity.square().mean() + 0.5)  # zero has the cosine 0 with everything
    torch.testing.assert_close(network.given["timesteps"], 100 * times)
    share = times[:, None, None, None]
    torch.testing.assert_close(network.given["x"], 2 * (1 - share) * values + share * noise)
    assert torch.equal(network.given["context"], labels)
    network.answer = lambda x, t: 3 * velocity
    found = loss(values, labels, torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, 4 * velocity.square().mean())  # the direction is right
    dropping = FlowLoss(network=network, scheduler=FlowPath(), label_dropout=0.9).train()  # type: ignore[arg-type]
    dropping(values, labels, torch.Generator().manual_seed(4))
    assert (network.given["context"] == 3).any()


def test_times_are_logit_normal() -> None:
    times = FlowPath().times(20_000, torch.Generator().manual_seed(0))
    logits = (times / (1 - times)).log()
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)


def test_the_transformer_starts_at_zero_and_sees_time_label_and_place() -> None:
    torch.manual_seed(0)
    network = FlowTransformer(in_channels=2, num_classes=3, width=16, depth=2, num_heads=2).eval()
    x, time, label = torch.randn(1, 2, 3, 4), torch.tensor([400.0]), torch.tensor([1])
    assert not network(x, time, label).any()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    found = network(x, time, label)
    assert found.shape == x.shape
    assert not torch.allclose(network(x, time + 50, label), found, atol=1e-4)
    assert not torch.allclose(network(x, time, label + 1), found, atol=1e-4)
    torch.testing.assert_close(network(x, time), network(x, time, torch.tensor([3])))
    assert not torch.allclose(network(x.flip(3), time, label).flip(3), found, atol=1e-4)
    changed = x.clone()
    changed[0, :, 2, 3] += 1
    assert ((network(changed, time, label) - found).abs().amax(dim=1) > 0).all()


def test_what_does_not_fit_is_refused() -> None:
    network = FlowTransformer(in_channels=2, width=16, depth=1, num_heads=2)
    with pytest.raises(VaevqMedError, match=r"the latent has shape \(1, 3, 4, 4\); expected \[B, 2, h, w\]"):
        network(torch.zeros(1, 3, 4, 4), torch.zeros(1))
    with pytest.raises(VaevqMedError, match="num_steps is 0; expected at least 1"):
        EulerSteps(0, FlowPath())
    with pytest.raises(VaevqMedError, match="direction_weight is -1; expected 0 or more"):
        FlowLoss(network=network, scheduler=FlowPath(), direction_weight=-1)
    with pytest.raises(VaevqMedError, match="direction_weight is inf; expected 0 or more"):
        FlowLoss(network=network, scheduler=FlowPath(), direction_weight=math.inf)
    with pytest.raises(VaevqMedError, match="found no scale factor; expected one measured"):
        FlowLoss(network=network, scheduler=FlowPath())(torch.zeros(1, 2, 4, 4), torch.zeros(1, dtype=torch.int64))
    assert math.isnan(network.scale_factor.item())


def test_a_loss_refuses_a_network_and_a_schedule_of_something_else() -> None:
    sizes: dict[str, Any] = {"in_channels": 2, "num_channels": 32, "channel_mult": (1, 2), "cross_attention_dim": 8}
    noise, velocity = LatentDiffusionUNet(**sizes), FlowUNet(**sizes)
    with pytest.raises(VaevqMedError, match="is a LatentDiffusionUNet, which predicts 'noise'; expected one"):
        FlowLoss(network=noise, scheduler=FlowPath())
    with pytest.raises(VaevqMedError, match=r"is a FlowUNet, which predicts 'velocity'; expected .* 'noise'"):
        LatentLoss(network=velocity, scheduler=ldm_scheduler())
    with pytest.raises(VaevqMedError, match="is a DDIMScheduler, of the prediction_type 'epsilon'; expected one of"):
        FlowLoss(network=velocity, scheduler=ldm_scheduler())  # type: ignore[arg-type]
    with pytest.raises(VaevqMedError, match="the scheduler's prediction_type is 'velocity'; expected 'epsilon'"):
        LatentLoss(network=noise, scheduler=FlowPath())  # type: ignore[arg-type]
    tokens = LlamaGen(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2)
    with pytest.raises(VaevqMedError, match="is a LlamaGen, which says of no latent what it predicts; expected"):
        FlowLoss(network=tokens, scheduler=FlowPath())  # type: ignore[arg-type]


def test_the_transformer_sees_the_same_times_on_every_scale() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"in_channels": 2, "width": 16, "depth": 1, "num_heads": 2}
    networks = [FlowTransformer(**options), FlowTransformer(**options, num_train_timesteps=10)]
    with torch.no_grad():
        for parameter in networks[0].parameters():
            parameter.normal_(std=0.3)
    networks[1].load_state_dict(networks[0].state_dict())
    x, times = torch.randn(2, 2, 3, 3), torch.tensor([0.25, 0.5])
    torch.testing.assert_close(networks[1](x, 10 * times), networks[0](x, 1000 * times))
    with pytest.raises(VaevqMedError, match=r"num_train_timesteps is 10 in the network; expected that of the .*, 1000"):
        FlowLoss(network=networks[1], scheduler=FlowPath())
