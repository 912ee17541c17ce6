"""Probes: codes that say all or nothing, positions of masks by hand, and the command on a tokenizer."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from sklearn.neural_network import MLPClassifier
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.tasks.probe_report import HEADS, lines, markdown
from vaevq_med.tasks.probes import TASKS, Asked, Probe, answer, at_positions, balanced_interval, pooled


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
    row = {"name": "a", "quantizer": "VQ", "embedding_dim": 4, "patients": {"test": 1}, "probes": {"contrast": found}}
    record = {"split": "test", "asked": {"contrast": "which"}, "tokenizers": [row]}
    told = [*lines(record)]
    assert [line.endswith(", not converged") for line in told] == [False, False, False, False, True]
    assert "converged 0" not in told[4]
    assert "- Stopped by the limit of iterations: a, contrast, mlp." in markdown(record).splitlines()


@given(st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_mean_and_deviation(seed: int) -> None:
    codes = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    found = pooled(codes).numpy()
    flat = codes.numpy().reshape(2, 3, -1)
    np.testing.assert_allclose(found, np.concatenate([flat.mean(2), flat.std(2)], axis=1), atol=1e-6)


def test_the_interval_draws_whole_patients() -> None:
    """Of two patients one draw in four takes A twice, one B twice; one class alone is judged by itself."""
    labels, patients = np.array([0, 1, 0, 1]), ["A", "A", "B", "B"]
    assert balanced_interval(labels, np.array([0, 1, 1, 0]), patients) == (0.0, 1.0)
    assert balanced_interval(labels, labels, patients) == (1.0, 1.0)
    # A is right in both of its classes, B in its only one or not at all.
    assert balanced_interval(np.array([0, 1, 1]), np.array([0, 1, 0]), ["A", "A", "B"]) == (0.0, 1.0)
    for unknown in (["A"] * 4, [""] * 4, ["A", "B", "", ""], []):
        assert all(np.isnan(balanced_interval(labels[: len(unknown)], labels[: len(unknown)], unknown)))


def test_the_interval_is_that_of_the_score_drawn_again_and_again() -> None:
    rng = np.random.default_rng(5)
    labels, told = rng.integers(0, 3, 400), rng.integers(0, 3, 400)
    told[:200] = labels[:200]
    patients = np.repeat(np.arange(20), 20)
    draws = []
    for _ in range(1000):
        of = np.concatenate([np.flatnonzero(patients == patient) for patient in rng.integers(0, 20, 20)])
        draws.append(balanced_accuracy_score(labels[of], told[of]))
    found = balanced_interval(labels, told, [f"P{patient}" for patient in patients])
    assert found == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)


def test_patients_stand_beside_what_they_are_asked() -> None:
    training, test = asked(0), asked(1)
    named = answer(training, Asked(test.features, test.labels, [f"P{i % 9}" for i in range(300)]))["linear"]
    assert named["balanced_accuracy_low"] <= named["balanced_accuracy"] <= named["balanced_accuracy_high"]
    assert "balanced_accuracy_low" not in answer(training, test)["linear"]


def test_the_command(tmp_path: Path) -> None:
    other = shutil.copy(FIXTURES / "simvq.pt", tmp_path / "again.pt")
    output, options = tmp_path / "new" / "probes", ["--max-positions", "50", "--device", "cpu"]
    command = ["probe", str(FIXTURES / "slices"), str(output), str(FIXTURES / "simvq.pt"), str(other)]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    record = json.loads((output / "probes.json").read_text())
    first, second = record["tokenizers"]
    assert (first["name"], second["name"], first["quantizer"]) == ("simvq", "again", "SimVQ")
    assert first == {**second, "name": "simvq"}
    assert set(first["probes"]) == set(TASKS)
    found = first["probes"]["contrast"]
    assert (found["n_training"], found["n_test"]) == (first["images"]["training"], first["images"]["test"])
    # Every slice of the fixture shows tumor, so that there is nothing to tell apart.
    assert "fewer than two classes" in first["probes"]["tumor_slice"]["left_out"]
    assert first["probes"]["tumor_position"]["n_test"] <= 50
    assert "NaN" not in (output / "probes.json").read_text()
    assert "tumor_slice: left out" in done.output
    table = (output / "table.md").read_text().splitlines()
    assert table[0].startswith("| Tokenizer | Quantizer | D | contrast, chance | contrast, linear | contrast, mlp |")
    assert "tumor_slice" not in table[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:4]]
    assert [row[0] for row in cells] == ["simvq", "again"]
    assert cells[0][4].startswith(f"{found['linear']['balanced_accuracy']:.3f}")
    rows = [*csv.DictReader((output / "probes.csv").open())]
    (linear,) = (
        row for row in rows if (row["tokenizer"], row["probe"], row["head"]) == ("again", "contrast", "linear")
    )
    assert float(linear["balanced_accuracy"]) == found["linear"]["balanced_accuracy"]
    again = CliRunner().invoke(app, [*command[:4], *options])
    assert isinstance(again.exception, VaevqMedError)  # of two tokenizers, not of one
    assert "again" in str(again.exception)
    assert json.loads((output / "probes.json").read_text()) == record


def test_the_order_of_before_is_told(tmp_path: Path) -> None:
    before = ["probe", str(FIXTURES / "simvq.pt"), str(FIXTURES / "slices"), str(tmp_path / "probes.json")]
    done = CliRunner().invoke(app, before)
    assert isinstance(done.exception, VaevqMedError)
    assert "expected DATASET OUTPUT CHECKPOINT..." in str(done.exception)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_items": 0}, "--max-items: found 0, expected 1 or more"),
        ({"seed": -1}, "--seed: found -1, expected 0 to"),
        (
            {"checkpoints": [FIXTURES / "simvq.pt", FIXTURES / "autoregressive.pt"]},
            "autoregressive.pt: found a checkpoint of",
        ),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"output": FIXTURES}, "fixtures: found a folder with other things in it"),
        ({"output": FIXTURES / "simvq.pt"}, "simvq.pt: found a file, expected a folder or nothing"),
    ],
)
def test_what_cannot_be(options: dict, message: str, tmp_path: Path) -> None:
    whole = {"checkpoints": [FIXTURES / "simvq.pt"], "dataset": FIXTURES / "slices", "output": tmp_path / "probes"}
    with pytest.raises(VaevqMedError) as caught:
        Probe(**{**whole, **options}).run()
    assert message in str(caught.value)
    assert not (tmp_path / "probes").exists()
