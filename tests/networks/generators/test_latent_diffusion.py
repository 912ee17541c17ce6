"""The latent diffusion network, its loss and its sampler."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.graphs import Recorder
from helpers.toy_networks import tokenizer
from monai.inferers import LatentDiffusionInferer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators import ddim as diffusion
from vaevq_med.networks.generators.ddim import generate_images, ldm_scheduler, set_ddim_steps
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.losses import DenoisingLoss

# Linear in the square root, summed up by hand.
ALPHAS = np.cumprod(1 - np.linspace(math.sqrt(0.0015), math.sqrt(0.0195), 1000) ** 2)


def small(num_classes: int = 3) -> LatentDiffusionUNet:
    torch.manual_seed(0)
    network = LatentDiffusionUNet(
        in_channels=4,
        num_classes=num_classes,
        num_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        cross_attention_dim=8,
    )
    network.scale_factor.fill_(0.5)
    return network.eval()


class Scripted(LatentDiffusionUNet):
    """Answers by a rule, and notes what it was asked."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__(in_channels=4, num_classes=3, num_channels=32, channel_mult=(1,), num_res_blocks=1)
        self.scale_factor.fill_(0.5)
        self.rule = rule
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen.append((x, timesteps, context))
        return self.rule(x, timesteps, context)


class CastsOf(TorchDispatchMode):
    """Count casts of tensors of a shape to bf16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        casts = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16
        self.count += casts and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_the_default_is_the_published_size() -> None:
    with torch.device("meta"):
        network = LatentDiffusionUNet(in_channels=3, num_classes=1000)
    assert round(sum(p.numel() for p in network.unet.parameters()) / 1e6, 1) == 400.9
    assert network.class_embedding.weight.shape == (1001, 512)


def test_a_label_counts_and_none_is_the_null_class() -> None:
    network = small()
    for parameter in network.parameters():  # the last convolution starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 700])
    free = network(x, t)
    torch.testing.assert_close(free, network(x, t, torch.full((2,), 3)))
    labeled = network(x, t, torch.tensor([0, 3]))
    assert not torch.allclose(labeled[0], free[0], atol=1e-4)
    torch.testing.assert_close(labeled[1], free[1])
    network(x, t, torch.tensor([1, 1])).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("x", "labels", "said"),
    [
        (torch.zeros(1, 3, 8, 8), None, r"shape \(1, 3, 8, 8\); expected \[B, 4, h, w\]"),
        (torch.zeros(1, 4, 7, 8), None, "multiples of 2"),
        (torch.zeros(1, 4, 8, 8), torch.tensor([4]), "labels range from 4 to 4; expected within 0 to 3"),
        (torch.zeros(1, 4, 8, 8), torch.tensor([1, 1]), r"labels have shape \(2,\); expected \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, labels: Tensor | None, said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        small()(x, torch.tensor([1]), labels)


@pytest.mark.parametrize("options", [{"num_channels": 48}, {"num_classes": -1}, {"attention_levels": (True,)}])
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(VaevqMedError, match="expected"):
        LatentDiffusionUNet(**{"in_channels": 4, "num_channels": 32, "channel_mult": (1, 1), **options})  # type: ignore[arg-type]


def test_one_position_of_one_channel_a_group_is_refused() -> None:
    """Normalized by itself a channel is 0 there, and PyTorch refuses a batch of one."""
    tokens = {"kind": "latents", "grid": [2, 2], "tokenizer": {"embedding_dim": 4}, "label": {"names": ["a", "b", "c"]}}
    with pytest.raises(VaevqMedError, match=r"here: found a grid of 2x2, .* halves to one position of 32 channels"):
        small().check_fit(tokens, "here")
    small().check_fit({**tokens, "grid": [2, 4]}, "here")
    wide = LatentDiffusionUNet(in_channels=4, num_classes=3, num_channels=64, channel_mult=(1, 1), num_res_blocks=1)
    wide.check_fit(tokens, "here")
    assert wide(torch.zeros(1, 4, 2, 2), torch.tensor([1])).shape == (1, 4, 2, 2)


def test_the_scale_factor_makes_unit_deviation_and_is_stored() -> None:
    network = LatentDiffusionUNet(in_channels=4, num_channels=32, channel_mult=(1,), num_res_blocks=1)
    with pytest.raises(VaevqMedError, match="no scale factor; expected one measured"):
        network.measured_scale_factor()
    latents = 3 + 5 * torch.randn(4, 4, 16, 16)
    factor = network.set_scale_factor(latents)
    assert factor == pytest.approx(1 / np.std(latents.numpy().astype(np.float64), ddof=1))
    other = LatentDiffusionUNet(in_channels=4, num_channels=32, channel_mult=(1,), num_res_blocks=1)
    other.load_state_dict(network.state_dict())
    assert other.measured_scale_factor() == pytest.approx(factor)
    with pytest.raises(VaevqMedError, match=r"deviation 0\.0"):
        network.set_scale_factor(torch.zeros(1, 4, 2, 2))


def test_the_loss_by_hand() -> None:
    network = Scripted(lambda x, t, y: torch.zeros_like(x))
    latents = torch.randn(3, 4, 2, 2)
    loss = DenoisingLoss(scheduler=ldm_scheduler(), label_dropout=0.0)(
        network, latents, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(1)
    )
    ((noisy, times, labels),) = network.seen
    alpha = torch.from_numpy(ALPHAS)[times].float().view(-1, 1, 1, 1)
    noise = (noisy - alpha.sqrt() * 0.5 * latents) / (1 - alpha).sqrt()
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]
    assert float(loss) == pytest.approx(float(noise.square().mean()), rel=1e-3)
    perfect = Scripted(lambda x, t, y: noise)
    again = DenoisingLoss(scheduler=ldm_scheduler(), label_dropout=0.0)(
        perfect, latents, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(1)
    )
    assert float(again) < 1e-6


def test_noise_and_times_have_their_distributions_and_labels_drop() -> None:
    network = Scripted(lambda x, t, y: torch.zeros_like(x))
    loss = DenoisingLoss(scheduler=ldm_scheduler(), label_dropout=0.3)
    value = loss(
        network, torch.zeros(4000, 4, 1, 1), torch.ones(4000, dtype=torch.int64), torch.Generator().manual_seed(0)
    )
    _, times, labels = network.seen[0]
    assert float(value) == pytest.approx(1.0, abs=0.05)
    assert labels is not None
    assert set(labels.tolist()) == {1, 3}
    assert float((labels == 3).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(times.float().mean()) == pytest.approx(499.5, abs=20)
    assert (int(times.min()), int(times.max())) == (0, 999)
    with pytest.raises(VaevqMedError, match="label_dropout is 1"):
        DenoisingLoss(scheduler=ldm_scheduler(), label_dropout=1.0)


@pytest.mark.parametrize("num_steps", [4, 30, 250])
def test_a_network_that_knows_the_noise_ends_where_ddim_says(num_steps: int) -> None:
    """With one latent behind all noise every step keeps the noise: what is left is the last step's share of it."""
    target = torch.randn(1, 4, 8, 8)
    alphas = torch.from_numpy(ALPHAS)

    def exact(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        alpha = alphas[int(t.flatten()[0])]
        return ((x - alpha.sqrt() * target) / (1 - alpha).sqrt()).float()

    network, model = Scripted(exact), tokenizer()
    seen: list[Tensor] = []
    model.decode_stage_2_outputs = lambda z: seen.append(z) or z  # type: ignore[method-assign]
    generate_images(
        network, model, num_images=1, grid_size=(8, 8), num_steps=num_steps, generator=torch.Generator().manual_seed(2)
    )
    times = [int(t.flatten()[0]) for _, t, _ in network.seen]
    interval = 1000 // num_steps
    assert times == [1 + interval * number for number in reversed(range(num_steps))]
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    first = alphas[times[0]]
    noise = (start - first.sqrt() * target) / (1 - first).sqrt()
    expected = (alphas[0].sqrt() * target + (1 - alphas[0]).sqrt() * noise) / 0.5
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_every_number_of_steps_that_is_drawn_starts_near_the_end_of_the_schedule() -> None:
    scheduler, drawn = ldm_scheduler(), []
    for steps in range(1, 1000):
        try:
            set_ddim_steps(scheduler, steps)
        except VaevqMedError:
            continue
        times = scheduler.timesteps.tolist()
        # LDM's own times are range(0, T, T // S), plus one: one of them, the latest, may be left out.
        published = [time + 1 for time in range(0, 1000, 1000 // steps)]
        assert times[::-1] in (published, published[:-1])
        drawn.append(steps)
    assert {*range(1, 32), 50, 100, 200, 250, 333, 500, 999} <= set(drawn)


def test_autocast_is_of_the_network_alone() -> None:
    model, network = tokenizer(), small()
    types: dict[str, list[torch.dtype]] = {"unet": [], "decoder": []}
    network.unet.conv_in.register_forward_hook(lambda module, inputs, output: types["unet"].append(output.dtype))
    model.post_quant_conv.register_forward_hook(lambda module, inputs, output: types["decoder"].append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.bfloat16, None):
            images = generate_images(network, model, num_images=1, grid_size=(8, 8), num_steps=1, dtype=dtype)
            assert images.dtype == torch.float32
    assert types == {"unet": [torch.bfloat16, torch.float32], "decoder": [torch.float32, torch.float32]}


def test_guidance_contrasts_the_class_with_none_in_one_pass() -> None:
    def by_label(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return y.view(-1, 1, 1, 1).float().expand_as(x) / 10

    guided, plain = Scripted(by_label), Scripted(by_label)
    model = tokenizer()
    draw = {"grid_size": (8, 8), "num_steps": 1, "quantize": False}
    images = generate_images(
        guided, model, torch.tensor([1, 2]), guidance_scale=2.5, generator=torch.Generator().manual_seed(0), **draw
    )  # type: ignore[arg-type]
    ((x, _, labels),) = guided.seen
    assert labels is not None
    assert labels.tolist() == [3, 3, 1, 2]
    torch.testing.assert_close(x[:2], x[2:])
    # u + s (c - u) with u = 0.3 and c = 0.1 and 0.2.
    expected = [0.3 + 2.5 * (0.1 - 0.3), 0.3 + 2.5 * (0.2 - 0.3)]
    alpha, last = ALPHAS[1], ALPHAS[0]
    noise = torch.tensor(expected).view(-1, 1, 1, 1)
    clean = (x[:2] - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    latent = (math.sqrt(last) * clean + math.sqrt(1 - last) * noise) / 0.5
    torch.testing.assert_close(images, model.decode(latent), rtol=1e-3, atol=1e-4)
    generate_images(plain, model, torch.tensor([1, 2]), guidance_scale=1.0, **draw)  # type: ignore[arg-type]
    assert [len(x) for x, _, _ in plain.seen] == [2]


@pytest.mark.parametrize("quantize", [True, False])
def test_what_is_decoded_is_a_codeword_unless_told_otherwise(quantize: bool) -> None:
    model, network = tokenizer(), small()
    fed: list[Tensor] = []
    model.post_quant_conv.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    images = generate_images(
        network, model, torch.tensor([0, 2]), grid_size=(8, 8), num_steps=2, quantize=quantize,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert images.shape == (2, 1, 32, 32)
    codebook = model.quantizer.codebook()
    assert codebook is not None
    distance = torch.cdist(fed[0].permute(0, 2, 3, 1).reshape(-1, 4), codebook.detach()).amin(dim=1)
    assert (float(distance.max()) < 2e-3) is quantize


def test_the_same_generator_draws_the_same_images() -> None:
    model, network = tokenizer(), small()
    draws = [
        generate_images(
            network, model, num_images=1, grid_size=(8, 8), num_steps=2, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_steps": 0}, "num_steps is 0; expected 1 to 999"),
        ({"num_steps": 1000}, "num_steps is 1000"),
        # Of T = 1000: steps of 3, 2 and 1 end at 898, 799, 600 and 501.
        ({"num_steps": 300}, "starts at time 898 of 1000; expected e.g. 250 or 333"),
        ({"num_steps": 400}, "starts at time 799 of 1000; expected e.g. 333 or 499"),
        ({"num_steps": 600}, "starts at time 600 of 1000; expected e.g. 500 or 999"),
        ({"num_steps": 501}, "starts at time 501 of 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; expected 0 to 10000"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan; expected 0 to 10000"),
        ({"labels": torch.tensor([0]), "num_images": 2}, "num_images is 2 with 1 labels"),
        ({"labels": torch.tensor([7])}, "labels range from"),
        ({"grid_size": (7, 8)}, "multiples of 2"),
    ],
)
def test_sampling_refuses_what_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        generate_images(small(), tokenizer(), **{"grid_size": (8, 8), "num_steps": 2, **options})  # type: ignore[arg-type]


def test_another_tokenizer_or_a_missing_scale_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="has 8 channels; expected those of the tokenizer's latent, 4"):
        generate_images(
            LatentDiffusionUNet(in_channels=8, num_channels=32, channel_mult=(1,)), tokenizer(), grid_size=(8, 8)
        )
    network = small()
    network.scale_factor.fill_(math.nan)
    with pytest.raises(VaevqMedError, match="no scale factor"):
        generate_images(network, tokenizer(), grid_size=(8, 8))


@pytest.mark.parametrize(("guidance_scale", "labeled"), [(1.0, True), (2.0, True), (1.0, False)])
@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_steps_are_those_of_monai(guidance_scale: float, labeled: bool, num_steps: int) -> None:
    network, first_stage = small(), tokenizer()
    with torch.no_grad():
        for parameter in network.parameters():  # the last convolution starts at zero
            parameter.normal_(std=0.05)
    labels = torch.tensor([0, 2]) if labeled else None
    options = {"num_steps": num_steps, "guidance_scale": guidance_scale, "num_images": 2, "quantize": False}
    found = generate_images(
        network, first_stage, labels, **options, grid_size=(8, 8), generator=torch.Generator().manual_seed(0)
    )
    scheduler = ldm_scheduler()
    set_ddim_steps(scheduler, num_steps)
    expected = LatentDiffusionInferer(scheduler, scale_factor=0.5).sample(
        input_noise=torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        autoencoder_model=SimpleNamespace(decode_stage_2_outputs=first_stage.decode),
        diffusion_model=network,
        conditioning=labels,
        cfg=guidance_scale if guidance_scale != 1 else None,
        cfg_fill_value=network.null_class,
        verbose=False,
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("labeled", [False, True])
def test_replayed_passes_draw_the_same_images(dtype: torch.dtype | None, labeled: bool) -> None:
    network, first_stage = small(), tokenizer()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    labels = torch.tensor([0, 2]) if labeled else None

    def draw(graphs: Recorder | None) -> Tensor:
        options = {"grid_size": (8, 8), "num_steps": 8, "num_images": 2, "dtype": dtype, "quantize": False}
        generator = torch.Generator().manual_seed(0)
        return generate_images(network, first_stage, labels, **options, generator=generator, graphs=graphs)

    recorder = Recorder()
    assert torch.equal(draw(recorder), draw(None))
    assert (recorder.warm_ups, recorder.captures, recorder.replays) == (3, 1, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_graphs_on_a_gpu_draw_the_same_images(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    network, first_stage = small().cuda(), tokenizer().cuda()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    made = []

    class Watched(diffusion.StaticPredictor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(diffusion, "StaticPredictor", Watched)

    def draw(graphs: Recorder | None) -> Tensor:
        options = {"grid_size": (8, 8), "num_steps": 20, "dtype": dtype, "graphs": graphs, "quantize": False}
        generator = torch.Generator().manual_seed(0)
        return generate_images(network, first_stage, torch.tensor([0, 2]), **options, generator=generator)

    found, eager = draw(None), draw(Recorder())
    torch.testing.assert_close(found, eager, atol=1e-4, rtol=1e-4)
    assert made[0].replayed.replays == 17


def test_autocast_casts_the_weights_once_for_all_steps() -> None:
    network, first_stage = small(), tokenizer()

    def casts(num_steps: int) -> int:
        options = {"grid_size": (8, 8), "num_steps": num_steps, "num_images": 1, "dtype": torch.bfloat16}
        with CastsOf(network.unet.conv_in.conv.weight.shape) as counter:
            generate_images(network, first_stage, **options)
        return counter.count

    assert casts(1) == casts(5) >= 1


def test_the_scale_factor_is_read_again_where_it_was_written() -> None:
    from torch.overrides import TorchFunctionMode

    class Reads(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += getattr(func, "__name__", "") == "__float__"
            return func(*args, **(kwargs or {}))

    network = LatentDiffusionUNet(in_channels=4, num_channels=32, channel_mult=[1], cross_attention_dim=32)
    first = network.set_scale_factor(torch.tensor([0.0, 1.0, 5.0]))
    with Reads() as reads:
        assert network.measured_scale_factor() == network.measured_scale_factor() == pytest.approx(first)
    assert reads.count == 1
    network.set_scale_factor(torch.tensor([0.0, 2.0, 10.0]))
    assert network.measured_scale_factor() == pytest.approx(first / 2)
    network.load_state_dict({**network.state_dict(), "scale_factor": torch.tensor(3.0)})
    assert network.measured_scale_factor() == 3.0
    assert copy.deepcopy(network).double().measured_scale_factor() == 3.0
