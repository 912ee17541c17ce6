"""Draw assignment_regions.png: which codeword a posterior mean goes to, under two posteriors.

``python docs/images/assignment_regions.py`` writes the picture beside this file.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Ellipse

from vaevq_med.networks.quantizers.nearest import nearest_codeword

EXTENT = 2.2
POSTERIORS = (
    ((0.6, 0.6), "equally sure of both coordinates\n(the nearest codeword)"),
    ((0.2, 0.9), "sure of $z_1$, unsure of $z_2$\n(the codeword of highest density)"),
)


def main() -> None:
    """Two panels: the regions of 14 codewords, one mean with its posterior, and the codeword that it goes to."""
    generator = torch.Generator().manual_seed(7)
    codebook = torch.randn(14, 2, generator=generator)  # [K, 2]
    mean = torch.tensor([[0.15, 0.35]])  # [1, 2]
    line = torch.linspace(-EXTENT, EXTENT, 600)
    points = torch.cartesian_prod(line, line)  # [N, 2]
    colors = plt.get_cmap("tab20")(np.linspace(0, 1, len(codebook)))[:, :3] * 0.45 + 0.55

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.9), sharey=True, layout="constrained")
    for axis, (deviations, title) in zip(axes, POSTERIORS, strict=True):
        precision = torch.tensor([deviations]).square().reciprocal()  # [1, 2]
        region = nearest_codeword(points, codebook, precision=precision.expand(len(points), 2).contiguous())
        axis.imshow(
            colors[region.reshape(600, 600).T.numpy()], origin="lower", extent=(-EXTENT, EXTENT, -EXTENT, EXTENT)
        )
        axis.plot(*codebook.T.numpy(), "o", color="black", markersize=4)
        chosen = codebook[nearest_codeword(mean, codebook, precision=precision)][0]
        for radius in (1, 2):
            width, height = (2 * radius * deviation for deviation in deviations)
            axis.add_patch(Ellipse(tuple(mean[0].tolist()), width, height, fill=False, linewidth=1))
        axis.annotate(
            "", xy=chosen.tolist(), xytext=mean[0].tolist(), arrowprops={"arrowstyle": "->", "linewidth": 1.6}
        )
        axis.plot(*mean[0].tolist(), "x", color="black", markersize=7)
        axis.set(title=title, xlabel="$z_1$", xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT))
    axes[0].set_ylabel("$z_2$")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
