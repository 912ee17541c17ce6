"""The reference of a study of tokenizers minus each rival, on records that can be worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.against import Against
from vaevq_med.study.bundle import Bundle
from vaevq_med.study.file import check_study
from vaevq_med.study.methods import Method
from vaevq_med.study.plan import Plan, Row
from vaevq_med.study.rows import RowResult, read_result
from vaevq_med.study.statistics import sign_test
from vaevq_med.study.tables import Table, make_table

ROOT = Path(__file__).parents[2]
Images = Sequence[tuple[str, float, float]]
"""Patient, PSNR and LPIPS of each image."""


class Records:
    """Writes the records of rows, and makes the table over them."""

    def __init__(self, output: Path, *methods: str, **report: Any) -> None:
        content = {"study": "tokenizers", "output": str(output), "methods": [*methods], "seeds": [0, 1, 2]}
        study = check_study({**content, "report": {"reference": "ours", "pictures": 0, **report}}, "study")
        found = tuple(Method(name, ("vqgan",), name.upper(), family=name) for name in methods)
        self.plan = Plan(study, Bundle.find("brats"), found)
        self.results: list[RowResult] = []

    def add(self, name: str, seed: int, images: Images, rfid: float | None = 3.0, **told: Any) -> Records:
        """A finished row, read back from its files."""
        (method,) = (method for method in self.plan.methods if method.name == name)
        row = Row(self.plan, method, seed)
        row.evaluation.mkdir(parents=True)
        means = {"psnr": sum(i[1] for i in images) / len(images), "lpips": sum(i[2] for i in images) / len(images)}
        overall = {**means, **({} if rfid is None else {"rfid": rfid})}
        record = {
            "summary": {"overall": {figure: {"value": value} for figure, value in overall.items()}},
            "provenance": {"split": "test", "n": len(images), **told},
            "conventions": {},
        }
        row.evaluation.joinpath("metrics.json").write_text(json.dumps(record))
        with row.evaluation.joinpath("per_image.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["index", "path", "patient", "psnr", "lpips"])
            table.writerows([i, f"data/{i}.png", *image] for i, image in enumerate(images))
        self.results.append(read_result(row))
        return self

    def table(self) -> Table:
        """Over the rows that were added."""
        return make_table(self.plan, self.results)

    def against(self) -> Against:
        """The reference and its rivals."""
        found = self.table().against
        assert found is not None
        return found


def two_patients(a1: float, a2: float, b: float, lpips: float = 0.2) -> Images:
    return [("A", a1, lpips), ("A", a2, lpips), ("B", b, lpips + 0.1)]


def section(text: str, title: str) -> list[list[str]]:
    """The cells of a table under a heading."""
    lines = text.split(f"## {title}\n\n")[1].splitlines()
    rows = [line for line in lines[: lines.index("") if "" in lines else None] if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if "---" not in row]


def test_pairs_of_patient_and_seed_by_hand(tmp_path: Path) -> None:
    """Patient means minus patient means: 21 - 20, 30 - 30, 20 - 21 and 31 - 28."""
    records = Records(tmp_path, "ours", "theirs")
    records.add("ours", 0, two_patients(20, 22, 30, 0.1), 5.0).add("theirs", 0, two_patients(19, 21, 30, 0.3), 6.0)
    records.add("ours", 1, two_patients(20, 20, 31, 0.2), 7.0).add("theirs", 1, two_patients(20, 22, 28, 0.5), 6.5)
    found = records.against()
    (rival,) = found.rivals
    psnr, lpips = rival.pairs["psnr"], rival.pairs["lpips"]
    assert (found.unit, found.num_groups, rival.seeds) == ("patient", 2, (0, 1))
    assert (psnr.difference, psnr.better, psnr.ties, psnr.n) == (0.75, 2, 1, 4)
    assert psnr.p_value == 1.0  # two of three: (1 + 3) / 8, twice
    assert lpips.difference == pytest.approx((-0.2 - 0.2 - 0.3 - 0.3) / 4)
    assert (lpips.better, lpips.ties, lpips.n, lpips.p_value) == (4, 0, 4, 0.125)  # lower is better; 2 / 2^4
    assert rival.differences == {"rfid": {0: -1.0, 1: 0.5}}
    assert rival.by_seed == {}
    text = records.table().markdown()
    head, row = section(text, "OURS minus each rival")
    assert head == ["Rival", "Seeds", "PSNR (dB) ↑", "LPIPS ↓", "rFID ↓"]
    assert row == [*("THEIRS", "0, 1", "+0.75, 2 of 4 (1 equal), p = 1", "-0.2500, 4 of 4, p = 0.12", "-1.00, +0.50")]
    assert "Pairs of one patient are not independent" in text
    assert "3 pairs: too few for any p-value below 0.05: the smallest possible is 0.25." in text
    assert section(text, "Seeds apart")[1:] == [
        ["OURS", "0", "24.00", "5.00", "0.1333"],
        ["OURS", "1", "23.67", "7.00", "0.2333"],
        ["THEIRS", "0", "23.33", "6.00", "0.3333"],
        ["THEIRS", "1", "23.33", "6.50", "0.5333"],
    ]
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert (record["name"], record["unit"], record["groups"]) == ("ours", "patients", 2)
    assert record["rivals"][0]["figures"]["psnr"]["better"] == 2
    assert record["rivals"][0]["differences"] == {"rfid": {"0": -1.0, "1": 0.5}}


def test_the_sign_test_is_a_sum_of_binomials() -> None:
    assert sign_test(17, 4) == pytest.approx(2 * sum(math.comb(21, k) for k in range(5)) / 2**21)
    assert sign_test(4, 17) == sign_test(17, 4)
    assert sign_test(0, 0) == 1.0


def test_pairs_are_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "late", "never")
    records.add("ours", 0, two_patients(20, 20, 20)).add("ours", 1, two_patients(25, 25, 25), None)
    records.add("late", 1, two_patients(21, 21, 29)).add("never", 2, two_patients(30, 30, 30))
    late, never = records.against().rivals
    assert (late.seeds, late.pairs["psnr"].n, late.pairs["psnr"].difference) == ((1,), 2, 0.0)
    assert late.differences == {}
    assert (never.seeds, never.pairs, never.differences) == ((), {}, {})
    rows = section(records.table().markdown(), "OURS minus each rival")
    assert rows[2][:3] == ["NEVER", "none in common", ""]
    assert "rFID ↓" not in rows[0]


def test_one_seed_says_nothing_of_another(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs")
    patients = [f"P{i}" for i in range(7)]
    records.add("ours", 0, [(p, 21.0, 0.1) for p in patients]).add("theirs", 0, [(p, 20.0, 0.1) for p in patients])
    (rival,) = records.against().rivals
    assert rival.pairs["psnr"].p_value == 2 / 2**7
    assert (rival.pairs["lpips"].better, rival.pairs["lpips"].ties, rival.pairs["lpips"].p_value) == (0, 7, 1.0)
    text = records.table().markdown()
    assert "One seed: nothing is said of another training." in text
    assert "too few for any p-value" not in text.split("minus each rival")[1]
    assert "Seeds apart" not in text


def test_an_image_without_a_value_leaves_the_others_of_its_patient_in(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs", "third")
    nan = math.nan
    records.add("ours", 0, [("A", 21.0, 0.1), ("A", nan, 0.1), ("B", 22.0, 0.1), ("C", nan, 0.1)])
    records.add("theirs", 0, [("A", 20.0, 0.1), ("A", 9.0, 0.1), ("B", 20.0, 0.1), ("C", 20.0, 0.1)])
    records.add("ours", 1, two_patients(1, 2, 3)[:2] * 2, None).add("third", 1, two_patients(0, 0, 0)[:2] * 2)
    theirs, third = records.against().rivals
    assert (theirs.pairs["psnr"].n, theirs.pairs["psnr"].difference) == (2, 1.5)
    assert records.against().record()["rivals"][0]["figures"]["psnr"]["n"] == 2
    assert third.differences == {}
    assert "One seed: nothing is said of another training." in records.against().notes
    assert not any("independent" in note for note in records.against().notes)


def test_a_difference_says_whose_seed_it_is(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs")
    for seed, rfid in ((0, None), (1, 5.0)):
        records.add("ours", seed, two_patients(1, 2, 3), rfid).add("theirs", seed, two_patients(0, 2, 3), 3.0)
    assert section(records.table().markdown(), "OURS minus each rival")[1][-1] == "–, +2.00"


def test_one_patient_is_one_group(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs")
    for seed in (0, 1):
        records.add("ours", seed, [("A", 21.0 + i, 0.1) for i in range(9)])
        records.add("theirs", seed, [("A", 20.0, 0.1)] * 9)
    found = records.against()
    assert (found.unit, found.num_groups) == ("patient", 1)
    assert (found.rivals[0].pairs["psnr"].n, found.rivals[0].pairs["psnr"].difference) == (2, 5.0)
    assert "All images are of one patient: nothing is said of other patients." in found.notes


def test_photographs_are_paired_image_by_image(tmp_path: Path) -> None:
    gains = {0: [0.5, -1.0, 2.0, 1.5, 3.0, 0.25, 0.75], 1: [1.0, 2.0, -3.0, 0.0, 5.0, 6.0, -7.0]}
    records = Records(tmp_path, "ours", "theirs")
    for seed, values in gains.items():
        records.add("ours", seed, [("", 20 + gain, 0.1) for gain in values])
        records.add("theirs", seed, [("", 20.0, 0.2) for _ in values])
    found = records.against()
    (rival,) = found.rivals
    both = rival.pairs["psnr"]
    assert (found.unit, found.num_groups, both.n, both.better, both.ties) == ("image", 7, 14, 10, 1)
    assert both.p_value == pytest.approx(2 * sum(math.comb(13, k) for k in range(4)) / 2**13)
    for seed, values in gains.items():
        own = rival.by_seed["psnr"][seed]
        assert own.difference == pytest.approx(sum(values) / 7)
        assert own.p_value == pytest.approx(stats.wilcoxon([v for v in values if v]).pvalue)
    text = records.table().markdown()
    rows = section(text, "OURS minus each rival, over the images of each seed")
    assert [row[:2] for row in rows[1:]] == [["THEIRS", "0"], ["THEIRS", "1"]]
    assert rows[1][2].startswith("+1.00, 6 of 7, p = ")
    assert rows[2][2].startswith("+0.57, 4 of 7 (1 equal), p = ")
    assert "Images of one seed share one training" in text
    assert "patient" not in text.split("minus each rival")[1]


def test_continuous_codes_are_set_against_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path / "rival", "ours", "soft")
    records.add("ours", 0, two_patients(1, 2, 3)).add("soft", 0, two_patients(1, 2, 3), is_discrete=False)
    assert records.against().rivals == ()
    assert "OURS, the reference, has no rival whose codes are discrete." in records.against().notes
    records = Records(tmp_path / "reference", "ours", "hard")
    records.add("ours", 0, two_patients(1, 2, 3), is_discrete=False).add("hard", 0, two_patients(1, 2, 3))
    table = records.table()
    assert table.against is None
    assert "OURS, the reference, is set against no rival: its codes are continuous." in table.notes
    records = Records(tmp_path / "missing", "ours", "hard").add("hard", 0, two_patients(1, 2, 3))
    assert "OURS, the reference, is set against no rival: none of its rows is finished." in records.table().notes


def test_a_reference_without_rivals_has_its_seeds_apart(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours").add("ours", 0, two_patients(1, 2, 3)).add("ours", 1, two_patients(1, 2, 3))
    text = records.table().markdown()
    assert [row[1] for row in section(text, "Seeds apart")] == ["Seed", "0", "1"]
    assert "minus each rival" not in text


def test_other_images_of_one_seed_are_not_paired(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs", "best").add("ours", 0, two_patients(1, 2, 3))
    records.add("theirs", 0, two_patients(0, 0, 0)).add("best", 0, two_patients(9, 9, 9))
    records.results[1].images[0]["path"] = "other.png"
    with pytest.raises(VaevqMedError, match=r"methods ours and theirs: found different images \(3 and 3\)"):
        records.table()


def test_the_report_says_which_figures_are_looked_at(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs", figures=["lpips"])
    records.add("ours", 0, two_patients(1, 2, 3)).add("theirs", 0, two_patients(1, 2, 3))
    (rival,) = records.against().rivals
    assert ([*rival.pairs], rival.differences) == (["lpips"], {})


def test_a_figure_of_unknown_direction_is_left_out_and_others_have_rows(tmp_path: Path) -> None:
    records = Records(tmp_path, "ours", "theirs")
    figures = (Figure("largest", "Largest error", 1, higher_is_better=False), Figure("hue", "Hue", 1))
    for name, gain in (("ours", 0.0), ("theirs", 1.0)):
        records.add(name, 0, two_patients(1, 2, 3))
        last = records.results.pop()
        images = [{**row, "largest": str(gain), "hue": "1"} for row in last.images]
        metrics = {**last.metrics, "largest": {"value": gain}, "hue": {"value": 1.0}}
        told = RowResult(last.row, metrics, last.provenance, {}, {}, images, figures)
        records.results.append(told)
    (rival,) = records.against().rivals
    assert [*rival.pairs] == ["psnr", "lpips", "largest"]
    assert (rival.pairs["largest"].difference, rival.pairs["largest"].better) == (-1.0, 2)


def test_the_figures_of_the_results_page(tmp_path: Path) -> None:
    """docs/results/README.md, "The default minus each rival" of 1,500 steps, from the means of each patient."""
    told = json.loads((ROOT / "docs/results/slices.json").read_text())
    records = Records(tmp_path, "ours", "simvq", "vlq_averages")
    for name in ("ours", "simvq", "vlq_averages"):
        of = "coherent" if name == "ours" else name
        for seed, patients in told["patients"][of].items():
            images = [(patient, values["psnr"], values["lpips"]) for patient, values in patients.items()]
            records.add(name, int(seed), images, told["figures"][of][seed]["rfid"])
    rows = section(records.table().markdown(), "OURS minus each rival")
    assert rows[1] == [
        *("SIMVQ", "0, 1, 2", "+0.24, 17 of 21, p = 0.0072", "-0.0221, 21 of 21, p = 9.5e-07", "-0.86, -1.42, -0.02")
    ]
    assert rows[2][2:] == [*("+0.77, 21 of 21, p = 9.5e-07", "-0.0203, 20 of 21, p = 2.1e-05", "-0.71, -0.10, +0.13")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"report": {"reference": "other"}}, "report.reference is other; expected one of vqgan, simvq"),
        ({"methods": ["simvq"]}, "report.reference is vqgan; expected one of simvq"),
        (
            {"methods": ["vqgan", "simvq"], "sweep": {"num_embeddings": [32, 64]}},
            "report.reference is vqgan; expected one of vqgan_k32, vqgan_k64, simvq_k32, simvq_k64",
        ),
    ],
)
def test_an_unknown_reference_is_one_line_before_training(
    content: dict[str, Any], message: str, slice_dataset: Path, tmp_path: Path
) -> None:
    whole = {"study": "tokenizers", "output": str(tmp_path / "out"), "dataset_dir": str(slice_dataset)}
    whole |= {"methods": ["vqgan", "simvq"], "overlays": ["small_cpu"], "report": {"reference": "vqgan"}, **content}
    with pytest.raises(VaevqMedError) as refused:
        Plan.of(check_study(whole, "study"))
    assert str(refused.value) == message
    assert not (tmp_path / "out").exists()


def test_generators_have_no_reference() -> None:
    content = {"study": "generators", "output": "out", "tokenizers": {"a": "a.pt"}, "report": {"reference": "a"}}
    content["generators"] = [{"name": "g", "config": "train_autoregressive.json"}]
    with pytest.raises(VaevqMedError, match="reference is unknown"):
        check_study(content, "study")
