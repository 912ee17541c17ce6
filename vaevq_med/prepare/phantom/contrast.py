"""What a scanner makes of a synthetic brain: tissue contrast, vessels, bias field, Rician noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vaevq_med.prepare.phantom.anatomy import Anatomy, Array, Grid, cortex_weight, smooth_noise
from vaevq_med.prepare.phantom.tumor import Lesion


@dataclass(frozen=True)
class Contrast:
    """Mean intensity of each tissue in one contrast, in arbitrary units.

    Attributes:
        csf: cerebrospinal fluid.
        gm: gray matter.
        wm: white matter.
        edema: vasogenic edema (SNFH).
        rim: enhancing tumor (ET).
        necrosis: necrotic core (NETC).
        cavity: resection cavity (RC).
        texture: gain of the template's T1 detail.
        vessel: vessels and choroid plexus.
        mottle: amplitude of the lesion's texture.
        scale: int16 value of one unit in a typical scan.
    """

    csf: float
    gm: float
    wm: float
    edema: float
    rim: float
    necrosis: float
    cavity: float
    texture: float
    vessel: float
    mottle: float
    scale: float


CONTRASTS: Mapping[str, Contrast] = MappingProxyType(
    {
        "t1n": Contrast(0.22, 0.60, 0.84, 0.63, 0.56, 0.40, 0.24, 1.0, 0.50, 0.03, 900.0),
        "t1c": Contrast(0.22, 0.60, 0.80, 0.58, 1.50, 0.36, 0.24, 0.9, 1.45, 0.10, 1100.0),
        "t2w": Contrast(1.35, 0.56, 0.38, 0.92, 0.74, 1.02, 1.30, -0.6, 0.25, 0.07, 700.0),
        "t2f": Contrast(0.14, 0.62, 0.50, 1.12, 0.90, 0.42, 0.17, -0.4, 0.30, 0.07, 800.0),
    }
)
"""The four contrasts of BraTS, by the names of 2023 and 2024, in the order in which they are made."""


def find_vessels(rng: np.random.Generator, grid: Grid, anatomy: Anatomy) -> Array:
    """Thin tubes along the sulci, the sagittal sinus and the choroid plexus.

    A tube runs where two independent random fields are both near zero.

    Args:
        rng: the person's source of randomness.
        grid: of the brain.
        anatomy: the brain.

    Returns:
        Fraction of vessel in each voxel of the brain, ``[N]``.
    """
    first, second, third = (smooth_noise(rng, spacing, grid.axes)[anatomy.mask] for spacing in (8.0, 8.0, 3.0))
    tubes = np.exp((first**2 + second**2) * np.float32(-1 / (2 * 0.17**2)))
    x, y, z = anatomy.points
    shallow = np.clip((np.float32(0.97) - anatomy.cover) * 4, 0, 1)
    sinus = np.exp(-((x / 2.2) ** 2)) * np.clip((np.float32(0.8) - anatomy.cover) * 5, 0, 1) * (y < 45) * (z > 0)
    plexus = np.zeros_like(x)
    for side in (-1, 1):
        plexus += np.exp(-(((x - side * 20) / 7) ** 2 + ((y + 36) / 8) ** 2 + ((z - 6) / 9) ** 2))
    plexus *= anatomy.csf**2 * np.clip(third + np.float32(0.3), 0, 1)
    return np.clip(
        tubes * np.maximum(shallow, np.minimum(anatomy.csf * 2, 1) * cortex_weight(anatomy.points)) + sinus + plexus,
        0,
        1,
    )


def render(
    rng: np.random.Generator,
    contrast: Contrast,
    grid: Grid,
    anatomy: Anatomy,
    lesion: Lesion,
    vessels: Array,
    *,
    noise: float,
    bias_field: float,
) -> NDArray[np.int16]:
    """Render one contrast.

    Args:
        rng: the scan's source of randomness.
        contrast: tissue intensities.
        grid: of the brain.
        anatomy: the brain.
        lesion: its tumor.
        vessels: fraction of vessel, ``[N]``.
        noise: standard deviation of the noise in each of the two receive channels, as a fraction of the
            brightest healthy tissue.
        bias_field: standard deviation of the logarithm of the bias field.

    Returns:
        ``[N]`` int16; at least 1, so that zero is background only.
    """
    spread = 1 + rng.normal(0.0, 0.03, 7)
    means = np.array(
        (
            contrast.csf,
            contrast.gm,
            contrast.wm,
            contrast.edema,
            contrast.rim,
            contrast.necrosis,
            contrast.cavity,
        )
    )
    csf, gm, wm, edema, rim, necrosis, cavity = (means * spread).astype(np.float32)
    image = csf * anatomy.csf + gm * anatomy.gm + wm * anatomy.wm + np.float32(contrast.texture) * anatomy.texture
    image += vessels * (np.float32(contrast.vessel) - image)
    mottle = np.float32(contrast.mottle) * lesion.mottle
    image += lesion.edema * (edema + mottle / 2 - image)
    for fraction, mean in ((lesion.necrosis, necrosis), (lesion.rim, rim)):
        image += fraction * (mean * (1 + np.float32(1.5) * mottle) - image)
    image += lesion.cavity * (cavity - image)
    field = smooth_noise(rng, 75.0, grid.axes)[anatomy.mask]
    image *= np.exp(np.float32(bias_field) * field)
    sigma = np.float32(noise * max(contrast.gm, contrast.wm))
    real, imaginary = (_grain(rng, anatomy.mask) * sigma for _ in range(2))
    image = np.hypot(np.maximum(image, 0) + real, imaginary)
    scale = np.float32(contrast.scale * np.exp(rng.normal(0.0, 0.15)))
    return np.clip(np.rint(image * scale), 1, np.iinfo(np.int16).max).astype(np.int16)


def _grain(rng: np.random.Generator, mask: NDArray[np.bool_]) -> Array:
    """Unit normal noise, ``[N]``, correlated over about a voxel as resampled scans are."""
    white = rng.standard_normal(mask.shape, dtype=np.float32)
    for axis in range(3):
        white = ndimage.correlate1d(white, (0.16, 0.68, 0.16), axis=axis)
    return white[mask] / np.float32((0.68**2 + 2 * 0.16**2) ** 1.5)
