"""``vaevq-med token-bits``: how many bits a generator spends on the tokens of images that it has not seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vaevq_med import __version__
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text, check_free
from vaevq_med.core.intervals import bootstrap_interval, independent_units
from vaevq_med.core.options import is_int
from vaevq_med.core.picks import evenly_spaced
from vaevq_med.networks.generators.base import Generator
from vaevq_med.tokens.store import KEYS, TokenDataset
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredGenerator
from vaevq_med.trained.patients import first_seen

HELD_OUT_BITS = "held_out_bits"
_LARGEST_SEED = 2**63 - 1
BOUND_DRAWS = 2
"""Draws of time and corruption for each image, where a bound is what is measured."""


@dataclass(frozen=True)
class TokenBitsReport:
    """What was found.

    Attributes:
        output: the file that was written.
        record: as it holds it: ``held_out_bits``, ``interval`` (None without patients), ``likelihood`` (``exact`` or
            ``bound``), ``uniform_bits`` (log2 K, as though all indices were alike), ``labels`` (the bits of each) and
            ``provenance``.
    """

    output: Path
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TokenBits:
    """Measure ``-log2 p`` of a token of a split, a mean over all tokens of its images, each with its own label.

    Attributes:
        checkpoint: of the generator.
        tokens: token store of its tokenizer.
        output: file to write, ``.json``.
        split: of the store; ``test`` is what neither training nor the choice of a checkpoint has seen.
        weights: ``ema`` for the averaged weights, or ``network``.
        draws: passes over the split, each with its own times and corruptions, for a generator that has a bound; None
            takes :data:`BOUND_DRAWS`. An exact likelihood takes one.
        max_items: this many images, evenly spaced.
        batch_size: images at once.
        seed: of the draws.
        device: by default the GPU, where there is one.
        overwrite: replace the output.
    """

    checkpoint: Path
    tokens: Path
    output: Path
    split: str = "test"
    weights: str = "ema"
    draws: int | None = None
    max_items: int | None = None
    batch_size: int = 64
    seed: int = 0
    device: str | None = None
    overwrite: bool = False

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> TokenBitsReport:
        """Measure and write.

        Args:
            on_start: called once with the number of images, those of every draw counted.
            on_images: called with the images of each batch that is done.

        Raises:
            VaevqMedError: the generator has no likelihood, the store is not of its tokens or of volumes, the split has
                no images or some that the generator was trained on, or an option is out of its range.
        """
        if self.output.suffix != ".json":
            raise VaevqMedError(f"output {self.output}: found the suffix {self.output.suffix!r}, expected .json")
        check_free(self.output, self.overwrite)
        if not self.output.parent.is_dir():
            raise VaevqMedError(f"output {self.output}: found no folder {self.output.parent}, expected one")
        if not is_int(self.seed, 0, _LARGEST_SEED):
            raise VaevqMedError(f"--seed: found {self.seed}, expected 0 to {_LARGEST_SEED}")
        for name, count in {"batch-size": self.batch_size, "draws": self.draws, "max-items": self.max_items}.items():
            if count is not None and count < 1:
                raise VaevqMedError(f"--{name}: found {count}, expected 1 or more")
        device = named_device(self.device)
        stored = StoredGenerator(self.checkpoint, weights=self.weights)
        network = stored.network()
        if network.likelihood is None:
            raise VaevqMedError(
                f"{self.checkpoint}: found {type(network).__name__}, which has no likelihood of tokens, expected a "
                "generator of indices"
            )
        if network.likelihood == "exact" and self.draws not in (None, 1):
            raise VaevqMedError(f"--draws: found {self.draws} for an exact likelihood, expected 1")
        dataset = self._dataset(stored, network)
        if not len(dataset):
            raise VaevqMedError(f"{self.tokens}: found no images in split {self.split!r}, expected some")
        chosen = evenly_spaced(len(dataset), self.max_items or len(dataset))
        draws = 1 if network.likelihood == "exact" else self.draws or BOUND_DRAWS
        on_start(draws * len(chosen))
        network = network.to(device).eval()
        generator = torch.Generator(device).manual_seed(self.seed)
        nats = np.zeros(len(chosen))
        for _ in range(draws):
            for batch in self._batches(dataset, chosen):
                nats[batch] += self._nats(network, dataset, [chosen[i] for i in batch], generator) / draws
                on_images(len(batch))
        record = self._record(stored, network, dataset, chosen, nats / math.log(2), draws)
        atomic_write_text(self.output, json.dumps(record, indent=2) + "\n")
        return TokenBitsReport(self.output, record)

    def _dataset(self, stored: StoredGenerator, network: Generator) -> TokenDataset:
        """The split, of the tokens and labels that the generator was trained on."""
        dataset = TokenDataset(
            tokens_dir=self.tokens,
            split=self.split,
            kind="indices",
            tokenizer_hash=stored.tokens["tokenizer"]["content_hash"],
        )
        where = str(dataset.store.root)
        network.check_plane(dataset.store.content, where)
        network.check_fit(dataset.store.content, where)
        if dataset.store.label_names != stored.label_names:
            raise VaevqMedError(
                f"{dataset.store.root}: found labels {', '.join(dataset.store.label_names) or 'none'}, expected those "
                f"of the generator, {', '.join(stored.label_names) or 'none'}"
            )
        self._check_unseen(stored, dataset)
        return dataset

    def _check_unseen(self, stored: StoredGenerator, dataset: TokenDataset) -> None:
        """Refuse to call a split held out that the generator was trained on."""
        if self.split == "training":
            return
        patients = {str(item["patient"]) for item in dataset.items if "patient" in item}
        seen = first_seen(stored.data, str(self.checkpoint), patients)
        if seen is not None:
            raise VaevqMedError(
                f"split {self.split!r}: found patient {seen[0]}, whom {seen[1]} was trained on, expected none"
            )
        data = dataset.store.content["data"]
        same = stored.data.get("content_hash") == data["content_hash"]
        if not patients and same and stored.data.get("split_hash") != data["split_hash"]:
            raise VaevqMedError(
                f"split {self.split!r}: found the images that {self.checkpoint} was trained on dealt to other splits, "
                "expected the same split"
            )

    def _batches(self, dataset: TokenDataset, chosen: Sequence[int]) -> Iterator[list[int]]:
        """Places in ``chosen``, a patient's and a label's together, so that a batch's mean is one of both."""
        groups: dict[tuple[str, int], list[int]] = {}
        for place, number in enumerate(chosen):
            key = str(dataset.items[number].get("patient", "")), dataset.labels[number]
            groups.setdefault(key, []).append(place)
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]

    @torch.no_grad()
    def _nats(
        self, network: Generator, dataset: TokenDataset, numbers: Sequence[int], generator: torch.Generator
    ) -> float:
        """The mean of some images, in nats a token."""
        # Of images that are not trained on there is one view, the image itself.
        items = [dataset.item(number, 0) for number in numbers]
        device = generator.device
        indices = torch.stack([item[KEYS["indices"]] for item in items]).to(device)
        labels = torch.tensor([item["label"] for item in items], device=device)
        found = float(network.bound(indices, labels, generator=generator))
        if not math.isfinite(found):
            raise VaevqMedError(f"{self.checkpoint}: found the loss {found} of {items[0]['id']}, expected a finite one")
        return found

    def _record(
        self,
        stored: StoredGenerator,
        network: Generator,
        dataset: TokenDataset,
        chosen: Sequence[int],
        bits: np.ndarray[Any, np.dtype[np.float64]],
        draws: int,
    ) -> dict[str, Any]:
        unit, numbers = independent_units([str(dataset.items[number].get("patient", "")) for number in chosen])
        interval = bootstrap_interval(bits, numbers) if unit == "patients" else None
        labels = np.array([dataset.labels[number] for number in chosen])
        names = dataset.store.label_names or ("all",)
        return {
            HELD_OUT_BITS: float(bits.mean()),
            "interval": interval,
            "likelihood": network.likelihood,
            "uniform_bits": math.log2(dataset.store.tokenizer["num_embeddings"]),
            "labels": {names[label]: float(bits[labels == label].mean()) for label in sorted({*labels.tolist()})},
            "provenance": {
                "version": __version__,
                **stored.provenance(weights=stored.kept),
                "tokens": dataset.store.content_hash,
                "split": self.split,
                "n": len(chosen),
                "patients": len({*numbers.tolist()}) if unit == "patients" else None,
                "draws": draws,
                "seed": self.seed,
                "batch_size": self.batch_size,
                "device": str(named_device(self.device)),
            },
        }
