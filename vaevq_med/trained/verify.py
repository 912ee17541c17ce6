"""``vaevq-med bundle verify``: whether a packed bundle is what was packed, and works here; nothing is downloaded.

MONAI's own checks, ``verify_metadata`` (which fetches its schema) and ``verify_net_in_out``, take the same folder. Of
that schema the fields that a packed bundle has are asked for here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import file_sha256
from vaevq_med.core.maker import MADE_BY
from vaevq_med.networks.weight_file import header_of
from vaevq_med.trained.network import StoredNetwork
from vaevq_med.trained.packed import HEADER, MODELS, RECORD, WEIGHTS, weights_file
from vaevq_med.trained.passing import input_shape, output_of

_METADATA: Mapping[str, type] = {
    **dict.fromkeys(("schema", "version", "monai_version", "pytorch_version", "numpy_version"), str),
    **dict.fromkeys(("task", "description", "authors", "copyright"), str),
    **dict.fromkeys(("changelog", "required_packages_version", "network_data_format"), dict),
}
_FORMAT: Mapping[str, type] = {
    **{"type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str},
    **{"value_range": list, "is_patch_data": bool, "channel_def": dict},
}
_WORDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object", bool: "true or false"}
_AGAIN = "copy the bundle again, or pack the checkpoint again"


@dataclass(frozen=True)
class BundleVerify:
    """Check a packed bundle.

    Attributes:
        folder: of it.
    """

    folder: Path

    def run(self) -> Iterator[str]:
        """What was found, a line a check.

        Raises:
            VaevqMedError: at the first check that fails: files are missing or altered, weights do not load or are
                others than those that were packed, the metadata lacks something, or the network makes something else
                than they say.
        """
        weights_file(self.folder)  # refuses what is no bundle
        made = _object(self.folder / MADE_BY)
        if not {"network", "files"} & made.keys():
            raise VaevqMedError(
                f"{self.folder / MADE_BY}: found neither the network's hash nor those of files, expected what bundle "
                f"pack wrote: {_AGAIN}"
            )
        yield self._check_files(made)
        stored = self._stored(made)
        yield f"weights: those that were packed, {stored.content_hash[:19]}..., of iteration {stored.iteration}"
        path = self.folder / "configs" / "metadata.json"
        formats = _check_metadata(_object(path), path)
        yield "metadata: every field is there"
        yield _check_passing(stored, formats, path)

    def _check_files(self, made: Mapping[str, Any]) -> str:
        files = made.get("files")
        if not isinstance(files, Mapping):
            return "files: unknown, since none were recorded when this bundle was packed"
        missing, altered = [], []
        for name, digest in files.items():
            path = self.folder / str(name)
            if Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
                raise VaevqMedError(f"{self.folder / MADE_BY}: found the file {name!r}, expected one inside the bundle")
            if not path.is_file():
                missing.append(str(name))
            elif file_sha256(path) != digest:
                altered.append(str(name))
        if missing or altered:
            words = [
                f"{len(names)} files {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in (("missing", missing), ("altered", altered))
                if names
            ]
            raise VaevqMedError(f"{self.folder}: found {' and '.join(words)}, expected them as packed: {_AGAIN}")
        return f"files: {len(files)}, each as it was packed"

    def _stored(self, made: Mapping[str, Any]) -> StoredNetwork:
        """The network, of each file of weights, which hold the same."""
        kept = {}
        for name in WEIGHTS:
            if (path := self.folder / MODELS / name).is_file():
                kept[name] = StoredNetwork(path)
                if made.get("network") not in (None, kept[name].content_hash):
                    raise VaevqMedError(
                        f"{path}: found weights of {kept[name].content_hash[:19]}, expected "
                        f"{str(made['network'])[:19]}, as {MADE_BY} says: {_AGAIN}"
                    )
        self._check_records()
        return next(iter(kept.values()))

    def _check_records(self) -> None:
        """Refuse a header of weights that says something else than the record beside them."""
        weights, beside = (self.folder / MODELS / name for name in ("model.safetensors", RECORD))
        header = header_of(weights).get(HEADER) if weights.is_file() else None
        if header is not None and beside.is_file() and json.loads(header) != _object(beside):
            raise VaevqMedError(
                f"{beside}: found another record than that in the header of {weights.name}, expected the same: {_AGAIN}"
            )


def _check_metadata(metadata: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Refuse metadata that MONAI's schema would refuse; the formats of what goes in and what comes out."""
    _check_fields(metadata, _METADATA, str(path))
    formats = metadata["network_data_format"]
    found = {}
    for side, name in (("inputs", "image"), ("outputs", "pred")):
        where = f"{path}: network_data_format#{side}"
        _check_fields(formats, {side: dict}, f"{path}: network_data_format")
        _check_fields(formats[side], {name: dict}, where)
        _check_fields(formats[side][name], _FORMAT, f"{where}#{name}")
        found[name] = formats[side][name]
    return found


def _check_fields(values: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise VaevqMedError(f"{where}: found no {name}, expected {_WORDS[kind]}")
        if not isinstance(values[name], kind):
            raise VaevqMedError(f"{where}: found {name} {str(values[name])[:80]!r}, expected {_WORDS[kind]}")


def _check_passing(stored: StoredNetwork, formats: Mapping[str, Any], path: Path) -> str:
    """Pass an image of noise through the network."""
    network = stored.network()
    shape = input_shape(stored, network)
    said = {name: (one["num_channels"], *one["spatial_shape"]) for name, one in formats.items()}
    if said["image"] != shape:
        raise VaevqMedError(f"{path}: found images of {said['image']}, expected {shape}, which the network takes")
    output = output_of(network, shape)
    if tuple(output.shape[1:]) != said["pred"] or str(output.dtype) != f"torch.{formats['pred']['dtype']}":
        raise VaevqMedError(
            f"{path}: found outputs of {said['pred']} in {formats['pred']['dtype']}, expected "
            f"{tuple(output.shape[1:])} in {output.dtype}, which the network makes"
        )
    if not bool(torch.isfinite(output).all()):
        raise VaevqMedError(f"{stored.path}: found outputs that are NaN or infinite, expected finite numbers")
    return f"network: an image of {shape} gives {tuple(output.shape[1:])}, all finite"


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    if not path.is_file():
        raise VaevqMedError(f"{path}: found no file, expected that of a packed bundle (vaevq-med bundle pack)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise VaevqMedError(f"{path}: found no JSON ({str(error).splitlines()[0]}), expected an object") from None
    if not isinstance(found, dict):
        raise VaevqMedError(f"{path}: found a {type(found).__name__}, expected an object")
    return found
