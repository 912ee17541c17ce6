"""Studies of rate against distortion: records that last, curves, delta rates, and what the command says."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.codec.classical import codec_named
from vaevq_med.codec.classical.images import SliceCodec
from vaevq_med.codec.coders.mask import encode_mask
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.volumes import FIGURES
from vaevq_med.study.file import check_study, read_study
from vaevq_med.study.rates.curves import Curve, Spread, curves_of, delta_rate
from vaevq_med.study.rates.file import RateDistortionStudy
from vaevq_med.study.rates.report import Report
from vaevq_med.study.rates.run import RunRates

pytest.importorskip("imagecodecs")
pytest.importorskip("bjontegaard")

SHAPE = (48, 44, 14)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients with two contrasts, one of them with a tumor, and a third who is for training."""
    root = tmp_path_factory.mktemp("cases")
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    ball = (x**2 + y**2 < 0.7) & (abs(z) < 0.8)
    for number in range(3):
        name, rng = f"BraTS-GLI-0000{number}-000", np.random.default_rng(number)
        (root / name).mkdir()
        for contrast in ("t1c", "t2f"):
            smooth = 400 + 150 * np.sin((7 + number) * x + 3 * z) + 90 * np.cos(11 * y) + rng.normal(0, 20, SHAPE)
            voxels = np.where(ball, smooth, 0).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([-1, -1, 1, 1])), root / name / f"{name}-{contrast}.nii.gz")
        if number == 0:
            labels = (ball & (x > 0.2)).astype(np.uint8)
            nib.save(nib.Nifti1Image(labels, np.diag([-1, -1, 1, 1])), root / name / f"{name}-seg.nii.gz")
    splits = {"BraTS-GLI-00000": "test", "BraTS-GLI-00001": "test", "BraTS-GLI-00002": "training"}
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def study_of(cases: Path, output: Path, **fields: Any) -> RateDistortionStudy:
    content = {
        "study": "rate_distortion",
        "output": str(output),
        "input": str(cases),
        "split_file": str(cases / "splits.json"),
        "contrasts": ["t1c"],
        "codecs": [{"name": "jpeg2000", "settings": [26, 32, 40]}, {"name": "jpeg", "settings": [10, 90]}],
        "rates": [0.3, 1.0],
        "anchors": ["jpeg2000_8"],
        "perceptual": None,
        **fields,
    }
    found = check_study(content, "test")
    assert isinstance(found, RateDistortionStudy)
    return found


def test_a_record_says_what_a_volume_cost_and_what_is_left(cases: Path, tmp_path: Path) -> None:
    report = RunRates(study_of(cases, tmp_path / "out")).run()
    assert (report.expected, report.missing, report.problems) == (2 * (3 + 1 + 2), 0, ())
    records = tmp_path / "out" / "records"
    assert sorted(folder.name for folder in records.iterdir()) == ["BraTS-GLI-00000-000_t1c", "BraTS-GLI-00001-000_t1c"]
    record = json.loads((records / "BraTS-GLI-00000-000_t1c" / "jpeg2000_8@32.json").read_text())

    voxels = np.asarray(nib.load(cases / "BraTS-GLI-00000-000" / "BraTS-GLI-00000-000-t1c.nii.gz").dataobj, float)
    upright = voxels.transpose(2, 1, 0)
    brain = upright > 0
    low, high = np.percentile(upright[brain], [0, 99.5])
    unit = np.where(brain, np.clip((upright - low) / (high - low), 0, 1), 0)
    codec = codec_named("jpeg2000")
    files = codec.encode(np.rint(unit * 255).astype(np.uint8), 8, 32)
    result = codec.decode(files, unit.shape, 8) / 255
    assert record["bytes"] == pytest.approx(sum(map(len, files)), rel=0.01)
    assert record["voxels"] == voxels.size
    assert record["brain_voxels"] == brain.sum()
    psnr = -10 * np.log10(np.mean((result - unit)[brain] ** 2))
    assert record["figures"]["psnr_brain"] == pytest.approx(psnr, abs=0.1)
    assert "psnr_tumor" in record["figures"]
    assert record["patient"] == "BraTS-GLI-00000"
    lossless = json.loads((records / "BraTS-GLI-00000-000_t1c" / "jpeg2000_8@0.json").read_text())
    assert lossless["figures"]["psnr_brain"] > 55  # what rounding to 8 bits leaves


def test_what_is_there_is_not_made_again(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(cases, tmp_path / "out")
    first = RunRates(study).run()
    path = tmp_path / "out" / "records" / "BraTS-GLI-00001-000_t1c" / "jpeg_8@90.json"
    before = path.read_text()
    made: list[str] = []
    RunRates(study, made.append).run()
    assert made == []
    path.write_text("{")  # of a disk that failed
    again = RunRates(study, made.append).run()
    assert len(made) == 1
    assert "BraTS-GLI-00001-000_t1c jpeg_8@90" in made[0]
    assert json.loads(path.read_text())["figures"] == json.loads(before)["figures"]
    strip = [line for line in first.table.splitlines() if "| JPEG" in line and "[" in line]
    assert strip
    assert all(line in again.table for line in strip)
    more = RunRates(study_of(cases, tmp_path / "out", slices=3), made.append)
    assert more.dry_run() == [f"BraTS-GLI-0000{n}-000_t1c: 0 of 6 records" for n in (0, 1)]  # another SSIM


def test_an_interrupted_run_goes_on(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, whole = study_of(cases, tmp_path / "out"), study_of(cases, tmp_path / "whole")
    encode, calls = SliceCodec.encode, []

    def interrupted(self: Any, *arguments: Any) -> list[bytes]:
        calls.append(self.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, *arguments)

    monkeypatch.setattr(SliceCodec, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunRates(study).run()
    assert len([*(tmp_path / "out").rglob("*@*.json")]) == 4
    report = RunRates(study).run()
    assert report.missing == 0
    assert len(calls) == 1 + report.expected
    expected = RunRates(whole).run()

    def rates(table: str) -> str:
        return table.partition("## Time")[0]

    assert rates(report.table) == rates(expected.table)


def test_a_volume_that_another_call_is_at_is_left_to_it(cases: Path, tmp_path: Path) -> None:
    command = RunRates(study_of(cases, tmp_path / "out"))
    with command.folder(command.scans[0]).lock():
        report = command.run()
    assert report.busy == ("BraTS-GLI-00000-000_t1c",)
    assert (report.missing, report.expected) == (6, 12)
    assert RunRates(command.study).run().missing == 0


def test_with_masks_their_bytes_are_counted(cases: Path, tmp_path: Path) -> None:
    plain, masked = (RunRates(study_of(cases, tmp_path / way, background=way)) for way in ("decoded", "masked"))
    plain.run(), masked.run()
    for one, other, scan in zip(
        plain.records(), masked.records(), [s for s in plain.scans for _ in range(6)], strict=True
    ):
        assert other["bytes"] - one["bytes"] == len(encode_mask(scan.read().brain)) > 0
        assert other["figures"]["psnr_brain"] == pytest.approx(one["figures"]["psnr_brain"])


def test_tables_and_pictures(cases: Path, tmp_path: Path) -> None:
    report = RunRates(study_of(cases, tmp_path / "out", contrasts=["t1c", "t2f"], notes=["A note."])).run()
    assert [path.name for path in report.files] == ["table.md", "records.csv", "results.json", "curves.png"]
    assert all(path.stat().st_size for path in report.files)
    with (tmp_path / "out" / "records.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == report.expected
    assert float(rows[0]["bits_per_voxel"]) == pytest.approx(
        8 * int(rows[0]["bytes"]) / int(rows[0]["voxels"]), abs=1e-5
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["patients"] == ["BraTS-GLI-00000", "BraTS-GLI-00001"]
    assert found["rows"]["jpeg_8"]["bd_rate"]["jpeg2000_8"]["psnr_brain"]["n"] > 0
    assert "## BD-rate against JPEG 2000, slices, 8 bit" in report.table
    assert "- A note." in report.table


def test_a_codec_that_fails_is_a_line_and_the_others_go_on(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = SliceCodec.encode

    def fails(self: Any, volume: Any, bits: int, setting: float) -> list[bytes]:
        if setting == 90:
            raise VaevqMedError("jpeg: the program failed; expected a stream")
        return encode(self, volume, bits, setting)

    monkeypatch.setattr(SliceCodec, "encode", fails)
    report = RunRates(study_of(cases, tmp_path / "out")).run()
    assert report.missing == 2
    assert [where for where, _ in report.problems] == [f"BraTS-GLI-0000{n}-000_t1c jpeg_8@90" for n in (0, 1)]


CURVE = Curve(
    "a", "a-0", "t1c", (1, 2, 3, 4), np.array([0.02, 0.05, 0.1, 0.3]), {"psnr_brain": np.array([26, 30, 33, 39.0])}
)


def scaled(factor: float, sign: int = 1) -> Curve:
    return replace(CURVE, rates=CURVE.rates * factor, figures={"psnr_brain": sign * CURVE.figures["psnr_brain"]})


@given(factor=st.floats(0.2, 5))
@settings(max_examples=20, deadline=None)
def test_a_curve_of_a_multiple_of_the_bytes_has_that_delta_rate(factor: float) -> None:
    assert delta_rate(CURVE, scaled(factor), "psnr_brain") == pytest.approx(100 * (factor - 1), abs=1e-6)


def test_a_delta_rate_by_hand() -> None:
    # Straight lines over log10 of the rate: 30 dB at 0.1 and 40 dB at 1; 30 dB at 0.2 and 40 dB at 4. The mean of the
    # difference log10(2) + log10(2) (q - 30) / 10 over q is 1.5 log10(2): 2 ** 1.5 = 2.828 times the bytes.
    anchor = Curve("a", "a-0", "t1c", (1, 2), np.array([0.1, 1.0]), {"q": np.array([30.0, 40.0])})
    other = Curve("a", "a-0", "t1c", (1, 2), np.array([0.2, 4.0]), {"q": np.array([30.0, 40.0])})
    assert delta_rate(anchor, other, "q") == pytest.approx(100 * (2**1.5 - 1))


def test_delta_rates_where_lower_is_better_and_where_nothing_is_shared() -> None:
    worse = delta_rate(scaled(1, -1), scaled(2, -1), "psnr_brain", higher_is_better=False)
    assert worse == pytest.approx(100)
    far = Curve("a", "a-0", "t1c", (1, 2), np.array([0.1, 1.0]), {"psnr_brain": np.array([50.0, 60.0])})
    assert np.isnan(delta_rate(CURVE, far, "psnr_brain"))
    assert np.isnan(delta_rate(CURVE, far, "ssim"))


def test_a_curve_is_read_on_the_logarithm_and_not_beyond_its_ends() -> None:
    assert CURVE.at(0.05, "psnr_brain") == pytest.approx(30)
    assert 30 < CURVE.at(0.07, "psnr_brain") < 33
    assert np.isnan(CURVE.at(0.019, "psnr_brain"))
    assert np.isnan(CURVE.at(0.31, "psnr_brain"))
    assert np.isnan(CURVE.at(0.1, "ssim"))


def test_points_of_one_size_are_one_and_figures_that_some_lack_are_left_out() -> None:
    shared = {"voxels": 800, "patient": "a", "case": "a-0", "contrast": "t1c"}
    records = [
        {**shared, "setting": 1, "bytes": 10, "figures": {"psnr_brain": 20.0, "perceptual": 1.0}},
        {**shared, "setting": 2, "bytes": 10, "figures": {"psnr_brain": 20.5}},
        {**shared, "setting": 3, "bytes": 30, "figures": {"psnr_brain": 25.0}},
    ]
    (curve,) = curves_of(records)
    np.testing.assert_allclose(curve.rates, [0.1, 0.3])
    assert list(curve.figures) == ["psnr_brain"]


def made_up(row: str, case: str, points: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    """Records of a row on a case of the patient whose name the case begins with: bytes and PSNR of each setting."""
    times = {"encode_seconds": 1.0, "decode_seconds": 1.0}
    shared = {"row": row, "patient": case[:1], "case": case, "contrast": "t1c", "voxels": 8000, "brain_voxels": 10}
    return [
        {**shared, **times, "setting": n, "bytes": size, "figures": {"psnr_brain": psnr}}
        for n, (size, psnr) in enumerate(points, 30)
    ]


SMALL, LARGE = [(100, 26.0), (300, 31.0), (900, 38.0)], [(400, 26.0), (1200, 31.0), (3600, 38.0)]


def test_two_examinations_of_a_patient_are_two_volumes(cases: Path, tmp_path: Path) -> None:
    command = RunRates(study_of(cases, tmp_path / "out"))
    own = {name: made_up(name, "a-0", SMALL) + made_up(name, "a-1", LARGE) for name in ("jpeg2000_8", "jpeg_8")}
    report = Report(command.study, command.rows, [*own["jpeg2000_8"], *own["jpeg_8"]])
    found = report.delta("jpeg_8", "jpeg2000_8", FIGURES[0])
    assert found.n == 2
    assert found.mean == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("reached", "cell"), [(4, "+300 [+300, +300]"), (3, "+300 [+300, +300] (3 of 4)"), (2, "–")])
def test_a_delta_rate_says_of_how_many_volumes_it_is(cases: Path, tmp_path: Path, reached: int, cell: str) -> None:
    command = RunRates(study_of(cases, tmp_path / "out"))
    far = [(size, psnr + 40) for size, psnr in LARGE]  # shares no figure with the anchor
    records = [record for case in "abcd" for record in made_up("jpeg2000_8", case, SMALL)]
    for number, case in enumerate("abcd"):
        records += made_up("jpeg_8", case, LARGE if number < reached else far)
    table = Report(command.study, command.rows, records).markdown()
    own = table.partition("## BD-rate")[2].partition("## Time")[0].splitlines()
    assert [line for line in own if line.startswith("| JPEG")] == [f"| JPEG, one mosaic, 8 bit | {cell} |"]


def test_rows_of_one_title_are_two_lines(cases: Path, tmp_path: Path) -> None:
    codecs = [{"name": name, "title": "JPEG"} for name in ("jpeg", "jpeg2000")]
    command = RunRates(study_of(cases, tmp_path / "out", codecs=codecs))
    records = made_up("jpeg2000_8", "a-0", SMALL) + made_up("jpeg_8", "a-0", LARGE)
    points = Report(command.study, command.rows, records).points()
    assert sorted(points) == ["jpeg2000_8", "jpeg_8"]


def test_settings_alike_to_six_digits_have_records_of_their_own(cases: Path, tmp_path: Path) -> None:
    codecs = [{"name": "jpeg2000", "settings": [30, 30.0000001]}]
    command = RunRates(study_of(cases, tmp_path / "out", codecs=codecs, lossless=False))
    assert command.run().missing == 0
    names = sorted(path.name for path in (tmp_path / "out" / "records" / "BraTS-GLI-00000-000_t1c").glob("*@*"))
    assert names == ["jpeg2000_8@30.0000001.json", "jpeg2000_8@30.json"]


def test_without_the_package_of_delta_rates_nothing_is_coded(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bjontegaard", None)
    with pytest.raises(VaevqMedError, match="a delta rate needs bjontegaard, which is not installed"):
        RunRates(study_of(cases, tmp_path / "out")).dry_run()
    RunRates(study_of(cases, tmp_path / "out", anchors=[])).dry_run()


def test_intervals_are_over_patients() -> None:
    alike = Spread.of([1.0, 1.0, 3.0, 3.0], ["a", "a", "b", "b"])
    assert (alike.mean, alike.low, alike.high, alike.n) == (2.0, 1.0, 3.0, 4)
    assert np.isnan(Spread.of([1.0, 2.0], ["a", "a"]).low)
    assert Spread.of([float("nan")], ["a"]).to_json() == {"mean": None, "low": None, "high": None, "n": 0}


def of_codec(name: str, values: list[float]) -> dict[str, Any]:
    return {"codecs": [{"name": name, "settings": values}], "anchors": []}


def tokenizer(**fields: Any) -> dict[str, Any]:
    return {"tokenizers": [{"name": "toy", "checkpoint": "none.pt", **fields}]}


def test_what_the_file_may_not_say(cases: Path, tmp_path: Path) -> None:
    for fields, message in (
        ({"codecs": ["jpg2000"]}, "codecs[0].name is jpg2000; expected jpeg2000"),
        ({"codecs": []}, "codecs and tokenizers are empty; expected at least one"),
        ({"anchors": ["hevc"]}, "anchors has hevc; expected some of jpeg2000_8, jpeg_8"),
        ({"contrasts": ["t3"]}, "contrasts has t3; expected some of t1n, t1c, t2w, t2f"),
        ({"codec": []}, "codec is unknown; expected codecs"),
        (
            of_codec("sperr", [500]),
            "settings is a list with 500; expected numbers from 0.1 to 150 (PSNR (dB))",
        ),
        (of_codec("sperr", [0]), "codecs[0].settings is a list with 0; expected numbers from 0.1 to 150"),
        (of_codec("jpegls", [12.5]), "codecs[0].settings is a list with 12.5; expected whole numbers from 0 to 127"),
        (of_codec("jpeg2000", [0.5]), "list with 0.5; expected numbers from 1 to 120, or 0 for no loss"),
        (of_codec("hevc_z", [math.nan]), "codecs[0].settings is a list with nan; expected finite numbers"),
        (of_codec("hevc_z", [52]), "codecs[0].settings is a list with 52; expected numbers from 0 to 51 (crf)"),
        (tokenizer(settings=[0, -1]), "tokenizers[0].settings is a list with -1; expected weights of 0 or more"),
        (tokenizer(settings=[math.inf]), "tokenizers[0].settings is a list with inf; expected finite numbers"),
        (tokenizer(coder="adaptiv"), "tokenizers[0].coder is adaptiv; expected adaptive"),
        (
            tokenizer(coder="context"),
            "coder_model is null; expected the file that the coder context needs",
        ),
        (tokenizer(coder_model="m.pt"), "tokenizers[0].coder_model is m.pt; expected none, since the coder adaptive"),
        (tokenizer(name="jpeg_8"), "tokenizers has jpeg_8, which is the row of a codec; expected another name"),
        ({"rates": [math.inf]}, "rates[0] is"),
        ({"split": "validation"}, "found no case of the split validation"),
    ):
        with pytest.raises(VaevqMedError) as caught:
            RunRates(study_of(cases, tmp_path / "out", **fields)).dry_run()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_rows_of_bits_that_a_library_codes_alike_are_one(cases: Path, tmp_path: Path) -> None:
    codecs = ["jpeg", {"name": "jpeg2000", "bits": [12]}]
    command = RunRates(study_of(cases, tmp_path / "out", bits=[8, 12], codecs=codecs, anchors=[]))
    assert [row.name for row in command.rows] == ["jpeg_8", "jpeg2000_12"]


def test_the_command_and_its_exit_codes(cases: Path, tmp_path: Path) -> None:
    study = study_of(cases, tmp_path / "out")
    (tmp_path / "mine.yaml").write_text(study.text())
    assert read_study(str(tmp_path / "mine.yaml")) == study
    runner = CliRunner()
    dry = runner.invoke(app, ["rate-distortion", str(tmp_path / "mine.yaml"), "--dry-run"])
    assert dry.exit_code == 0
    assert "BraTS-GLI-00000-000_t1c: 0 of 6 records" in dry.output
    assert not (tmp_path / "out").exists()
    done = runner.invoke(app, ["study", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 0, done.output
    assert "12 of 12 records are there" in done.output
    shutil.rmtree(tmp_path / "out" / "records")
    some = runner.invoke(
        app, ["rate-distortion", str(tmp_path / "mine.yaml"), "--set", "codecs=[jpeg]", "--set", "anchors=[]"]
    )
    assert some.exit_code == 0
    task = runner.invoke(app, ["study", str(tmp_path / "mine.yaml"), "--task", "0"])
    assert isinstance(task.exception, VaevqMedError)
    assert "found a study that trains nothing" in str(task.exception)
    other = runner.invoke(app, ["rate-distortion", "small"])
    assert str(other.exception) == "study is tokenizers; expected rate_distortion"


def test_the_bundled_study_is_one() -> None:
    found = read_study("rate_distortion")
    assert isinstance(found, RateDistortionStudy)
    assert {part.name for part in found.codecs} >= {"jpeg2000", "libaom_z", "hevc_z", "svtav1_intra"}
