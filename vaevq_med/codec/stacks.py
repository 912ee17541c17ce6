"""The slices of a data set as stacks of indices: what the models of the entropy coders are trained and measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.geometry import live_positions
from vaevq_med.images.manifest import load_manifest
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.trained.network import StoredTokenizer


@dataclass(frozen=True)
class Stack:
    """The slices of a contrast of a case.

    Attributes:
        case: its name.
        indices: int64 ``[N, *grid, G]``.
        layout: what is known before the first of them.
    """

    case: str
    indices: NDArray[np.int64]
    layout: Layout


def shown_positions(images: Tensor, factor: int, interpolation: str) -> NDArray[np.bool_]:
    """Positions of the grid that the codec would code of slices which a data set holds.

    Args:
        images: ``[B, C, S, S]`` in [-1, 1], whose background is exactly -1.
        factor: pixels of a position along each axis.
        interpolation: by which the slices were resized, ``bilinear`` or ``bicubic``.

    Returns:
        bool ``[B, h, w]``.
    """
    shown = (images > -1).any(dim=1).numpy()
    return live_positions(shown, size=shown.shape[-1], patch=factor, interpolation=interpolation, resized=True)


def encode_stacks(
    dataset: Path,
    stored: StoredTokenizer,
    split: str,
    *,
    max_cases: int | None = None,
    batch_size: int = 16,
) -> Iterator[Stack]:
    """Every case's contrasts of a split, one after the other, each with the one before it as its reference.

    Args:
        dataset: folder of ``dataset.json``.
        stored: the tokenizer.
        split: ``training``, ``validation`` or ``test``.
        max_cases: the first ones only.
        batch_size: slices that go through the network at once.

    Raises:
        VaevqMedError: the data set or the checkpoint is not what was expected.
    """
    from vaevq_med.images.dataset import SliceDataset  # which needs MONAI, as reading does
    from vaevq_med.images.reading import reader

    manifest = load_manifest(dataset)
    network = stored.network()
    stacked = bool(stored.value("stack_modalities", False))
    images = SliceDataset(
        dataset_dir=dataset,
        split=split,
        modalities=stored.value("modalities", None),
        stack_modalities=stacked,
        transform=reader(
            manifest,
            image_size=int(stored.value("image_size")),
            in_channels=int(stored.value("in_channels")),
        ),
    )
    interpolation = str(manifest.content.get("recipe", {}).get("interpolation", "bilinear"))
    order = [str(name) for name in manifest.content.get("modality", {}).values()]
    groups: dict[tuple[str, str], list[int]] = {}
    for number, entry in enumerate(images.data):
        groups.setdefault((str(entry["case"]), str(entry["modality"])), []).append(number)
    cases = list(dict.fromkeys(case for case, _ in groups))[:max_cases]
    names = sorted(
        (key for key in groups if key[0] in cases),
        key=lambda key: (cases.index(key[0]), order.index(key[1]) if key[1] in order else len(order), key[1]),
    )
    before: Stack | None = None
    for case, contrast in names:
        numbers = sorted(groups[case, contrast], key=lambda number: int(images.data[number]["slice"]))
        slices = np.array([int(images.data[number]["slice"]) for number in numbers])
        indices, live = _encode(network, images, numbers, batch_size, interpolation)
        layout = Layout(
            live=live,
            slices=slices,
            num_embeddings=network.quantizer.num_embeddings,
            num_codebooks=network.quantizer.num_codebooks,
            contrast="" if stacked else contrast,
        )
        if before is not None and before.case == case:
            layout = replace(layout, reference=_reference(before, layout))
        before = Stack(case, indices, layout)
        yield before


def _encode(
    network: VisualTokenizer, images: Any, numbers: list[int], batch_size: int, interpolation: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    found, live = [], []
    with torch.inference_mode():
        for start in range(0, len(numbers), batch_size):
            batch = torch.stack([torch.as_tensor(images[n]["image"]) for n in numbers[start : start + batch_size]])
            found.append(network.encode_indices(batch).numpy())
            live.append(shown_positions(batch, network.encoder.downsampling_factor, interpolation))
    return np.concatenate(found), np.concatenate(live)


def _reference(before: Stack, layout: Layout) -> NDArray[np.int64]:
    """The indices of a contrast at the slices of another, 0 where it has none."""
    reference = np.zeros((*layout.live.shape, layout.num_codebooks), np.int64)
    _, here, there = np.intersect1d(layout.slices, before.layout.slices, return_indices=True)
    reference[here] = np.where(before.layout.live[there][..., None], before.indices[there], 0)
    return reference


def save_stacks(path: Path, stacks: Sequence[Stack]) -> None:
    """Keep stacks in a file of numpy arrays, without objects."""
    arrays: dict[str, Any] = {}
    for number, stack in enumerate(stacks):
        layout = stack.layout
        arrays |= {
            f"{number}/indices": stack.indices.astype(np.int32),
            f"{number}/live": layout.live,
            f"{number}/slices": layout.slices,
            f"{number}/sizes": np.array([layout.num_embeddings, layout.num_codebooks]),
            f"{number}/names": np.array([stack.case, layout.contrast]),
        }
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_stacks(path: Path) -> list[Stack]:
    """Read what :func:`save_stacks` wrote; references are made again.

    Raises:
        CodecError: the file is no such one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, NDArray[Any]] = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise CodecError(f"{path}: found no readable stacks ({error}), expected a file of save_stacks") from None
    stacks: list[Stack] = []
    for number in range(len(arrays) // 5):
        parts = {name: arrays[f"{number}/{name}"] for name in ("indices", "live", "slices", "sizes", "names")}
        case, contrast = map(str, parts["names"])
        layout = Layout(
            live=parts["live"],
            slices=parts["slices"],
            num_embeddings=int(parts["sizes"][0]),
            num_codebooks=int(parts["sizes"][1]),
            contrast=contrast,
        )
        if stacks and stacks[-1].case == case:
            layout = replace(layout, reference=_reference(stacks[-1], layout))
        stacks.append(Stack(case, parts["indices"].astype(np.int64), layout))
    return stacks
