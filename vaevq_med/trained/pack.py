"""``vaevq-med bundle pack``: a trained tokenizer in the layout of MONAI's model zoo."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_binary_writer, atomic_write_text
from vaevq_med.core.maker import MADE_BY
from vaevq_med.core.resources import bundle_path, overlay_files
from vaevq_med.trained.network import StoredTokenizer

_PACKAGE = Path(__file__).resolve().parents[1]


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
    """Write ``configs/``, ``models/model.pt``, ``docs/``, ``LICENSE`` and, of which checkpoint it is, ``made_by.json``.

    ``model.pt`` is a plain state dictionary, which MONAI's ``ckpt_export`` and ``onnx_export`` load; ``inference.json``
    and ``evaluate.json`` carry the network's definition, so that they run beside it.

    Attributes:
        bundle: name of the bundle.
        output: folder to make; it must not exist, or be empty.
        checkpoint: a training run's checkpoint.
        weights: ``ema`` or ``network``.
        metrics: an evaluation's ``metrics.json``, whose figures go into the metadata.
    """

    bundle: str
    output: Path
    checkpoint: Path
    weights: str = "ema"
    metrics: Path | None = None

    def run(self) -> PackReport:
        """Write the packed bundle.

        Raises:
            VaevqMedError: the output is in use, or a file is not what was expected.
        """
        source = bundle_path(self.bundle)
        stored = StoredTokenizer(self.checkpoint, weights=self.weights)
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise VaevqMedError(
                f"output {self.output}: found something there, expected nothing or an empty folder; choose another "
                "output, or remove what is there to replace it"
            )
        settings = {name: stored.value(name) for name in ("network_def", "image_size", "in_channels")}
        settings |= {name: stored.value(name) for name in ("modalities", "stack_modalities") if name in stored.config}
        network = stored.network()
        partial = self.output.with_name(f".{self.output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for folder in ("configs/overlays", "models", "docs"):
                (partial / folder).mkdir(parents=True)
            with atomic_binary_writer(partial / "models" / "model.pt") as file:  # whose errors are the system's
                torch.save(network.state_dict(), file)
            for path in overlay_files(source).values():
                shutil.copyfile(path, partial / "configs" / "overlays" / path.name)
            shutil.copyfile(source / "logging.conf", partial / "configs" / "logging.conf")
            shutil.copyfile(source / "README.md", partial / "docs" / "README.md")
            (partial / "LICENSE").write_text(_license())
            self._write_configs(source, partial / "configs", stored, settings)
            self._write_metadata(source, partial / "configs", settings)
            _write(partial / MADE_BY, self._made_by(stored))
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
        files = sorted(p.relative_to(self.output).as_posix() for p in self.output.rglob("*") if p.is_file())
        return PackReport(self.output, tuple(files))

    @staticmethod
    def _made_by(stored: StoredTokenizer) -> dict[str, Any]:
        """What the bundle was made of."""
        return {
            "command": "bundle pack",
            "network": stored.content_hash,
            "checkpoint": stored.path.name,
            "checkpoint_sha256": stored.sha256,
            "weights": stored.weights,
            "iteration": stored.iteration,
            "trained_on": {name: stored.data.get(name) for name in ("content_hash", "split_hash")},
            "version": version("vaevq_med"),
        }

    @staticmethod
    def _write_configs(source: Path, configs: Path, stored: StoredTokenizer, settings: dict[str, Any]) -> None:
        for name in ("inference", "evaluate"):
            config = json.loads((source / f"{name}.json").read_text())
            config["bundle_root"] = "."
            config["checkpoint_path"] = "$@bundle_root + '/models/model.pt'"
            config["stored"]["config"] = settings | ({"reading": {"shape": stored.shape}} if stored.shape else {})
            _write(configs / f"{name}.json", config)
        train = json.loads((source / "train.json").read_text())
        # The run's own network and plain numbers, so that the packed bundle trains what it holds. An expression in a
        # checkpoint must not run as code: nothing else is taken from there.
        numbers = {key: value for key, value in stored.config.items() if isinstance(value, int | float | bool)}
        train |= {key: value for key, value in numbers.items() if isinstance(train.get(key), int | float)}
        train |= {**settings, "bundle_root": "."}
        _write(configs / "train.json", train)

    def _write_metadata(self, source: Path, configs: Path, settings: dict[str, Any]) -> None:
        metadata = json.loads((source / "metadata.json").read_text())
        metadata |= {
            "monai_version": version("monai").split("+")[0],
            "pytorch_version": torch.__version__.split("+")[0],
            "numpy_version": version("numpy"),
        }
        metadata["required_packages_version"]["vaevq_med"] = version("vaevq_med")
        for specification in (
            metadata["network_data_format"]["inputs"]["image"],
            metadata["network_data_format"]["outputs"]["pred"],
        ):
            channels = int(settings["in_channels"])
            specification["num_channels"] = channels
            specification["spatial_shape"] = [int(settings["image_size"])] * 2
            specification["channel_def"] = {str(i): "image" for i in range(channels)}
        if self.metrics is not None:
            try:
                summary = json.loads(self.metrics.read_text())["summary"]["overall"]
                metadata["eval_metrics"] = {name: round(entry["value"], 6) for name, entry in summary.items()}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise VaevqMedError(
                    f"metrics {self.metrics}: found no evaluation's record ({error}), expected a metrics.json"
                ) from None
        _write(configs / "metadata.json", metadata)


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
