"""Handlers that measure reconstructions, draw them, and track the figures."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor
from torch.utils.data import Dataset

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.pictures import reconstruction_grid, usage_histogram
from vaevq_med.evaluation.reconstruction import METADATA, ReconstructionEvaluation
from vaevq_med.evaluation.report import EvaluationReport
from vaevq_med.images.manifest import SPLITS, load_manifest
from vaevq_med.images.transforms import REGIONS
from vaevq_med.metrics.base import ImageMetric
from vaevq_med.networks.features import feature_network
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.training import distributed
from vaevq_med.training.tokenizer_evaluator import TokenizerEvaluator
from vaevq_med.training.tracking import MLflowTracker

logger = logging.getLogger(__name__)


def label_map(dataset_dir: str | Path) -> Mapping[str, Sequence[int]]:
    """Label values of each tumor region of a slice data set."""
    return load_manifest(dataset_dir).label_map


def validation_split(dataset_dir: str | Path) -> str:
    """``validation``, or, where no patient stands in it, ``training``, with a warning.

    Args:
        dataset_dir: slice data set.
    """
    manifest = load_manifest(dataset_dir)
    if manifest.entries("validation"):
        return "validation"
    if distributed.is_main():
        logger.warning(
            "%s: the validation split is empty, so training images are validated on; %s, or pass --val_split test",
            dataset_dir,
            manifest.splitting_advice(),
        )
    return "training"


def evaluation_split(dataset_dir: str | Path) -> str:
    """``test``, or, where nothing stands in it, ``validation``, as with ImageNet, whose test labels are not public.

    Args:
        dataset_dir: data set of slices or photographs.
    """
    return "test" if load_manifest(dataset_dir).entries("test") else "validation"


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

    def _provenance(self, network: VisualTokenizer) -> dict[str, Any]:
        record: dict[str, Any] = {}
        manifest = getattr(self.dataset, "manifest", None)
        if manifest is not None:
            record |= {
                "split": self.dataset.split,  # type: ignore[attr-defined]
                "split_hash": manifest.split_hash,
                "dataset_hash": manifest.content_hash,
            }
        if self.stored is not None:
            record |= {
                "is_discrete": network.quantizer.is_discrete,
                "checkpoint": self.stored.path.name,
                "checkpoint_sha256": self.stored.sha256,
                "iteration": self.stored.iteration,
                "weights": self.stored.weights,
            }
            if self.stored.readout is not None:
                record["readout"] = self.stored.readout
        return record

    def _check_data(self) -> None:
        """Refuse to call a test what was trained on, or what is read in another way.

        Raises:
            VaevqMedError: a patient of the evaluated split was in the training data, or the images have another shape.
        """
        manifest = getattr(self.dataset, "manifest", None)
        if self.stored is not None and manifest is not None and not self.any_shape:
            self.stored.check_shape(getattr(self.dataset, "shape", None), manifest.path.parent, "--any_shape True")
        if self.stored is None or manifest is None or self.dataset.split == "training":  # type: ignore[attr-defined]
            return
        split = self.dataset.split  # type: ignore[attr-defined]
        trained, entries = self.stored.data, manifest.entries(split)
        moved = trained.get("split_hash") != manifest.split_hash
        patients = set(trained.get("patients", ()))
        named = {str(entry["patient"]) for one in SPLITS for entry in manifest.entries(one) if "patient" in entry}
        told_apart = patients and patients <= named
        if moved and trained.get("content_hash") == manifest.content_hash and not told_apart:
            raise VaevqMedError(
                f"split {split!r}: found the images that {self.stored.path.name} was trained on dealt to other splits, "
                "expected the same split"
            )
        leaked = {str(entry["patient"]) for entry in entries if "patient" in entry} & patients
        if leaked:
            raise VaevqMedError(
                f"split {split!r}: found patient {min(leaked)}, whom {self.stored.path.name} was trained on, expected "
                "none; the data set's split has changed since"
            )

    def _started(self, engine: TokenizerEvaluator) -> None:
        for network in (self.lpips, self.fid):
            if network is not None:
                network.to(engine.state.device)
        self._check_data()
        self._evaluation = ReconstructionEvaluation(
            num_embeddings=self.num_embeddings,
            num_codebooks=self.num_codebooks,
            metrics=self.metrics,
            lpips=self.lpips,
            fid=self.fid,
            uint8=self.uint8,
            provenance={**self._provenance(cast(VisualTokenizer, engine.network)), "quantize": engine.quantize},
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
        self._evaluation.update(
            output[Keys.IMAGE],
            output[Keys.PRED],
            output["indices"],
            metadata={name: list(batch[name]) for name in METADATA},
            regions=regions,
            indices_sample=output.get("indices_sample"),
            posterior=(output["mean"], output["std"]) if "mean" in output else None,
        )

    def _completed(self, engine: TokenizerEvaluator) -> None:
        assert self._evaluation is not None
        self.report = report = self._evaluation.compute()
        engine.state.metrics.update(report.overall())
        if not distributed.is_main():
            return
        if self.output_dir is not None:
            report.save(self.output_dir)
            if report.figures:
                self._draw(engine, self._extremes(report), self.output_dir / "best_median_worst.png")
        folder = self.pictures_dir or self.output_dir
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if self.pictures_dir is not None:
                fixed = np.linspace(0, len(self.dataset) - 1, self.num_pictures).round().astype(int)  # type: ignore[arg-type]
                self._draw(engine, {f"{i}": int(i) for i in dict.fromkeys(fixed)}, folder / "reconstructions.png")
            usage_histogram(report.usage_counts, folder / "codebook_usage.png")

    def _extremes(self, report: EvaluationReport) -> dict[str, int]:
        """Two items each of the best, the median and the worst by the first metric, as this process's item numbers."""
        data = getattr(self.dataset, "data", None)
        first = report.figures[0]
        sign = 1 if first["higher_is_better"] is False else -1
        values = {row["index"]: sign * row[first["name"]] for row in report.per_image}
        own = [values[data[i]["index"] if data is not None else i] for i in range(len(self.dataset))]  # type: ignore[arg-type]
        order = sorted(range(len(own)), key=lambda i: own[i] if own[i] == own[i] else math.inf)
        middle = len(order) // 2
        chosen = {"best": order[:2], "median": order[middle : middle + 2], "worst": order[-2:]}
        return {f"{name} {n + 1}": item for name, items in chosen.items() for n, item in enumerate(items)}

    def _draw(self, engine: TokenizerEvaluator, items: Mapping[str, int], path: Path) -> None:
        rows = [self.dataset[item] for item in items.values()]
        images = torch.stack([torch.as_tensor(row["image"]) for row in rows]).to(engine.state.device)
        output = engine.reconstruct(images, continuous=True)
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


class ValidationSummary:
    """Hand the validation's figures to the trainer as ``state.validation``, empty where none took place.

    Args:
        evaluator: validation engine.
        interval: epochs between validations.

    Raises:
        VaevqMedError: the interval is below 1.
    """

    def __init__(self, *, evaluator: Engine, interval: int = 1) -> None:
        if interval < 1:
            raise VaevqMedError(f"val_interval: found {interval}, expected 1 or more")
        self.evaluator = evaluator
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Register the event; has to come after the validation handler."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Engine) -> None:
        took_place = engine.state.epoch % self.interval == 0
        state: Any = engine.state
        state.validation = dict(self.evaluator.state.metrics) if took_place else {}


class EvaluationTracker:
    """Log an evaluation to the MLflow run that trained the tokenizer, or to one of its own.

    Args:
        tracking_uri: MLflow tracking URI; ``none`` turns tracking off.
        experiment: experiment of a run of its own.
        stored: the evaluated checkpoint.
        evaluation: the handler that measures.
        split: prefix of the metrics' names.
    """

    def __init__(
        self,
        *,
        tracking_uri: str,
        experiment: str,
        stored: StoredTokenizer,
        evaluation: EvaluationHandler,
        split: str,
    ) -> None:
        self.tracker = MLflowTracker(tracking_uri=tracking_uri, experiment=experiment, config=stored.config)
        self.stored = stored
        self.evaluation = evaluation
        self.split = split

    def attach(self, engine: Engine) -> None:
        """Register the event; has to come after the measuring handler."""
        if self.tracker.enabled:
            engine.add_event_handler(Events.COMPLETED, self._completed)

    def _completed(self, engine: Engine) -> None:
        tracker = self.tracker
        with tracker.guard():
            tracker.start_run(self.stored.run_id, resume=False)
            figures = {f"{self.split}/{name}": value for name, value in engine.state.metrics.items()}
            tracker.log_metrics(figures, self.stored.iteration)
            folder = self.evaluation.output_dir
            for path in sorted(folder.iterdir()) if folder is not None else []:
                tracker.log_artifact(path, f"evaluation/{self.split}")
            if tracker.run_id == self.stored.run_id:
                tracker.flush()
            else:
                tracker.end_run("FINISHED")
