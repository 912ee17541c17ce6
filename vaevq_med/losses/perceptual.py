"""Perceptual loss over a frozen feature network: LPIPS (arXiv 1801.03924), or LPIPS-style offline."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vaevq_med.losses.base import PATH_REDUCTIONS, PATHS, LossTerm, combine, paths
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.ranges import check_choice, check_sizes
from vaevq_med.networks.slices import some_slices


class PerceptualLoss(LossTerm):
    """Perceptual distance of the reconstruction, mean over the batch.

    The target's features are computed once a step, both paths' in one batch.

    Args:
        network: name of the feature network, see :mod:`vaevq_med.networks.features`.
        weights: file of its weights, where it is not in a usual place.
        path_reduction: ``"sum"`` or ``"mean"`` of the quantized and the continuous path.
        paths: ``"both"``, or the ``"continuous"`` path alone.
        num_slices: of each volume, this many random slices, the same of original and reconstruction.

    Raises:
        MissingWeightsError: the network's weights are not on this machine.
    """

    initial_files: ClassVar[tuple[str, ...]] = ("weights",)
    """Arguments that name a file, which may lie elsewhere in a run that goes on."""

    def __init__(
        self,
        *,
        network: str = "efficientnet-lite0",
        weights: str | Path | None = None,
        path_reduction: str = "sum",
        paths: str = "both",
        num_slices: int = 4,
    ) -> None:
        super().__init__()
        check_sizes(num_slices=num_slices)
        self.num_slices = num_slices
        self.path_reduction = check_choice("path_reduction", path_reduction, PATH_REDUCTIONS)
        self.paths = check_choice("paths", paths, PATHS)
        self.features = feature_network(network, weights)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of two batches ``[B, C, H, W]`` in [-1, 1], ``[B]``."""
        return self.features.distance(first, second)

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The distance, a scalar."""
        target, *reconstructions = some_slices([target, *paths(output, self.paths)], self.num_slices)
        with torch.no_grad():
            expected = self.features.layers(target)
        found = self.features.layers(torch.cat(reconstructions))
        by_path = zip(*(stage.chunk(len(reconstructions)) for stage in found), strict=True)
        # Path by path, so that the target's maps need not be repeated.
        distances = [self.features.compare(maps, expected).mean() for maps in by_path]
        return combine(distances, self.path_reduction)
