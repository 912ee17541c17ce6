"""``vaevq-med adopt``: a foreign tokenizer as a checkpoint of this package, which all that takes one takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.components import ComponentError, build
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import file_sha256
from vaevq_med.core.names import in_one_line
from vaevq_med.foreign.base import Adopted, AdoptOptions, Kind
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.folders import numbers
from vaevq_med.foreign.registry import kind_of
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.trained.file import FORMAT, atomic_save

_UNIFORM = "vaevq_med.networks.quantizers.uniform.UniformQuantizer"


@dataclass(frozen=True)
class AdoptReport:
    """What was written.

    Attributes:
        output: the checkpoint.
        kind: of the source.
        factors: image sizes over those of the latent grid.
        bits: of a position; None of a continuous latent.
        quantizer: its class.
        image_size: side of an image.
        in_channels: of an image.
        parameters: of the network.
        notes: what the user has to be told.
    """

    output: Path
    kind: str
    factors: tuple[int, ...]
    bits: float | None
    quantizer: str
    image_size: int
    in_channels: int
    parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Adopt:
    """Read a foreign file, try the network on a blank image, and write the checkpoint.

    Attributes:
        kind: name of its kind.
        source: file or folder.
        output: checkpoint to write.
        options: of the kind.
        overwrite: replace the output.
    """

    kind: str
    source: Path
    output: Path
    options: AdoptOptions
    overwrite: bool = False

    def run(self) -> AdoptReport:
        """Do it.

        Raises:
            VaevqMedError: the source is not what was said, an option does not fit it, or the output cannot be written.
        """
        if self.output.exists() and not (self.overwrite and self.output.is_file()):
            raise ForeignError(f"{self.output}: found something there, expected nothing; --overwrite replaces a file")
        kind = kind_of(self.kind)()
        adopted = _read(kind, self.source, self.options)
        definition = dict(adopted.definition)
        measured: dict[str, Any] = {}
        if adopted.latent_channels is not None:
            definition["quantizer"], measured = self._quantizer(adopted, adopted.latent_channels)
        network = _built(definition, adopted.network, self.source)
        if adopted.averaged is not None:
            _built(definition, adopted.averaged, self.source)
        _try(network, adopted, self.source)
        self._write(kind, adopted, definition, measured)
        notes = list(adopted.notes)
        if measured:
            notes.append(f"range of the latent: {', '.join(_ranges(definition['quantizer']))}, {measured['how']}")
        return AdoptReport(
            output=self.output,
            kind=kind.name,
            factors=network.factors,
            bits=network.quantizer.bits_per_position,
            quantizer=type(network.quantizer).__name__,
            image_size=adopted.image_size,
            in_channels=adopted.in_channels,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            notes=tuple(notes),
        )

    def _quantizer(self, adopted: Adopted, channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The int8 grid of a continuous latent, and where its range comes from."""
        options: Any = self.options
        definition = {"_target_": _UNIFORM, "num_embeddings": 2**options.latent_bits, "readout": "hard"}
        if bool(options.latent_range) == (options.latent_from is not None):
            found = "both" if options.latent_range else "neither"
            raise ForeignError(
                f"the latent is continuous: found {found} of --latent-from DATASET and --latent-range LOW,HIGH, "
                "expected one of them, by which its bits are counted"
            )
        if options.latent_range:
            ends = numbers(options.latent_range, "latent_range")
            return {**definition, "low": [ends[0]] * channels, "high": [ends[1]] * channels}, {"how": "given"}
        trial = {**definition, "low": [-1.0] * channels, "high": [1.0] * channels}
        network = _built({**adopted.definition, "quantizer": trial}, adopted.network, self.source)
        low, high, told = _measured(network, adopted, options.latent_from, options.latent_images)
        return {**definition, "low": low, "high": high}, told

    def _write(self, kind: Kind, adopted: Adopted, definition: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        size = {"image_size": adopted.image_size, "in_channels": adopted.in_channels}
        depth = {} if adopted.depth is None else {"depth": adopted.depth}
        config = {"network_def": dict(definition), **size, **depth}
        state: dict[str, Any] = {
            "format": FORMAT,
            "network": dict(adopted.network),
            **({} if adopted.averaged is None else {"ema": dict(adopted.averaged)}),
            "config": json.dumps(config),
            "data": {
                "adopted": {
                    "kind": kind.name,
                    "title": kind.title,
                    "license": kind.license,
                    "files": {path.name: file_sha256(path) for path in adopted.files},
                    "version": version("vaevq_med"),
                    **({"latent": dict(measured)} if measured else {}),
                }
            },
        }
        try:
            atomic_save(state, self.output)
        except OSError as error:
            raise ForeignError(
                f"{self.output}: found it not writable ({error.strerror or error}), expected a file to write"
            ) from None


def _read(kind: Kind, source: Path, options: AdoptOptions) -> Adopted:
    """What a kind reads; of values that it does not check, and of which Python or PyTorch complains, a line.

    Raises:
        VaevqMedError: the source is something else.
    """
    try:
        return kind.read(source, options)
    except (
        *(TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError),
        UnicodeError,
    ) as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ForeignError(
            f"{source}: found values that do not belong in it ({type(error).__name__}: {in_one_line(line)[:160]}), "
            f"expected those of {kind.title}: {kind.source}"
        ) from error


def _ranges(quantizer: Mapping[str, Any]) -> list[str]:
    pairs = list(dict.fromkeys(zip(quantizer["low"], quantizer["high"], strict=True)))
    told = [f"{low:.3g} to {high:.3g}" for low, high in pairs]
    return told if len(told) < 5 else [*told[:4], "..."]


def _built(definition: Mapping[str, Any], state: Mapping[str, Tensor], source: Path) -> Tokenizer:
    """The tokenizer, as a checkpoint will build it.

    Raises:
        VaevqMedError: tensors are missing, left over, or of another shape.
    """
    try:
        network: Any = build(definition, nn.Module, own="vaevq_med.networks")
    except ComponentError as error:
        raise ForeignError(f"{source}: {error}") from error
    assert isinstance(network, Tokenizer)
    own = network.state_dict()
    missing, left = [name for name in own if name not in state], [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or left or other:
        name = (missing or left or other)[0]
        shown = name.removeprefix("network.")
        found = "no tensor" if missing else "the tensor" if left else f"shape {list(state[name].shape)} of"
        expected = "it" if missing else "none of that name" if left else str(list(own[name].shape))
        counted = f" ({len(missing)} missing, {len(left)} left over, {len(other)} of another shape)"
        raise ForeignError(
            f"{source}: found {found} {shown!r}{counted}, expected {expected}: it is another architecture"
        )
    network.load_state_dict(dict(state))
    return network.eval()


def _blank(network: Tokenizer, adopted: Adopted) -> Tensor:
    size = [adopted.image_size] * 2
    if network.takes_volumes:
        size = [adopted.depth or 0, *size]
    return torch.zeros(1, adopted.in_channels, *size)


@torch.inference_mode()
def _try(network: Tokenizer, adopted: Adopted, source: Path) -> None:
    """Refuse what does not give an image of the image's size.

    Raises:
        VaevqMedError: saying what it gives.
    """
    if network.takes_volumes != (adopted.depth is not None):
        found = "a depth" if adopted.depth is not None else "no depth"
        expected = "the slices of an item, --depth" if network.takes_volumes else "none, it is a network of images"
        raise ForeignError(f"{source}: found {found}, expected {expected}")
    images = _blank(network, adopted)
    try:
        grid = network.grid_of(images.shape[2:])
        latent = network.encode_stage_2_inputs(images)
        decoded = network.decode_indices(network.encode_indices(images))
    except VaevqMedError as error:
        raise ForeignError(f"{source}: {error}") from None
    except Exception as error:  # whatever the foreign network raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ForeignError(
            f"{source}: found a network that does not take an image of shape {list(images.shape)} ({line}), expected "
            "one that does; --image-size and --in-channels choose another"
        ) from None
    shape, wanted = list(latent.shape[1:]), [network.embedding_dim, *grid]
    if shape != wanted or decoded.shape != images.shape:
        raise ForeignError(
            f"{source}: found a latent of shape {shape} and an image of {list(decoded.shape[1:])} for one of "
            f"{list(images.shape[1:])}, expected {wanted} and an image of the same shape"
        )
    for name, values in (("a latent", latent), ("an image", decoded)):
        if not bool(torch.isfinite(values).all()):
            raise ForeignError(
                f"{source}: found {name} with values that are NaN or infinite, of a blank image, expected finite ones"
            )


@torch.inference_mode()
def _measured(
    network: Tokenizer, adopted: Adopted, dataset: Path, count: int
) -> tuple[list[float], list[float], dict[str, Any]]:
    """The smallest and the largest value of each channel of the latent over images of a training split."""
    from vaevq_med.images.dataset import SliceDataset
    from vaevq_med.images.reading import reader

    images = SliceDataset(
        dataset_dir=dataset,
        split="training",
        max_items=count,
        depth=adopted.depth,
        transform=reader(dataset, image_size=adopted.image_size, in_channels=adopted.in_channels),
    )
    lows, highs = [], []
    for number in range(len(images)):
        item: Any = images[number]
        encoded = network.encode(torch.as_tensor(item["image"]).unsqueeze(0))
        latent = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
        values = latent.float().movedim(1, 0).flatten(1)
        lows.append(values.amin(dim=1))
        highs.append(values.amax(dim=1))
    low, high = torch.stack(lows).amin(dim=0), torch.stack(highs).amax(dim=0)
    if not bool(torch.isfinite(high - low).all()) or not bool((low < high).all()):
        raise ForeignError(
            f"{dataset}: found a latent without a range over {len(images)} images, expected values that vary"
        )
    told = {
        "how": f"measured on {len(images)} training images of {images.manifest.content.get('name') or dataset.name}",
        "content_hash": images.manifest.content_hash,
        "images": len(images),
    }
    return low.tolist(), high.tolist(), told
