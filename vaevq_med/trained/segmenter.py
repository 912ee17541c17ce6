"""A segmentation network as its checkpoint describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vaevq_med.networks.segmenter import SliceSegmenter
from vaevq_med.trained.file import CheckpointError
from vaevq_med.trained.network import StoredNetwork

_WINDOW = ("axis", "clip_negatives", "percentiles")
"""What of a recipe decides how a slice is cut and which intensities become black and white."""


class StoredSegmenter(StoredNetwork):
    """A trained segmentation network and the settings it was trained with.

    Args:
        path: checkpoint written by training.
        weights: ``ema`` for the averaged weights (the raw ones where none were kept), or ``network``.
        config: settings of the training run, where ``path`` is a plain state dictionary as in a packed bundle.

    Raises:
        CheckpointError: see :class:`vaevq_med.trained.network.StoredNetwork`.
    """

    @property
    def contrasts(self) -> tuple[str, ...]:
        """Names of the contrasts that it takes, in the order of its channels.

        Raises:
            CheckpointError: the checkpoint does not say them.
        """
        named = self.value("modalities", None)
        if not isinstance(named, list) or not named:
            raise CheckpointError(
                f"{self.path}: found no list of modalities, expected a checkpoint of the segmentation bundle "
                "(python -m monai.bundle run training --config_file bundles/segmentation/train.json)"
            )
        return tuple(map(str, named))

    @property
    def image_size(self) -> int:
        """Side in pixels of the squares that it was trained on."""
        return int(self.value("image_size"))

    def check_window(self, recipe: Mapping[str, Any]) -> list[str]:
        """Refuse a recipe that cuts or windows volumes in another way than that of its training.

        Args:
            recipe: of ``slice-extract``, as plain values.

        Returns:
            What a user should know: that the checkpoint does not say it.

        Raises:
            CheckpointError: naming both.
        """
        trained = self.data.get("recipe") or {}
        known = [name for name in _WINDOW if name in trained]
        if not known:
            return [
                f"{self.path.name} does not say by which recipe its images were made; {recipe['name']} may be another"
            ]
        for name in known:
            found, expected = recipe[name], trained[name]
            if found != expected:
                raise CheckpointError(
                    f"recipe {recipe['name']}: found {name} {found}, expected {expected}, as {self.path} was trained on"
                )
        return []

    def network(self) -> SliceSegmenter:
        """Build the network and load its weights.

        Raises:
            CheckpointError: the checkpoint is another network's, or its contrasts are not as many as it has channels.
        """
        network: SliceSegmenter = self._build(SliceSegmenter, "that of vaevq_med.networks.SliceSegmenter")
        if network.in_channels != len(self.contrasts):
            raise CheckpointError(
                f"{self.path}: found {len(self.contrasts)} modalities, expected {network.in_channels}, the channels of "
                "its network"
            )
        return network
