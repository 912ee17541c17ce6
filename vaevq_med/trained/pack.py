"""``vaevq-med bundle pack``: a trained network in the layout of MONAI's model zoo, with all that is known of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_binary_writer, atomic_write_text, file_sha256
from vaevq_med.core.maker import MADE_BY
from vaevq_med.core.resources import bundle_path, overlay_files
from vaevq_med.trained.card import CardFacts, model_card, told_by_parts
from vaevq_med.trained.figures import Evaluation
from vaevq_med.trained.file import stored_shape
from vaevq_med.trained.network import StoredNetwork
from vaevq_med.trained.packed import HEADER, MODELS, RECORD, TrainingRecord
from vaevq_med.trained.passing import input_shape, output_of
from vaevq_med.trained.patients import HASHES, without_names

FORMATS = ("both", "pt", "safetensors")
_PACKAGE = Path(__file__).resolve().parents[1]
_SETTINGS = ("network_def", "image_size", "in_channels", "modalities", "stack_modalities", "depth")
"""What a network is used by, which a record has resolved, where the run has them."""
_SPENT = ("images", "timed_images", "timed_seconds", "peak_memory", "device")


@dataclass(frozen=True)
class PackReport:
    """What was written.

    Attributes:
        output: the packed bundle.
        files: its files, relative to ``output``.
    """

    output: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class BundlePack:
    """Write ``configs/``, ``models/``, ``README.md`` (the model card), ``docs/``, ``LICENSE`` and ``made_by.json``.

    ``models/model.pt`` is a plain state dictionary, which MONAI's ``ckpt_export`` and ``onnx_export`` load;
    ``models/model.safetensors`` holds the same tensors, and ``models/trained.json`` what else is known of the training,
    see :mod:`vaevq_med.trained.packed`. ``made_by.json`` has a hash of every other file.

    Attributes:
        bundle: name of the bundle.
        output: folder to make; it must not exist, or be empty.
        checkpoint: a training run's checkpoint, or a packed bundle.
        weights: ``ema`` or ``network``.
        metrics: an evaluation's ``metrics.json``, whose figures go into the metadata and the card.
        format: of the weights: ``both``, ``pt`` or ``safetensors``.
        patients: let hashes of the training's patients travel along.
    """

    bundle: str
    output: Path
    checkpoint: Path
    weights: str = "ema"
    metrics: Path | None = None
    format: str = "both"
    patients: bool = True

    def run(self) -> PackReport:
        """Write the packed bundle.

        Raises:
            VaevqMedError: the output is in use, or a file is not what was expected.
        """
        if self.format not in FORMATS:
            raise VaevqMedError(f"--format: found {self.format!r}, expected one of {', '.join(FORMATS)}")
        source = bundle_path(self.bundle)
        stored = _kind(source)(self.checkpoint, weights=self.weights)
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise VaevqMedError(
                f"output {self.output}: found something there, expected nothing or an empty folder; choose another "
                "output, or remove what is there to replace it"
            )
        network = stored.network()
        _check_finite(stored)
        evaluation = None if self.metrics is None else Evaluation.read(self.metrics)
        if evaluation is not None and self.metrics is not None:
            evaluation.check_of(stored.sha256, stored.weights, self.metrics)
        record = _record(stored, hashes=self.patients)
        partial = self.output.with_name(f".{self.output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write(partial, source, stored, network, record, evaluation)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self.output.exists():
                self.output.rmdir()
            partial.rename(self.output)
        except OSError as error:
            raise VaevqMedError(
                f"output {self.output}: found it not writable ({error.strerror or error}), expected a folder to make"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return PackReport(self.output, tuple(_files_of(self.output)))

    def _write(
        self,
        partial: Path,
        source: Path,
        stored: StoredNetwork,
        network: nn.Module,
        record: TrainingRecord,
        evaluation: Evaluation | None,
    ) -> None:
        for folder in ("configs/overlays", MODELS, "docs"):
            (partial / folder).mkdir(parents=True)
        self._write_weights(partial / MODELS, stored.tensors, record)
        for path in overlay_files(source).values():
            shutil.copyfile(path, partial / "configs" / "overlays" / path.name)
        shutil.copyfile(source / "logging.conf", partial / "configs" / "logging.conf")
        shutil.copyfile(source / "README.md", partial / "docs" / "bundle.md")
        (partial / "LICENSE").write_text(_license())
        defaults = json.loads((source / "train.json").read_text())
        self._write_configs(source, partial / "configs", stored, record, defaults)
        metadata = _metadata(source, stored, network, evaluation)
        _write(partial / "configs" / "metadata.json", metadata)
        hashes = {f"{MODELS}/{path.name}": file_sha256(path) for path in sorted((partial / MODELS).glob("model.*"))}
        hashed = len(record.data[HASHES]["digests"]) if HASHES in record.data else 0
        card = model_card(
            CardFacts(stored, network, metadata, self.bundle, defaults, hashes, evaluation, hashed_patients=hashed)
        )
        for name in ("README.md", "docs/README.md"):  # where hubs look for it, and where MONAI's zoo has it
            atomic_write_text(partial / name, card)
        files = {name: file_sha256(partial / name) for name in _files_of(partial)}
        _write(partial / MADE_BY, {**_made_by(stored), "files": files})

    def _write_weights(self, models: Path, tensors: Mapping[str, Tensor], record: TrainingRecord) -> None:
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        if self.format != "safetensors":
            with atomic_binary_writer(models / "model.pt") as file:  # whose errors are the system's
                torch.save(plain, file)
        if self.format != "pt":
            from safetensors.torch import save

            header = {"format": "pt", HEADER: json.dumps(record.to_dict())}
            with atomic_binary_writer(models / "model.safetensors") as file:
                file.write(save(plain, metadata=header))
        _write(models / RECORD, record.to_dict())

    def _write_configs(
        self,
        source: Path,
        configs: Path,
        stored: StoredNetwork,
        record: TrainingRecord,
        defaults: Mapping[str, Any],
    ) -> None:
        suffix = "safetensors" if self.format == "safetensors" else "pt"
        for name in ("inference", "evaluate"):
            config = json.loads((source / f"{name}.json").read_text())
            config |= {"bundle_root": ".", "checkpoint_path": f"$@bundle_root + '/{MODELS}/model.{suffix}'"}
            config["weights"] = stored.kept
            _write(configs / f"{name}.json", config)
        # The run's own network and plain numbers, so that the packed bundle trains what it holds. An expression in a
        # checkpoint must not run as code: nothing else is taken from there.
        train = dict(defaults)
        numbers = {key: value for key, value in record.config.items() if isinstance(value, int | float | bool)}
        train |= {key: value for key, value in numbers.items() if isinstance(train.get(key), int | float)}
        settings = {key: record.config[key] for key in _SETTINGS if key in record.config and key in train}
        _write(configs / "train.json", {**train, **settings, "bundle_root": "."})


def _kind(source: Path) -> type[StoredNetwork]:
    """Which class reads the networks of a bundle: the one that its own ``inference.json`` names."""
    target = json.loads((source / "inference.json").read_text())["stored"]["_target_"]
    module, _, name = target.rpartition(".")
    kind: type[StoredNetwork] = getattr(import_module(module), name)
    return kind


def _check_finite(stored: StoredNetwork) -> None:
    """Refuse weights that nobody can use."""
    for name, value in stored.tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise VaevqMedError(
                f"{stored.path}: found {name} with values that are NaN or infinite, expected finite weights to pack"
            )


def _record(stored: StoredNetwork, *, hashes: bool) -> TrainingRecord:
    """All that is known of the training and may be given away."""
    config: dict[str, Any] = {k: value for k, value in stored.config.items() if isinstance(value, int | float | bool)}
    config |= {name: stored.value(name) for name in _SETTINGS if name in stored.config}
    if isinstance(title := stored.config.get("_title_"), str):
        config["_title_"] = title
    shape = stored_shape(stored.data, stored.config)
    if shape is not None:
        config["reading"] = {"shape": shape}
    content_hash = stored.content_hash
    return TrainingRecord(
        network=content_hash,
        weights="ema" if stored.kept == "ema" else "network",
        iteration=stored.iteration,
        run=stored.run_id,
        version=version("vaevq_med"),
        config=config,
        data=without_names(stored.data, content_hash, hashes=hashes),
        feature_weights=dict(stored.feature_weights),
        spent={name: stored.spent[name] for name in _SPENT if name in stored.spent},
    )


def _made_by(stored: StoredNetwork) -> dict[str, Any]:
    """What the bundle was made of."""
    return {
        "command": "bundle pack",
        "network": stored.content_hash,
        "checkpoint": stored.path.name,
        "checkpoint_sha256": stored.sha256,
        "weights": stored.kept,
        "iteration": stored.iteration,
        "trained_on": {name: stored.data.get(name) for name in ("content_hash", "split_hash")},
        "version": version("vaevq_med"),
    }


def _metadata(source: Path, stored: StoredNetwork, network: nn.Module, evaluation: Evaluation | None) -> dict[str, Any]:
    metadata = json.loads((source / "metadata.json").read_text())
    metadata |= {
        "monai_version": version("monai").split("+")[0],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": version("numpy"),
    }
    metadata["required_packages_version"]["vaevq_med"] = version("vaevq_med")
    name = stored.data.get("name") or "unknown"
    metadata["data_source"] = f"data set: {name} (the bundle is made for {metadata['data_source']})"
    if isinstance(adopted := stored.data.get("adopted"), Mapping):  # weights of others have their own
        metadata |= _of_others(adopted)
        for side in ("inputs", "outputs"):
            for specification in metadata["network_data_format"][side].values():
                specification["modality"] = "unknown"
    for package in told_by_parts(network, "needed_packages"):
        metadata["required_packages_version"][package] = version(package).split("+")[0]
    formats = metadata["network_data_format"]
    given = input_shape(stored, network)
    made = output_of(network, given).shape[1:]
    for specification, (channels, *shape) in (
        (formats["inputs"]["image"], given),
        (formats["outputs"]["pred"], tuple(made)),
    ):
        if specification["num_channels"] != channels:
            specification["channel_def"] = {str(number): "image" for number in range(channels)}
        specification |= {"num_channels": channels, "spatial_shape": [int(size) for size in shape]}
    if evaluation is not None:
        metadata["eval_metrics"] = {figure.name: round(figure.value, 6) for figure in evaluation.figures}
    return metadata


def _of_others(adopted: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a network that others trained: what is known of it, in place of what a bundle says of its own."""
    title = str(adopted.get("title", "a network of others"))
    files = adopted.get("files")
    names = ", ".join(map(str, files)) if isinstance(files, Mapping) and files else "files that are not known"
    license = str(adopted.get("license", "unknown"))
    return {
        "name": f"Taken over: {title}",
        "task": "Visual tokenization by a network of others",
        "description": f"{title}, taken over from {names} (adopt {adopted.get('kind', '')}); not trained here",
        "authors": f"those of the weights, who are not known here: {title}",
        "copyright": f"that of the weights' authors; their license: {license}",
        "license": license,
        "references": [title],
        "data_source": "that of the training is not known here",
        "image_classes": "an image in [-1, 1]",
        "pred_classes": "the reconstructed image in [-1, 1]",
        "intended_use": (
            f"Research, to compare tokenizers, within the license of the weights ({license}); not a medical device"
        ),
        "changelog": {version("vaevq_med"): "taken over"},
    }


def _files_of(folder: Path) -> list[str]:
    """The files below a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write(path: Path, content: Any) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _license() -> str:
    """The license text that was installed with the package, or the checkout's."""
    from importlib.metadata import distribution

    for file in distribution("vaevq_med").files or []:
        if file.name == "LICENSE":
            text = Path(str(file.locate()))
            if text.is_file():
                return text.read_text()
    path = _PACKAGE.parent / "LICENSE"
    if path.is_file():
        return path.read_text()
    return "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
