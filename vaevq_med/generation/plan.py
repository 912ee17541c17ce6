"""Which images are drawn: number, label, seed and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import did_you_mean
from vaevq_med.core.options import expect, is_int
from vaevq_med.generation.originals import Originals
from vaevq_med.images.dataset import mix_seeds
from vaevq_med.networks.generators.inpainting import inpainting_generators
from vaevq_med.tokens.store import TokenDataset
from vaevq_med.tokens.views import View
from vaevq_med.trained.network import StoredGenerator

_WHOLE = 2**63 - 1


def resolve_labels(labels: Any, names: Sequence[str]) -> list[int]:
    """Numbers of labels, which are given by name or by number, one or several; None is all in turn.

    Args:
        labels: what is asked for.
        names: of the labels, by number.

    Returns:
        The numbers; that of the null class, 0, where there are no labels.

    Raises:
        VaevqMedError: there is no such label, or several.

    >>> resolve_labels(["t2f", 0], ["t1n", "t2f"]), resolve_labels(None, ["t1n", "t2f"])
    ([1, 0], [0, 1])
    """
    if labels is None:
        return list(range(max(1, len(names))))
    if not names:
        raise VaevqMedError(f"labels: found {labels} for a generator without labels, expected null")
    found = []
    for label in labels if isinstance(labels, list | tuple) else [labels]:
        if list(names).count(label) > 1:
            numbers = ", ".join(str(number) for number, name in enumerate(names) if name == label)
            raise VaevqMedError(f"labels: found {label!r}, the name of several, expected one of the numbers {numbers}")
        if label in names:
            found.append(list(names).index(label))
        elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
            found.append(label)
        else:
            known = did_you_mean(label, names, f"0 to {len(names) - 1}: {', '.join(names[:8])}")
            raise VaevqMedError(f"labels: found {label!r}, expected a label of the generator's training: {known}")
    if not found:
        raise VaevqMedError("labels: found an empty list, expected labels, or null for all in turn")
    return found


class SamplePlan(Dataset[dict[str, Any]]):
    """Number, label and seed of each image to draw, and with ``inpaint_tokens`` what is known of it.

    Sample ``i`` has the label ``labels[i % len(labels)]`` and a seed made of ``seed`` and ``i`` alone. To inpaint, it
    is image ``i % N`` of the N of a token store's split, whole and not mirrored, with the positions that the box
    touches drawn anew and, without ``labels``, the image's own label.

    Args:
        stored: the generator.
        num_samples: how many.
        labels: names or numbers, see :func:`resolve_labels`.
        seed: of the samples, from 0.
        inpaint_tokens: token store, of the generator's own tokenizer, whose images are inpainted.
        inpaint_split: its split; None takes ``test``.
        inpaint_box: rows and columns of the image, ``(top, left, bottom, right)`` in pixels, the last two exclusive.
        inpaint_images: data set that the tokens were encoded from; the pixels outside of the box are then those of the
            images, and not the tokenizer's. None leaves them as they are decoded.

    Attributes:
        labels: numbers of the labels in turn, or None where each image has its own.

    An item holds ``number``, ``label`` and ``seed``, and to inpaint ``known`` int64 ``[h, w, G]``, ``mask`` bool
    ``[h, w]``, true where known, and ``source``, the image's path in its data set; with ``inpaint_images`` also
    ``original`` float32 ``[C, S, S]`` and ``keeps`` bool ``[S, S]``, true outside of the box.

    Raises:
        VaevqMedError: a label, a count, the seed or the box is out of range, or the store is not the generator's
            tokenizer's, or has crops only.
    """

    def __init__(
        self,
        *,
        stored: StoredGenerator,
        num_samples: int,
        labels: Any = None,
        seed: int = 0,
        inpaint_tokens: str | Path | None = None,
        inpaint_split: str | None = None,
        inpaint_box: Sequence[int] | None = None,
        inpaint_images: str | Path | None = None,
    ) -> None:
        expect(is_int(num_samples, 1, _WHOLE), "num_samples", num_samples, "a whole number from 1")
        expect(is_int(seed, 0, _WHOLE), "seed", seed, "a whole number from 0")
        if (inpaint_tokens is None) != (inpaint_box is None):
            raise VaevqMedError("inpainting: found one of inpaint_tokens and inpaint_box, expected both or neither")
        for name, value in (("inpaint_split", inpaint_split), ("inpaint_images", inpaint_images)):
            if inpaint_tokens is None and value is not None:
                raise VaevqMedError(f"{name}: found {str(value)!r} without inpaint_tokens, expected both or neither")
        self.stored = stored
        self.num_samples = num_samples
        self.seed = seed
        self.box = inpaint_box
        self.known: TokenDataset | None = None
        self.originals: Originals | None = None
        self.labels: list[int] | None = resolve_labels(labels, stored.label_names)
        if inpaint_tokens is not None:
            self.known = self._known(Path(inpaint_tokens), inpaint_split or "test")
            self.view = self._whole(self.known)
            self.mask = self._mask()
            if inpaint_images is not None:
                size, channels = (int(stored.tokens[key]) for key in ("image_size", "in_channels"))
                self.originals = Originals(inpaint_images, self.known, image_size=size, in_channels=channels)
                self.keeps = self._keeps(size)
            if labels is None:
                self._check_names(self.known)
                self.labels = None

    def _known(self, tokens_dir: Path, split: str) -> TokenDataset:
        tokens = self.stored.tokens
        if tokens["kind"] != "indices":
            definition = self.stored.config.get("network_def")
            target = str(definition.get("_target_") if isinstance(definition, dict) else None).rpartition(".")[2]
            raise VaevqMedError(
                f"inpaint_tokens: found {target}, a generator of {tokens['kind']}, expected {inpainting_generators()}"
            )
        if len(tokens["grid"]) != 2:
            raise VaevqMedError("inpaint_tokens: found a generator of layers of volumes, expected one of images")
        if not tokens["tokenizer"].get("patchwise", True):
            raise VaevqMedError("inpaint_tokens: found tokens that stand for no place, expected one for each patch")
        return TokenDataset(
            tokens_dir=tokens_dir,
            split=split,
            kind="indices",
            grid=tokens["grid"],
            tokenizer_hash=tokens["tokenizer"]["content_hash"],
        )

    def _whole(self, known: TokenDataset) -> int:
        """Which of the views is the image itself."""
        views = known.store.views(known.split)
        if View().name not in views:
            raise VaevqMedError(
                f"{known.store.root}: found split {known.split!r} in {len(views)} views, such as {views[0]!r}, but not "
                f"{View().name!r}, expected that; make a store without --ten-crop"
            )
        return views.index(View().name)

    def _mask(self) -> Tensor:
        """Where tokens are kept: outside of the positions that the box touches."""
        size, (height, width) = int(self.stored.tokens["image_size"]), self.stored.tokens["grid"]
        box: Any = self.box
        valid = isinstance(box, list | tuple) and len(box) == 4 and all(is_int(side, 0, size) for side in box)
        expect(
            valid and box[0] < box[2] and box[1] < box[3],
            "inpaint_box",
            box,
            f"[top, left, bottom, right], whole pixels within 0 to {size}",
        )
        row, column = size // height, size // width
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[box[0] // row : -(-box[2] // row), box[1] // column : -(-box[3] // column)] = False
        return mask

    def _keeps(self, size: int) -> Tensor:
        """Where pixels are kept: outside of the box itself, where the mask is of whole positions."""
        assert self.box is not None
        top, left, bottom, right = self.box
        keeps = torch.ones(size, size, dtype=torch.bool)
        keeps[top:bottom, left:right] = False
        return keeps

    def _check_names(self, known: TokenDataset) -> None:
        if known.store.label_names != self.stored.label_names:
            raise VaevqMedError(
                f"{known.store.root}: found labels {', '.join(known.store.label_names) or 'none'}, expected those of "
                f"the generator, {', '.join(self.stored.label_names) or 'none'}; name some with --labels"
            )

    def describe(self) -> dict[str, Any]:
        """What a sample depends on, apart from its number."""
        record: dict[str, Any] = {"seed": self.seed, "labels": self.labels}
        if self.known is not None:
            record |= {
                "inpaint_tokens": self.known.store.content_hash,
                "inpaint_split": self.known.split,
                "inpaint_box": self.box,
            }
        if self.originals is not None:
            record["inpaint_images"] = self.originals.content_hash
        return record

    def __len__(self) -> int:
        return self.num_samples

    def entry(self, number: int) -> dict[str, Any]:
        """``number``, ``label``, ``seed`` and, to inpaint, ``source`` of a sample."""
        entry: dict[str, Any] = {"number": number, "seed": mix_seeds(self.seed, number)}
        if self.known is None:
            assert self.labels is not None
            return {**entry, "label": self.labels[number % len(self.labels)]}
        image = number % len(self.known)
        label = self.known.labels[image] if self.labels is None else self.labels[number % len(self.labels)]
        return {**entry, "label": label, "source": str(self.known.items[image]["id"])}

    def __getitem__(self, number: int) -> dict[str, Any]:
        entry = self.entry(number)
        if self.known is None:
            return entry
        image = number % len(self.known)
        values = self.known.store.array(self.known.split)[image, self.view]
        item = {**entry, "known": torch.from_numpy(values.astype(np.int64)), "mask": self.mask}
        if self.originals is None:
            return item
        return {**item, "original": self.originals[image], "keeps": self.keeps}
