"""The handler that measures reconstructions in one pass, writes the record and draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Events
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor
from torch.utils.data import Dataset

from vaevq_med import __version__
from vaevq_med.core.errors import dispensable
from vaevq_med.core.picks import evenly_spaced
from vaevq_med.evaluation.data import check_data
from vaevq_med.evaluation.pictures import reconstruction_grid, usage_histogram
from vaevq_med.evaluation.reconstruction import METADATA, ReconstructionEvaluation
from vaevq_med.evaluation.report import EvaluationReport
from vaevq_med.images.transforms import REGIONS
from vaevq_med.metrics.base import ImageMetric
from vaevq_med.metrics.volumes import InterSliceError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.features import feature_network
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.training import distributed
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator

_EXTREMES, _USAGE = "best_median_worst.png", "codebook_usage.png"


class EvaluationHandler:
    """Measure every batch of a :class:`TokenizerEvaluator` in one pass, then write the record and pictures.

    ``evaluator.state.metrics`` receives the figures over the whole split as floats; :attr:`report` the rest.

    Args:
        dataset: what the evaluator reads; a few of its items are decoded again for the pictures.
        num_embeddings: K, codewords of a codebook.
        num_codebooks: G, codebooks.
        metrics: of single images; by default PSNR and SSIM.
        lpips_network: feature network of the perceptual distance; None leaves it out.
        lpips_weights: its weights file, where it is not in the usual place.
        fid_network: feature network of rFID; None leaves it out.
        fid_weights: its weights file.
        uint8: round both images to 256 levels first, as published work does.
        output_dir: where ``metrics.json``, ``metrics.csv``, ``per_image.csv`` and the grid of the best, median and
            worst reconstructions go; None writes none of them.
        pictures_dir: where a grid of a few fixed items goes, with the codebook-usage histogram, for training.
        num_pictures: rows of a grid.
        stored: the evaluated checkpoint, for the record.
        any_shape: evaluate images that are brought to squares in another way than those that it was trained on.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        num_embeddings: int,
        num_codebooks: int = 1,
        metrics: Sequence[ImageMetric] | None = None,
        lpips_network: str | None = None,
        lpips_weights: str | None = None,
        fid_network: str | None = None,
        fid_weights: str | None = None,
        uint8: bool = True,
        output_dir: str | Path | None = None,
        pictures_dir: str | Path | None = None,
        num_pictures: int = 6,
        stored: StoredTokenizer | None = None,
        any_shape: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_embeddings = num_embeddings
        self.num_codebooks = num_codebooks
        self.metrics = metrics
        self.lpips = None if lpips_network is None else feature_network(lpips_network, lpips_weights)
        same = fid_network == lpips_network and fid_weights == lpips_weights
        self.fid = self.lpips if same else None if fid_network is None else feature_network(fid_network, fid_weights)
        self.uint8 = uint8
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.pictures_dir = None if pictures_dir is None else Path(pictures_dir)
        self.num_pictures = num_pictures
        self.stored = stored
        self.any_shape = any_shape
        self.report: EvaluationReport | None = None
        self._evaluation: ReconstructionEvaluation | None = None

    def attach(self, engine: TokenizerEvaluator) -> None:
        """Register the events."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._completed)

    def _provenance(self, network: Tokenizer) -> dict[str, Any]:
        record: dict[str, Any] = {"version": __version__}
        manifest = getattr(self.dataset, "manifest", None)
        if manifest is not None:
            record |= {
                "split": self.dataset.split,  # type: ignore[attr-defined]
                "split_hash": manifest.split_hash,
                "dataset_hash": manifest.content_hash,
            }
        if self.stored is not None:
            record |= {
                "network": {
                    "parameters": sum(parameter.numel() for parameter in network.parameters()),
                    **network.bits(),
                },
                "is_discrete": network.quantizer.is_discrete,
                "checkpoint": self.stored.path.name,
                "checkpoint_sha256": self.stored.sha256,
                "iteration": self.stored.iteration,
                "weights": self.stored.weights,
                "image_size": self.stored.value("image_size", None),
            }
            if "adopted" in self.stored.data:
                record["adopted"] = dict(self.stored.data["adopted"])
            if self.stored.readout is not None:
                record["readout"] = self.stored.readout
        return record

    def _started(self, engine: TokenizerEvaluator) -> None:
        for network in (self.lpips, self.fid):
            if network is not None:
                network.to(engine.state.device)
        check_data(self.dataset, self.stored, self.any_shape)
        tokenizer = cast(Tokenizer, engine.network)
        self._evaluation = ReconstructionEvaluation(
            num_embeddings=self.num_embeddings,
            num_codebooks=self.num_codebooks,
            num_codewords=tokenizer.quantizer.num_codewords,
            rate=tokenizer.quantizer.rate,
            metrics=self.metrics,
            volume_metrics=[InterSliceError()] if getattr(self.dataset, "depth", None) else [],
            lpips=self.lpips,
            fid=self.fid,
            uint8=self.uint8,
            provenance={**self._provenance(tokenizer), "quantize": engine.quantize},
            device=engine.state.device,
        )

    def _iteration_completed(self, engine: TokenizerEvaluator) -> None:
        assert self._evaluation is not None
        output, batch = engine.state.output, engine.state.batch
        regions = None
        if "brain" in batch:
            regions = {
                name: torch.as_tensor(batch[name]).to(engine.state.device, non_blocking=True)
                for name in ("brain", *REGIONS)
            }
        of_volumes = output[Keys.IMAGE].ndim == 5
        update = self._evaluation.update_volumes if of_volumes else self._evaluation.update
        update(
            output[Keys.IMAGE],
            output[Keys.PRED],
            output.get("indices"),
            metadata={name: batch[name] if of_volumes and name == "slice" else list(batch[name]) for name in METADATA},
            regions=regions,
            indices_sample=output.get("indices_sample"),
            posterior=(output["mean"], output.get("std")) if "mean" in output else None,
        )

    def _completed(self, engine: TokenizerEvaluator) -> None:
        assert self._evaluation is not None
        self.report = report = self._evaluation.compute()
        engine.state.metrics.update(report.overall())
        if not distributed.is_main():
            return
        if self.output_dir is not None:
            report.save(self.output_dir, beside=(_EXTREMES, _USAGE))
            if report.figures:
                self._draw(engine, self._extremes(report), self.output_dir / _EXTREMES)
        if self.pictures_dir is not None:
            # The checkpoint, which is written after this, decides whether training can go on.
            with dispensable("the pictures of this validation"):
                self.pictures_dir.mkdir(parents=True, exist_ok=True)
                fixed = evenly_spaced(len(self.dataset), self.num_pictures)  # type: ignore[arg-type]
                self._draw(engine, {f"{i}": i for i in fixed}, self.pictures_dir / "reconstructions.png")
                if len(report.usage_counts):
                    usage_histogram(report.usage_counts, self.pictures_dir / _USAGE)
        elif self.output_dir is not None and len(report.usage_counts):
            usage_histogram(report.usage_counts, self.output_dir / _USAGE)

    def _extremes(self, report: EvaluationReport) -> dict[str, int]:
        """Two items each of the best, the median and the worst by the first metric, as this process's item numbers."""
        data = getattr(self.dataset, "data", None)
        first = report.figures[0]
        sign = 1 if first["higher_is_better"] is False else -1
        values: dict[Any, float] = {}
        for row in report.per_image:
            # Of a volume, that of its worst slice.
            value = sign * row[first["name"]]
            values[row["index"]] = max(value, values.get(row["index"], value))
        own = [values[data[i]["index"] if data is not None else i] for i in range(len(self.dataset))]  # type: ignore[arg-type]
        order = sorted(range(len(own)), key=lambda i: own[i] if own[i] == own[i] else math.inf)
        middle = len(order) // 2
        chosen = {"best": order[:2], "median": order[middle : middle + 2], "worst": order[-2:]}
        return {f"{name} {n + 1}": item for name, items in chosen.items() for n, item in enumerate(items)}

    def _draw(self, engine: TokenizerEvaluator, items: Mapping[str, int], path: Path) -> None:
        rows = [self.dataset[item] for item in items.values()]
        images = torch.stack([torch.as_tensor(row["image"]) for row in rows]).to(engine.state.device)
        output, images = _in_the_middle(engine, images)
        continuous: Tensor | None = output.get("pred_continuous")
        path.parent.mkdir(parents=True, exist_ok=True)
        titles = [name if not name.isdigit() else "" for name in items]
        reconstruction_grid(
            images.cpu(),
            output[Keys.PRED].cpu(),
            None if continuous is None else continuous.cpu(),
            labels=[
                f"{title} {row['modality']}\n{row['case'] or Path(row['path']).stem}".strip()
                for title, row in zip(titles, rows, strict=True)
            ],
            path=path,
        )


def _in_the_middle(engine: TokenizerEvaluator, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Reconstructions by both paths and the images ``[N, C, H, W]``; of volumes the middle slices."""
    if images.ndim == 4:
        return engine.reconstruct(images, continuous=True), images
    middle = images.shape[2] // 2
    if not cast(Tokenizer, engine.network).takes_volumes:
        images = images[:, :, middle]
        return engine.reconstruct(images, continuous=True), images
    output = engine.reconstruct(images, continuous=True)
    found = {name: value[:, :, middle] for name, value in output.items() if name.startswith("pred")}
    return found, images[:, :, middle]
