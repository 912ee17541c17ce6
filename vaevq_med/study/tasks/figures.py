"""What a study of downstream tasks says of a row: figures that cost little, and those that a diagnosis is made of."""

from __future__ import annotations

from dataclasses import replace

from vaevq_med.evaluation.volumes import FIGURES as VOLUME_FIGURES
from vaevq_med.metrics.figures import RFID, Figure
from vaevq_med.metrics.preservation import SIZES
from vaevq_med.metrics.segmentation import FIGURES as SEGMENTATION_FIGURES

SHORT = {"whole_tumor": "WT", "tumor_core": "TC", "enhancing_tumor": "ET"}
"""As tables of BraTS call the regions."""
BYTES = Figure("bytes", "Bytes a volume", 0, convention="of a case's files, divided by its contrasts")
_DICE, _DISTANCE = (next(f for f in SEGMENTATION_FIGURES if f.name == name) for name in ("dice", "hd95_mm"))


def _of_region(figure: Figure, region: str) -> Figure:
    head, mark, unit = figure.title.partition(" (")
    better, convention = figure.higher_is_better, figure.convention
    title = f"{head} {SHORT[region]}{mark}{unit}"
    return Figure(f"{figure.name}_{region}", title, figure.digits, higher_is_better=better, convention=convention)


_ERROR = Figure(
    "volume_error_ml",
    "Volume error (ml)",
    2,
    higher_is_better=False,
    convention="mean over cases of the absolute difference of the volume found and the expert's",
)
_BIAS = Figure("difference_ml", "Volume bias (ml)", 2, convention="mean over cases of that difference, with its sign")
CHEAP = (
    *(figure for figure in VOLUME_FIGURES if figure.name in ("psnr_brain", "psnr_tumor", "ssim_brain", "perceptual")),
    replace(
        RFID,
        convention="Frechet distance of the pooled features of originals and results, of the network and the slices of "
        "the LPIPS-style distance, all cases and contrasts together; biased upward at few slices, so that it compares "
        "rows of one study alone",
    ),
    Figure(
        "frd",
        "FRD",
        3,
        higher_is_better=False,
        convention="Frechet distance of radiomics vectors (arXiv 2412.01496) of all contrasts and regions, in units of "
        "the originals' spread; biased upward at few regions, so that it compares rows of one study alone",
    ),
)
"""What needs no segmentation network and no lesions."""
EXPENSIVE = (
    *(_of_region(_DICE, region) for region in SHORT),
    _of_region(_DISTANCE, "whole_tumor"),
    _of_region(_BIAS, "whole_tumor"),
    _of_region(_ERROR, "whole_tumor"),
    Figure(
        "delta_dice_whole_tumor",
        "ΔDice WT",
        3,
        higher_is_better=True,
        convention="mean over cases of Dice less that of the originals, by the same segmentation network",
    ),
    *(
        Figure(
            f"lesion_recall_{size}",
            f"{size.capitalize()} lesions kept (%)",
            1,
            100,
            higher_is_better=True,
            convention=f"share of the {size} lesions of WT, of all cases, of whose voxels the segmentation network "
            "finds half or more",
        )
        for size in SIZES
    ),
    Figure(
        "icc_share",
        "ICC > 0.9 (%)",
        1,
        100,
        higher_is_better=True,
        convention="share of the radiomics features, of all contrasts and regions, whose ICC(A,1) between original and "
        "result is above 0.9",
    ),
    Figure(
        "icc_shape_share",
        "ICC > 0.9, shape (%)",
        1,
        100,
        higher_is_better=True,
        convention="likewise of the shapes of the regions that the segmentation network finds; beside it how many "
        "regions, over all cases, it finds in the result too, of those that it finds in the original; where it finds "
        "none, volume, area, diameter and axes are 0, and the other features count as not reproduced",
    ),
    Figure(
        "auc",
        "Lesion AUC",
        3,
        higher_is_better=True,
        convention="mean over sizes and strengths of the area under the ROC curve of the observer of synthetic lesions",
    ),
    Figure(
        "contrast_kept",
        "Lesion contrast kept (%)",
        1,
        100,
        higher_is_better=True,
        convention="what synthetic lesions add to the observer's response, as a share of what they add in the original",
    ),
)
"""What a diagnosis is made of."""
FIGURES = (BYTES, *CHEAP, *EXPENSIVE)
