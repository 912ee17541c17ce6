"""Evaluation of a segmentation network on MONAI's ``SupervisedEvaluator``: Dice of each region, of each patient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.images.transforms import REGIONS
from vaevq_med.metrics.segmentation import dice_of_counts
from vaevq_med.networks.segmenter import SliceSegmenter
from vaevq_med.training.base_evaluator import BaseEvaluator


class SegmentationEvaluator(BaseEvaluator):
    """Segment each stack, and count what is right.

    ``engine.state.output`` holds ``image``, ``pred``, the probabilities ``[B, R, H, W]`` (2.5D) or ``[B, R, d, H, W]``
    of nested regions, and ``label``, their masks of the same shape. ``engine.state.metrics`` receives
    ``dice_whole_tumor`` and so on, the Dice of all seen slices of a patient at a probability of 0.5, a mean over
    patients, and ``dice``, the mean of these. A region that is empty and found so is 1. Of stacks that overlap, as in
    training, a slice counts as often as it is seen. Batches without ``regions`` are segmented, and not counted. In
    several processes each goes over the whole split.

    Args:
        device: where to evaluate.
        val_data_loader: yields dictionaries of a ``RegionDataset``.
        network: the segmentation network, usually with its averaged weights.
        precision: ``fp32``, or ``bf16`` for autocast.
        val_handlers: ignite handlers.
        **kwargs: passed on to ``SupervisedEvaluator``.

    Raises:
        VaevqMedError: there is no such precision; while running, a batch has slices without known regions.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: SliceSegmenter,
        precision: str = "fp32",
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
        self._counts: dict[str, Tensor] = {}
        self.add_event_handler(Events.EPOCH_COMPLETED, self._summarize)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Evaluate once."""
        self._counts = {}
        super().run(global_epoch)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        network: SliceSegmenter = self.network  # type: ignore[assignment]
        images = torch.as_tensor(batchdata[Keys.IMAGE]).to(engine.state.device, non_blocking=True)
        network.eval()
        with torch.no_grad(), self._autocast():
            logits: Tensor = self.inferer(images, network)
        probability = logits.float().sigmoid().cummin(dim=1).values
        if "regions" not in batchdata:
            return {Keys.IMAGE: images, Keys.PRED: probability}
        if not bool(torch.as_tensor(batchdata["labeled"]).all()):
            raise VaevqMedError("found slices without a segmentation to evaluate, expected all to have one")
        masks = network.targets(torch.as_tensor(batchdata["regions"]).to(engine.state.device, non_blocking=True))
        self._count(batchdata["patient"], probability > 0.5, masks > 0.5)
        return {Keys.IMAGE: images, Keys.PRED: probability, Keys.LABEL: masks}

    def _count(self, patients: Sequence[str], found: Tensor, wanted: Tensor) -> None:
        """Add up, for each patient, ``[3, R]``: pixels in both, found, wanted."""
        counts = torch.stack([one.flatten(2).sum(dim=2) for one in (found & wanted, found, wanted)], dim=1).double()
        for patient, count in zip(patients, counts, strict=True):
            self._counts[patient] = self._counts.get(patient, 0) + count

    def _summarize(self) -> None:
        if not self._counts:
            return
        scores = torch.stack([dice_of_counts(*count) for count in self._counts.values()]).mean(dim=0).tolist()  # [R]
        figures = {f"dice_{name}": score for name, score in zip(REGIONS, scores, strict=True)}
        self.state.metrics.update({"dice": sum(scores) / len(scores), **figures})
