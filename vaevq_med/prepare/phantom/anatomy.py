"""Anatomy of a synthetic subject: the MNI152 template, deformed and sharpened into one person's brain.

Everything is defined in millimeters of MNI space, so that a subject is the same person at every grid.

Legend: X Y Z voxels of the working grid (the part of the volume around the brain); N voxels in the brain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vaevq_med.core.errors import DataError

Array = NDArray[np.float32]

FULL_SHAPE = (182, 218, 182)
_LOWER = (-91.5, -126.5, -72.5)
"""Lower edges of the field of view in mm: the MNI152 1 mm grid, whose first axis runs right to left."""
_LATTICE_ORIGIN = -130.0
_LATTICE_EXTENT = 250.0
_SPLINE_STD = (151.0 / 315.0) ** 1.5
"""Standard deviation of a 3D cubic B-spline with unit normal coefficients, averaged over position."""


@dataclass(frozen=True)
class Template:
    """The MNI152 maps around the brain, on a 1 mm grid, zero outside.

    Attributes:
        gm: gray-matter probability, in [0, 1].
        wm: white-matter probability, in [0, 1].
        csf: what remains of the brain mask, in [0, 1].
        texture: T1 intensity minus what the three classes explain, white matter being about 0.87.
        cover: brain mask smoothed by 2 mm, in [0, 1]; it falls towards the surface.
        origin: MNI coordinates of the first voxel, in mm.
    """

    gm: Array
    wm: Array
    csf: Array
    texture: Array
    cover: Array
    origin: NDArray[np.float64]

    def sample(self, name: str, points: Array) -> Array:
        """Interpolate a map linearly.

        Args:
            name: one of the map attributes.
            points: MNI coordinates in mm, ``[3, ...]``.

        Returns:
            The map at the points, shape ``[...]``; zero outside the grid.
        """
        index = points - self.origin.astype(np.float32).reshape(3, *[1] * (points.ndim - 1))
        return ndimage.map_coordinates(getattr(self, name), index, order=1, mode="constant", output=np.float32)


def _read_map(name: str) -> tuple[Array, NDArray[np.float64]]:
    """Read one MNI152 map (``t1``, ``gm`` or ``wm``) of nilearn's wheel, scaled to [0, 1].

    The file is read directly: importing nilearn takes two seconds in every worker.
    """
    spec = find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise DataError("synthetic subjects need nilearn's MNI152 maps; nilearn is not installed")
    file = f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    path = Path(spec.origin).parent / "datasets" / "data" / file
    if not path.is_file():
        raise DataError(f"synthetic subjects need nilearn's {file}; found no such file in {path.parent}")
    image = nib.Nifti1Image.from_filename(path)
    return np.asanyarray(image.dataobj).astype(np.float32) / np.float32(255.0), image.affine


@lru_cache(maxsize=2)
def load_template(spacing: float = 1.0) -> Template:
    """Load the template, smoothed for sampling at a coarser spacing.

    Args:
        spacing: of the grid that will sample it, in mm; above 1 the maps are smoothed against aliasing.

    Returns:
        The template; the same object for the same spacing.

    Raises:
        DataError: nilearn or its MNI152 files are not installed.
    """
    maps, origin = _load_maps()
    sigma = 0.42 * math.sqrt(max(spacing**2 - 1.0, 0.0))

    def blur(volume: Array, width: float) -> Array:
        return ndimage.gaussian_filter(volume, width, mode="constant") if width else volume

    return Template(
        gm=blur(maps["gm"], sigma),
        wm=blur(maps["wm"], sigma),
        csf=blur(maps["csf"], sigma),
        texture=blur(maps["texture"], sigma),
        cover=blur(maps["mask"], math.hypot(2.0, sigma)),
        origin=origin,
    )


@lru_cache(maxsize=1)
def _load_maps() -> tuple[dict[str, Array], NDArray[np.float64]]:
    """The template's maps, cut to the brain with a margin, and the coordinates of their first voxel."""
    t1, affine = _read_map("t1")
    mask = (t1 > 0).astype(np.float32)
    gm, wm = (_read_map(name)[0] * mask for name in ("gm", "wm"))
    csf = np.clip(mask - gm - wm, 0, 1)
    texture = np.clip(t1 - 0.87 * wm - 0.65 * gm - 0.27 * csf, -0.2, 0.2) * mask
    extent = ndimage.find_objects(mask.astype(np.uint8))[0]
    margin = 8
    maps = {
        name: np.pad(volume[extent], margin)
        for name, volume in (("mask", mask), ("gm", gm), ("wm", wm), ("csf", csf), ("texture", texture))
    }
    start = np.array([axis.start - margin for axis in extent], dtype=np.float64)
    return maps, affine[:3, 3] + start


@dataclass(frozen=True)
class Grid:
    """A volume's grid and the part of it that holds the brain.

    Attributes:
        shape: voxels of the whole volume.
        affine: voxel to MNI millimeters, ``[4, 4]``; left, anterior, superior as in MNI152 of FSL.
        window: the working grid, as slices of the volume.
        axes: MNI coordinates of the working grid's voxels along each axis, in mm.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    window: tuple[slice, slice, slice]
    axes: tuple[Array, Array, Array]

    @property
    def spacing(self) -> float:
        """Geometric mean of the voxel's edges, in mm."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) ** (1 / 3))


def make_grid(shape: Sequence[int]) -> Grid:
    """Lay a grid over the field of view of MNI152 at 1 mm (182 x 218 x 182 mm).

    Args:
        shape: voxels along each axis; the field of view stays, so fewer voxels are larger ones.

    Returns:
        The grid.
    """
    size = np.array(FULL_SHAPE) / np.array(shape)
    affine = np.diag([-size[0], size[1], size[2], 1.0])
    affine[:3, 3] = (
        _LOWER[0] + FULL_SHAPE[0] - size[0] / 2,
        _LOWER[1] + size[1] / 2,
        _LOWER[2] + size[2] / 2,
    )
    bounds = ((-83.0, 83.0), (-117.0, 84.0), (-80.0, 94.0))
    window, axes = [], []
    for axis, (low, high) in enumerate(bounds):
        position = affine[axis, 3] + affine[axis, axis] * np.arange(shape[axis])
        inside = np.flatnonzero((position > low) & (position < high))
        window.append(slice(int(inside[0]), int(inside[-1]) + 1))
        axes.append(position[window[-1]].astype(np.float32))
    return Grid((shape[0], shape[1], shape[2]), affine, (window[0], window[1], window[2]), (axes[0], axes[1], axes[2]))


def smooth_noise(
    rng: np.random.Generator, spacing: float, axes: Sequence[Array], *, limit: float | None = None
) -> Array:
    """A smooth Gaussian random field of about zero mean and unit variance.

    A cubic B-spline with normal coefficients on a lattice that is fixed in space, so the field does not
    depend on where it is evaluated.

    Args:
        rng: source of the coefficients.
        spacing: distance of the lattice's knots, in mm; structures are about twice as wide.
        axes: coordinates along X, Y, Z, in mm.
        limit: clip the coefficients to this magnitude; bounds the field and its slope.

    Returns:
        ``[X, Y, Z]``.
    """
    count = math.ceil(_LATTICE_EXTENT / spacing) + 4
    field = rng.standard_normal((count,) * 3, dtype=np.float32)
    if limit is not None:
        field = np.clip(field, -limit, limit)
    for axis in (2, 1, 0):
        position = (np.asarray(axes[axis], dtype=np.float64) - _LATTICE_ORIGIN) / spacing
        first = np.floor(position).astype(np.intp)
        t = (position - first).astype(np.float32)
        taps = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
        taps = (taps / 6).astype(np.float32)
        along = tuple(slice(None) if a == axis else None for a in range(3))
        total: Array = np.take(field, first, axis=axis) * taps[0][along]
        for offset in (1, 2, 3):
            total += np.take(field, first + offset, axis=axis) * taps[offset][along]
        field = total
    return field / np.float32(_SPLINE_STD)


@dataclass(frozen=True)
class Anatomy:
    """One person's brain on a working grid.

    Attributes:
        mask: the brain, ``[X, Y, Z]`` bool.
        points: template coordinates of the brain's voxels in mm, ``[3, N]``, before any mass effect.
        csf: fraction of cerebrospinal fluid, ``[N]``; the three fractions add up to one.
        gm: fraction of gray matter, ``[N]``.
        wm: fraction of white matter, ``[N]``.
        texture: T1 intensity that the fractions do not explain, ``[N]``.
        cover: depth below the surface, ``[N]``; about 0.5 at the surface and 1 from 4 mm on.
    """

    mask: NDArray[np.bool_]
    points: Array
    csf: Array
    gm: Array
    wm: Array
    texture: Array
    cover: Array


def deform(rng: np.random.Generator, axes: Sequence[Array], strength: float) -> Array:
    """Map a person's brain to the template: a small affine map and smooth displacements at three scales.

    Args:
        rng: the person's source of randomness.
        axes: MNI coordinates along X, Y, Z, in mm.
        strength: 0 for the template itself, 1 for the spread among people, up to 1.5.

    Returns:
        Template coordinates of each voxel in mm, ``[3, X, Y, Z]``.
    """
    turn = rng.normal(0.0, 0.02, 3) * strength
    matrix = np.diag(1.0 + rng.normal(0.0, 0.03, 3) * strength)
    for (a, b), angle in zip(((0, 1), (0, 2), (1, 2)), turn, strict=True):
        matrix[a, b] += angle
        matrix[b, a] -= angle
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    points = np.empty((3, *(len(axis) for axis in axes)), dtype=np.float32)
    for row in range(3):
        points[row] = sum(np.float32(matrix[row, column]) * grid[column] for column in range(3))
        for spacing, amplitude in ((62.0, 3.6), (30.0, 1.5), (13.0, 0.8)):
            points[row] += np.float32(strength * amplitude) * smooth_noise(rng, spacing, axes, limit=2.5)
    return points


def magnify(points: Array, center: Sequence[float], strength: float, reach: float) -> Array:
    """Pull sampling points towards a center, so that what lies there looks larger and pushes the rest away.

    The map is radial and monotone for ``strength < 1``: nothing folds.

    Args:
        points: template coordinates in mm, ``[3, ...]``.
        center: of the growth, in mm.
        strength: 0 for none; below 1.
        reach: standard deviation of the effect, in mm.

    Returns:
        The moved points, ``[3, ...]``.
    """
    offset = points - np.asarray(center, dtype=np.float32).reshape(3, *[1] * (points.ndim - 1))
    squared = np.einsum("i...,i...->...", offset, offset)
    return points - np.float32(strength) * np.exp(squared / np.float32(-2 * reach**2)) * offset


def cortex_weight(points: Array) -> Array:
    """Tell the cortex from the deep gray matter, ventricles, brain stem and cerebellum, by place alone.

    Args:
        points: template coordinates in mm, ``[3, N]``.

    Returns:
        1 in the cortex, 0 in the rest, ``[N]``.
    """
    x, y, z = points
    deep = (x / 38) ** 2 + ((y + 8) / 44) ** 2 + ((z - 4) / 26) ** 2
    below = 1 / (1 + np.exp((z + 22 + np.maximum(y + 45, 0)) / 3)) * (y < -25)
    return np.clip((deep - 1) * 3, 0, 1) * (1 - below)


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part of a mask."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == np.argmax(sizes)


def build_anatomy(
    rng: np.random.Generator,
    grid: Grid,
    deformation: float,
    mass: tuple[Sequence[float], float, float] | None,
) -> Anatomy:
    """Deform the template into one person's brain.

    Args:
        rng: the person's source of randomness.
        grid: where the brain is wanted.
        deformation: see ``deform``.
        mass: center, strength and reach of a tumor's mass effect (see ``magnify``), or None.

    Returns:
        The brain.
    """
    template = load_template(round(grid.spacing, 3))
    points = deform(rng, grid.axes, deformation)
    ventricles = rng.uniform(0.0, 0.3) * min(deformation, 1.0)
    atrophy = rng.normal(0.0, 0.25)
    edge = 0.5 + 0.07 * smooth_noise(rng, 9.0, grid.axes, limit=2.0)
    mask = _largest_part(template.sample("cover", points) > edge)
    points = points[:, mask]
    source = points
    for side in (-1, 1):
        source = magnify(source, (side * 14.0, -12.0, 14.0), ventricles, 16.0)
    if mass is not None:
        source = magnify(source, *mass)
    csf, gm, wm = (template.sample(name, source) for name in ("csf", "gm", "wm"))
    sheet = smooth_noise(rng, 6.5, grid.axes)[mask]
    csf += np.float32(0.35) * np.exp(sheet**2 * np.float32(-1 / (2 * 0.22**2))) * gm * cortex_weight(source)
    weights = []
    for fraction, shift in ((csf, atrophy), (gm, 0.0), (wm, 0.0)):
        noise = smooth_noise(rng, 4.0, grid.axes)[mask]
        weights.append(
            (fraction + np.float32(0.01)) ** np.float32(1.7) * np.exp(np.float32(0.35) * noise + np.float32(shift))
        )
    total = weights[0] + weights[1] + weights[2]
    csf, gm, wm = (weight / total for weight in weights)
    return Anatomy(
        mask=mask,
        points=points,
        csf=csf,
        gm=gm,
        wm=wm,
        texture=template.sample("texture", source),
        cover=template.sample("cover", points),
    )
