"""Everything that is measured of reconstructions, in one pass over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.report import EvaluationReport, Summary
from vaevq_med.metrics import figures
from vaevq_med.metrics.base import ImageMetric
from vaevq_med.metrics.channels import ChannelActivity
from vaevq_med.metrics.codebook import CodebookUsage
from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.reconstruction import PSNR, SSIM, to_unit
from vaevq_med.metrics.statistics import FrechetDistance
from vaevq_med.metrics.volumes import VolumeMetric
from vaevq_med.networks.features import FeatureNetwork
from vaevq_med.networks.processes import objects_of_each_process
from vaevq_med.networks.slices import slices_of

METADATA = ("index", "path", "patient", "case", "modality", "slice")
"""What an item says of its image, which the row of an evaluation keeps."""
_TAKEN = frozenset(
    {
        *(*METADATA, "finite", "rfid", "dead_codes"),
        *("utilization", "perplexity", "utilization_sample", "perplexity_sample"),
        *("active_channels", "active_channels_relative", "mean_bits", "mean_codes"),
    }
)
"""What rows and tables have beside the metrics."""
# Batches whose figures stay on a device before they are read.
_BATCHES = 64


class ReconstructionEvaluation:
    """Accumulates metrics of images, LPIPS, rFID and codebook usage; each image's features are extracted once.

    Memory grows by one row of numbers an image; features are summed up and dropped.

    Args:
        num_embeddings: K.
        num_codebooks: G.
        num_codewords: as for :class:`~vaevq_med.metrics.CodebookUsage`.
        metrics: of single images; by default PSNR and SSIM.
        volume_metrics: of volumes; by default none.
        lpips: network of the perceptual distance, or None.
        fid: network of the Frechet distance, or None; may be the same.
        uint8: round both images to 256 levels first.
        provenance: what the record says of checkpoint and split.
        rate: of the counts of each index ``[G, K]``, figures of a rate that differs from position to position; see
            ``Quantizer.rate``.
        device: where sums are kept.

    Raises:
        VaevqMedError: something is no metric, or two have one name.
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        num_codebooks: int = 1,
        num_codewords: int | None = None,
        metrics: Sequence[ImageMetric] | None = None,
        volume_metrics: Sequence[VolumeMetric] = (),
        lpips: FeatureNetwork | None = None,
        fid: FeatureNetwork | None = None,
        uint8: bool = True,
        provenance: Mapping[str, Any] | None = None,
        rate: Callable[[Tensor], Mapping[str, float]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rate = rate
        self.metrics = (PSNR(), SSIM()) if metrics is None else tuple(metrics)
        for metric in self.metrics:
            if not isinstance(metric, ImageMetric) or not isinstance(getattr(metric, "figure", None), Figure):
                raise VaevqMedError(
                    f"metrics: found {metric!r}, expected objects derived from ImageMetric, each with a figure"
                )
        self.volume_metrics = tuple(volume_metrics)
        self.lpips = lpips
        self.fid = fid
        of_volumes = [metric.figure for metric in self.volume_metrics]
        of_images = [metric.figure for metric in self.metrics]
        self.figures = [*of_images, *of_volumes, *([figures.LPIPS] if lpips is not None else [])]
        names = [figure.name for figure in self.figures]
        if len(set(names)) < len(names):
            raise VaevqMedError(f"metrics: found {', '.join(names)}, expected each name once")
        taken = sorted(set(names) & _TAKEN)
        if taken:
            raise VaevqMedError(f"metrics: found a figure called {taken[0]}, which the record has already")
        self.uint8 = uint8
        self.provenance = dict(provenance or {})
        self.device = device
        self.usage, self.usage_sample = (
            CodebookUsage(
                num_embeddings=num_embeddings,
                num_codebooks=num_codebooks,
                num_codewords=num_codewords,
                device=device,
            )
            for _ in range(2)
        )
        self.channels = ChannelActivity()
        self._sampled = False
        self._rows: list[dict[str, Any]] = []
        self._unread: list[tuple[dict[str, Sequence[Any]], tuple[str, ...], Tensor]] = []
        self._distances: dict[str, FrechetDistance] = {}
        self._regions: tuple[str, ...] = ()

    @torch.no_grad()
    def update_volumes(
        self,
        target: Tensor,
        reconstruction: Tensor,
        indices: Tensor | None,
        *,
        metadata: Mapping[str, Sequence[Any]],
        regions: Mapping[str, Tensor] | None = None,
        indices_sample: Tensor | None = None,
        posterior: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """Take in volumes, slice by slice, so that every figure means what it means for images.

        Args:
            target: originals, ``[B, C, d, H, W]`` in [-1, 1].
            reconstruction: of the same shape.
            indices: as for :meth:`update`, of any grid; what they are of slices that are not counted is counted.
            metadata: as for :meth:`update`, but for ``slice``, int64 ``[B, d]``: -1 for a slice that is not counted.
            regions: masks by name, bool ``[B, d, H, W]``.
            indices_sample: as for :meth:`update`.
            posterior: as for :meth:`update`.
        """
        numbers = torch.as_tensor(metadata["slice"]).cpu()  # [B, d]
        kept = (numbers >= 0).flatten().nonzero().flatten()
        of_item = kept // numbers.shape[1]
        rows = {name: [values[int(i)] for i in of_item] for name, values in metadata.items() if name != "slice"}
        unit, unit_reconstruction = (to_unit(volume, uint8=self.uint8) for volume in (target, reconstruction))
        places = kept.to(target.device)
        further = {
            metric.figure.name: _without_last(metric.per_slice(unit, unit_reconstruction), numbers).flatten()[places]
            for metric in self.volume_metrics
        }
        self.update(
            slices_of(target)[places],
            slices_of(reconstruction)[places],
            indices,
            metadata={**rows, "slice": numbers.flatten()[kept].tolist()},
            regions=None if regions is None else {n: mask.flatten(0, 1)[places] for n, mask in regions.items()},
            indices_sample=indices_sample,
            posterior=posterior,
            further=further,
        )

    @torch.no_grad()
    def update(
        self,
        target: Tensor,
        reconstruction: Tensor,
        indices: Tensor | None,
        *,
        metadata: Mapping[str, Sequence[Any]],
        regions: Mapping[str, Tensor] | None = None,
        indices_sample: Tensor | None = None,
        posterior: tuple[Tensor, Tensor | None] | None = None,
        further: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            target: originals, ``[B, C, H, W]`` in [-1, 1].
            reconstruction: of the same shape.
            indices: ``[B, h, w, G]``, or None for a tokenizer without any.
            metadata: lists of length B that the rows shall hold. ``index`` orders them; ``modality``, where an image
                has one, gives tables by modality.
            regions: masks by name, bool ``[B, H, W]``; an empty mask leaves the image out of that region.
            indices_sample: indices of a quantized sample, for its utilization.
            posterior: means and standard deviations, ``[B, D, *grid]`` each, for the active channels; of a tokenizer
                without a posterior its latent before quantization and None.
            further: figures ``[B]`` by name that were measured elsewhere.

        Raises:
            VaevqMedError: a reconstruction holds NaN or infinity, which no metric would show; of a device this batch
                or one of the last before it, or :meth:`compute` says so.
        """
        columns = {"finite": reconstruction.isfinite().flatten(1).all(dim=1), **(further or {})}
        unit_target, unit = to_unit(target, uint8=self.uint8), to_unit(reconstruction, uint8=self.uint8)
        for metric in self.metrics:
            for name, values in metric.measure(unit_target, unit, regions or {}).items():
                shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                if shape != [len(target)]:
                    raise VaevqMedError(f"metric {name}: found figures of shape {shape}, expected [{len(target)}]")
                columns[name] = values
        distance, features = self._features(2 * unit_target - 1, 2 * unit - 1)
        if distance is not None:
            columns["lpips"] = distance
        self._regions = tuple(dict.fromkeys([*self._regions, *(regions or {})]))
        self._unread.append((dict(metadata), tuple(columns), torch.stack([c.double() for c in columns.values()])))
        if len(self._unread) >= (_BATCHES if target.device.type != "cpu" else 1):
            self._read()
        if features is not None:
            real, fake = features.chunk(2)
            self._add_features(real, fake, modalities=[str(m) for m in metadata.get("modality", [""] * len(real))])
        if indices is not None:
            self.usage.update(indices)
        if indices_sample is not None:
            self._sampled = True
            self.usage_sample.update(indices_sample)
        if posterior is not None:
            self.channels.update(*posterior)

    def _features(self, target: Tensor, reconstruction: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """LPIPS ``[B]`` and the vectors of rFID ``[2 B, F]``, the originals' first; one network for both runs once."""
        both = torch.cat([target, reconstruction])
        layers: list[Tensor] = []
        pooled: Tensor | None = None
        if self.lpips is not None and self.lpips is self.fid:
            layers, pooled = self.lpips.layers_and_pooled(both)
        else:
            if self.lpips is not None:
                layers = self.lpips.layers(both)
            if self.fid is not None:
                pooled = self.fid.pooled(both)
        if self.lpips is None:
            return None, pooled
        of_target, found = zip(*(stage.chunk(2) for stage in layers), strict=True)
        return self.lpips.distance_of(found, of_target, len(target)), pooled

    def _read(self) -> None:
        """Fetch the figures of the batches since the last time, which waits for the device.

        Raises:
            VaevqMedError: a reconstruction holds NaN or infinity.
        """
        unread, self._unread = self._unread, []
        for metadata, names, columns in unread:
            table = dict(zip(names, columns.tolist(), strict=True))
            finite = table.pop("finite")
            if not all(finite):
                bad = finite.index(0.0)
                name = metadata["path"][bad] if "path" in metadata else f"item {bad} of the batch"
                raise VaevqMedError(f"{name}: found NaN or infinity in the reconstruction, expected finite values")
            for i in range(len(finite)):
                row = {name: _plain(items[i]) for name, items in metadata.items()}
                self._rows.append({**row, **{name: values[i] for name, values in table.items()}})

    def _add_features(self, real: Tensor, fake: Tensor, modalities: Sequence[str]) -> None:
        groups = {"all": list(range(len(modalities)))}
        for i, modality in enumerate(modalities):
            if modality:
                groups.setdefault(f"modality {modality}", []).append(i)
        for name, members in groups.items():
            if name not in self._distances:
                self._distances[name] = FrechetDistance(num_features=real.shape[1], device=self.device)
            # Copied without waiting for the device.
            rows = torch.tensor(members).to(real.device, non_blocking=True)
            self._distances[name].update(real.index_select(0, rows), fake.index_select(0, rows))

    def compute(self) -> EvaluationReport:
        """The record over everything seen so far, by all processes of a group.

        Raises:
            VaevqMedError: a reconstruction holds NaN or infinity.
        """
        self._read()
        rows = self._gather_rows()
        self.usage.reduce()
        self.usage_sample.reduce()
        self.channels.reduce()
        names = [figure.name for figure in self.figures]
        every = [*names, *self._parts(rows, names)]
        overall: Summary = _means(rows, every)
        modalities = {
            modality: _means([row for row in rows if row.get("modality") == modality], every)
            for modality in sorted({str(row.get("modality") or "") for row in rows} - {""})
        }
        regions: dict[str, Summary] = {}
        for region in self._regions:
            table = _means(rows, [f"{name}_{region}" for name in names])
            regions[region] = {name.removesuffix(f"_{region}"): entry for name, entry in table.items() if entry["n"]}
        if self.fid is not None:
            self._add_distances(overall, modalities, rows)
        overall |= {name: {"value": value, "n": len(rows)} for name, value in self._usage_figures().items()}
        summary = {
            "overall": overall,
            "modality": modalities,
            "region": {name: table for name, table in regions.items() if table},
        }
        return EvaluationReport(
            summary=summary,
            per_image=rows,
            usage_counts=self.usage.counts.cpu(),
            provenance={**self.provenance, "n": len(rows), **self._networks()},
            conventions=self._conventions(len(rows)),
            figures=[figure.to_json() for figure in self.figures],
        )

    def _parts(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
        """Figures ``NAME_PART`` of a metric's own parts, e.g. of channels, which are no regions."""
        others = {*names, *(f"{name}_{region}" for name in names for region in self._regions)}
        starts = tuple(f"{name}_" for name in names)
        return list(
            dict.fromkeys(name for row in rows for name in row if name.startswith(starts) and name not in others)
        )

    def _gather_rows(self) -> list[dict[str, Any]]:
        rows = [row for part in objects_of_each_process(self._rows) for row in part]
        return sorted(rows, key=lambda row: row["index"]) if rows and "index" in rows[0] else rows

    def _add_distances(
        self, overall: Summary, modalities: Mapping[str, Summary], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        assert self.fid is not None
        width = self.fid.num_features
        for name in ["all", *(f"modality {modality}" for modality in modalities)]:
            distance = self._distances.setdefault(name, FrechetDistance(num_features=width, device=self.device))
            table = overall if name == "all" else modalities[name.removeprefix("modality ")]
            count = sum(name in ("all", f"modality {row.get('modality')}") for row in rows)
            table["rfid"] = {"value": distance.compute(), "n": count}

    def _usage_figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if int(self.usage.counts.sum()):
            figures |= {
                "utilization": self.usage.utilization(),
                "perplexity": self.usage.perplexity(),
                "dead_codes": self.usage.dead_codes(),
                **({} if self.rate is None else self.rate(self.usage.counts)),
            }
        if self._sampled:
            figures |= {
                "utilization_sample": self.usage_sample.utilization(),
                "perplexity_sample": self.usage_sample.perplexity(),
            }
        return figures | self.channels.figures()

    def _networks(self) -> dict[str, str]:
        record = {}
        for role, network in (("lpips", self.lpips), ("fid", self.fid)):
            if network is not None:
                record[f"{role}_network"] = network.name
                record[f"{role}_weights_sha256"] = network.weights_sha256
        return record

    def _conventions(self, count: int) -> dict[str, str]:
        levels = "rounded to 256 levels" if self.uint8 else "not rounded"
        words = {
            "images": f"[0, 1], both sides {levels}",
            **{figure.name: figure.convention for figure in self.figures if figure.convention},
            "region": "PSNR, and mean of the SSIM map, over the region's pixels; images without it left out",
            "utilization": figures.UTILIZATION.convention,
            "perplexity": figures.PERPLEXITY.convention,
        }
        if self.rate is not None and self.rate(self.usage.counts):
            words |= {figure.name: figure.convention for figure in (figures.MEAN_BITS, figures.MEAN_CODES)}
        active = (figures.ACTIVE_CHANNELS, figures.ACTIVE_CHANNELS_RELATIVE)
        words |= {figure.name: figure.convention for figure in active if figure.name in self.channels.figures()}
        if self.lpips is not None:
            learned = self.lpips.name in ("vgg", "alex", "squeeze")
            words["lpips"] = f"{'LPIPS' if learned else 'LPIPS-style distance'} of {self.lpips.name}"
        if self.fid is not None:
            words["rfid"] = f"Frechet distance of {self.fid.name} features to the split's own originals"
            if count <= self.fid.num_features:
                words["rfid"] += (
                    f"; biased upward: {count} images for {self.fid.num_features} features, compare at equal N only"
                )
        return words


def _without_last(values: Tensor, numbers: Tensor) -> Tensor:
    """NaN in place of the figure ``[B, d]`` of a slice whose upper neighbor is not counted."""
    upper = torch.cat([numbers[:, 1:], torch.full_like(numbers[:, :1], -1)], dim=1)
    return values.masked_fill((upper < 0).to(values.device), torch.nan)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor | np.generic) else value


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Summary:
    """Mean, sample standard deviation and count of each column, NaN entries left out."""
    table: Summary = {}
    for name in names:
        values = np.array([row[name] for row in rows if name in row and not math.isnan(row[name])])
        table[name] = {
            "value": float(values.mean()) if len(values) else math.nan,
            "std": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
            "n": len(values),
        }
    return table
