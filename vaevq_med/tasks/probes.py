"""What do the codes of a frozen tokenizer know? Linear and small heads on them (Alain and Bengio, arXiv 1610.01644).

A head that is trained on codes of training patients is asked about other patients: which contrast an image shows,
whether it shows tumor, and which positions of the grid are tumor. What a head without any look at the codes would
reach stands beside it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.intervals import LEVEL, RESAMPLES, independent_units
from vaevq_med.core.names import names_of
from vaevq_med.evaluation.data import check_unseen
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.reading import reader
from vaevq_med.images.transforms import REGIONS
from vaevq_med.networks.base import Tokenizer
from vaevq_med.tasks.probe_options import ProbeOptions
from vaevq_med.tasks.probe_report import markdown, table
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
TASKS = {
    "contrast": "which contrast an image shows, from mean and deviation of its codes over the grid",
    "tumor_slice": "whether an image shows whole tumor, from the same",
    "tumor_position": "whether at least half of a position's pixels in the brain are whole tumor, from its code alone",
}
"""What is asked."""
_RECORD = "probes.json"
_LEAST_SHARE = 0.5
_UNKNOWN = -1


@dataclass(frozen=True)
class Asked:
    """What a head is given and what is right.

    Attributes:
        features: float32 ``[N, F]``.
        labels: int64 ``[N]``.
        patients: of each of them; empty where nobody knows.
    """

    features: Features
    labels: Labels
    patients: Sequence[str] = ()


@dataclass(frozen=True)
class ProbeReport:
    """What was found.

    Attributes:
        output: folder of the files.
        record: what ``probes.json`` holds.
    """

    output: Path
    record: Mapping[str, Any]


def pooled(codes: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over the grid.

    Args:
        codes: ``[B, D, *grid]``.

    Returns:
        ``[B, 2 D]``, the means first.
    """
    flat = codes.flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2, unbiased=False)], dim=1)


def at_positions(mask: Tensor, brain: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which positions of a grid lie in the brain, and which of these are mostly of a region.

    Args:
        mask: of the region, bool ``[B, S, S]``.
        brain: bool ``[B, S, S]``.
        grid: positions along each axis.

    Returns:
        Both bool ``[B, *grid]``: at least half of the patch is brain; at least half of its brain is of the region.
    """
    rows, columns = grid
    share = F.adaptive_avg_pool2d(brain.float(), (rows, columns))
    own = F.adaptive_avg_pool2d((mask & brain).float(), (rows, columns))
    inside = share >= _LEAST_SHARE
    return inside, inside & (own >= _LEAST_SHARE * share)


def answer(training: Asked, test: Asked, seed: int = 0) -> dict[str, Any]:
    """Train each head and judge it.

    Args:
        training: what it learns from.
        test: what it is asked.
        seed: of the heads.

    Returns:
        ``n_training``, ``n_test`` and, of each of the ``HEADS`` of :mod:`vaevq_med.tasks.probe_report`, ``accuracy``,
        ``balanced_accuracy`` (the mean over classes of the share that is right), with ``balanced_accuracy_low`` and
        ``_high`` where there are two patients or more, and, of two classes, ``auc`` and ``dice`` of the second, and
        ``converged``, false of a head whose training reached its limit of iterations; or ``left_out``, the reason why
        nothing is asked.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sizes = {"n_training": len(training.labels), "n_test": len(test.labels)}
    for name, asked in (("training", training), ("test", test)):
        if len(np.unique(asked.labels)) < 2:
            return {**sizes, "left_out": f"the {name} images have fewer than two classes of it"}
    if set(np.unique(test.labels)) - set(np.unique(training.labels)):
        return {**sizes, "left_out": "the test images have a class that the training images lack"}
    models = {
        "chance": DummyClassifier(strategy="stratified", random_state=seed),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced")),
        "mlp": make_pipeline(StandardScaler(), MLPClassifier((64,), max_iter=300, random_state=seed)),
    }
    found: dict[str, Any] = dict(sizes)
    for name, model in models.items():
        converged = _converges(model, training)
        told = model.predict(test.features)
        scores = {
            "accuracy": float(accuracy_score(test.labels, told)),
            "balanced_accuracy": float(balanced_accuracy_score(test.labels, told)),
        }
        low, high = balanced_interval(test.labels, told, test.patients)
        if not np.isnan(low):
            scores |= {"balanced_accuracy_low": low, "balanced_accuracy_high": high}
        if len(model.classes_) == 2:
            likely = model.predict_proba(test.features)[:, 1]
            # A guess by shares says nothing about one image, so that its area is that of any order.
            scores["auc"] = 0.5 if name == "chance" else float(roc_auc_score(test.labels, likely))
            scores["dice"] = float(f1_score(test.labels, told, zero_division=0.0))
        found[name] = {**scores, "converged": converged}
    return found


def balanced_interval(labels: Labels, told: Labels, patients: Sequence[str]) -> tuple[float, float]:
    """Percentile interval of the balanced accuracy when whole patients are drawn with replacement.

    Args:
        labels: what is right, int64 ``[N]``.
        told: what a head says, int64 ``[N]``.
        patients: of each of them.

    Returns:
        The lower and the upper end; NaN where fewer than two patients are named, or not all are. A draw without any of
        a class has the mean over the others.
    """
    unit, units = independent_units(patients)
    if unit != "patients":
        return float("nan"), float("nan")
    classes, which = np.unique(labels, return_inverse=True)
    totals = np.zeros((2, units.max() + 1, len(classes)))
    np.add.at(totals[0], (units, which), 1)
    np.add.at(totals[1], (units, which), told == labels)
    count = totals.shape[1]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
    asked, right = drawn @ totals[0], drawn @ totals[1]
    shares = np.divide(right, asked, out=np.zeros_like(right), where=asked > 0)
    means = shares.sum(axis=1) / (asked > 0).sum(axis=1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _converges(model: Any, training: Asked) -> bool:
    """Train a head; whether it converged.

    Raises:
        KeyboardInterrupt: on Ctrl-C, which scikit-learn's ``MLPClassifier`` turns into a warning, half trained.
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.fit(training.features, training.labels)
    if any("interrupted" in str(one.message) for one in warned):
        raise KeyboardInterrupt
    converged = True
    for one in warned:
        if issubclass(one.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return converged


@dataclass(frozen=True, kw_only=True)
class Probe(ProbeOptions):
    """Probe tokenizers on a data set of slices.

    Attributes:
        dataset: folder of ``dataset.json``; the heads learn from its ``training`` split.
        output: folder of ``probes.json``, ``probes.csv`` and ``table.md``.
        checkpoints: of the tokenizers.
    """

    dataset: Path
    output: Path
    checkpoints: Sequence[Path]

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> ProbeReport:
        """Encode both splits by each tokenizer, train the heads, and write the record and the table.

        Args:
            on_start: called once with the number of images of all tokenizers.
            on_images: called with the number of images of each batch that is encoded.

        Raises:
            VaevqMedError: a checkpoint, an option or the data set does not fit, a patient was trained on, or the output
                is no folder of earlier probes, or one of other settings.
        """
        self.check()
        folder = OutputFolder(self.output, ".probes", "vaevq-med probe", "probes", result=_RECORD, copies=True)
        folder.check()
        device, splits = named_device(self.device), ("training", self.split)
        stored = [StoredTokenizer(path, weights=self.weights, readout=self.readout) for path in self.checkpoints]
        for one in stored:  # what cannot be probed is told before the first is
            self._network(one)
        datasets = [{split: self._dataset(one, split) for split in splits} for one in stored]
        for one, images in zip(stored, datasets, strict=True):
            if not self.any_shape:
                one.check_shape(images[self.split].shape, self.dataset, "--any-shape")
            check_unseen(images[self.split], one)
        settings = {
            "data": datasets[0][self.split].manifest.content_hash,
            **{name: getattr(self, name) for name in ("split", "seed", "max_items", "max_positions", "weights")},
            **{name: getattr(self, name) for name in ("readout", "any_shape")},
        }
        names = names_of(self.checkpoints)
        made_of = {name: one.content_hash for name, one in zip(names, stored, strict=True)}
        folder.refuse_record({**settings, "tokenizers": made_of}, "probes")
        with folder.writing():  # a folder that cannot be is told before the work
            self.output.mkdir(parents=True, exist_ok=True)
        on_start(sum(len(images) for of in datasets for images in of.values()))
        rows = [
            {
                "name": name,
                "checkpoint": made_of[name],
                **self._probed(self._network(one).to(device), images, on_images),
            }
            for name, one, images in zip(names, stored, datasets, strict=True)
        ]
        record = {**settings, "asked": TASKS, "tokenizers": rows}
        with folder.writing():
            # The record first: by it the same command knows the folder again.
            atomic_write_text(self.output / _RECORD, json.dumps(record, indent=2) + "\n")
            atomic_write_text(self.output / "probes.csv", table(rows))
            atomic_write_text(self.output / "table.md", markdown(record))
        return ProbeReport(self.output, record)

    def _probed(
        self, network: Tokenizer, datasets: Mapping[str, SliceDataset], on_images: Callable[[int], None]
    ) -> dict[str, Any]:
        """What is told of a tokenizer: itself, the images, and what its codes know."""
        asked = {split: self._asked(network, images, on_images) for split, images in datasets.items()}
        return {
            "quantizer": type(network.quantizer).__name__,
            "embedding_dim": network.embedding_dim,
            "images": {split: len(images) for split, images in datasets.items()},
            "patients": {split: len(_known_patients(images)) for split, images in datasets.items()},
            "probes": {task: answer(asked["training"][task], asked[self.split][task], self.seed) for task in TASKS},
        }

    def _network(self, stored: StoredTokenizer) -> Tokenizer:
        stored.check_target()
        if stored.value("depth", None) is not None:
            raise VaevqMedError(f"{stored.path}: found a tokenizer of volumes, expected one of slices")
        network = stored.network()
        if not network.patchwise:
            raise VaevqMedError(f"{stored.path}: found tokens that stand for no place, expected one for each patch")
        if not network.quantizer.is_discrete:
            other = "; name --readout hard" if "hard" in network.quantizer.readouts else ""
            raise VaevqMedError(
                f"{stored.path}: found {type(network.quantizer).__name__} with read-out "
                f"{network.quantizer.readout!r}, expected one that decodes its indices{other}"
            )
        return network

    def _dataset(self, stored: StoredTokenizer, split: str) -> SliceDataset:
        stacked = bool(stored.value("stack_modalities", False))
        size, channels = int(stored.value("image_size")), int(stored.value("in_channels"))
        return SliceDataset(
            dataset_dir=self.dataset,
            split=split,
            modalities=stored.value("modalities", None) if stacked else None,
            stack_modalities=stacked,
            max_items=self.max_items,
            transform=reader(self.dataset, image_size=size, in_channels=channels, regions=True),
        )

    @torch.inference_mode()
    def _asked(self, network: Tokenizer, images: SliceDataset, on_images: Callable[[int], None]) -> dict[str, Asked]:
        """What each probe is given of a split, and what is right."""
        device = next(network.parameters()).device
        told_apart = images.channels is None and "modality" in images.manifest.content
        whole: list[Features] = []
        contrasts: list[int] = []
        tumors: list[int] = []
        patients = [str(one.get("patient") or "") for one in images.data]
        patients_there: list[str] = []
        places, inside_tumor = [np.empty((0, network.embedding_dim), np.float32)], [np.empty(0, np.int64)]
        for items, segmented in _batches(images, self.batch_size):
            first = len(tumors)
            squares = torch.stack([item["image"] for item in items]).to(device)
            codes = network.quantizer.indices_to_codes(network.encode_indices(squares)).cpu()
            whole.append(pooled(codes).numpy())
            contrasts += [item["label"] if told_apart else _UNKNOWN for item in items]
            tumors += [
                int(item[REGIONS[0]].any()) if known else _UNKNOWN for item, known in zip(items, segmented, strict=True)
            ]
            chosen = [number for number, known in enumerate(segmented) if known]
            if chosen:
                masks = [torch.stack([items[number][name] for number in chosen]) for name in (REGIONS[0], "brain")]
                inside, tumor = at_positions(masks[0], masks[1], codes.shape[2:])
                places.append(codes[chosen].movedim(1, -1)[inside].numpy())
                inside_tumor.append(tumor[inside].numpy().astype(np.int64))
                for number, positions in zip(chosen, inside.flatten(1).sum(dim=1).tolist(), strict=True):
                    patients_there += [patients[first + number]] * positions
            on_images(len(items))
        features, codes_there, labels = np.concatenate(whole), np.concatenate(places), np.concatenate(inside_tumor)
        drawn = np.random.default_rng(self.seed).permutation(len(labels))[: self.max_positions]
        return {
            "contrast": _known(features, contrasts, patients),
            "tumor_slice": _known(features, tumors, patients),
            "tumor_position": Asked(codes_there[drawn], labels[drawn], [patients_there[number] for number in drawn]),
        }


def _known_patients(images: SliceDataset) -> set[str]:
    return {str(item["patient"]) for item in images.data if item.get("patient")}


def _known(features: Features, labels: Sequence[int], patients: Sequence[str]) -> Asked:
    array = np.array(labels, np.int64)
    known = np.flatnonzero(array != _UNKNOWN)
    return Asked(features[known], array[known], [patients[number] for number in known.tolist()])


def _batches(images: SliceDataset, size: int) -> Iterator[tuple[list[dict[str, Any]], list[bool]]]:
    """Items, and whether each has a segmentation: the mask of one without is empty and says nothing."""
    for start in range(0, len(images), size):
        numbers = range(start, min(start + size, len(images)))
        items = [images[number] for number in numbers]
        known = [
            bool(images.data[n].get("segmentation")) and REGIONS[0] in one
            for n, one in zip(numbers, items, strict=True)
        ]
        yield items, known
