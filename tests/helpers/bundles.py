"""Runs of the bundles, as ``python -m monai.bundle run`` makes them, small and in this process."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import BUNDLE, OVERLAYS
from monai.bundle import ConfigParser, ConfigWorkflow


def run_bundle(
    file: str, overrides: dict[str, Any], *overlays: str, run_id: str = "run", bundle: Path = BUNDLE
) -> ConfigParser:
    """What ``python -m monai.bundle run`` does, in this process; a bundle's own overlays go before shared ones."""
    known = {name: bundle / "overlays" / f"{name}.json" for name in overlays}
    shared = (path if path.is_file() else OVERLAYS / f"{name}.json" for name, path in known.items())
    workflow = ConfigWorkflow(
        config_file=[str(bundle / file), *map(str, shared)],
        meta_file=str(bundle / "metadata.json"),
        logging_file=str(bundle / "logging.conf"),
        run_id=run_id,
        workflow_type="train" if file.startswith("train") else "infer",
        **overrides,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow.parser


def run_generator(file: str, overrides: dict[str, Any], *overlays: str) -> ConfigParser:
    """The same of a generator's training, or of drawing from it, with overlays of generators."""
    training = file.startswith("train")
    names = [f"generation/{name}" for name in overlays]
    return run_bundle(file, overrides, *names, run_id="training" if training else "generating")


def evaluation_overrides(toy: dict[str, Any]) -> dict[str, Any]:
    names = ("dataset_dir", "output_dir", "tracking_uri", "device", "num_workers", "batch_size")
    return {name: toy[name] for name in names}


def states_equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(states_equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(states_equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def quick(toy: dict[str, Any]) -> dict[str, Any]:
    """One epoch of four iterations, without networks that only the losses need."""
    kept = {key: value for key, value in toy.items() if not key.startswith("objective#adversarial")}
    return {
        **kept,
        "max_epochs": 1,
        "val_max_items": 4,
        "objective#adversarial": None,
        "objective#weights#perceptual": 0.0,
    }


def train_and_evaluate(overrides: dict[str, Any], *overlays: str) -> tuple[Any, dict[str, Any]]:
    """The trainer at its end, and what the evaluation of its checkpoint, with no overlay, says overall."""
    parser = run_bundle("train.json", overrides, *overlays, run_id="training")
    run_bundle("evaluate.json", evaluation_overrides(overrides), run_id="evaluating")
    record = Path(overrides["output_dir"]) / "evaluation" / "test" / "metrics.json"
    overall = json.loads(record.read_text())["summary"]["overall"]
    assert 0 < overall["utilization"]["value"] <= 1
    assert overall["psnr"]["value"] > 0
    return parser.get_parsed_content("train#trainer"), overall


TOY: dict[str, dict[str, Any]] = {
    "autoregressive": {"network_def#width": 32, "network_def#depth": 1, "network_def#num_heads": 2},
    "diffusion": {
        "network_def#num_channels": 32,
        "network_def#channel_mult": [1, 1],
        "network_def#num_res_blocks": 1,
        "network_def#cross_attention_dim": 8,
    },
}


def literal(text: str) -> Any:
    """As MONAI's command line reads a value."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def flags(command: list[str]) -> dict[str, Any]:
    words = command[command.index("run") + 2 :]
    return {name.removeprefix("--"): literal(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def evaluate(overrides: dict[str, Any]) -> None:
    """From the checkpoint, as it describes the network."""
    run_bundle("evaluate.json", evaluation_overrides(overrides), run_id="evaluating")
    record = Path(overrides["output_dir"]) / "evaluation" / "test" / "metrics.json"
    overall = json.loads(record.read_text())["summary"]["overall"]
    assert 0 < overall["utilization"]["value"] <= 1
    assert overall["psnr"]["value"] > 0


def generator_overrides(
    tokens: Path, output: Path, sizes: Mapping[str, Any] = TOY["autoregressive"], **further: Any
) -> dict[str, Any]:
    """Overrides for a short training of a small generator, from a token store into a folder."""
    return {
        "tokens_dir": str(tokens),
        "output_dir": str(output),
        "tracking_uri": "none",
        "device": "cpu",
        "max_epochs": 1,
        "batch_size": 8,
        "num_workers": 0,
        "precision": "fp32",
        "val_max_items": 4,
        **sizes,
        **further,
    }


def drawing_overrides(trained: Path, tokenizer: Path, **further: Any) -> dict[str, Any]:
    """Overrides for two images of the generator that was trained into a folder."""
    checkpoint = {"checkpoint_path": str(trained / "checkpoints/best.pt"), "tokenizer_path": str(tokenizer)}
    return {**checkpoint, "device": "cpu", "num_samples": 2, **further}
