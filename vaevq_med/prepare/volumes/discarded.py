"""What slicing discards of a volume's foreground: measured for each contrast, and refused above a stated share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.numbers import percent
from vaevq_med.prepare.recipes import Recipe

LIMITS: Mapping[str, float] = {"background": 0.05, "clipping": 0.01, "saturation": 0.05}
"""What ``--accept`` may name, and the shares above which a case is refused otherwise.

``background``: of the corners of the foreground's bounding box that hold faint noise, as around a head; where
no background was found at all, whatever they hold. ``clipping``: of the foreground that ``clip_negatives`` sets to 0.
``saturation``: of the foreground outside of the window, or at its white, beyond the share that the recipe's percentiles
leave out.
"""
_SHOWN = ("clipped", "saturated")


@dataclass(frozen=True)
class Discarded:
    """What was measured of one contrast of a case.

    Attributes:
        background: the background's intensity, or None where none was found and 0 was taken.
        tolerance: how far from it intensities still count as background.
        foreground: share of the volume's voxels that are not background.
        clipped: share of the foreground that ``clip_negatives`` sets to 0.
        saturated: share of what is left of it that is white, or below the window's black.
        corners: share of the corners of the foreground's bounding box that hold faint noise.
        white_regions: share of each region of the segmentation that is white, of those that are not empty.
    """

    background: float | None
    tolerance: float
    foreground: float
    clipped: float
    saturated: float
    corners: float = 0.0
    white_regions: Mapping[str, float] = field(default_factory=dict)

    def excesses(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Names of :data:`LIMITS` that are exceeded, and in words by what.

        Args:
            recipe: with which the case is sliced.
        """
        low, high = recipe.percentiles
        asked = 1 - (high - low) / 100
        if self.background is None:
            yield (
                "background",
                f"found no background: no value holds half of the border, and {percent(self.foreground)} of the "
                "voxels are not 0, expected one, as a skull-stripped volume has",
            )
        elif self.corners > (most := LIMITS["background"]):
            yield (
                "background",
                f"found a background of {self.background:g} with noise: {percent(self.corners, most)} of the corners "
                f"of the foreground's box hold some, expected at most {percent(most)}, as a skull-stripped volume "
                "leaves them empty",
            )
        if self.clipped > (most := LIMITS["clipping"]):
            yield (
                "clipping",
                f"found {percent(self.clipped, most)} of the foreground at or below 0, which clip_negatives would set "
                f"to 0, expected at most {percent(most)}; a recipe with clip_negatives false keeps it, as "
                "--recipe brats24/axial_256_signed does",
            )
        if self.saturated > (most := asked + LIMITS["saturation"]):
            yield (
                "saturation",
                f"found {percent(self.saturated, most)} of the foreground saturated, expected at most "
                f"{percent(most)} with percentiles {low} and {high}; was the volume clipped before?",
            )


def check_accepted(accept: Collection[str]) -> None:
    """Refuse a name that is none of :data:`LIMITS`.

    Raises:
        DataError: naming it.
    """
    for name in accept:
        if name not in LIMITS:
            raise DataError(f"accept is {name!r}; expected one of {', '.join(LIMITS)}")


def check_discarded(
    name: str, found: Discarded, recipe: Recipe, *, accept: Collection[str], note: Callable[[str], None]
) -> None:
    """Refuse a volume of which too much is discarded.

    Args:
        name: of the file, for the message.
        found: what was measured of it.
        recipe: with which the case is sliced.
        accept: names of :data:`LIMITS` that the user goes on with.
        note: called with what was accepted.

    Raises:
        DataError: a limit that was not accepted is exceeded.
    """
    for limit, words in found.excesses(recipe):
        if limit not in accept:
            raise DataError(f"{name}: {words}; or go on with --accept {limit}")
        note(f"{limit} was accepted: {words.partition(', expected')[0]}")


def summary(cases: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What a report says of all cases.

    Args:
        cases: case to contrast to the fields of :class:`Discarded`.

    Returns:
        The limits; for each contrast and each kind of loss how many cases have it, their mean, the largest share, and
        its case; and all that was measured.
    """
    contrasts: dict[str, dict[str, Any]] = {}
    for modality in dict.fromkeys(name for found in cases.values() for name in found):
        measured = {case: found[modality] for case, found in cases.items() if modality in found}
        regions = dict.fromkeys(region for found in measured.values() for region in found["white_regions"])
        contrasts[modality] = {
            **{kind: _over_cases({case: found[kind] for case, found in measured.items()}) for kind in _SHOWN},
            "white_regions": {
                region: _over_cases(
                    {
                        case: found["white_regions"][region]
                        for case, found in measured.items()
                        if region in found["white_regions"]
                    }
                )
                for region in regions
            },
        }
    return {"limits": dict(LIMITS), "contrasts": contrasts, "cases": dict(cases)}


def _over_cases(shares: Mapping[str, float]) -> dict[str, Any]:
    """Number, mean and maximum of the shares of cases."""
    worst = max(shares, key=lambda case: shares[case])
    mean = round(sum(shares.values()) / len(shares), 6)
    return {"cases": len(shares), "mean": mean, "max": shares[worst], "case": worst}


def in_words(facts: Mapping[str, Any]) -> Iterator[str]:
    """A line for each kind of loss of a :func:`summary`: the largest share of each contrast.

    Args:
        facts: the summary.

    Yields:
        Of regions those contrasts alone in which more than the limit of saturation is white in some case.
    """
    for kind in _SHOWN:
        shares = [f"{modality} {percent(found[kind]['max'])}" for modality, found in facts["contrasts"].items()]
        if shares:
            yield f"{kind} of the foreground, at most: {', '.join(shares)}"
    contrasts: Mapping[str, Any] = facts["contrasts"]
    for region in dict.fromkeys(region for found in contrasts.values() for region in found["white_regions"]):
        found = {modality: contrasts[modality]["white_regions"][region] for modality in contrasts}
        limit = LIMITS["saturation"]
        white = [
            f"{modality} {percent(most['max'], limit)} ({most['case']})"
            for modality, most in found.items()
            if most["max"] > limit
        ]
        if white:
            yield f"white of the {region}, at most: {', '.join(white)}"


def gathered(notes: Iterable[Sequence[str]]) -> list[str]:
    """Notes on files, those that say the same as one.

    Args:
        notes: names of files, and what is to be known of them.

    Examples:
        >>> gathered([("a.nii", "odd"), ("b.nii", "odd"), ("c.nii", "even")])
        ['a.nii and 1 more: odd', 'c.nii: even']
    """
    files: dict[str, list[str]] = {}
    for name, text in notes:
        files.setdefault(text, []).append(name)
    return [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {text}" for text, names in files.items()]
