"""A network as its checkpoint describes it, so that what uses it needs neither overlays nor overrides.

A checkpoint holds the merged configuration. Only its plain values and components of ``vaevq_med.networks`` and of
trusted packages are read back: an expression in a file must not run as code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vaevq_med.core.components import ComponentError, build, resolve
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import file_sha256
from vaevq_med.core.options import is_int
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Generator
from vaevq_med.networks.weights import read_weights
from vaevq_med.trained.definition import OWN, plain, target_of
from vaevq_med.trained.file import CheckpointError, load_state, network_hash, stored_shape
from vaevq_med.trained.packed import is_described, read_trained, weights_file
from vaevq_med.trained.patients import TrainingPatients

_SIZES = ("image_size", "in_channels", "depth")
"""Settings that are whole numbers; None of a run without one, where that may be."""
_LARGEST = 2**16

_TOKENIZER = "that of a tokenizer, such as vaevq_med.networks.VisualTokenizer"


class StoredNetwork:
    """A trained network and the settings it was trained with.

    Args:
        path: a checkpoint written by training, the folder of a packed bundle, or a file of its weights; see
            :func:`vaevq_med.trained.packed.read_trained`.
        weights: ``ema`` for the averaged weights (the raw ones where none were kept), or ``network``.
        config: settings of the training run, for a plain state dictionary that nothing beside it describes.

    Attributes:
        path: as it was given; a folder by its whole name.
        file: the file of the weights.
        config: the configuration it was trained with, unresolved.

    Raises:
        CheckpointError: the file is missing, unreadable, of another version, or holds an expression where plain
            values are due; or a packed bundle has the averaged weights alone, and others are asked for.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        weights: str = "ema",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if weights not in ("ema", "network"):
            raise CheckpointError(f"weights: found {weights!r}, expected 'ema' or 'network'")
        self.path = Path(path).resolve() if Path(path).is_dir() else Path(path)
        self.file = weights_file(self.path)
        self.weights = weights
        # MONAI builds the components of a configuration, those of a network's definition too: the file's own are plain.
        if config is None or is_described(self.file):
            self._state: dict[str, Any] = read_trained(self.path)
            self.config = json.loads(self._state.get("config") or "{}")
        else:
            self._state = {"network": read_weights(self.file)}
            self.config = dict(config)
        if weights == "network" and self._state.get("packed") == "ema":
            raise CheckpointError(
                f"{self.path}: found a bundle of the averaged weights alone, expected the others for weights network: "
                "pack them with vaevq-med bundle pack --weights network"
            )

    def value(self, key: str, *default: Any) -> Any:
        """A top-level setting of the training run, such as ``image_size``.

        Args:
            key: its id.
            *default: what to return where the run has no such setting; without it, that is an error.
        """
        if default and key not in self.config:
            return default[0]
        if key not in self.config:
            raise CheckpointError(f"{self.path}: found no setting {key!r}, expected the run's configuration")
        found = plain(self.config[key], self.config, self.path)
        if key in _SIZES and not (is_int(found, 1, _LARGEST) or (found is None and default)):
            raise CheckpointError(
                f"{self.path}: {key} is {str(found)[:80]!r}; expected a whole number from 1 to {_LARGEST}"
            )
        return found

    @property
    def iteration(self) -> int:
        """Iterations that the weights were trained for."""
        return int(self._state.get("iteration", 0))

    @property
    def data(self) -> Mapping[str, Any]:
        """The data it was trained on: ``split_hash``, ``content_hash``, ``patients``, ``reading``; empty if unknown.

        A packed bundle has hashes in place of the patients' names, which :attr:`patients` understands. ``recipe`` is
        what the data set says that its images were made by. A generator's has ``tokens`` too, the description of its
        token store.
        """
        return self._state.get("data", {})

    @property
    def patients(self) -> TrainingPatients:
        """Whom it was trained on.

        Raises:
            DataError: a packed bundle has something else in place of their hashes.
        """
        return TrainingPatients(self.data, str(self.path))

    @property
    def run_id(self) -> str | None:
        """MLflow run that trained it."""
        return self._state.get("extra", {}).get("mlflow_run_id")

    @property
    def spent(self) -> Mapping[str, Any]:
        """What the training counted of itself: ``images``, ``timed_seconds``, ``device``; empty if unknown."""
        found = self._state.get("extra", {}).get("run_summary")
        return found if isinstance(found, Mapping) else {}

    @property
    def feature_weights(self) -> Mapping[str, str]:
        """Hashes of the weights of the feature networks that its objective measured by, by their names."""
        return self._state.get("feature_weights") or {}

    @property
    def sha256(self) -> str:
        """SHA-256 of the file of the weights."""
        return file_sha256(self.file)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the network's definition and weights alone, with the prefix ``sha256:``."""
        return network_hash(self.value("network_def"), self.tensors)

    @property
    def kept(self) -> str:
        """``ema`` where the weights that are used are an average, ``network`` where they are those of the last step."""
        return str(
            self._state.get("packed") or ("ema" if self.weights == "ema" and self._state.get("ema") else "network")
        )

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The weights that are used, by name."""
        return self._state.get(self.weights) or self._state["network"]

    def network(self) -> nn.Module:
        """Build the network, of whatever kind, and load its weights.

        Raises:
            VaevqMedError: it cannot be built, or the weights are of another architecture.
        """
        network: nn.Module = self._build(nn.Module, "a network")
        return network

    def _build(self, kind: type[nn.Module], expected: str) -> Any:
        """The network of this kind, with its weights, in evaluation mode."""
        definition = self.value("network_def")
        try:
            network = build(definition, nn.Module, own=OWN)
        except VaevqMedError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        if not isinstance(network, kind):
            raise CheckpointError(f"{self.path}: found a checkpoint of {target_of(definition)}, expected {expected}")
        load_state(network, self.tensors, self.path, "network", "the one that its own network_def describes")
        return network.eval()


class StoredTokenizer(StoredNetwork):
    """A trained tokenizer and the settings it was trained with.

    Args:
        path: as for :class:`StoredNetwork`.
        weights: ``ema`` for the averaged weights (the raw ones where none were kept), or ``network``.
        readout: which of the quantizer's ways to decode is used, or None for the one that it was trained with.
        config: as for :class:`StoredNetwork`.

    Raises:
        CheckpointError: see :class:`StoredNetwork`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        weights: str = "ema",
        readout: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, weights=weights, config=config)
        self._readout = readout

    @classmethod
    def of_hash(cls, path: str | Path, content_hash: str, readout: str | None = None) -> StoredTokenizer | None:
        """The averaged or the raw weights of a checkpoint, whichever have a content hash; None if neither has.

        Args:
            path: the checkpoint.
            content_hash: of a tokenizer.
            readout: as for the class.
        """
        stored = cls(path, readout=readout)
        for stored.weights in ("ema", "network"):
            if stored.content_hash == content_hash:
                return stored
        return None

    def check_target(self) -> None:
        """Refuse, without building it, another network's checkpoint.

        Raises:
            CheckpointError: naming what was found.
        """
        target = target_of(self.value("network_def"))
        try:
            kind = resolve(str(target), nn.Module, own=OWN)
        except ComponentError:
            kind = None
        if not (isinstance(kind, type) and issubclass(kind, Tokenizer)):
            raise CheckpointError(f"{self.path}: found a checkpoint of {target}, expected {_TOKENIZER}")

    @property
    def shape(self) -> str | None:
        """How its images were brought to squares, see :mod:`vaevq_med.images.reading`; None where that is unknown."""
        return stored_shape(self.data, self.config)

    def check_shape(self, found: str | None, dataset: Path, option: str) -> None:
        """Refuse images that are brought to squares in another way than those of its training.

        Args:
            found: how they are; None where that is unknown, which is not refused.
            dataset: their folder, for the message.
            option: what allows them.

        Raises:
            CheckpointError: naming both.
        """
        if found and self.shape and found != self.shape:
            raise CheckpointError(
                f"{dataset}: found images that are read as {found}, expected {self.shape}, as {self.path} was trained "
                f"on; {option} takes them all the same"
            )

    @property
    def readout(self) -> str | None:
        """How the quantizer is decoded, or None where that is not said."""
        definition = self.value("network_def")
        quantizer = definition.get("quantizer") if isinstance(definition, Mapping) else None
        return self._readout or (quantizer.get("readout") if isinstance(quantizer, Mapping) else None)

    def network(self) -> Tokenizer:
        """Build the tokenizer and load its weights.

        Raises:
            VaevqMedError: the checkpoint is another network's, or the quantizer has no such read-out.
        """
        network: Tokenizer = self._build(Tokenizer, _TOKENIZER)
        if self._readout is not None:
            network.quantizer.select_readout(self._readout)
        return network


class StoredGenerator(StoredNetwork):
    """A trained generator, and what its checkpoint says of the tokens that it was trained on.

    Args:
        path: as for :class:`StoredNetwork`.
        weights: ``ema`` for the averaged weights, or ``network``.

    Raises:
        CheckpointError: see :class:`StoredNetwork`.
    """

    @property
    def tokens(self) -> Mapping[str, Any]:
        """``content_hash``, ``kind``, ``tokenizer``, ``grid``, ``image_size``, ``in_channels`` and ``label``.

        Raises:
            CheckpointError: the checkpoint is no generator's.
        """
        if "tokens" not in self.data:
            raise CheckpointError(
                f"{self.path}: found a checkpoint that no token store belongs to, expected a generator's "
                "(python -m monai.bundle run training --config_file bundles/brats/train_autoregressive.json)"
            )
        return self.data["tokens"]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels by number; empty where there are none."""
        return tuple(self.tokens["label"]["names"])

    def provenance(self, **further: Any) -> dict[str, Any]:
        """What a generated image depends on: the generator's weights, its tokenizer, its images, and ``further``."""
        described = self.tokens["tokenizer"]
        return {
            "generator": self.content_hash,
            "tokenizer": described["content_hash"],
            "readout": described["readout"],
            "trained_on": {name: self.data.get(name) for name in ("content_hash", "split_hash")},
            "views": self.tokens.get("views"),
            **further,
        }

    def network(self) -> Generator:
        """Build the generator and load its weights.

        Raises:
            VaevqMedError: the checkpoint is another network's, or the network does not fit its tokens, or has no scale
                factor.
        """
        tokens = self.tokens
        network: Generator = self._build(Generator, "that of a generator, such as vaevq_med.networks.LlamaGen")
        network.check_fit(tokens, str(self.path))
        try:
            network.check_ready()
        except VaevqMedError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return network

    def tokenizer(self, path: str | Path) -> Tokenizer:
        """The tokenizer that made the tokens, with the weights and the read-out that it made them with.

        Args:
            path: its checkpoint.

        Raises:
            VaevqMedError: it is another tokenizer.
        """
        described = self.tokens["tokenizer"]
        found = StoredTokenizer.of_hash(path, described["content_hash"], described["readout"])
        if found is not None:
            return found.network()
        StoredTokenizer(path).network()
        raise CheckpointError(
            f"{path}: found another tokenizer ({StoredTokenizer(path).content_hash[:19]}...), expected "
            f"{described['content_hash'][:19]}..., which made the tokens of {self.path}"
        )
