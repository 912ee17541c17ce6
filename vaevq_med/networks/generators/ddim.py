"""Images from a latent diffusion model by DDIM (arXiv 2010.02502) with classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Generator, Wanted
from vaevq_med.networks.generators.captured import CudaGraphs, Graphs, Replayed
from vaevq_med.networks.generators.drawing import check_guidance, guided_logits
from vaevq_med.networks.generators.inpainting import inpainting_generators


def ldm_scheduler(num_train_timesteps: int = 1000) -> DDIMScheduler:
    """LDM's schedule: ``beta`` from 0.0015 to 0.0195, linear in its square root.

    Raises:
        VaevqMedError: there are fewer than 2 times.
    """
    if num_train_timesteps < 2:
        raise VaevqMedError(f"num_train_timesteps: found {num_train_timesteps}, expected 2 or more")
    return DDIMScheduler(
        num_train_timesteps=num_train_timesteps,
        schedule="scaled_linear_beta",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def check_ddim_steps(num_steps: int, num_train_timesteps: int) -> None:
    """Refuse an S whose S times, ``T // S`` apart, end two steps or more before T: noise is not the start of those.

    Args:
        num_steps: S.
        num_train_timesteps: T.

    Raises:
        VaevqMedError: S is not below T, or is such a number; the nearest others are named.

    >>> check_ddim_steps(250, 1000), check_ddim_steps(30, 1000)
    (None, None)
    """
    if not 1 <= num_steps < num_train_timesteps:
        raise VaevqMedError(f"num_steps is {num_steps}; expected 1 to {num_train_timesteps - 1}")

    def fits(steps: int) -> bool:
        return num_train_timesteps % steps <= num_train_timesteps // steps

    if not fits(num_steps):
        lower = next(filter(fits, range(num_steps, 0, -1)))
        higher = next(filter(fits, range(num_steps, num_train_timesteps)))
        last = (num_steps - 1) * (num_train_timesteps // num_steps) + 1
        raise VaevqMedError(
            f"num_steps is {num_steps}, which starts at time {last} of {num_train_timesteps}; expected e.g. {lower} or "
            f"{higher}, which start near its end"
        )


def set_ddim_steps(scheduler: DDIMScheduler, num_steps: int) -> None:
    """Choose S of the T times as LDM does: 1, 1 + c, 1 + 2c, ... with ``c = T // S``, from the last to the first.

    MONAI's own choice spreads them over the whole schedule, while its steps go back by ``T // S`` each: the two agree
    only here. Where S does not divide T, LDM's goes on by the same steps up to T, and so takes more than S.

    Raises:
        VaevqMedError: see :func:`check_ddim_steps`.
    """
    check_ddim_steps(num_steps, scheduler.num_train_timesteps)
    scheduler.set_timesteps(num_steps)
    interval = scheduler.num_train_timesteps // num_steps
    scheduler.timesteps = (torch.arange(num_steps) * interval).flip(0) + scheduler.steps_offset


class Steps(Protocol):
    """A schedule that goes from noise to a latent, such as MONAI's ``DDIMScheduler``.

    Attributes:
        timesteps: of the steps, from the first.
    """

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, Any]:
        """The sample after the step at a time, and anything."""


class NoisePredictor(Generator):
    """A generator of latents that predicts the noise in them, called with ``x``, ``timesteps`` and ``context``.

    Attributes:
        predicts: what it gives: ``noise``, or, of a flow, ``velocity``. A loss and a schedule are of one of the two.
        in_channels: D, channels of the latent.
    """

    kind = "latents"
    predicts: ClassVar[str] = "noise"
    in_channels: int

    @abstractmethod
    def measured_scale_factor(self) -> float:
        """What training multiplied the latents by, above 0.

        Raises:
            VaevqMedError: it was not measured.
        """

    def check_ready(self) -> None:
        """Refuse a network without a scale factor."""
        self.measured_scale_factor()


class StaticPredictor:
    """The network over static memory, so that a GPU replays its pass at each step as a CUDA graph.

    Under autocast it has to be used within one context from the first call to the last: the graph reads the weights
    that the warm-up cast, which autocast keeps until the context ends.

    Args:
        predict: the network.
        graphs: how a pass is captured.

    Attributes:
        replayed: what does the passes.
    """

    def __init__(self, predict: Callable[..., Tensor], graphs: Graphs) -> None:
        self.replayed = Replayed(graphs)
        self._predict = predict
        self._given: list[Tensor | None] = []
        self._found: Tensor | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor | None) -> Tensor:
        """As the network; shapes are those of the first call, and the next call overwrites what this one returns."""
        given = [x, timesteps, context]
        if self._found is None:
            self._given = [None if value is None else value.clone() for value in given]
            self._found = torch.empty_like(x, memory_format=torch.contiguous_format)
        for own, value in zip(self._given, given, strict=True):
            if own is not None and value is not None:
                own.copy_(value)
        self.replayed("pass", self._work)
        return self._found

    def _work(self) -> None:
        assert self._found is not None
        x, timesteps, context = self._given
        self._found.copy_(self._predict(x, timesteps=timesteps, context=context))


def _predictor(
    network: NoisePredictor, device: torch.device, dtype: torch.dtype | None, graphs: Graphs | None
) -> Callable[..., Tensor]:
    """The network, under autocast where a type is given, its output then in fp32; captured where graphs are used."""

    def in_type(*args: Tensor, **kwargs: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return network(*args, **kwargs).float()

    predict: Callable[..., Tensor] = network if dtype is None else in_type
    if graphs is None and device.type == "cuda":
        graphs = CudaGraphs(device)
    return predict if graphs is None else StaticPredictor(predict, graphs)


@torch.no_grad()
def generate_images(
    network: NoisePredictor,
    tokenizer: Tokenizer,
    labels: Tensor | None = None,
    *,
    num_images: int | None = None,
    grid_size: tuple[int, ...],
    scheduler: DDIMScheduler | None = None,
    num_steps: int = 250,
    guidance_scale: float = 1.5,
    quantize: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Draw images: noise, ``num_steps`` of DDIM (eta = 0), the scale factor undone, the codebook, the decoder.

    On a GPU the network's pass is captured as a CUDA graph after a few steps, and replayed in the others.

    Args:
        network: in evaluation mode.
        tokenizer: in evaluation mode, on the same device.
        labels: a class an image, ``[B]``; None draws without a class.
        num_images: B, where there are no labels.
        grid_size: h and w of the latent.
        scheduler: the schedule trained with; :func:`ldm_scheduler` when absent.
        num_steps: S, at least 1 and fewer than the schedule's; see :func:`check_ddim_steps`.
        guidance_scale: s in ``u + s (c - u)`` of the predictions u without and c with the class; 1 takes c alone, at
            half the cost. Without labels it is not used.
        quantize: replace each generated vector by its codeword before decoding, as LDM does.
        dtype: type that the network is autocast to, such as ``torch.bfloat16``; the decoder never is.
        generator: of the noise, on the CPU, or one for each image; the global one when absent.
        graphs: captures the network's pass; by default CUDA graphs on a GPU, and on a CPU nothing.

    Returns:
        Images ``[B, C, H, W]``, not clamped.

    Raises:
        VaevqMedError: an argument out of range, or a network without its scale factor.
    """
    scheduler = scheduler or ldm_scheduler()
    set_ddim_steps(scheduler, num_steps)
    return integrated_images(
        network,
        tokenizer,
        labels,
        num_images=num_images,
        grid_size=grid_size,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        quantize=quantize,
        dtype=dtype,
        generator=generator,
        graphs=graphs,
    )


def integrated_images(
    network: NoisePredictor,
    tokenizer: Tokenizer,
    labels: Tensor | None,
    *,
    num_images: int | None,
    grid_size: tuple[int, ...],
    scheduler: Steps,
    guidance_scale: float,
    quantize: bool,
    dtype: torch.dtype | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Draw images by a schedule whose times were chosen; the arguments are those of :func:`generate_images`.

    Raises:
        VaevqMedError: an argument out of range, or a network without its scale factor.
    """
    check_guidance(guidance_scale)
    if labels is not None and num_images not in (None, len(labels)):
        raise VaevqMedError(f"num_images is {num_images} with {len(labels)} labels; expected one of the two")
    if network.in_channels != tokenizer.embedding_dim:
        raise VaevqMedError(
            f"the diffusion model has {network.in_channels} channels; expected those of the tokenizer's latent, "
            f"{tokenizer.embedding_dim}"
        )
    device, scale_factor = next(network.parameters()).device, network.measured_scale_factor()
    count = len(labels) if labels is not None else num_images or 1
    noise = _noise(count, (network.in_channels, *grid_size), generator).to(device)
    predict, times = _predictor(network, device, dtype, graphs), scheduler.timesteps.tolist()
    # Outermost, so that autocast keeps the weights that it casts until the last step.
    with torch.autocast(device.type, enabled=False):
        context = None if labels is None else labels.to(device)
        null_class = None if labels is None or guidance_scale == 1 else network.null_class
        latent = denoised(predict, noise, context, scheduler, times, null_class, guidance_scale) / scale_factor
        return tokenizer.decode_stage_2_outputs(latent) if quantize else tokenizer.decode_latent(latent)


def _noise(count: int, shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """``[count, *shape]`` from one generator, or each part from its own."""
    if not isinstance(generator, Sequence):
        return torch.randn(count, *shape, generator=generator)
    if len(generator) != count:
        raise VaevqMedError(f"found {len(generator)} generators; expected one, or one for each of {count} images")
    return torch.stack([torch.randn(*shape, generator=of_one) for of_one in generator])


def latent_draws(make: Callable[..., Tensor], network: NoisePredictor, tokenizer: Tokenizer, **given: Any) -> Draw:
    """What draws latents and decodes them.

    Args:
        make: :func:`generate_images` or its like.
        network: in evaluation mode.
        tokenizer: on the same device.
        **given: further arguments of ``make``.
    """

    def draw(wanted: Wanted) -> Tensor:
        if wanted.known is not None or wanted.mask is not None:
            raise VaevqMedError(f"found known tokens for {type(network).__name__}; expected {inpainting_generators()}")
        return make(
            network,
            tokenizer,
            wanted.labels,
            num_images=None if wanted.labels is not None else len(wanted.seeds),
            dtype=wanted.dtype,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            **given,
        )

    return draw


def diffusion_draws(
    network: NoisePredictor,
    tokenizer: Tokenizer,
    *,
    grid: tuple[int, ...],
    settings: Mapping[str, Any],
    num_train_timesteps: int,
) -> Draw:
    """What draws latents and decodes them.

    Args:
        network: in evaluation mode.
        tokenizer: on the same device.
        grid: h and w of the latent.
        settings: of :func:`generate_images`.
        num_train_timesteps: T.

    Raises:
        VaevqMedError: see :func:`check_ddim_steps`.
    """
    scheduler = ldm_scheduler(num_train_timesteps)
    check_ddim_steps(settings["num_steps"], num_train_timesteps)

    return latent_draws(generate_images, network, tokenizer, grid_size=grid, scheduler=scheduler, **settings)


def denoised(
    predict: Callable[..., Tensor],
    latent: Tensor,
    labels: Tensor | None,
    scheduler: Steps,
    times: Sequence[Any],
    null_class: int | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """What DDIM makes of noise; MONAI's ``DiffusionInferer`` does the same but waits for the device at every step.

    Args:
        predict: the network.
        latent: noise, ``[B, D, h, w]``.
        labels: ``[B]``, or None.
        scheduler: of which a step is taken at each time, with its tables on the CPU.
        times: its times, known to the host, which looks up the schedule by them; they go to the device together.
        null_class: the label to contrast the others with; None for no guidance.
        guidance_scale: of that contrast.
    """
    guided = labels is not None and null_class is not None
    if labels is not None and null_class is not None:
        labels = torch.cat([torch.full_like(labels, null_class), labels])  # [2 B]
    on_device = torch.tensor(times, dtype=torch.float32, device=latent.device)
    for step, time in enumerate(times):
        inputs = torch.cat([latent, latent]) if guided else latent
        noise = predict(inputs, timesteps=on_device[step : step + 1], context=labels)
        if guided:
            unconditional, conditional = noise.chunk(2)
            noise = guided_logits(conditional, unconditional, guidance_scale)  # [B, D, h, w]
        latent, _ = scheduler.step(noise, time, latent)
    return latent
