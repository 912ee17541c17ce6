"""Images from a trained generator: by which settings, and the engine that draws them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import expect
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Generator, Wanted
from vaevq_med.networks.generators.inpainting import inpainting_generators
from vaevq_med.trained.network import StoredGenerator
from vaevq_med.training.base_evaluator import BaseEvaluator


class SamplingSettings:
    """How images are drawn; None, or a setting left out, takes the published value of the generator's kind.

    Args:
        guidance_scale: 2 (LlamaGen-B) or 1.5 (LDM-4) with labels; 1, no guidance, without.
        temperature: autoregressive; divides the logits, 1.
        top_k: autoregressive; 0, which keeps all.
        top_p: autoregressive; 1, which keeps all.
        num_steps: diffusion; of DDIM, 250.
        quantize: diffusion; replace generated vectors by their codewords before decoding, True.
        **further: settings of other generators.
    """

    def __init__(
        self,
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_steps: int | None = None,
        quantize: bool | None = None,
        **further: Any,
    ) -> None:
        self.chosen = {
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "num_steps": num_steps,
            "quantize": quantize,
            **further,
        }

    def for_network(self, network: Generator) -> dict[str, Any]:
        """Every setting that this network has, by name.

        Raises:
            VaevqMedError: a setting of another generator, or out of its range, or guidance without labels.
        """
        values = {name: setting.default for name, setting in network.settings.items()}
        if network.num_classes == 0 and "guidance_scale" in values:
            values["guidance_scale"] = 1.0
        for name, value in self.chosen.items():
            if value is None:
                continue
            if name not in values:
                raise VaevqMedError(
                    f"{name}: found {value} for {type(network).__name__}, expected none; its settings are "
                    f"{', '.join(values)}"
                )
            setting = network.settings[name]
            expect(setting.valid(value), name, value, setting.expected)
            values[name] = value
        if network.num_classes == 0 and values.get("guidance_scale", 1) != 1:
            raise VaevqMedError(
                f"guidance_scale: found {values['guidance_scale']} for a generator without labels, expected 1 or null"
            )
        return values


class ImageSampler(BaseEvaluator):
    """Draw the images of a :class:`SamplePlan` and decode them.

    ``engine.state.output`` holds the images (``pred``, ``[B, C, H, W]`` in [-1, 1]). Where the plan has the images
    that are inpainted, their pixels outside of the box are put back after decoding. Each sample has random numbers of
    its own, so that it does not depend on the batch that it is drawn in, but for rounding.

    Args:
        device: where to draw.
        val_data_loader: yields batches of a :class:`SamplePlan`; with nothing to draw, the run ends at once.
        network: the generator, in evaluation mode.
        tokenizer: in evaluation mode, on the same device.
        stored: what the network was built from.
        settings: how to draw.
        precision: ``fp32``; ``bf16``, weights and cache of an autoregressive model, autocast of a diffusion model; or
            ``auto``, which is ``bf16`` on a GPU that has it. The tokenizer decodes in fp32.
        val_handlers: ignite handlers.
        **kwargs: passed on to ``SupervisedEvaluator``.

    Raises:
        VaevqMedError: a setting that does not fit.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: Generator,
        tokenizer: Tokenizer,
        stored: StoredGenerator,
        settings: Mapping[str, Any],
        precision: str = "auto",
        val_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=network,
            precision=precision,
            val_handlers=val_handlers,
            **kwargs,
        )
        grid = tuple(map(int, stored.tokens["grid"]))
        self._draw = network.draws(tokenizer, grid=grid, settings=settings, trained_with=stored.value)
        self._calls = network.network_calls(grid=grid, settings=settings)
        self._times: list[tuple[int, float]] = []

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Draw what is to be drawn."""
        if len(self.data_loader):  # type: ignore[arg-type]
            super().run(global_epoch)
        else:
            self.fire_event(Events.COMPLETED)

    def drawing(self) -> dict[str, Any] | None:
        """What it took: ``network_calls`` an image, ``seconds_per_image`` with decoding, ``batch_size``, ``device``.

        The first batch, which warms up, is left out of the seconds where there are others. None where nothing was
        drawn.
        """
        if not self._times:
            return None
        timed = self._times[1:] or self._times
        device = self.state.device
        return {
            "network_calls": self._calls,
            "seconds_per_image": sum(seconds for _, seconds in timed) / sum(images for images, _ in timed),
            "batch_size": max(images for images, _ in timed),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }

    @torch.no_grad()
    def sample(self, labels: Tensor, seeds: Sequence[int], known: Tensor | None, mask: Tensor | None) -> Tensor:
        """Images ``[B, C, H, W]``, one a label and seed; the other arguments as for ``generate_indices``."""
        if known is not None and not self.network.inpaints:
            raise VaevqMedError(
                f"inpaint_tokens: found {type(self.network).__name__}, which draws whole images alone, expected "
                f"{inpainting_generators()}"
            )
        classes = labels if self.network.num_classes else None
        return self._draw(Wanted(classes, seeds, known, mask, self.autocast_dtype))

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        labels, seeds = batchdata[Keys.LABEL].to(engine.state.device), batchdata["seed"].tolist()
        began = time.perf_counter()
        images = self.inferer(labels, self.sample, seeds, batchdata.get("known"), batchdata.get("mask"))
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        self._times.append((len(seeds), time.perf_counter() - began))
        images = images.float().clamp(-1, 1)
        if "original" in batchdata:
            original, keeps = (batchdata[key].to(images.device) for key in ("original", "keeps"))
            images = torch.where(keeps[:, None], original, images)
        return {Keys.PRED: images}
