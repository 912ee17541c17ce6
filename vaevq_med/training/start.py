"""What a run starts from, which of its parts stay as they are, and at what rates the others learn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.base import FollowsLatents
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.trained.patients import STARTED_FROM
from vaevq_med.trained.starting import check_parts, is_given, part_of, start_network
from vaevq_med.training import distributed
from vaevq_med.training.checkpoint import resumed_file

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


class Start:
    """Starts a run's network from another one's weights, freezes parts, and deals parameters to the optimizer.

    A run that goes on from its own checkpoint does not read ``init_from`` again.

    Args:
        init_from: see :func:`vaevq_med.trained.starting.read_start`; None starts with random weights.
        parts: which parts are taken; None for all.
        freeze: parts that stay as they are to the bit: no gradient, no optimizer, no moving averages.
        learning_rate_ratio: rate of the parts that were loaded over that of the new ones, above 0; of no effect where
            nothing is loaded.
        directory: of the run's checkpoints.
        resume: as for :class:`~vaevq_med.training.TrainingCheckpoint`.

    Attributes:
        record: of a file that was started from, see :func:`vaevq_med.trained.starting.start_network`; otherwise None.

    Raises:
        VaevqMedError: an option is out of its range, or parts are named without a file.
    """

    def __init__(
        self,
        *,
        init_from: str | Path | None = None,
        parts: Sequence[str] | None = None,
        freeze: Sequence[str] = (),
        learning_rate_ratio: float = 1.0,
        directory: str | Path,
        resume: bool | str = "auto",
    ) -> None:
        self.init_from = init_from if is_given(init_from) else None
        self.parts = parts if is_given(parts) else None
        self.freeze = freeze if is_given(freeze) else ()
        self.learning_rate_ratio = learning_rate_ratio
        if not learning_rate_ratio > 0:
            raise VaevqMedError(f"loaded_learning_rate_ratio: found {learning_rate_ratio}, expected a number above 0")
        if self.init_from is None and self.parts is not None:
            raise VaevqMedError(f"init_parts: found {parts} without init_from, expected a file to start from beside it")
        self.resumed = resumed_file(directory, resume)
        self.record: dict[str, Any] | None = None
        self._made = False

    def network(self, network: Network) -> Network:
        """The network at its start, with what is frozen frozen.

        Raises:
            VaevqMedError: the file does not fit, there is no such part, or nothing is left to train.
        """
        if self.init_from is not None:
            if self.resumed is not None:
                self.record = _kept_record(self.resumed)
                if distributed.is_main():
                    logger.warning("init_from %s is not read: the run goes on from %s", self.init_from, self.resumed)
            else:
                self.record = start_network(network, self.init_from, parts=self.parts)
                if distributed.is_main():
                    logger.warning("  discriminator and averages of the optimizers: new")
        self._made = True
        frozen = check_parts("freeze", self.freeze, network)
        for name, parameter in network.named_parameters():
            if part_of(name) in frozen:
                parameter.requires_grad_(False)
        for name, module in network.named_modules():
            if isinstance(module, FollowsLatents) and part_of(name) in frozen:
                module.frozen = True
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise VaevqMedError(
                f"freeze: found {', '.join(frozen)}, which leaves no parameter to train, expected fewer parts"
            )
        return network

    def parameter_groups(self, network: nn.Module, learning_rate: float) -> list[Any]:
        """What the optimizer is given: the trained parameters, or groups of the new and of the loaded ones.

        Args:
            network: after :meth:`network`.
            learning_rate: of what is new.

        Raises:
            VaevqMedError: there is something to load or to freeze, and the network was not made by :meth:`network`.
        """
        if not self._made and (self.init_from is not None or self.freeze):
            raise VaevqMedError(
                "network: found one that is not made by @start, expected $@start.network(...) for init_from and freeze"
            )
        trained = {name: one for name, one in network.named_parameters() if one.requires_grad}
        if self.record is None:
            return list(trained.values())
        loaded = {name for name, told in self.record["parts"].items() if _is_loaded(told)}
        groups: list[dict[str, Any]] = [
            {"params": [one for name, one in trained.items() if part_of(name) not in loaded]},
            {
                "params": [one for name, one in trained.items() if part_of(name) in loaded],
                "lr": learning_rate * self.learning_rate_ratio,
                "name": "loaded",
            },
        ]
        return [group for group in groups if group["params"]]


def _is_loaded(told: Mapping[str, Any]) -> bool:
    return bool(told["loaded"] or told["adapted"] or told["inflated"])


def _kept_record(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says that its run started from."""
    if not path.is_file():
        return None  # the checkpoint handler says so
    return read_checkpoint(path).get("data", {}).get(STARTED_FROM)
