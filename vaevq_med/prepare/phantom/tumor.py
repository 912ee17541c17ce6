"""The tumor of a synthetic subject: an enhancing rim around necrosis, edema along white matter, a cavity.

Labels are those of BraTS 2024 glioma: 1 necrotic core (NETC), 2 edema (SNFH), 3 enhancing rim (ET),
4 resection cavity (RC).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.graph import MCP_Geometric

from vaevq_med.prepare.phantom.anatomy import Anatomy, Array, Grid, Template, load_template, magnify, smooth_noise

_EDGE = 0.8
"""Width of the partial-volume edge of a lesion, in mm."""
_STEP = 2.0
"""Grid on which the spread of edema is computed, in mm."""
_REACH = 56.0
"""Half the edge of that grid's cube, in mm."""
_SPEED = {"wm": 1.0, "gm": 0.13, "csf": 0.02}
"""How fast edema spreads in each tissue, relative to white matter."""


class Label(IntEnum):
    """Classes of ``seg`` in BraTS 2024 glioma."""

    NETC = 1
    SNFH = 2
    ET = 3
    RC = 4


@dataclass(frozen=True)
class TumorPlan:
    """Where a tumor lies and how it grows, in template millimeters.

    Attributes:
        center: of the main focus, ``[3]``.
        foci: centers of all foci, ``[F, 3]``; the first is ``center``.
        radii: of the foci's core, rim included, ``[F]``.
        shape: turns and stretches an offset in mm to one whose length is the distance in mm, ``[3, 3]``.
        rim: mean thickness of the enhancing rim.
        edema: how far edema spreads in white matter from the core.
        mass: strength of the mass effect, see ``magnify``.
    """

    center: NDArray[np.float64]
    foci: NDArray[np.float64]
    radii: NDArray[np.float64]
    shape: NDArray[np.float64]
    rim: float
    edema: float
    mass: float

    @property
    def mass_effect(self) -> tuple[list[float], float, float]:
        """Center, strength and reach of the mass effect, as ``build_anatomy`` takes them."""
        return self.center.tolist(), self.mass, 1.1 * float(self.radii[0])


@dataclass(frozen=True)
class Lesion:
    """A tumor's tissue in the N voxels of a brain.

    Attributes:
        label: BraTS 2024 classes, ``[N]`` uint8, 0 for none.
        edema: fraction of edema, ``[N]``, before the core and the cavity lie over it.
        rim: fraction of enhancing tumor, ``[N]``.
        necrosis: fraction of necrotic core, ``[N]``.
        cavity: fraction of resection cavity, ``[N]``.
        mottle: zero-mean texture of the lesion, of about unit variance, ``[N]``.
    """

    label: NDArray[np.uint8]
    edema: Array
    rim: Array
    necrosis: Array
    cavity: Array
    mottle: Array


def plan_tumor(rng: np.random.Generator) -> TumorPlan:
    """Choose a tumor: deep in the white matter of a hemisphere, one focus or two.

    Args:
        rng: the person's source of randomness for the tumor.

    Returns:
        The plan; it does not depend on a grid.
    """
    template = load_template()
    depth = ndimage.gaussian_filter(template.wm[::4, ::4, ::4], 1.2)
    x, y, z = (template.origin.reshape(3, 1) + np.argwhere(depth > 0.55).T * 4).astype(np.float64)
    inside = (np.abs(x) > 18) & (y > -72) & (y < 48) & (z > -2) & (z < 50)
    candidates = np.stack([x, y, z], axis=1)[inside]
    center = candidates[rng.integers(len(candidates))] + rng.uniform(-2, 2, 3)
    radius = rng.uniform(12.0, 21.0)
    basis, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    shape = basis @ np.diag(np.exp(rng.normal(0.0, 0.16, 3))) @ basis.T
    foci, radii = [center], [radius]
    if rng.random() < 0.3:
        direction = rng.standard_normal(3)
        direction[0] *= 0.3
        foci.append(center + direction / np.linalg.norm(direction) * radius * rng.uniform(1.2, 1.6))
        radii.append(radius * rng.uniform(0.35, 0.55))
    return TumorPlan(
        center=center,
        foci=np.array(foci),
        radii=np.array(radii),
        shape=shape,
        rim=rng.uniform(2.2, 4.2),
        edema=rng.uniform(9.0, 20.0),
        mass=rng.uniform(0.15, 0.4),
    )


def _core_distance(plan: TumorPlan, points: Array) -> Array:
    """Signed distance from the smooth outline of the core in mm, negative inside; ``[...]``."""
    distances = []
    for focus, radius in zip(plan.foci.astype(np.float32), plan.radii.astype(np.float32), strict=True):
        x, y, z = (points[axis] - focus[axis] for axis in range(3))
        rows = plan.shape.astype(np.float32)
        distances.append(np.sqrt(sum((row[0] * x + row[1] * y + row[2] * z) ** 2 for row in rows)) - radius)
    return np.min(distances, axis=0)


def _edema_distance(plan: TumorPlan, template: Template, points: Array) -> Array:
    """Distance from the core along white matter in mm, ``[N]``; other tissue counts for more.

    The cheapest path over the template's tissue (with the mass effect), from the core's outline.
    """
    ticks = np.arange(-_REACH, _REACH + _STEP, _STEP)
    cube = (plan.center.reshape(3, 1, 1, 1) + np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"))).astype(
        np.float32
    )
    pushed = magnify(cube, *plan.mass_effect)
    speed = sum(np.float32(value) * template.sample(name, pushed) for name, value in _SPEED.items())
    core = _core_distance(plan, cube) < 0
    cost = np.where(template.sample("cover", pushed) > 0.5, 1 / np.maximum(speed, 0.02), -1.0)
    cost[core] = 1.0
    reached, _ = MCP_Geometric(cost, sampling=(_STEP,) * 3).find_costs(np.argwhere(core))
    reached = np.minimum(reached, 4 * _REACH).astype(np.float32)
    index = (points - cube[:, 0, 0, 0].reshape(3, 1)) / np.float32(_STEP)
    return ndimage.map_coordinates(reached, index, order=1, mode="constant", cval=4 * _REACH, output=np.float32)


def _inside(distance: Array) -> Array:
    """Fraction of tissue inside an outline, from the signed distance to it in mm."""
    return 1 / (1 + np.exp(np.clip(distance / np.float32(0.5 * _EDGE), -30, 30)))


def grow_tumor(rng: np.random.Generator, plan: TumorPlan, grid: Grid, anatomy: Anatomy, *, resected: bool) -> Lesion:
    """Grow a planned tumor in a person's brain.

    The same generator state gives the same tumor before and after the resection.

    Args:
        rng: source of the irregular outlines.
        plan: where and how.
        grid: of the brain.
        anatomy: the brain, with the plan's mass effect.
        resected: True for the state after surgery: a cavity takes the place of most of the core, what is
            left of the tumor has grown a little, the edema has receded.

    Returns:
        The tumor's tissue.
    """
    coarse, fine, thick, rough = (
        smooth_noise(rng, spacing, grid.axes, limit=2.0)[anatomy.mask] for spacing in (13.0, 5.0, 9.0, 3.0)
    )
    mottle = smooth_noise(rng, 2.5, grid.axes)[anatomy.mask] * np.float32(0.6) + np.float32(0.8) * fine
    points = anatomy.points
    radius = np.float32(plan.radii[0])
    warp = np.float32(0.16) * radius * coarse + np.float32(1.3) * fine
    outline = _core_distance(plan, points) + warp
    spread = _edema_distance(plan, load_template(round(grid.spacing, 3)), points)
    if resected:
        outline -= np.float32(1.0)
    rim = np.float32(plan.rim) * (1 + np.float32(0.5) * thick) + np.float32(0.7) * rough
    core = _inside(outline)
    necrosis = _inside(outline + np.maximum(rim, np.float32(0.5)))
    reach = np.float32(plan.edema * (0.65 if resected else 1.0)) * (1 + np.float32(0.3) * coarse)
    edema = _inside((spread - reach - np.float32(1.2) * fine) / 2)
    density = 1 - np.float32(0.4) * np.clip(spread / np.maximum(reach, 1), 0, 1)
    if resected:
        cavity, margin = _cavity(plan, points, outline, coarse, fine, thick)
    else:
        cavity = margin = np.zeros_like(core)
    tissue = 1 - anatomy.csf**2
    core, necrosis, margin = core * tissue, necrosis * tissue, margin * tissue
    enhancing = np.maximum(core - necrosis, margin) * (1 - cavity)
    necrosis = necrosis * (1 - cavity)
    edema = np.maximum(edema, core) * tissue
    label = np.zeros(len(core), dtype=np.uint8)
    label[edema > 0.5] = Label.SNFH
    label[enhancing + necrosis > 0.5] = Label.ET
    label[(enhancing + necrosis > 0.5) & (necrosis > enhancing)] = Label.NETC
    label[cavity > 0.5] = Label.RC
    return Lesion(label, edema * density, enhancing, necrosis, cavity, mottle)


def _cavity(
    plan: TumorPlan, points: Array, outline: Array, coarse: Array, fine: Array, thick: Array
) -> tuple[Array, Array]:
    """The resection cavity and the patchy enhancement of its wall, ``[N]`` each.

    The cavity takes the core's outer part and reaches towards the surface of the brain.
    """
    radius = np.float32(plan.radii[0])
    outward = plan.center - np.array([0.0, -18.0, 12.0])
    outward = (outward / np.linalg.norm(outward)).astype(np.float32)
    x, y, z = points - plan.center.astype(np.float32).reshape(3, 1)
    along = outward[0] * x + outward[1] * y + outward[2] * z
    across = np.sqrt(np.maximum(x**2 + y**2 + z**2 - along**2, 0))
    access = np.maximum(across - np.float32(0.6) * radius, along - np.float32(1.7) * radius) + fine
    front = np.float32(-0.3) * radius - along + np.float32(0.2) * radius * thick
    distance = np.maximum(np.minimum(outline + np.float32(0.5), access), front)
    cavity = _inside(distance)
    patches = _inside(np.float32(2.4) * (np.float32(0.3) - coarse - np.float32(0.5) * thick))
    margin = _inside(np.abs(distance - np.float32(1.0)) - np.float32(1.3)) * patches
    return cavity, margin
