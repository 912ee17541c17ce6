"""Values in a checkpoint that nothing of this package writes: each is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES

from vaevq_med.trained import CheckpointError, StoredTokenizer


def altered(path: Path, **values: Any) -> Path:
    state = torch.load(FIXTURES / "simvq.pt", weights_only=True)
    torch.save({**state, **values}, path)
    return path


def with_config(path: Path, part: str, **values: Any) -> Path:
    """With other values in the network's definition, or at the top."""
    state = torch.load(FIXTURES / "simvq.pt", weights_only=True)
    config = json.loads(state["config"])
    inner = config
    for key in part.split("#") if part else ():
        inner = inner[key]
    inner |= values
    return altered(path, config=json.dumps(config))


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("network_def#quantizer", {"colour": 1}, "SimVQ: found arguments .*'colour'"),
        ("network_def#quantizer", {"num_embeddings": "many"}, "num_embeddings is 'many'; expected a whole number"),
        ("network_def#quantizer", {"num_embeddings": 10**14}, "SimVQ: found arguments"),
        ("network_def", {"quantizer": None}, "VisualTokenizer: found arguments"),
        ("network_def", {"encoder": "none"}, "VisualTokenizer: found arguments"),
        ("network_def", {"encoder": "@image_size#a"}, "found the reference '@image_size#a' to nothing"),
        ("network_def", {"encoder": "@network_def#_target_#0"}, "found the reference"),
        ("", {"network_def": None}, "found a checkpoint of None, expected that of a tokenizer"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_in_a_line(
    part: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = with_config(tmp_path / "a.pt", part, **values)
    with pytest.raises(CheckpointError, match=said) as caught:
        StoredTokenizer(path).network()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["big", None, 0, [256], True])
def test_a_size_is_a_whole_number(size: Any, tmp_path: Path) -> None:
    stored = StoredTokenizer(with_config(tmp_path / "a.pt", "", image_size=size))
    with pytest.raises(CheckpointError, match=r"image_size is '.*'; expected a whole number"):
        stored.value("image_size")


_WEIGHTS = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"config": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"}, "config"),
        ({"config": '{"a": ' + "[" * 200 + "]" * 200 + "}"}, "more than 64 deep"),
        ({"data": [1]}, "data is"),
        ({"extra": "none"}, "extra is"),
        ({"iteration": "3"}, "iteration is"),
        ({"ema": [1]}, "found a 'ema' that is no state dictionary"),
        ({"feature_weights": {"vgg": 1}}, "feature_weights is"),
        ({"data": {"patients": 7}}, "patients: found 7, expected a list of names"),
        ({"data": {"patients": "anna"}}, 'patients: found "anna", expected a list of names'),
        ({"data": {"started_from": "a.pt"}}, "started_from is"),
        ({"data": {"started_from": {"data": 3}}}, "data.started_from.data is"),
        ({"network": {3: _WEIGHTS}}, "found a 'network' that is no state dictionary"),
        ({"network": {"a": _WEIGHTS.to_sparse()}}, "found a, a tensor float32 sparse_coo, expected dense numbers"),
        ({"ema": {"a": torch.empty(2, device="meta")}}, r"found a, a tensor without values \(meta\)"),
    ],
)
def test_odd_values_are_refused_at_reading(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        StoredTokenizer(altered(tmp_path / "a.pt", **values))
    assert "\n" not in str(caught.value)
