"""Finding cases among DICOM series: an examination is a study, and a contrast is told by what a series is called."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.images.dicom import Series, find_series
from vaevq_med.prepare.job import Search
from vaevq_med.prepare.volumes.case import CONTRAST_ALIASES, Case, Volume, listed, printable, strip_suffix
from vaevq_med.prepare.volumes.find import walk
from vaevq_med.prepare.volumes.labels import BRATS2024

_OTHER = re.compile(r"[^A-Za-z0-9._-]+")
_T1 = re.compile(r"t1|mprage|mp2rage|bravo|spgr")
_T2 = re.compile(r"t2")
_FLAIR = re.compile(r"flair|dark_?fluid|tirm|t2f")
_OTHERS = re.compile(
    r"t2_?(?:\*|star)|loc(?:_|$|al)|scout|survey|diff|trace|perf|map|subtr|angio|spectro"
    r"|(?:^|_)(?:adc|asl|dce|dsc|dti|dwi|mip|sub|swan|swi|tof)(?:_|$)"
)
_NOT_T2W = re.compile(r"ha?emo|(?:^|_)(?:fl[23]d|ffe|flash|gre|grad[a-z]*|pd[a-z0-9]*)(?:_|$)")
"""T2*-weighted, or two contrasts in one."""
_AGENT = r"(?:contrast|kontrast|gad|enh)[a-z]*|gd|km|ce|cm|c|iv"
_BEFORE = re.compile(
    r"(?:^|_)(?:"
    r"pre(?!_?op)(?:contrast|gd|km)?|nati[fv]e?|t1w?(?:n|pre)"
    r"|(?:wo|w_o|w_?out|without|non|ohne|sans)(?!_(?:fat|fs|sat))"
    rf"|(?:no|before|prior_to|vor|avant)_\+?(?:{_AGENT})"
    r"|un_?enh[a-z]*|non(?:contrast|enh|gad)[a-z]*"
    r")(?:_|$)"
)
_BEFORE_AS_WRITTEN = re.compile(
    r"(?<![a-z0-9])-c(?![a-z0-9+])|(?:(?<![a-z0-9+])|t1w?)c-(?![a-z0-9])"
    rf"|(?:^|[\s_])0[\s_]+(?:{_AGENT})(?![a-z0-9])"
)
"""Where the signs say it: ``-C``, and no decimals, as in ``3.0 CE``."""
_AFTER = re.compile(
    r"(?:^|_)(?:post(?!_?op)[a-z]*|gd|gad|gado[a-z]*|ce|km|contrast|enh|enhanced)(?:_|$)|\+(?:c|gd|km)(?:_|$)|c\+(?:_|$)"
    r"|t1w?(?:ce|c|gd|gad|post|km)(?:_|$)"
)


def contrast_of_series(description: str, *, enhanced: bool = False) -> str | None:
    """The contrast that the usual words of a description mean; None where they mean none of the four.

    Args:
        description: of the series.
        enhanced: whether it names a contrast agent, which makes a T1-weighted image one after it.

    Examples:
        >>> [contrast_of_series(text) for text in ("AX T1 POST GD", "t1_mprage_sag", "T2 FLAIR", "t2_tse_tra", "DWI")]
        ['t1c', 't1n', 't2f', 't2w', None]
    """
    text = re.sub(r"[^a-z0-9+*]+", "_", description.lower()).strip("_")
    if _OTHERS.search(text):
        return None
    if _T1.search(text):  # first, as there is a T1 FLAIR
        before = _BEFORE.search(text) or _BEFORE_AS_WRITTEN.search(description.lower())
        return "t1c" if (enhanced or _AFTER.search(text)) and not before else "t1n"
    if _FLAIR.search(text):
        return "t2f"
    return "t2w" if _T2.search(text) and not _NOT_T2W.search(text) else None


def read_patterns(options: Sequence[str], contrasts: Sequence[str]) -> dict[str, list[str]]:
    """What a user says of which series is which contrast.

    Args:
        options: ``CONTRAST=PATTERN``, or ``CONTRAST=NUMBER`` of a series.
        contrasts: that every case must have.

    Raises:
        DataError: an option has another form, or another contrast.

    Examples:
        >>> read_patterns(["t1c=*post*", "t1ce=7"], ["t1c", "t2f"])
        {'t1c': ['*post*', '7']}
    """
    patterns: dict[str, list[str]] = defaultdict(list)
    for text in options:
        name, sign, pattern = text.partition("=")
        contrast = name if name in contrasts else CONTRAST_ALIASES.get(name.lower(), name)
        if not sign or not pattern.strip():
            raise DataError(f"--series: found {text!r}, expected CONTRAST=PATTERN, e.g. 't1c=*post*'")
        if contrast not in contrasts:
            raise DataError(f"--series: found the contrast {name!r}, expected one of {', '.join(contrasts)}")
        patterns[contrast].append(pattern.strip().lower())
    return dict(patterns)


def series_below(root: Path, search: Search[Case], *, exclude: Path | None = None) -> list[Series]:
    """The DICOM series of a folder and of those below it; none where any file there is a volume by its name.

    Args:
        root: the folder.
        search: that takes note of folders which cannot be read.
        exclude: one to leave out.
    """
    folders: dict[Path, None] = {}
    for path in walk(root, search, exclude):
        if strip_suffix(path.name) is not None:
            return []
        folders[path.parent] = None
    return [series for folder in folders for series in find_series(folder)]


def find_studies(
    root: Path,
    search: Search[Case],
    found: Sequence[Series],
    contrasts: Sequence[str],
    patterns: Mapping[str, Sequence[str]],
) -> None:
    """Cases of DICOM series: those of one study, or, where none is named, of one folder.

    A case is called after the folder that its series are in or below, seen from ``root``.

    Args:
        root: that the series are below.
        search: that takes the cases, and what stood in the way of others.
        found: the series.
        contrasts: that every case must have.
        patterns: of each contrast, patterns of descriptions (as a shell's, upper and lower case alike) and numbers of
            series; the usual words tell those of the others.
    """
    studies: dict[str, list[Series]] = defaultdict(list)
    images = [series for series in found if series.is_image]
    beside = [series.folder for series in images]
    for series in images:
        alone = beside.count(series.folder) == 1
        studies[series.study or str(series.folder.parent if alone else series.folder)].append(series)
    places: dict[Path, list[list[Series]]] = defaultdict(list)
    for members in studies.values():
        places[Path(os.path.commonpath([series.folder for series in members]))].append(members)
    named: dict[str, list[Path]] = defaultdict(list)
    for folder in sorted(places):
        named[_name(folder, root)].append(folder)
    taken: dict[str, list[str]] = defaultdict(list)
    unused: list[str] = []
    for name, folders in sorted(named.items()):
        if len(folders) > 1:
            shown = " and ".join(printable(repr(str(folder.relative_to(root)))) for folder in folders[:2])
            search.problems.append(
                (name, f"found {len(folders)} folders of this name ({shown}), expected one; rename one")
            )
            continue
        groups = places[folders[0]]
        if len(groups) > 1:
            search.problems.append(
                (name, f"found the series of {len(groups)} studies in one folder, expected a folder for each study")
            )
            continue
        chosen, left = _chosen(groups[0], contrasts, patterns)
        problem = _problem(chosen, groups[0], contrasts)
        if problem is not None:
            search.problems.append((name, problem))
            continue
        for contrast in contrasts:
            taken[contrast].append(chosen[contrast][0].description)
        unused += [series.description for series in left]
        volumes = {
            contrast: Volume(chosen[contrast][0].folder, series=chosen[contrast][0].uid, title=f"{name}-{contrast}")
            for contrast in contrasts
        }
        search.units.append(Case(name, name, volumes, None, BRATS2024.name))
    search.notes += [taken_note(contrast, names) for contrast, names in taken.items()]
    if len(images) < len(found):
        search.notes.append(f"{len(found) - len(images)} DICOM series that hold no images are left out")
    if unused:
        search.notes.append(f"series that are none of these contrasts are left out: {_counted(unused)}")


def taken_note(contrast: str, descriptions: Sequence[str]) -> str:
    """What was taken for a contrast.

    Args:
        contrast: its name.
        descriptions: of the series, one for each case.

    Examples:
        >>> taken_note("t2f", ["FLAIR sag", "FLAIR ax", "FLAIR sag"])
        "t2f is the series called 'FLAIR sag' (2 times), 'FLAIR ax'"
    """
    return f"{contrast} is the series called {_counted(descriptions)}"


def _name(folder: Path, root: Path) -> str:
    parts = folder.relative_to(root).parts or (root.name,)
    return safe_name("_".join(parts))


def safe_name(text: str) -> str:
    """A name that a case's folder can have, made of another.

    Examples:
        >>> safe_name("scan 1/T1 (a)")
        'scan_1_T1_a_'
    """
    return _OTHER.sub("_", text).lstrip("._-")[:128].rstrip(".") or "volume"


def _chosen(
    members: Sequence[Series], contrasts: Sequence[str], patterns: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[Series]], list[Series]]:
    """Of each contrast the series that may be it, and those that are none."""
    chosen: dict[str, list[Series]] = {contrast: [] for contrast in contrasts}
    left = []
    for series in members:
        named = [contrast for contrast, own in patterns.items() if any(_fits(series, pattern) for pattern in own)]
        guess = contrast_of_series(series.description, enhanced=series.enhanced)
        if not named and guess in chosen and guess not in patterns:
            named = [guess]
        for contrast in named:
            chosen[contrast].append(series)
        if not named:
            left.append(series)
    return chosen, left


def _fits(series: Series, pattern: str) -> bool:
    return pattern == series.number or fnmatchcase(series.description.lower(), pattern)


def _problem(chosen: Mapping[str, Sequence[Series]], members: Sequence[Series], contrasts: Sequence[str]) -> str | None:
    """What stands in the way of a case, or None."""
    several = next((contrast for contrast, own in chosen.items() if len(own) > 1), None)
    if several is not None:
        own = chosen[several]
        return (
            f"found {len(own)} series for {several} ({_shown(own)}), expected one; choose it by its description or "
            f"number, e.g. --series {several}={own[0].number or own[0].description}"
        )
    missing = [contrast for contrast, own in chosen.items() if not own]
    if missing:
        return (
            f"missing {', '.join(missing)}; found the series {_shown(members)}, expected {', '.join(contrasts)}; say "
            f"which it is by its description or number, e.g. --series '{missing[0]}=*words*'"
        )
    shared = [(a, b) for a in contrasts for b in contrasts if a < b and chosen[a][0] is chosen[b][0]]
    if shared:
        a, b = shared[0]
        return f"found the series {_shown(chosen[a])} for {a} and for {b}, expected one for each"
    return None


def _shown(members: Sequence[Series]) -> str:
    """Series for a reader: number, description, files."""
    texts = [
        f"{f'{one.number} ' if one.number else ''}'{one.description}' of {one.files} file{'s'[: one.files > 1]}"
        for one in members
    ]
    return listed(texts, 12)


def _counted(names: Sequence[str]) -> str:
    """Different names, each with how often it is there."""
    counts = {name: list(names).count(name) for name in dict.fromkeys(names)}
    return listed([f"'{printable(name)}'{f' ({n} times)' if n > 1 else ''}" for name, n in counts.items()])
