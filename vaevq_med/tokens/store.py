"""The token store: what a tokenizer makes of the images of a data set, for the training of a generator.

A folder of ``tokens.json`` and one memory-mapped array a split, e.g. ``training.npy``: indices ``[N, views, *grid, G]``
in the smallest sufficient integer type, or latents before quantization ``[N, views, D, *grid]``. The grid is the
tokenizer's, of one axis or more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vaevq_med.core.errors import DataError, ItemError
from vaevq_med.images.dataset import mix_seeds
from vaevq_med.images.manifest import SPLITS

FILE_NAME = "tokens.json"
FORMAT = 1
KINDS = ("indices", "latents")
KEYS = {"indices": "indices", "latents": "latent"}
"""What an item of a :class:`TokenDataset` calls the values of a kind."""
COMMAND = "vaevq-med encode-tokens CHECKPOINT DATASET"
_REQUIRED = ("tokenizer", "grid", "dtype", "image_size", "in_channels", "label", "data", "splits", "items")


def index_type(num_embeddings: int) -> str:
    """The smallest unsigned integer type that holds every index of K codewords.

    Args:
        num_embeddings: K.

    Examples:
        >>> index_type(256), index_type(16384)
        ('uint8', 'uint16')
    """
    return str(np.min_scalar_type(num_embeddings - 1))


def stored_type(dtype: str) -> np.dtype[Any]:
    """A type of numpy as it is stored, little-endian."""
    return np.dtype(dtype).newbyteorder("<")


def header_hash(header: Mapping[str, Any]) -> str:
    """Hash of a store's description, its ``content_hash`` and items left out, with the prefix ``sha256:``."""
    kept = {key: value for key, value in header.items() if key not in ("content_hash", "items")}
    return "sha256:" + hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def items_hash(items: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what a store says of a split's images, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


@dataclass(frozen=True)
class TokenStore:
    """A finished store.

    Attributes:
        root: its folder.
        content: the whole of ``tokens.json``.
    """

    root: Path
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``indices`` or ``latents``."""
        return str(self.content["kind"])

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """``content_hash``, ``quantizer``, ``readout``, ``num_embeddings``, ``num_codebooks``, ``embedding_dim``.

        ``patchwise`` is there where it is false: tokens that stand for no place.
        """
        return self.content["tokenizer"]

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of the latent grid along each axis."""
        return tuple(self.content["grid"])

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of their numbers; empty where there are none."""
        return tuple(self.content["label"]["names"])

    @property
    def content_hash(self) -> str:
        """Hash of the tokenizer, the data, the views, the items and the arrays."""
        return str(self.content["content_hash"])

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are there."""
        return tuple(self.content["splits"])

    def items(self, split: str) -> Sequence[Mapping[str, Any]]:
        """``id``, ``patient``, ``modality`` and ``label`` of each image of a split, as far as the data set has them.

        Raises:
            DataError: the split is not there.
        """
        self._check_split(split)
        return self.content["items"][split]

    def views(self, split: str) -> tuple[str, ...]:
        """Names of a split's views.

        Raises:
            DataError: the split is not there.
        """
        self._check_split(split)
        return tuple(self.content["splits"][split]["views"])

    def array(self, split: str) -> NDArray[Any]:
        """A split's array, mapped into memory.

        Raises:
            DataError: the split is not there, or its file is missing, truncated, too long or another than described.
        """
        self._check_split(split)
        path = self.root / f"{split}.npy"
        shape, dtype = tuple(self.content["splits"][split]["shape"]), stored_type(self.content["dtype"])
        expected = f"{dtype.name} of {'x'.join(map(str, shape))}"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0] if path.is_file() else "no such file"
            raise DataError(
                f"{path}: found a missing or truncated array ({reason}), expected {expected}; make it anew with: "
                f"{COMMAND} {self.root} --overwrite"
            ) from None
        if array.shape != shape or array.dtype != dtype:
            raise DataError(
                f"{path}: found {array.dtype.name} of {'x'.join(map(str, array.shape))}, expected {expected}"
            )
        size, whole = path.stat().st_size, array.offset + array.nbytes
        if size != whole:
            raise DataError(f"{path}: found {size:,} bytes, expected {whole:,} for {expected}")
        return array

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise DataError(f"{self.root}: found no split {split!r}, expected one of {', '.join(self.splits)}")


def load_token_store(tokens_dir: str | Path) -> TokenStore:
    """Read and check the description of a token store.

    Args:
        tokens_dir: folder of ``tokens.json``.

    Raises:
        DataError: there is none, it is unfinished, it is no such description, or the items are not those written.
    """
    root = Path(tokens_dir)
    path = root / FILE_NAME
    if not path.is_file():
        raise DataError(f"{path}: found no finished token store, expected one made by: {COMMAND} {root}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: found an unreadable file ({error}), expected a JSON description") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(f"{path}: found token store format {found}, expected {FORMAT}")
    missing = [key for key in _REQUIRED if key not in content]
    if missing or content.get("kind") not in KINDS or header_hash(content) != content.get("content_hash"):
        raise DataError(
            f"{path}: found a description that was changed or is not whole, expected that of: {COMMAND} {root}"
        )
    for split, described in content["splits"].items():
        found = content["items"].get(split) if isinstance(content["items"], dict) else None
        items = found if isinstance(found, list) else []
        if split not in SPLITS or len(items) != described["shape"][0]:
            raise DataError(f"{path}: found {len(items)} items of split {split!r}, expected {described['shape'][0]}")
        if items_hash(items) != described.get("items_sha256"):
            raise DataError(
                f"{path}: found items of split {split!r} that were changed, expected those written; make it anew with: "
                f"{COMMAND} {root} --overwrite"
            )
    return TokenStore(root, content)


class TokenDataset(Dataset[dict[str, Any]]):
    """One split of a token store; of each item, a random view.

    An index carries the epoch, as that of ``SliceDataset`` does: item ``k`` is image ``k % len`` as epoch ``k // len``
    draws it. The view is seeded by that index alone.

    Args:
        tokens_dir: folder of ``tokens.json``.
        split: ``training``, ``validation`` or ``test``.
        kind: ``indices`` or ``latents``, where the store has to be of that kind.
        num_embeddings: K that the store has to have.
        num_codebooks: G that it has to have.
        embedding_dim: D that it has to have.
        grid: positions of the latent grid along each axis that it has to have.
        tokenizer_hash: content hash of the tokenizer that has to have made it.
        num_classes: labels have to be below it; None takes the number of the store's label names.
        seed: seed of the views.

    Attributes:
        store: what is read.
        num_classes: number of labels; 0 where the data set has none.

    An item holds ``indices`` int64 ``[*grid, G]`` or ``latent`` float32 ``[D, *grid]``, ``label`` (0 where the data
    set has none) and ``id``, the path of the image in the data set.

    Raises:
        DataError: there is no such store, it is not as wanted, a label is out of range, or a file is truncated.
    """

    def __init__(
        self,
        *,
        tokens_dir: str | Path,
        split: str = "training",
        kind: str | None = None,
        num_embeddings: int | None = None,
        num_codebooks: int | None = None,
        embedding_dim: int | None = None,
        grid: Sequence[int] | None = None,
        tokenizer_hash: str | None = None,
        num_classes: int | None = None,
        seed: int = 0,
    ) -> None:
        store = load_token_store(tokens_dir)
        wanted = {
            "kind": (store.kind, kind),
            "num_embeddings": (store.tokenizer["num_embeddings"], num_embeddings),
            "num_codebooks": (store.tokenizer["num_codebooks"], num_codebooks),
            "embedding_dim": (store.tokenizer["embedding_dim"], embedding_dim),
            "grid": (store.grid, None if grid is None else tuple(grid)),
            "tokenizer": (store.tokenizer["content_hash"], tokenizer_hash),
        }
        for name, (found, expected) in wanted.items():
            if expected is not None and found != expected:
                raise DataError(f"{store.root}: found a token store of {name} {found}, expected {name} {expected}")
        self.store = store
        self.split = split
        self.seed = seed
        self.num_classes = len(store.label_names) if num_classes is None else num_classes
        self.items = store.items(split)
        self.labels = [int(item.get("label", 0)) for item in self.items]
        self.num_views = len(store.views(split))
        self._array: NDArray[Any] | None = store.array(split)
        highest = max(self.num_classes, 1) - 1
        for item, label in zip(self.items, self.labels, strict=True):
            if not 0 <= label <= highest:
                raise DataError(f"{store.root}: found label {label} of {item['id']}, expected 0 to {highest}")

    def identity(self) -> dict[str, Any]:
        """What a generator's checkpoint says of its tokens, of the tokenizer and of the images behind them."""
        content = self.store.content
        described = ("content_hash", "kind", "tokenizer", "grid", "image_size", "in_channels", "label")
        return {
            "split_hash": content["data"]["split_hash"],
            "content_hash": content["data"]["content_hash"],
            "patients": sorted({str(item["patient"]) for item in self.items if "patient" in item}),
            "tokens": {**{key: content[key] for key in described}, "views": list(self.store.views(self.split))},
        }

    def __len__(self) -> int:
        return len(self.items)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself: a pickled map would be a copy of all of it.
        return {**self.__dict__, "_array": None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item ``index % len(self)`` in the view that epoch ``index // len(self)`` draws.

        Raises:
            ItemError: an index is not below K; a ``DataLoader`` with workers raises it alike.
        """
        if index < 0:
            raise IndexError(index)
        return self.item(index % len(self), self.view(index))

    def view(self, index: int) -> int:
        """Number of the view that is drawn for an index."""
        return mix_seeds(self.seed, index) % self.num_views

    def item(self, number: int, view: int) -> dict[str, Any]:
        """An image in a view, both by number.

        Raises:
            ItemError: an index is not below K.
        """
        if self._array is None:
            self._array = self.store.array(self.split)
        values = self._array[number, view]
        item: dict[str, Any] = {"label": self.labels[number], "id": str(self.items[number]["id"])}
        if self.store.kind == "latents":
            return {KEYS["latents"]: torch.from_numpy(values.astype(np.float32)), **item}
        indices = torch.from_numpy(values.astype(np.int64))
        highest, top = int(indices.max()), int(self.store.tokenizer["num_embeddings"]) - 1
        if highest > top:
            raise ItemError(f"{self.store.root}: found index {highest} in {item['id']}, expected 0 to {top}")
        return {KEYS["indices"]: indices, **item}
