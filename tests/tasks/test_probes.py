"""Probes: codes that say all or nothing, positions of masks by hand, and the command on a tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neural_network import MLPClassifier
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.tasks.probes import HEADS, TASKS, Asked, Probe, answer, at_positions, lines, pooled


def asked(seed: int, count: int = 300, *, informative: bool = True, classes: int = 2) -> Asked:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    features = rng.standard_normal((count, 4)).astype(np.float32)
    if informative:
        features[:, 1] += 8 * labels
    return Asked(features, labels)


def test_codes_that_say_it_and_codes_that_do_not() -> None:
    told = answer(asked(0), asked(1))
    assert told["linear"]["balanced_accuracy"] > 0.99
    assert told["mlp"]["auc"] > 0.99
    assert told["linear"]["dice"] > 0.99
    silent = answer(asked(0, informative=False), asked(1, informative=False))
    for head in HEADS:
        assert silent[head]["balanced_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert told["chance"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert told["chance"]["auc"] == 0.5
    assert (told["n_training"], told["n_test"]) == (300, 300)
    three = answer(asked(0, classes=3), asked(1, classes=3))
    assert "auc" not in three["linear"]
    assert three["linear"]["balanced_accuracy"] > 0.95


def test_a_ring_is_beyond_a_line_and_within_a_small_head() -> None:
    def ring(seed: int) -> Asked:
        features = np.random.default_rng(seed).standard_normal((800, 2)).astype(np.float32)
        return Asked(features, (np.linalg.norm(features, axis=1) > 1.18).astype(np.int64))

    found = answer(ring(0), ring(1))
    assert found["linear"]["balanced_accuracy"] < 0.65
    assert found["mlp"]["balanced_accuracy"] > 0.85


def test_without_two_classes_nothing_is_asked() -> None:
    one = Asked(np.zeros((4, 2), np.float32), np.zeros(4, np.int64))
    assert answer(asked(0), one)["left_out"] == "the test images have fewer than two classes of it"
    assert answer(one, asked(0))["left_out"] == "the training images have fewer than two classes of it"
    assert "that the training images lack" in answer(asked(0), asked(0, classes=3))["left_out"]
    nothing = Asked(np.empty((0, 2), np.float32), np.empty(0, np.int64))
    assert "left_out" in answer(nothing, nothing)


def test_positions_by_hand() -> None:
    brain, mask = torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    brain[0, :2, :2] = True  # the first patch is all brain, the second a half, the third a quarter
    brain[0, :2, 2] = True
    brain[0, 2, 0] = True
    mask[0, 0, :] = True  # half of the first patch, and half of the brain of the second
    inside, tumor = at_positions(mask, brain, (2, 2))
    assert inside.tolist() == [[[True, True], [False, False]]]
    assert tumor.tolist() == [[[True, True], [False, False]]]
    mask[0, 0, 0] = False
    assert at_positions(mask, brain, (2, 2))[1].tolist() == [[[False, True], [False, False]]]


def test_an_interrupted_head_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn swallows the interrupt that falls into its loop over epochs."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MLPClassifier, "_update_no_improvement_count", interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer(asked(0, 40), asked(1, 40))


def test_a_head_that_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = MLPClassifier.fit
    monkeypatch.setattr(MLPClassifier, "fit", lambda self, x, y: fit(self.set_params(max_iter=1), x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = answer(asked(0, 40), asked(1, 40))
    assert [found[head]["converged"] for head in HEADS] == [True, True, False]
    told = [*lines({"probes": {"contrast": found}})]
    assert [line.endswith(", not converged") for line in told] == [False, False, False, True]
    assert "converged 0" not in told[3]


@given(st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_mean_and_deviation(seed: int) -> None:
    codes = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    found = pooled(codes).numpy()
    flat = codes.numpy().reshape(2, 3, -1)
    np.testing.assert_allclose(found, np.concatenate([flat.mean(2), flat.std(2)], axis=1), atol=1e-6)


def test_the_command(tmp_path: Path) -> None:
    command = ["probe", str(FIXTURES / "simvq.pt"), str(FIXTURES / "slices"), str(tmp_path / "probes.json")]
    done = CliRunner().invoke(app, [*command, "--max-positions", "50", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "probes.json").read_text())
    assert set(record["probes"]) == set(TASKS)
    found = record["probes"]["contrast"]
    assert (found["n_training"], found["n_test"]) == (record["images"]["training"], record["images"]["test"])
    # Every slice of the fixture shows tumor, so that there is nothing to tell apart.
    assert "fewer than two classes" in record["probes"]["tumor_slice"]["left_out"]
    assert record["probes"]["tumor_position"]["n_test"] <= 50
    assert "NaN" not in (tmp_path / "probes.json").read_text()
    assert "tumor_slice: left out" in done.output
    again = tmp_path / "new" / "folder" / "again.json"
    CliRunner().invoke(app, [*command[:3], str(again), "--max-positions", "50", "--device", "cpu"])
    assert json.loads(again.read_text()) == record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_items": 0}, "--max-items: found 0, expected 1 or more"),
        ({"seed": -1}, "--seed: found -1, expected 0 to"),
        ({"checkpoint": FIXTURES / "autoregressive.pt"}, "autoregressive.pt: found a checkpoint of"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"output": FIXTURES}, "fixtures: found a folder, expected a file or nothing"),
    ],
)
def test_what_cannot_be(options: dict, message: str, tmp_path: Path) -> None:
    whole = {"checkpoint": FIXTURES / "simvq.pt", "dataset": FIXTURES / "slices", "output": tmp_path / "probes.json"}
    with pytest.raises(VaevqMedError) as caught:
        Probe(**{**whole, **options}).run()
    assert message in str(caught.value)
    assert not (tmp_path / "probes.json").exists()
