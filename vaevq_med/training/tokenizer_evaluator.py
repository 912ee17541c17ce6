"""Evaluation of a tokenizer on MONAI's ``SupervisedEvaluator``: each image is encoded and decoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from monai.engines import SupervisedEvaluator
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.slices import slices_of, stacked
from vaevq_med.training.base_evaluator import BaseEvaluator


class TokenizerEvaluator(BaseEvaluator):
    """Reconstruct each batch through the codebook, and, for a variational tokenizer, without it.

    ``engine.state.output`` holds ``image``, ``pred`` (the quantized path), ``indices`` ``[B, h, w, G]`` where there are
    codebooks, and, for a variational tokenizer, ``indices_sample`` (a sample quantized, for its utilization) and the
    posterior's ``mean`` and ``std``, ``[B, D, *grid]``. Without a posterior ``mean`` is the latent before it is
    quantized, where the tokenizer gives one.

    Args:
        device: where to evaluate.
        val_data_loader: yields dictionaries with ``image`` ``[B, C, H, W]`` in [-1, 1].
        network: the tokenizer, usually with its averaged weights.
        quantize: ``mode`` quantizes the posterior's mean, ``sample`` a sample of it.
        precision: ``fp32``, or ``bf16`` for autocast.
        seed: seed of the samples, drawn anew at each run of the evaluator.
        val_handlers: ignite handlers.
        **kwargs: passed on to ``SupervisedEvaluator``.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: Tokenizer,
        quantize: str = "mode",
        precision: str = "fp32",
        seed: int = 0,
        val_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if quantize not in ("mode", "sample"):
            raise VaevqMedError(f"quantize: found {quantize!r}, expected 'mode' or 'sample'")
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=network,
            precision=precision,
            seed=seed,
            val_handlers=val_handlers,
            **kwargs,
        )
        self.quantize = quantize
        self.generator: torch.Generator | None = None

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Evaluate once; the samples are the same at every call."""
        self.generator = torch.Generator(self.state.device).manual_seed(self.seed)
        super().run(global_epoch)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, continuous: bool = False) -> dict[str, Tensor]:
        """Reconstruct ``[B, C, H, W]`` in [-1, 1]; the keys are those of ``state.output`` without ``image``.

        Args:
            images: the originals.
            continuous: decode the posterior's mean too, as ``pred_continuous``, which doubles the decoder's work.
        """
        network: Tokenizer = self.network  # type: ignore[assignment]
        network.eval()
        encoded = network.encode(images)
        if not isinstance(encoded, DiagonalGaussian):
            quantized = network.quantize(encoded, images=images)
            found = {"indices": quantized.indices, **({"mean": encoded} if network.gives_latent else {})}
            return _indexed({Keys.PRED: network.decode(quantized.quantized).float(), **found})
        mean = encoded.mode()
        sample = encoded.sample(self.generator)
        of_mean = network.quantize(mean, encoded, images)
        of_sample = network.quantize(sample, encoded, images)
        chosen = of_mean if self.quantize == "mode" else of_sample
        found = {"indices": chosen.indices, "indices_sample": of_sample.indices, "mean": mean, "std": encoded.std}
        if not continuous:
            return _indexed({Keys.PRED: network.decode(chosen.quantized).float(), **found})
        decoded = network.decode_latent(torch.cat([network.rectify(chosen.quantized), mean])).float()
        return _indexed(dict(zip((Keys.PRED, "pred_continuous"), decoded.chunk(2), strict=True)) | found)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        images = torch.as_tensor(batchdata[Keys.IMAGE]).to(engine.state.device, non_blocking=True)
        if images.ndim == 5 and not cast(Tokenizer, self.network).takes_volumes:
            return self._slices(images)
        with self._autocast():
            return {Keys.IMAGE: images, **self.inferer(images, self.reconstruct)}

    def _slices(self, volumes: Tensor) -> dict[str, Any]:
        """What a tokenizer of single images makes of volumes ``[B, C, d, H, W]``, slice by slice."""
        with self._autocast():
            found = self.inferer(slices_of(volumes), self.reconstruct)
        return {Keys.IMAGE: volumes, **found, Keys.PRED: stacked(found[Keys.PRED], volumes.shape[0])}


def _indexed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the indices where there are none."""
    return {name: one for name, one in found.items() if not name.startswith("indices") or one.shape[-1]}
