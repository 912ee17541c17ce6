"""Images from a latent diffusion model by DDIM (arXiv 2010.02502) with classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.inferers import LatentDiffusionInferer
from monai.networks.schedulers import DDIMScheduler
from torch import Tensor

from vaevq_med.errors import VaevqMedError
from vaevq_med.networks.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.tokenizer import VisualTokenizer


class _WithoutCodebook:
    """A tokenizer whose decoder is fed the generated latent itself."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self.decode_stage_2_outputs = tokenizer.decode


def ldm_scheduler(num_train_timesteps: int = 1000) -> DDIMScheduler:
    """LDM's schedule: ``beta`` from 0.0015 to 0.0195, linear in its square root."""
    return DDIMScheduler(
        num_train_timesteps=num_train_timesteps,
        schedule="scaled_linear_beta",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def set_ddim_steps(scheduler: DDIMScheduler, num_steps: int, device: torch.device) -> None:
    """Choose S of the T times as LDM does: 1, 1 + c, 1 + 2c, ... with ``c = T // S``, from the last to the first.

    MONAI's own choice spreads them over the whole schedule, while its steps go back by ``T // S`` each: the two agree
    only here.
    """
    scheduler.set_timesteps(num_steps, device=device)
    interval = scheduler.num_train_timesteps // num_steps
    scheduler.timesteps = (torch.arange(num_steps, device=device) * interval).flip(0) + scheduler.steps_offset


@torch.no_grad()
def generate_images(
    network: LatentDiffusionUNet,
    tokenizer: VisualTokenizer,
    labels: Tensor | None = None,
    *,
    num_images: int | None = None,
    grid_size: tuple[int, int],
    scheduler: DDIMScheduler | None = None,
    num_steps: int = 250,
    guidance_scale: float = 1.5,
    quantize: bool = True,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw images: noise, ``num_steps`` of DDIM (eta = 0), the scale factor undone, the codebook, the decoder.

    Args:
        network: in evaluation mode.
        tokenizer: in evaluation mode, on the same device.
        labels: a class an image, ``[B]``; None draws without a class.
        num_images: B, where there are no labels.
        grid_size: h and w of the latent.
        scheduler: the schedule trained with; :func:`ldm_scheduler` when absent.
        num_steps: S, at least 1 and fewer than the schedule's.
        guidance_scale: s in ``u + s (c - u)`` of the predictions u without and c with the class; 1 takes c alone, at
            half the cost. Without labels it is not used.
        quantize: replace each generated vector by its codeword before decoding, as LDM does.
        generator: of the noise, on the CPU, or one for each image; the global one when absent.

    Returns:
        Images ``[B, C, H, W]``, not clamped.

    Raises:
        VaevqMedError: an argument out of range, or a network without its scale factor.
    """
    scheduler = scheduler or ldm_scheduler()
    if not 1 <= num_steps < scheduler.num_train_timesteps:
        raise VaevqMedError(f"num_steps is {num_steps}; expected 1 to {scheduler.num_train_timesteps - 1}")
    if guidance_scale < 0:
        raise VaevqMedError(f"guidance_scale is {guidance_scale}; expected at least 0")
    if labels is not None and num_images not in (None, len(labels)):
        raise VaevqMedError(f"num_images is {num_images} with {len(labels)} labels; expected one of the two")
    if network.in_channels != tokenizer.embedding_dim:
        raise VaevqMedError(
            f"the diffusion model has {network.in_channels} channels; expected those of the tokenizer's latent, "
            f"{tokenizer.embedding_dim}"
        )
    device = next(network.parameters()).device
    count = len(labels) if labels is not None else num_images or 1
    shape = (network.in_channels, *grid_size)
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise VaevqMedError(f"found {len(generator)} generators; expected one, or one for each of {count} images")
        noise = torch.stack([torch.randn(shape, generator=g) for g in generator]).to(device)
    else:
        noise = torch.randn(count, *shape, generator=generator).to(device)
    guided = labels is not None and guidance_scale != 1
    set_ddim_steps(scheduler, num_steps, device)
    inferer = LatentDiffusionInferer(scheduler, scale_factor=network.measured_scale_factor())
    images = inferer.sample(
        input_noise=noise,
        autoencoder_model=tokenizer if quantize else _WithoutCodebook(tokenizer),  # type: ignore[arg-type]
        diffusion_model=network,  # type: ignore[arg-type]
        conditioning=None if labels is None else labels.to(device),
        cfg=guidance_scale if guided else None,
        cfg_fill_value=network.null_class,
        verbose=False,
    )
    assert isinstance(images, Tensor)
    return images
