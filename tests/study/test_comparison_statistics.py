"""Statistics, tables and figures of a comparison, on numbers that can be worked out by hand."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.intervals import bootstrap_interval
from vaevq_med.metrics.figures import LPIPS, PSNR, Figure
from vaevq_med.study.bundle import Bundle
from vaevq_med.study.figures import sweep_curves, utilization_bars
from vaevq_med.study.file import Report, Study, check_study
from vaevq_med.study.methods import Method
from vaevq_med.study.plan import Plan, Row
from vaevq_med.study.published import load_published
from vaevq_med.study.rows import RowResult
from vaevq_med.study.statistics import (
    Images,
    best_against_next,
    mean_and_spread,
    over_seeds,
    smallest_p_value,
    wilcoxon,
)
from vaevq_med.study.tables import Table, latex_text, make_table


def images(values: list[float], patients: list[str] | None = None, metric: str = "psnr") -> Images:
    keys = tuple(f"image{i}" for i in range(len(values)))
    return Images(keys, tuple(patients or [""] * len(values)), {metric: np.array(values)})


# --- statistics -------------------------------------------------------------------------------------


def test_mean_and_spread_by_hand() -> None:
    mean, spread = mean_and_spread([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(mean_and_spread([5.0])[1])


def test_images_are_averaged_over_seeds() -> None:
    first = [{"path": "a", "patient": "P", "psnr": "20"}, {"path": "b", "patient": "P", "psnr": "30"}]
    second = [{"path": "a", "patient": "P", "psnr": "22"}, {"path": "b", "patient": "P", "psnr": "36"}]
    assert over_seeds([first, second], ["psnr"]).values["psnr"].tolist() == [21.0, 33.0]
    with pytest.raises(VaevqMedError, match="different images"):
        over_seeds([first, second[::-1]], ["psnr"])
    moved = [{**row, "path": f"/elsewhere/{row['path']}"} for row in second]
    assert over_seeds([first, moved], ["psnr"]).values["psnr"].tolist() == [21.0, 33.0]


def test_the_bootstrap_draws_whole_patients() -> None:
    """Two patients: one draw in four takes A twice, one B twice, two one of each."""
    values, units = np.array([10.0, 10.0, 10.0, 20.0]), np.array([0, 0, 0, 1])
    low, high = bootstrap_interval(values, units, resamples=4000)
    assert (low, high) == (10.0, 20.0)
    # Between the quartiles lies the mean over the images of both, (3 x 10 + 20) / 4; beyond them, one patient twice.
    assert bootstrap_interval(values, units, resamples=4000, level=0.6) == (12.5, 12.5)
    assert bootstrap_interval(values, units, resamples=4000, level=0.4) == (10.0, 20.0)


def test_the_bootstrap_interval_of_many_independent_images_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(30, 2, 400)
    low, high = bootstrap_interval(values, np.arange(400))
    half = stats.norm.ppf(0.975) * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    # Ten images a patient that are all alike hold no more than one.
    wide = bootstrap_interval(np.repeat(values[:40], 10), np.repeat(np.arange(40), 10))
    same = bootstrap_interval(values[:40], np.arange(40))
    assert wide == pytest.approx(same)


def test_one_unit_has_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([1.0, 2.0]), np.array([0, 0])))


def test_wilcoxon_by_counting_all_signs() -> None:
    """The exact two-sided p-value over all 2^n sign patterns of the ranks."""
    differences = np.array([0.5, 1.1, -0.2, 2.3, 0.9, 1.7, 3.0])
    ranks = stats.rankdata(np.abs(differences))
    observed = ranks[differences > 0].sum()
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product((False, True), repeat=7)])
    p = 2 * min((sums >= observed).mean(), (sums <= observed).mean())
    assert wilcoxon(differences) == pytest.approx(p)
    assert wilcoxon(np.append(differences, 0.0)) == pytest.approx(p)
    assert wilcoxon(np.zeros(9)) == 1.0


@pytest.mark.parametrize("n", [1, 3, 5, 6, 9])
def test_the_smallest_p_value_is_what_scipy_gives_at_best(n: int) -> None:
    assert smallest_p_value(n) == pytest.approx(stats.wilcoxon(np.arange(1, n + 1)).pvalue)


def test_the_best_is_tested_against_the_next_over_patients() -> None:
    patients = [f"P{i}" for i in range(8) for _ in range(2)]
    rng = np.random.default_rng(0)
    base = rng.normal(25, 1, 16)
    gain = rng.normal(1, 0.3, 16)
    methods = {
        "worst": images((base - 3).tolist(), patients),
        "best": images((base + gain).tolist(), patients),
        "next": images(base.tolist(), patients),
    }
    (test,) = best_against_next(PSNR, methods)
    assert (test.best, test.next, test.unit, test.n) == ("best", "next", "patients", 8)
    means = gain.reshape(8, 2).mean(axis=1)
    assert test.difference == pytest.approx(means.mean())
    assert test.p_value == pytest.approx(stats.wilcoxon(means).pvalue)


def test_lower_is_better_for_lpips() -> None:
    methods = {"a": images([0.2] * 7, metric="lpips"), "b": images([0.1] * 7, metric="lpips")}
    (test,) = best_against_next(LPIPS, methods)
    assert (test.best, test.next, test.unit) == ("b", "a", "images")
    assert test.p_value == pytest.approx(smallest_p_value(7))
    assert best_against_next(PSNR, methods) == []


def test_too_few_patients_for_a_p_value_are_said() -> None:
    patients = ["A", "A", "B", "B", "C", "C", "C", "C"]
    methods = {"a": images([float(i) for i in range(8)], patients), "b": images([i - 1.0 for i in range(8)], patients)}
    over_patients, over_images = best_against_next(PSNR, methods)
    assert (over_patients.unit, over_patients.n, over_patients.p_value) == ("patients", 3, None)
    assert "3 patients: too few for any p-value below 0.05" in over_patients.note
    assert "0.25" in over_patients.note
    assert over_images.p_value == pytest.approx(smallest_p_value(8))
    assert "not independent" in over_images.note
    few = {"a": images([1.0, 2.0]), "b": images([0.0, 1.0])}
    (test,) = best_against_next(PSNR, few)
    assert test.p_value is None
    assert "2 images: too few" in test.note


def test_methods_on_different_images_are_not_paired() -> None:
    other = Images(("x", "y"), ("", ""), {"psnr": np.array([1.0, 2.0])})
    with pytest.raises(VaevqMedError, match="different images"):
        best_against_next(PSNR, {"a": images([1.0, 2.0]), "b": other})


# --- tables -----------------------------------------------------------------------------------------

CONVENTIONS = {"lpips": "LPIPS of vgg", "rfid": "Frechet distance of inception features"}


def result(plan: Plan, method: Method, seed: int, psnr: list[float], patients: list[str], **more: Any) -> RowResult:
    metrics = {
        "psnr": {"value": float(np.mean(psnr)), "n": len(psnr)},
        "rfid": {"value": more.get("rfid", 3.0), "n": len(psnr)},
        "utilization": {"value": more.get("utilization", 0.5), "n": len(psnr)},
    }
    run = {"parameters": 1_500_000, "bits_per_position": 14.0, "device": "cpu", "peak_memory_of": "process"}
    run |= more.get("run", {})
    rows = [
        {"path": f"i{i}", "patient": p, "psnr": repr(v)} for i, (v, p) in enumerate(zip(psnr, patients, strict=True))
    ]
    provenance = {"split": "test", "n": len(psnr), "fid_weights_sha256": more.get("weights", "f" * 64)}
    provenance |= more.get("provenance", {})
    return RowResult(Row(plan, method, seed), metrics, provenance, CONVENTIONS, run, rows)


def study(output: Path, **further: Any) -> Study:
    return check_study({"study": "tokenizers", "output": str(output), "methods": ["vqgan"], **further}, "study")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    methods = (
        Method("vqgan", ("vqgan",), "VQGAN", family="vqgan"),
        Method("vaevq", ("paper",), "VAEVQ_50% & co", family="vaevq"),
    )
    return Plan(
        study(tmp_path, seeds=[0, 1], budget={"max_epochs": 3}, report={"published": True}),
        Bundle.find("brats"),
        methods,
    )


@pytest.fixture
def table(plan: Plan) -> Table:
    first, second = plan.methods
    patients = ["A", "A", "B"]
    results = [
        result(plan, first, 0, [20.0, 22.0, 24.0], patients, rfid=9.0, utilization=0.03),
        result(plan, first, 1, [22.0, 24.0, 26.0], patients, rfid=11.0, utilization=0.05),
        result(plan, second, 0, [30.0, 31.0, 32.0], patients, rfid=2.0, utilization=0.99),
    ]
    return make_table(plan, results)


def test_csv_parses_back_to_hand_computed_figures(table: Table) -> None:
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(table.csv()))}
    vqgan = rows["vqgan"]
    assert vqgan["seeds"] == "0 1"
    assert float(vqgan["psnr"]) == pytest.approx(23.0)
    assert float(vqgan["psnr_std"]) == pytest.approx(math.sqrt(2))
    # Over the seeds the images have 21, 23 (patient A) and 25 (patient B).
    assert (float(vqgan["psnr_low"]), float(vqgan["psnr_high"])) == (22.0, 25.0)
    assert float(vqgan["rfid"]) == 10.0
    assert float(vqgan["utilization"]) == pytest.approx(0.04)
    assert float(vqgan["bits_per_position"]) == 14.0
    assert vqgan["rfid_paper"] == "10.47"
    assert vqgan["utilization_paper"] == "3.4"
    vaevq = rows["vaevq"]
    assert vaevq["title"] == "VAEVQ_50% & co"
    assert vaevq["psnr_std"] == ""
    assert vaevq["rfid_paper"] == "2.50"
    assert vaevq["utilization_paper"] == ""
    assert "lpips" not in vaevq


def test_markdown_has_one_cell_a_column_and_marks_the_best(table: Table) -> None:
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in cells} == {len(cells[0])}
    head = cells[0]
    vqgan, vaevq = cells[2], cells[3]
    assert vqgan[head.index("PSNR (dB) ↑")] == "23.00 ± 1.41 [22.00, 25.00]"
    assert vaevq[head.index("PSNR (dB) ↑")] == "**31.00 [30.50, 32.00]**"
    assert vaevq[head.index("rFID ↓")] == "**2.00**"
    assert vqgan[head.index("Utilization (%) ↑")] == "4.0 ± 1.4"
    assert vqgan[head.index("Parameters (M)")] == "1.50"
    assert vqgan[head.index("rFID, paper")] == "10.47"
    assert vaevq[0] == r"VAEVQ\_50% & co"


def test_notes_say_what_a_reader_has_to_know(table: Table) -> None:
    notes = table.markdown()
    for said in ("3 epochs", "3 images", "2 patients", "inception", "Missing: vaevq seed 1", "arXiv 2511.06863"):
        assert said in notes, said
    assert "2 patients: too few for any p-value" in notes
    assert "PSNR (dB): VAEVQ\\_50% & co over VQGAN, mean difference" in notes
    assert "mean difference" not in table.latex()


def test_notes_say_what_a_budget_is_too_short_for(plan: Plan) -> None:
    # train.json has a warm-up of 1,000 steps and a GAN from step 10,000.
    def notes(steps: dict[str, int], **changes: Any) -> str:
        chosen = replace(plan, study=plan.study.model_copy(update=changes))
        results = [
            result(chosen, m, 0, [1.0, 2.0], ["A", "B"], run={"iterations": steps[m.name]}) for m in chosen.methods
        ]
        return " ".join(make_table(chosen, results).notes)

    short = notes({"vqgan": 1000, "vaevq": 1000})
    assert "No GAN: it starts at step 10,000, not within the 1,000 of each method." in short
    assert "The learning rate rises over 1,000 steps, all 1,000 of each method." in short
    some = notes({"vqgan": 10_001, "vaevq": 5000})
    assert "not within the 5,000 of VAEVQ_50% & co." in some
    assert "The learning rate rises" not in some
    assert "No GAN" not in notes({"vqgan": 10_001, "vaevq": 10_001})
    set_anew = {"objective#adversarial#start_step": "900", "warmup_steps": "10"}
    assert "Set" not in notes({"vqgan": 1000, "vaevq": 1000}, set=set_anew)
    assert "No GAN" not in notes({"vqgan": 1000, "vaevq": 1000}, set={"objective#adversarial": None})


def test_latex_is_escaped_and_balanced(table: Table) -> None:
    text = table.latex()
    assert r"VAEVQ\_50\% \& co" in text
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(rf"\{rule}") == 1
    rows = re.findall(r"^(.*) \\\\$", text, flags=re.MULTILINE)
    columns = re.search(r"\{tabular\}\{(l r*|lr*)\}", text)
    assert columns is not None
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns[1])}
    assert r"23.00 $\pm$ 1.41" in text
    bare = text.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert re.search(r"(?<!\\)%(?!\n)", text) is None
    assert latex_text(r"\ & % $ # _ { } ~ ^") == (
        r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{}"
    )


def test_figures_of_different_networks_share_no_column(plan: Plan) -> None:
    first, second = plan.methods
    results = [
        result(plan, first, 0, [20.0], ["A"]),
        result(plan, second, 0, [20.0], ["A"], weights="e" * 64),
    ]
    with pytest.raises(VaevqMedError, match="different fid_weights_sha256"):
        make_table(plan, results)


def test_the_record_is_json(table: Table) -> None:
    record = json.loads(json.dumps(table.record(), allow_nan=False))
    assert record["methods"][0]["figures"]["psnr"]["mean"] == pytest.approx(23.0)
    assert record["methods"][1]["figures"]["psnr"]["std"] is None
    assert table.flat()["vqgan/rfid"] == 10.0
    assert "vaevq/psnr_std" not in table.flat()


def test_published_figures_are_the_papers() -> None:
    brats, imagenet = load_published("brats"), load_published("imagenet")
    assert brats.figures["vaevq"]["rfid"] == "2.50"
    assert imagenet.figures["ablation_m1"]["rfid"] == "2.84"
    assert imagenet.metrics(["vaevq", "softvq"]) == ["rfid"]
    assert load_published("mine").figures == {}


def test_a_metric_from_outside_has_a_column(plan: Plan) -> None:
    largest = Figure("largest", "Largest error", 1, higher_is_better=False, convention="over pixels")
    results = []
    for method, add in zip(plan.methods, (0.0, 1.0), strict=True):
        one = result(plan, method, 0, [20.0] * 7, [f"P{i}" for i in range(7)])
        images = [{**row, "largest": repr(add + i)} for i, row in enumerate(one.images)]
        metrics = {**one.metrics, "largest": {"value": 3.0 + add}}
        results.append(replace(one, metrics=metrics, images=images, figures=(PSNR, largest)))
    table = make_table(plan, results)
    lines = table.markdown().splitlines()
    assert "| Largest error ↓ |" in lines[0]
    assert "**3.0 [" in lines[2]
    assert "- Largest error: over pixels." in lines
    assert any(line.startswith("- Largest error: VQGAN over VAEVQ") for line in lines)
    told = plan.study.model_copy(update={"report": Report(figures=["largest", "rfid"]), "set": {"metrics": []}})
    assert [column.name for column in make_table(replace(plan, study=told), results).columns] == ["largest", "rfid"]


def test_bars_and_curves(plan: Plan, table: Table, tmp_path: Path) -> None:
    assert utilization_bars(table.methods, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.size[0] > 200
    assert not sweep_curves(table.methods, tmp_path / "none.png")
    methods = tuple(
        Method(f"simvq_k{k}", ("simvq",), f"SimVQ, K = {k}", family="simvq", num_embeddings=k) for k in (16, 64)
    )
    results = [result(plan, method, 0, [20.0, 21.0], ["A", "B"]) for method in methods]
    swept = make_table(Plan(study(tmp_path), plan.bundle, methods), results)
    assert sweep_curves(swept.methods, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size[0] > picture.size[1]


def test_images_of_different_sizes_are_told_under_the_table(plan: Plan) -> None:
    def told(*sides: int) -> str:
        results = [
            result(plan, method, 0, [20.0, 22.0], ["A", "B"], provenance={"image_size": side})
            for method, side in zip(plan.methods, sides, strict=True)
        ]
        return "\n".join(make_table(plan, results).notes)

    assert "The sides of the images differ, 64 pixels: VAEVQ_50% & co; 256 pixels: VQGAN." in told(256, 64)
    assert "sides of the images" not in told(256, 256)
