"""What a run starts from, which of its parts stay as they are, and at what rates the others learn."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import listed
from vaevq_med.networks.quantizers.base import FollowsLatents
from vaevq_med.trained.definition import known_definition
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.trained.patients import STARTED_FROM
from vaevq_med.trained.starting import check_parts, is_given, part_of, start_network, unit_of
from vaevq_med.training import distributed
from vaevq_med.training.checkpoint import resumed_file
from vaevq_med.training.current import current_config

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
        if init_from is not None and not isinstance(init_from, str | Path):
            raise VaevqMedError(f"init_from: found {init_from!r}, expected the name of a file or a folder")
        self.init_from = init_from if is_given(init_from) else None
        self.parts = parts if is_given(parts) else None
        self.freeze = freeze if is_given(freeze) else ()
        self.learning_rate_ratio = learning_rate_ratio
        if not 0 < learning_rate_ratio < math.inf:
            raise VaevqMedError(
                f"loaded_learning_rate_ratio: found {learning_rate_ratio}, expected a finite number above 0"
            )
        if self.init_from is None and self.parts is not None:
            raise VaevqMedError(f"init_parts: found {parts} without init_from, expected a file to start from beside it")
        self.resumed = resumed_file(directory, resume)
        self.record: dict[str, Any] | None = None
        self._made = False

    def network(self, network: Network) -> Network:
        """The network at its start, with what is frozen frozen.

        Raises:
            VaevqMedError: the file does not fit, there is no such part, one that is to be frozen was left new though it
                was to be loaded, or nothing is left to train.
        """
        if self.resumed is not None:
            self.record = _kept_record(self.resumed)
            if self.init_from is not None and distributed.is_main():
                logger.warning("init_from %s is not read: the run goes on from %s", self.init_from, self.resumed)
        elif self.init_from is not None:
            own = known_definition(current_config(), "this run")
            self.record = start_network(network, self.init_from, parts=self.parts, own=own)
            if distributed.is_main():
                logger.warning("  discriminator and averages of the optimizers: new")
        self._made = True
        frozen = check_parts("freeze", self.freeze, network)
        if self.resumed is None:
            self._check_loaded(frozen)
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

    def _check_loaded(self, frozen: Sequence[str]) -> None:
        """Refuse to freeze what was to be loaded and was left new, at its random start."""
        if self.record is None:
            return
        asked = None if self.parts is None else [str(part) for part in listed(self.parts)]
        for part in frozen:
            told = self.record["parts"].get(part, {})
            if told.get("new") and (asked is None or part in asked):
                raise VaevqMedError(
                    f"freeze: found {part}, which {self.init_from} does not fit ({told['told']}), expected parts that "
                    "are loaded; to freeze it as it begins, leave it out of init_parts"
                )

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
        loaded = {unit for told in self.record["parts"].values() for unit in told["units"]}
        groups: list[dict[str, Any]] = [
            {"params": [one for name, one in trained.items() if unit_of(name) not in loaded]},
            {
                "params": [one for name, one in trained.items() if unit_of(name) in loaded],
                "lr": learning_rate * self.learning_rate_ratio,
                "name": "loaded",
            },
        ]
        return [group for group in groups if group["params"]]

    def check_codebook_init(self, init: str) -> None:
        """Refuse another start of a quantizer that is frozen, or that was loaded.

        Args:
            init: what puts its codewords elsewhere, for the message.

        Raises:
            VaevqMedError: it is.
        """
        if "quantizer" in map(str, listed(self.freeze)):
            raise VaevqMedError(
                f"codebook_init: found {init} with the quantizer in freeze, which would move it; expected "
                "codebook_init random, or freeze without quantizer"
            )
        told = (self.record or {}).get("parts", {}).get("quantizer", {})
        if self.resumed is None and told.get("units"):
            raise VaevqMedError(
                f"codebook_init: found {init} with a quantizer that was loaded from {self.init_from}, expected "
                "init_parts without quantizer, or codebook_init random"
            )


def _kept_record(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says that its run started from."""
    if not path.is_file():
        return None  # the checkpoint handler says so
    return read_checkpoint(path).get("data", {}).get(STARTED_FROM)
