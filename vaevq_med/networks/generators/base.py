"""The interface of a second-stage network: what a token store, a checkpoint and a sampler ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer


@dataclass(frozen=True)
class Setting:
    """One of the settings that a generator draws by.

    Attributes:
        default: the published value.
        valid: whether a value may be chosen.
        expected: the valid values in words.
    """

    default: Any
    valid: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Wanted:
    """Images to draw, one a seed.

    Attributes:
        labels: ``[B]`` on the network's device; None where there are no classes.
        seeds: B numbers, of which each image depends on its own alone.
        known: indices ``[B, *grid, G]`` that are given, to inpaint.
        mask: bool ``[B, *grid]``, true where they are.
        dtype: type that the network runs in; its own when absent.
    """

    labels: Tensor | None
    seeds: Sequence[int]
    known: Tensor | None = None
    mask: Tensor | None = None
    dtype: torch.dtype | None = None


Draw = Callable[[Wanted], Tensor]
"""Gives the images ``[B, C, H, W]`` that are wanted, not clamped, batch after batch."""


class Generator(nn.Module, ABC):
    """A network that draws what a tokenizer decodes.

    A new one is a file with the network, and one with its loss; a bundle names both.

    Attributes:
        kind: which of a store's arrays it is trained on.
        settings: of drawing, by name; ``guidance_scale`` is 1 in a network without classes.
        inpaints: whether it draws around indices that are given (:attr:`Wanted.known`).
        likelihood: what :meth:`bound` gives of tokens: ``exact``, a ``bound``, or None of a network that has neither.
        num_classes: labels are below it; 0 for none. It is the index of the null class too, and has to be the
            store's, also in a network that does not look at labels.
    """

    kind: ClassVar[Literal["indices", "latents"]]
    settings: ClassVar[Mapping[str, Setting]]
    inpaints: ClassVar[bool] = False
    likelihood: ClassVar[Literal["exact", "bound"] | None] = None
    num_classes: int = 0

    @property
    def null_class(self) -> int:
        """The label that stands for no label."""
        return self.num_classes

    @abstractmethod
    def sizes(self, tokens: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """What has to agree with a store, by name: the store's value and the network's.

        Args:
            tokens: description of the store: ``kind``, ``tokenizer``, ``grid`` and ``label``.
            where: what it was read from, for a message.

        Raises:
            VaevqMedError: a size that no other one fits.
        """

    @abstractmethod
    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """What draws images by these settings.

        Args:
            tokenizer: in evaluation mode, on the network's device.
            grid: positions of the tokens along each axis.
            settings: a value for each of :attr:`settings`.
            trained_with: the value of a setting of the training run, by its id.

        Raises:
            VaevqMedError: a setting does not fit the training.
        """

    def bound(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``-log p`` of indices in nats a token, or an upper bound of it, as :attr:`likelihood` says.

        Args:
            indices: ``[B, *grid, G]``.
            labels: ``[B]``; the null class when absent.
            generator: of a bound's draws; the global one when absent.

        Raises:
            VaevqMedError: there is no likelihood, or a shape or a value does not fit.
        """
        raise VaevqMedError(f"found {type(self).__name__}, which has no likelihood of tokens")

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int | None:
        """Passes through the network that one image takes, the tokenizer's left out; None of one that does not say.

        With guidance a pass is of twice the batch, and counts once.

        Args:
            grid: positions of the tokens along each axis.
            settings: a value for each of :attr:`settings`.
        """
        return None

    def check_plane(self, tokens: Mapping[str, Any], where: str) -> None:
        """Refuse a grid of other than two axes, for a network that is made for rows and columns.

        Args:
            tokens: description of the store.
            where: what it was read from, for the message.

        Raises:
            VaevqMedError: saying the grid found.
        """
        if len(tokens["grid"]) != 2:
            raise VaevqMedError(
                f"{where}: found a grid of {'x'.join(map(str, tokens['grid']))}, expected rows and columns, which "
                f"{type(self).__name__} is made for"
            )

    def check_fit(self, tokens: Mapping[str, Any], where: str) -> None:
        """Refuse tokens whose sizes are not the network's.

        Args:
            tokens: description of the store.
            where: what it was read from, for the message.

        Raises:
            VaevqMedError: naming the size.
        """
        sizes = {
            **self.sizes(tokens, where),
            "kind": (tokens["kind"], self.kind),
            "num_classes": (len(tokens["label"]["names"]), self.num_classes),
        }
        for name, (found, expected) in sizes.items():
            if found != expected:
                raise VaevqMedError(
                    f"{where}: found tokens of {name} {found}, expected {name} {expected}, as the generator has"
                )

    def prepare(self, values: Callable[[], Tensor]) -> None:
        """Measure what training needs of the data.

        Args:
            values: gives some of the training split, evenly spaced: indices ``[N, *grid, G]`` or latents
                ``[N, D, *grid]``.

        Raises:
            VaevqMedError: they do not serve.
        """

    def check_ready(self) -> None:
        """Refuse to draw where training has not measured what that needs.

        Raises:
            VaevqMedError: naming it.
        """
