"""``vaevq-med evaluate-samples``: how good generated images are, and whether they are copies of training images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vaevq_med import __version__
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.evaluation.features import ImageReader, RealImages, SplitPass
from vaevq_med.evaluation.neighbors import NeighborSearch, SampleNeighbors
from vaevq_med.evaluation.options import EvaluateOptions
from vaevq_med.images.generated import Sample, SampleDataset, find_samples, generation_record, image_side
from vaevq_med.images.manifest import Manifest, load_manifest
from vaevq_med.metrics.generation import measure_generation
from vaevq_med.metrics.reference import ReferenceCache, ReferenceFeatures
from vaevq_med.metrics.statistics import MIN_EXTRAPOLATED, FeatureStatistics
from vaevq_med.networks.features import FeatureNetwork, feature_network
from vaevq_med.tokens.items import label_of
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

METRICS, TABLE, PICTURE = "metrics.json", "memorization.csv", "memorization.png"


@dataclass(frozen=True)
class SamplesReport:
    """What an evaluation found.

    Attributes:
        output: folder of what was written.
        record: as ``metrics.json`` holds it: ``summary``, ``memorization`` (absent where not asked for), ``provenance``
            and ``conventions``.
        cached: splits whose features, all that were needed, were in the cache.
    """

    output: Path
    record: Mapping[str, Any]
    cached: Sequence[str]


@dataclass(frozen=True)
class EvaluateSamples(EvaluateOptions):
    """Evaluate a folder of generated images against a data set.

    Each image goes through the feature network once, the samples and the held-out images for the memorization check in
    mirror image too. In memory are these features and, for that check, a byte a pixel of the samples and the held-out
    images. A sample's nearest training image is looked for among all contrasts.

    Attributes:
        samples: folder of PNG files, see :func:`find_samples`.
        dataset: folder of ``dataset.json``.
        output: folder to write into.
        tokenizer: checkpoint of the tokenizer that decoded the samples. That check then compares training and held-out
            images as it reconstructs them: a sample of the very tokens of a training image is otherwise as far from it
            as the tokenizer's error. Samples of ``generate.json`` name theirs and its read-out; another is refused.
    """

    samples: Path
    dataset: Path
    output: Path
    tokenizer: Path | None = None

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> SamplesReport:
        """Extract what is not in the cache, measure, and write the figures.

        Args:
            on_start: called once with the number of images to read.
            on_images: called with the number of images of each batch that is done.

        Raises:
            DataError: the samples or the data set are not what was expected.
            VaevqMedError: an option is out of its range, or the feature network is not here or has no classifier.
        """
        self._check()
        device = named_device(self.device)
        network = feature_network(self.feature_network, self.feature_weights).to(device)
        manifest = load_manifest(self.dataset)
        score = self._scored(network, manifest)
        found = find_samples(self.samples)
        told = generation_record(self.samples)
        samples = self._labeled(found, manifest)
        reader = ImageReader(network, device, self.batch_size, self.workers, on_images)
        folder = self.dataset.resolve()
        real = RealImages(
            manifest=manifest,
            reader=reader,
            cache=ReferenceCache(self.cache_dir or folder.with_name(f"{folder.name}.features")),
            image_size=self.image_size or image_side(self.samples, samples),
            modalities=self.modality,
            max_items=self.max_items,
        )
        generated = SampleDataset(
            self.samples, samples, real.transform, max_items=self.max_items, gray=real.reading.channels == 1
        )
        self._check_numbers(len(generated), len(real.images(self.split)))
        check = NeighborSearch(self._reconstructed(real, told)) if self.memorization else None
        visited = check.passes if check else []
        own = [one for one in visited if one.images is real and one.split == self.split]
        reference = own[0] if own else SplitPass(real, self.split)
        passes = visited if own else [reference, *visited]
        on_start(len(generated) + sum(len(one) for one in passes))
        features = check.read(generated) if check else reader.read(generated)[0]
        if not own:
            reference.read()

        logits = network.logits(features.to(device)) if score else None
        figures, conventions = measure_generation(
            features.to(reader.compute_device),
            _moved(reference.features[0], reader.compute_device),
            network,
            k=self.neighbors,
            fid_infinity=self.fid_infinity,
            logits=logits,
        )
        record: dict[str, Any] = {"summary": {"overall": figures}}
        neighbors: SampleNeighbors | None = None
        if check:
            neighbors = check.neighbors((self.feature_threshold, self.pixel_threshold))
            record["memorization"] = neighbors.record()
            conventions = {**conventions, **neighbors.conventions(network.name)}
        record["provenance"] = self._provenance(real, generated, reference.features[0].statistics.count)
        if check and check.tokenizer_hash:
            record["provenance"]["tokenizer"] = check.tokenizer_hash
        record["provenance"] |= self._generation(told, len(found), manifest)
        record["conventions"] = {"images": "[0, 1], rounded to 256 levels", **conventions}
        self._write(record, neighbors, generated)
        return SamplesReport(self.output, record, [one.split for one in passes if one.cached])

    def _check(self) -> None:
        self.check()
        if self.tokenizer is not None and not self.memorization:
            raise VaevqMedError("--tokenizer: found it with --no-memorization, expected one of the two")
        if self.output.resolve().is_relative_to(self.samples.resolve()):
            raise VaevqMedError(f"--output-dir: found {self.output} in the folder of the samples, expected another")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VaevqMedError(f"--output-dir {self.output}: found it not writable ({error.strerror})") from None

    def _generation(self, told: Mapping[str, Any], drawn: int, manifest: Manifest) -> dict[str, Any]:
        """What ``generation.json`` says beside the samples: numbers, training images and their views."""
        found: dict[str, Any] = {}
        if isinstance(told.get("num_samples"), int):
            found |= {"n_drawn": drawn, "n_planned": told["num_samples"]}
        trained = told.get("trained_on")
        if isinstance(trained, Mapping):
            here = {"content_hash": manifest.content_hash, "split_hash": manifest.split_hash}
            found["generator_trained_on_these_splits"] = dict(trained) == here
        views = told.get("views")
        if isinstance(views, list):
            found["generator_trained_on_crops"] = any("whole" not in str(view) for view in views)
        return found

    def _stored(self, path: Path, told: Mapping[str, Any]) -> StoredTokenizer:
        """The tokenizer that decoded the samples, as far as their record tells."""
        stored = StoredTokenizer(path)
        stored.check_target()
        if not isinstance(told.get("tokenizer"), str):
            return stored
        found = StoredTokenizer.of_hash(path, told["tokenizer"], told.get("readout"))
        if found is None:
            raise VaevqMedError(
                f"--tokenizer {path}: found {stored.content_hash[:19]}..., expected {told['tokenizer'][:19]}..., which "
                f"decoded the samples in {self.samples}"
            )
        return found

    def _reconstructed(self, real: RealImages, told: Mapping[str, Any]) -> RealImages:
        """The data set as the tokenizer reconstructs it, or as it is where there is none."""
        if self.tokenizer is None:
            return real
        stored = self._stored(self.tokenizer, told)
        made = int(stored.value("image_size")), int(stored.value("in_channels"))
        if made != (real.image_size, real.reading.channels):
            raise VaevqMedError(
                f"--tokenizer: found one of {made[0]} pixels and {made[1]} channels, expected {real.image_size} and "
                f"{real.reading.channels}, as the images have"
            )
        network = stored.network().to(real.reader.device).eval()
        # The hash is of the weights, whichever way the quantizer is decoded.
        mark = stored.content_hash if stored.readout is None else f"{stored.content_hash} {stored.readout}"
        return replace(real, tokenizer=network, tokenizer_hash=mark)

    def _check_numbers(self, samples: int, real: int) -> None:
        """Refuse, before anything is computed, too few images."""
        for what, count in ((f"samples in {self.samples}", samples), (f"images of split {self.split!r}", real)):
            if count <= self.neighbors:
                raise DataError(f"found {count} {what}, expected more than --neighbors {self.neighbors}")
        if self.fid_infinity and samples < MIN_EXTRAPOLATED:
            raise DataError(f"found {samples} samples, expected at least {MIN_EXTRAPOLATED} for --fid-infinity")

    def _scored(self, network: FeatureNetwork, manifest: Manifest) -> bool:
        """Whether there is to be an Inception score; refuses one that the network cannot give."""
        if self.inception_score is None:
            return network.num_classes > 0 and label_of(manifest, stacked=False)["kind"] == "class"
        if self.inception_score and not network.num_classes:
            network.logits(torch.empty(0))
        return self.inception_score

    def _labeled(self, found: Sequence[Sample], manifest: Manifest) -> list[Sample]:
        """The samples found, their labels by name; those of the chosen contrasts, where they have labels."""
        label = label_of(manifest, stacked=False)
        names: list[str] = label["names"]
        samples = []
        for sample in found:
            name = sample.label
            if name and names and name not in names:
                if not (name.isdecimal() and int(name) < len(names)):
                    raise DataError(
                        f"{self.samples}: {sample.name}: found the label {name!r}, expected a {label['kind']} of "
                        f"{self.dataset}, by name or by number from 0 to {len(names) - 1}"
                    )
                name = names[int(name)]
            samples.append(Sample(sample.name, name))
        if self.modality is not None and any(sample.label for sample in samples):
            samples = [sample for sample in samples if sample.label in self.modality]
            if not samples:
                raise DataError(
                    f"{self.samples}: found no samples with the label {', '.join(self.modality)}, expected some"
                )
        return samples

    def _provenance(self, real: RealImages, generated: SampleDataset, count: int) -> dict[str, Any]:
        digest = hashlib.sha256()
        for sample in generated.samples:
            digest.update(f"{sample.name}\t{sample.label}\t".encode())
            digest.update(hashlib.sha256((generated.folder / sample.name).read_bytes()).digest())
        return {
            "feature_network": real.reader.network.name,
            "feature_weights_sha256": real.reader.network.weights_sha256,
            "dataset": str(real.manifest.content.get("name", "")),
            "content_hash": real.manifest.content_hash,
            "split_hash": real.manifest.split_hash,
            "split": self.split,
            "modalities": list(self.modality) if self.modality else None,
            "image_size": real.image_size,
            "channels": real.reading.channels,
            "max_items": self.max_items,
            "n": len(generated),
            "n_reference": count,
            "version": __version__,
            "samples_sha256": digest.hexdigest(),
        }

    def _write(self, record: Mapping[str, Any], neighbors: SampleNeighbors | None, generated: SampleDataset) -> None:
        """Replace what an earlier run left; the figures last, so that they stand for a finished run."""
        try:
            for name in (METRICS, TABLE, PICTURE):
                (self.output / name).unlink(missing_ok=True)
            if neighbors is not None:
                neighbors.write_table(self.output / TABLE, generated.samples)
                neighbors.write_picture(self.output / PICTURE, generated)
            atomic_write_text(self.output / METRICS, json.dumps(record, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise VaevqMedError(f"--output-dir {self.output}: found it not writable ({error.strerror})") from None


def _moved(reference: ReferenceFeatures, device: torch.device) -> ReferenceFeatures:
    statistics = reference.statistics
    moments = FeatureStatistics(statistics.mean.to(device), statistics.covariance.to(device), statistics.count)
    return ReferenceFeatures(moments, reference.features.to(device))


def table(record: Mapping[str, Any]) -> list[str]:
    """The figures of a record for a reader, one a line.

    Args:
        record: of a :class:`SamplesReport`.
    """
    told, words = record["provenance"], record["conventions"]
    against = f"{told['n_reference']:,} images of {told['split']}, {told['feature_network']}"
    lines = [f"against {against}"]
    if told.get("n_drawn", 0) < told.get("n_planned", 0):
        lines.append(f"note: {told['n_drawn']:,} of {told['n_planned']:,} samples are drawn; generate draws the others")
    if told.get("generator_trained_on_these_splits") is False:
        lines.append("note: the generator was trained on other images or splits: copies of those are not found here")
    if told.get("generator_trained_on_crops") and "memorization" in record:
        lines.append("note: the generator was trained on crops: copies of crops are not looked for, and mostly pass")
    for name, entry in record["summary"]["overall"].items():
        lines.append(f"{name:<16} {entry['value']:.4f}")
    lines.append(f"note: gfid is {words['gfid'].split('; ', 1)[1]}")
    for space, figures in record.get("memorization", {}).items():
        if space == "n_training":
            continue
        line = f"nearest of {record['memorization']['n_training']:,} training images by {space}: "
        line += f"median distance {figures['median']:.4f}"
        if "median_held_out" in figures:
            line += f" (held-out images {figures['median_held_out']:.4f})"
        if "share" in figures:
            line += f"; {figures['count']:,} samples ({figures['share']:.1%}) below {figures['threshold']:.4g}"
            line += f", {figures['count_mirrored']:,} of them in mirror image"
        lines.append(line)
    if "memorization" in record:
        if "n_planned" in told and "tokenizer" not in told:
            lines.append("note: the tokenizer blurs copies; --tokenizer CHECKPOINT compares its reconstructions")
        pixel = record["memorization"]["pixel"]
        line = f"identical to a training image: {pixel['identical']:,}"
        lines.append(f"{line}, {pixel['identical_mirrored']:,} of them in mirror image")
    return lines
