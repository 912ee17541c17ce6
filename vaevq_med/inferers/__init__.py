"""Sampling from trained second-stage networks."""

from vaevq_med.inferers.autoregressive import generate_indices
from vaevq_med.inferers.diffusion import check_ddim_steps, generate_images, ldm_scheduler, set_ddim_steps
from vaevq_med.inferers.drawing import MAX_GUIDANCE, MIN_TEMPERATURE, draw_indices, filter_logits, guided_logits
from vaevq_med.inferers.static_steps import StepStore

__all__ = [
    "MAX_GUIDANCE",
    "MIN_TEMPERATURE",
    "StepStore",
    "check_ddim_steps",
    "draw_indices",
    "filter_logits",
    "generate_images",
    "generate_indices",
    "guided_logits",
    "ldm_scheduler",
    "set_ddim_steps",
]
