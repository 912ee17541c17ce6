"""Sampling from trained second-stage networks."""

from vaevq_med.inferers.autoregressive import draw_indices, filter_logits, generate_indices, guided_logits
from vaevq_med.inferers.diffusion import generate_images, ldm_scheduler, set_ddim_steps

__all__ = [
    "draw_indices",
    "filter_logits",
    "generate_images",
    "generate_indices",
    "guided_logits",
    "ldm_scheduler",
    "set_ddim_steps",
]
