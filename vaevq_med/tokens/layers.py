"""A token store as layers, each with the one below it: what a prior of the codec is trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.tokens.store import TokenDataset

_SLICE = re.compile(r"(.*)-[xyz](\d+)\.\w+")
"""How ``slice-extract`` names a slice: what it is of, and its number."""


class LayerDataset(TokenDataset):
    """The layers of one split of a token store of indices: slices of a grid ``h w``, or each of the d of ``d h w``.

    An item holds ``layers`` int64 ``[2, h, w, G]``, the layer below, -1 throughout where the store has none, and the
    layer itself, both in the same view; ``label`` and ``id`` as :class:`TokenDataset` has them. Below the first layer
    of an item of several slices lies the last one of the item that ends there.

    Args:
        tokens_dir: folder of ``tokens.json``.
        split: ``training``, ``validation`` or ``test``.
        kind: ``indices``.
        seed: of the views.

    Raises:
        DataError: as for :class:`TokenDataset`, or the store is not of slices of volumes.
    """

    def __init__(
        self, *, tokens_dir: str | Path, split: str = "training", kind: str = "indices", seed: int = 0
    ) -> None:
        super().__init__(tokens_dir=tokens_dir, split=split, kind=kind, seed=seed)
        grid, root = self.store.grid, self.store.root
        if len(grid) not in (2, 3):
            raise DataError(f"{root}: found a grid of {len(grid)} axes, expected two or three for layers")
        depth = 1 if len(grid) == 2 else self.store.content.get("depth")
        if depth is None:
            raise DataError(
                f"{root}: found a store that does not say of how many slices an item is, expected one made anew by: "
                "vaevq-med encode-tokens --overwrite"
            )
        places: dict[tuple[str, int], int] = {}
        for number, item in enumerate(self.items):
            named = _SLICE.fullmatch(str(item["id"]))
            if named is None:
                raise DataError(
                    f"{root}: found the image {item['id']}, expected slices of volumes, made by vaevq-med slice-extract"
                )
            places[named[1], int(named[2])] = number
        self.num_layers = 1 if len(grid) == 2 else grid[0]
        self._below = [places.get((of, number - int(depth))) for of, number in places]

    def __len__(self) -> int:
        return len(self.items) * self.num_layers

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Layer ``index % len(self)`` in the view that epoch ``index // len(self)`` draws.

        Raises:
            ItemError: an index is not below K.
        """
        if index < 0:
            raise IndexError(index)
        number, layer = divmod(index % len(self), self.num_layers)
        view = self.view(index)
        item = self.item(number, view)
        own = self._layers(item)
        before = self._below[number]
        if layer:
            below = own[layer - 1]
        elif before is not None:
            below = self._layers(self.item(before, view))[-1]
        else:
            below = torch.full_like(own[0], -1)
        return {"layers": torch.stack([below, own[layer]]), "label": item["label"], "id": item["id"]}

    def _layers(self, item: Mapping[str, Any]) -> Tensor:
        """Its layers, ``[d, h, w, G]``."""
        indices: Tensor = item["indices"]
        return indices if len(self.store.grid) == 3 else indices.unsqueeze(0)
