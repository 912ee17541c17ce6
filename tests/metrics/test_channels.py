"""Active channels of a latent: by numpy, in parts, and where nothing varies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics import ChannelActivity, active_channels


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("grid", [(20,), (4, 5), (2, 2, 5)])
def test_variances_are_those_of_numpy(parts: int, grid: tuple[int, ...]) -> None:
    mean = random(6, 3, 20) * torch.tensor([1.0, 0.05, 0.0]).view(3, 1) + 1000
    std = random(6, 3, 20, seed=1).abs()
    activity = ChannelActivity()
    for pair in zip(mean.unflatten(-1, grid).chunk(parts), std.unflatten(-1, grid).chunk(parts), strict=True):
        activity.update(*pair)
    np.testing.assert_allclose(activity.of_means(), np.var(mean.double().numpy(), axis=(0, 2)), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(activity.within(), np.mean(std.double().numpy() ** 2, axis=(0, 2)))
    assert activity.figures()["active_channels"] == 1


def test_what_is_active_by_hand() -> None:
    """Means of -a and a have the variance a^2: 0.25, 0.0121, 0.0081 and 0."""
    sides = torch.tensor([0.5, 0.11, 0.09, 0.0])
    mean = torch.stack([-sides, sides]).unsqueeze(-1)
    assert active_channels(sides.square()) == 2
    activity = ChannelActivity()
    activity.update(mean, torch.ones(2, 4, 1))
    # Of 1 + a^2 the shares are 0.2, 0.01196, 0.008 and 0.
    assert activity.figures() == {"active_channels": 2, "active_channels_relative": 2}
    # Ten times as narrow in all, nothing of what they say is lost.
    narrow = ChannelActivity()
    narrow.update(0.1 * mean, torch.full((2, 4, 1), 0.1))
    assert narrow.figures() == {"active_channels": 0, "active_channels_relative": 2}


def test_a_latent_without_a_posterior_by_hand() -> None:
    """Variances 4, 0.0121, 0.0081 and 0 have the mean 1.005, of which 0.01 lies between the middle ones."""
    sides = torch.tensor([2.0, 0.11, 0.09, 0.0])
    for scale in (1.0, 10.0, 0.01):
        latent = scale * (torch.stack([-sides, sides, -sides, sides]).view(2, 2, 4).movedim(1, 2) + 5)
        activity = ChannelActivity()
        for part in latent.split(1):
            activity.update(part)
        assert activity.of_means().tolist() == pytest.approx((scale * sides).square().tolist(), rel=1e-4, abs=1e-12)
        assert activity.figures() == {"active_channels_relative": 2}


def test_of_a_wide_latent_all_channels_count_where_all_vary_and_none_where_none_does() -> None:
    activity, still = ChannelActivity(), ChannelActivity()
    activity.update(random(4, 256, 8, 8))
    assert activity.figures() == {"active_channels_relative": 256}
    constant = torch.rand(256, 1, 1, generator=torch.Generator().manual_seed(0))
    still.update(constant.expand(7, 256, 5, 5))
    assert still.of_means().any()  # rounding of the sums
    assert still.figures() == {"active_channels_relative": 0}


def test_a_process_that_saw_no_image_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, unseen = ChannelActivity(), ChannelActivity()
    seen.update(random(2, 3, 4), random(2, 3, 4, seed=1))
    before = seen.of_means()

    def gather(parts: list[Tensor | None], own: Tensor | None) -> None:
        parts[:] = [seen.sums, None]

    monkeypatch.setattr("vaevq_med.networks.processes.world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    unseen.reduce()
    seen.reduce()
    assert torch.equal(unseen.of_means(), before)
    assert torch.equal(seen.of_means(), before)


def test_nothing_seen_and_other_shapes() -> None:
    activity = ChannelActivity()
    assert activity.figures() == {}
    with pytest.raises(VaevqMedError, match="found no latents"):
        activity.of_means()
    activity.update(random(2, 3, 4), random(2, 3, 4))
    with pytest.raises(VaevqMedError, match="found posteriors of 4 channels, expected posteriors of 3 channels"):
        activity.update(random(2, 4, 4), random(2, 4, 4))
    with pytest.raises(VaevqMedError, match="found latents without a posterior of 3 channels, expected posteriors"):
        activity.update(random(2, 3, 4))
    plain = ChannelActivity()
    plain.update(random(2, 3, 4))
    with pytest.raises(VaevqMedError, match="found latents without a posterior of 3 channels, expected posteriors, "):
        plain.within()
    with pytest.raises(VaevqMedError, match="expected one shape"):
        ChannelActivity().update(random(2, 3, 4), random(2, 3, 5))
