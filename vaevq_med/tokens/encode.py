"""``vaevq-med encode-tokens``: every image of a data set as a tokenizer's indices or latents, for a generator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.jobs import usable_cores
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import SPLITS, Manifest, load_manifest
from vaevq_med.images.reading import Reading
from vaevq_med.networks.base import Tokenizer
from vaevq_med.tokens.items import describe_items, label_of
from vaevq_med.tokens.options import EncodeOptions
from vaevq_med.tokens.store import FORMAT, KINDS, TokenStore, index_type
from vaevq_med.tokens.views import LoadViews, View, plan_views
from vaevq_med.tokens.writer import TokenWriter
from vaevq_med.trained.device import named_device
from vaevq_med.trained.network import StoredTokenizer

LATENT_TYPES = ("float16", "float32")
_SAVE_EVERY = 10.0
"""Seconds of work that a killed run loses at most, but for the batch at hand."""


@dataclass(frozen=True)
class EncodeReport:
    """What a run wrote.

    Attributes:
        store: the finished store.
        written: images that this run encoded.
        reused: images that an earlier run had.
    """

    store: TokenStore
    written: int
    reused: int


def encode_views(network: Tokenizer, images: Tensor, kind: str, batch_size: int) -> NDArray[Any]:
    """Indices or latents of images in several views.

    Args:
        network: in evaluation mode.
        images: ``[N, views, C, S, S]`` in [-1, 1], on any device.
        kind: ``indices``, or ``latents`` for the mean before quantization.
        batch_size: squares that go through the network at once.

    Returns:
        int64 ``[N, views, h, w, G]`` or float32 ``[N, views, D, h, w]``.
    """
    encode = network.encode_indices if kind == "indices" else network.encode_stage_2_inputs
    device = network.device
    with torch.inference_mode():
        parts = [encode(squares.to(device)).cpu() for squares in images.flatten(0, 1).split(batch_size)]
    values = torch.cat(parts)
    return values.unflatten(0, images.shape[:2]).numpy()


def describe_tokenizer(network: Tokenizer, content_hash: str) -> dict[str, Any]:
    """What a store says of the tokenizer that its values come from.

    Args:
        network: the tokenizer.
        content_hash: of its definition and weights.
    """
    quantizer = network.quantizer
    return {
        "content_hash": content_hash,
        "quantizer": type(quantizer).__name__,
        "readout": quantizer.readout,
        "num_embeddings": quantizer.num_embeddings,
        "num_codebooks": quantizer.num_codebooks,
        "embedding_dim": network.embedding_dim,
        **({} if network.patchwise else {"patchwise": False}),
    }


@dataclass(frozen=True)
class EncodeTokens(EncodeOptions):
    """Encode the images of a data set into a token store.

    The images of ``training`` are encoded in all the views that are asked for, those of the other splits as they are.

    Attributes:
        checkpoint: of a tokenizer, written by training.
        dataset: folder of ``dataset.json``.
        output: folder of the store.
        kind: ``indices`` or ``latents``.
        overwrite: replace a store of other settings.
    """

    checkpoint: Path
    dataset: Path
    output: Path
    kind: str = "indices"
    overwrite: bool = False

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> EncodeReport:
        """Encode what is not encoded yet; a store that is finished already is left alone.

        Args:
            on_start: called once with the number of images.
            on_images: called with the number of images of each batch that is done, the reused ones first.

        Raises:
            DataError: the data set or an image of it is not what was expected, or the output holds something else.
            VaevqMedError: the checkpoint is no tokenizer's, or an option does not fit it.
        """
        self._check()
        device = named_device(self.device)
        stored = StoredTokenizer(self.checkpoint, weights=self.weights, readout=self.readout)
        network = self._network(stored)
        datasets = self._datasets(stored)
        header = self._header(stored, network, datasets)
        items = {split: describe_items(images, header["label"]["names"]) for split, images in datasets.items()}
        network = network.to(device)
        with TokenWriter(self.output, header, items, overwrite=self.overwrite) as writer:
            total, reused = sum(map(len, items.values())), sum(writer.done.values())
            on_start(total)
            on_images(reused)
            if writer.finished is None:
                self._encode(writer, network, datasets, on_images)
            store = writer.finished or writer.finish()
        return EncodeReport(store=store, written=total - reused, reused=reused)

    def _check(self) -> None:
        self.check()
        if self.kind not in KINDS:
            raise VaevqMedError(f"--kind: found {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.dtype is not None and self.kind == "indices":
            raise VaevqMedError(f"--dtype: found {self.dtype!r} for indices, expected it with --kind latents only")
        if self.dtype is not None and self.dtype not in LATENT_TYPES:
            raise VaevqMedError(f"--dtype: found {self.dtype!r}, expected one of {', '.join(LATENT_TYPES)}")

    def _network(self, stored: StoredTokenizer) -> Tokenizer:
        stored.check_target()
        network = stored.network()
        quantizer = network.quantizer
        if self.kind == "indices" and not quantizer.is_discrete:
            readout = f" with read-out {quantizer.readout!r}" if quantizer.readouts else ""
            found = f"{type(quantizer).__name__}{readout}"
            other = "; name --readout hard" if "hard" in quantizer.readouts else "; --kind latents has its latents"
            raise VaevqMedError(
                f"{self.checkpoint}: found {found}, expected one that decodes its indices, for --kind indices{other}"
            )
        return network

    def _datasets(self, stored: StoredTokenizer) -> dict[str, SliceDataset]:
        """Each split to encode."""
        manifest = load_manifest(self.dataset)
        if not self.any_shape:
            stored.check_shape(Reading.of(manifest).shape, self.dataset, "--any-shape")
        image_size, in_channels = int(stored.value("image_size")), int(stored.value("in_channels"))
        stacked = bool(stored.value("stack_modalities", False))
        chosen = [split for split in SPLITS if split in (self.split or SPLITS)]
        if self.split is None:
            chosen = [split for split in chosen if manifest.entries(split)] or chosen
        datasets = {
            split: SliceDataset(
                dataset_dir=self.dataset,
                split=split,
                modalities=stored.value("modalities", None) if stacked else None,
                stack_modalities=stacked,
                depth=stored.value("depth", None),
                transform=LoadViews(
                    self._views(split), image_size=image_size, in_channels=in_channels, manifest=manifest
                ),
            )
            for split in chosen
        }
        if not manifest.content_hash or stored.data.get("content_hash") != manifest.content_hash:
            contrasts = next(iter(datasets.values())).data[0]["image"]
            channels = len(contrasts) if isinstance(contrasts, list) else manifest.content.get("channels_per_image")
            self._check_images(manifest, channels, in_channels, image_size)
        return datasets

    def _check_images(self, manifest: Manifest, channels: int | None, in_channels: int, image_size: int) -> None:
        """Refuse another data set than the tokenizer's own whose images it has not learned."""
        if channels is not None and channels != in_channels:
            raise DataError(
                f"{self.dataset}: found images of {channels} channels, expected {in_channels}, as the tokenizer of "
                f"{self.checkpoint} was trained on"
            )
        size = manifest.content.get("image_size")
        if size is not None and size < image_size:
            raise DataError(
                f"{self.dataset}: found images of {size} pixels, expected {image_size} or more (they are shrunk), as "
                f"the tokenizer of {self.checkpoint} was trained on"
            )

    def _views(self, split: str) -> tuple[View, ...]:
        training = split == "training"
        return plan_views(flip=self.flip and training, ten_crop=self.ten_crop and training)

    def _header(
        self, stored: StoredTokenizer, network: Tokenizer, datasets: Mapping[str, SliceDataset]
    ) -> dict[str, Any]:
        """What the store says of itself, but for hashes and items."""
        manifest = next(iter(datasets.values())).manifest
        image_size, quantizer = int(stored.value("image_size")), network.quantizer
        if image_size % network.factors[-1]:
            raise VaevqMedError(
                f"{self.checkpoint}: found image_size {image_size}, expected a multiple of {network.factors[-1]}"
            )
        depth = stored.value("depth", None)
        grid = list(network.grid_of([image_size] * 2 if depth is None else [int(depth), image_size, image_size]))
        shape = [*grid, quantizer.num_codebooks]
        if self.kind == "latents":
            shape = [network.embedding_dim, *grid]
        return {
            "format": FORMAT,
            "kind": self.kind,
            "tokenizer": describe_tokenizer(network, stored.content_hash),
            "grid": grid,
            **({} if depth is None else {"depth": int(depth)}),
            "dtype": index_type(quantizer.num_embeddings) if self.kind == "indices" else self.dtype or "float16",
            "image_size": image_size,
            "in_channels": int(stored.value("in_channels")),
            "label": label_of(manifest, stacked=bool(stored.value("stack_modalities", False))),
            "data": {
                "name": str(manifest.content.get("name", "")),
                "content_hash": manifest.content_hash,
                "split_hash": manifest.split_hash,
            },
            "splits": {
                split: {
                    "shape": [len(images), len(self._views(split)), *shape],
                    "views": [view.name for view in self._views(split)],
                }
                for split, images in datasets.items()
            },
        }

    def _encode(
        self,
        writer: TokenWriter,
        network: Tokenizer,
        datasets: Mapping[str, SliceDataset],
        on_images: Callable[[int], None],
    ) -> None:
        saved = time.monotonic()
        for split, images in datasets.items():
            for values in self._batches(network, images, writer.done[split]):
                writer.append(split, values)
                on_images(len(values))
                if time.monotonic() - saved > _SAVE_EVERY:
                    writer.save()
                    saved = time.monotonic()

    def _batches(self, network: Tokenizer, images: SliceDataset, start: int) -> Iterator[NDArray[Any]]:
        """Arrays of the images from the ``start``-th on."""
        views = len(self._views(images.split))
        loader: Any = DataLoader(
            images,
            sampler=range(start, len(images)),
            batch_size=max(1, self.batch_size // views),
            num_workers=usable_cores() if self.workers is None else self.workers,
        )
        for batch in loader:
            yield encode_views(network, batch["image"], self.kind, self.batch_size)
