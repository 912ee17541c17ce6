"""Old addresses of what is now in ``networks.generators``.

The address of ``ldm_scheduler`` stands in the checkpoints of diffusion models, so that this one stays.
"""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "MAX_GUIDANCE": "vaevq_med.networks.generators.drawing",
        "MIN_TEMPERATURE": "vaevq_med.networks.generators.drawing",
        "StepStore": "vaevq_med.networks.generators.static_steps",
        "check_ddim_steps": "vaevq_med.networks.generators.ddim",
        "draw_indices": "vaevq_med.networks.generators.drawing",
        "filter_logits": "vaevq_med.networks.generators.drawing",
        "generate_images": "vaevq_med.networks.generators.ddim",
        "generate_indices": "vaevq_med.networks.generators.autoregressive",
        "guided_logits": "vaevq_med.networks.generators.drawing",
        "ldm_scheduler": "vaevq_med.networks.generators.ddim",
        "set_ddim_steps": "vaevq_med.networks.generators.ddim",
    },
)
