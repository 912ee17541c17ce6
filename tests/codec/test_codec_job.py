"""The three commands over cases: same bytes, resumed after an interruption, and what is refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.index_stacks import random_model
from helpers.scans import CONTRASTS, affine_of, body, write_case, write_nifti
from helpers.stores import write_checkpoint
from scipy.ndimage import maximum_filter

from vaevq_med.cli import app as cli
from vaevq_med.codec.case import CompressedCase, read_description
from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.container import pack, unpack
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.model import Model
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.work import Compress, _model, compress, decompress, reconstruct
from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.prepare.job import Prepare
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.source import VolumeSource

NAMES = ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt", modalities=[*CONTRASTS])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for name in NAMES:
        write_case(folder, name)
    return folder


def options_of(checkpoint: Path, **options: Any) -> CompressOptions:
    return CompressOptions(checkpoint=checkpoint, **{"workers": 1, "batch_size": 8, **options})


@pytest.fixture(scope="module")
def small(cases: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the compressed cases."""
    output = tmp_path_factory.mktemp("compressed") / "small"
    compress(cases, output, options_of(checkpoint)).run()
    return output


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".") and path.name != "report.json"
    }


def test_the_bytes_do_not_depend_on_workers_or_threads(
    cases: Path, small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    compress(cases, tmp_path / "two", options_of(checkpoint, workers=2)).run()
    assert digests(tmp_path / "two") == digests(small)
    # One case on two cores: two threads of one process.
    compress(cases / NAMES[0], tmp_path / "one.vvq", options_of(checkpoint, workers=2)).run()
    assert (tmp_path / "one.vvq").read_bytes() == (small / f"{NAMES[0]}.vvq").read_bytes()


def test_an_interrupted_run_goes_on(
    cases: Path, small: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Compress.make

    def interrupted(self: Compress, unit: str, threads: int) -> Any:
        if unit == NAMES[1]:
            raise KeyboardInterrupt
        return make(self, unit, threads)

    monkeypatch.setattr(Compress, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(cases, tmp_path / "out", options_of(checkpoint)).run()
    assert [*digests(tmp_path / "out")] == [f"{NAMES[0]}.vvq"]
    monkeypatch.setattr(Compress, "make", make)
    report = compress(cases, tmp_path / "out", options_of(checkpoint)).run()
    assert (report.written, report.reused) == (1, 1)
    assert digests(tmp_path / "out") == digests(small)
    report = compress(cases, tmp_path / "out", options_of(checkpoint)).run()
    assert (report.written, report.reused) == (0, 2)
    with pytest.raises(DataError, match="made with other settings"):
        compress(cases, tmp_path / "out", options_of(checkpoint, coder="fixed")).run()


def test_contrasts_that_share_a_mask_store_it_once(small: Path) -> None:
    content = (small / f"{NAMES[0]}.vvq").read_bytes()
    masks = [contrast["mask"] for contrast in read_description("", content)["contrasts"]]
    assert masks[0]["bytes"] > 0
    assert masks[1:] == [{"bytes": 0, "base": 0}] * 3


def test_the_indices_decode_alike_in_a_fresh_process_with_other_threads_and_under_bf16(
    small: Path, tmp_path: Path
) -> None:
    path = small / f"{NAMES[0]}.vvq"
    content = path.read_bytes()
    with torch.autocast("cpu", torch.bfloat16):
        case = CompressedCase.from_bytes(path.name, content)
    expected = hashlib.sha256(b"".join(stream.indices.tobytes() for stream in case.streams)).hexdigest()
    script = (
        "import sys, hashlib, pathlib, torch; torch.set_num_threads(2)\n"
        "from vaevq_med.codec.case import CompressedCase\n"
        "case = CompressedCase.from_bytes('a', pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(hashlib.sha256(b''.join(s.indices.tobytes() for s in case.streams)).hexdigest())\n"
        "assert 'monai' not in sys.modules, 'MONAI was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.strip() == expected, done.stderr[-2000:]


@pytest.mark.parametrize("coder", ["fixed", "adaptive"])
def test_the_coders_hold_the_same_indices(
    coder: str, cases: Path, small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    compress(cases / NAMES[0], tmp_path / "a.vvq", options_of(checkpoint, coder=coder)).run()
    one, other = (
        CompressedCase.from_bytes("", path.read_bytes()) for path in (tmp_path / "a.vvq", small / f"{NAMES[0]}.vvq")
    )
    for first, second in zip(one.streams, other.streams, strict=True):
        assert np.array_equal(first.indices, second.indices)
        assert first.indices.max() > 0


def test_the_network_is_given_batches_and_live_positions_only_are_coded(
    small: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CompressedCase.from_bytes("", (small / f"{NAMES[0]}.vvq").read_bytes())
    live = case.live((0,))
    assert live.any(axis=(1, 2)).all()
    assert not live.all()
    assert (case.streams[0].indices[~live] == 0).all()
    model = _model(checkpoint, "ema", None, None, 3)
    sizes: list[int] = []
    decode = model.network.decode
    monkeypatch.setattr(model.network, "decode", lambda x: (sizes.append(len(x)), decode(x))[1])
    assert len(model.decode(case.filled(case.streams[0]))) == len(case.slices)
    assert max(sizes) == 3


def test_reconstruct_is_both_at_once_with_figures_and_a_picture(
    cases: Path, small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    report = reconstruct(cases / NAMES[0], folder, options_of(checkpoint), preview=True).run()
    name = NAMES[0]
    assert (folder / name / f"{name}.vvq").read_bytes() == (small / f"{name}.vvq").read_bytes()
    assert (folder / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    quality = json.loads((folder / "report.json").read_text())["units"][name]["quality"]
    assert set(quality) == set(CONTRASTS)
    decompress(small / f"{name}.vvq", tmp_path / "back", DecompressOptions(checkpoint=checkpoint, workers=1)).run()
    for contrast in CONTRASTS:
        file = f"{name}-{contrast}.nii.gz"
        assert (folder / name / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
        before, after = (np.asarray(nib.load(at / file).dataobj) for at in (cases / name, tmp_path / "back"))
        low, high = CompressedCase.from_bytes("", (small / f"{name}.vvq").read_bytes()).contrasts[0].window
        if contrast == CONTRASTS[0]:
            inside = before != 0
            clipped = [np.clip((x[inside] - low) / (high - low), 0, 1) for x in (before, after)]
            expected = -10 * np.log10(np.mean((clipped[0] - clipped[1]) ** 2))
            assert quality[contrast]["psnr_foreground"] == pytest.approx(expected, abs=1e-3)
    assert report.figures[name]["bytes"] == (small / f"{name}.vvq").stat().st_size


def test_a_stacked_tokenizer_makes_one_stream(cases: Path, tmp_path: Path) -> None:
    stacked = write_checkpoint(tmp_path / "stacked.pt", in_channels=4, stack_modalities=True, modalities=[*CONTRASTS])
    reconstruct(cases / NAMES[0], tmp_path / "out", options_of(stacked)).run()
    content = (tmp_path / "out" / NAMES[0] / f"{NAMES[0]}.vvq").read_bytes()
    assert [name for name in unpack("", content) if name.startswith("tokens")] == ["tokens/0"]
    for contrast in CONTRASTS:
        file = f"{NAMES[0]}-{contrast}.nii.gz"
        before, after = (nib.load(at / NAMES[0] / file) for at in (cases, tmp_path / "out"))
        assert after.header.binaryblock == before.header.binaryblock
        assert np.array_equal(np.asarray(before.dataobj) == 0, np.asarray(after.dataobj) == 0)
    with pytest.raises(DataError, match="expected 4"):
        compress(cases, tmp_path / "two", options_of(stacked, modality=["t1n", "t1c"]))


def test_a_4d_file_comes_back_whole(checkpoint: Path, tmp_path: Path) -> None:
    single = nib.load(write_nifti(tmp_path / "x-t1n.nii"))
    values = np.stack([np.asarray(single.dataobj)] * 4, axis=-1)
    (tmp_path / "in" / "imagesTr").mkdir(parents=True)
    source = tmp_path / "in" / "imagesTr" / "BRATS_001.nii.gz"
    nib.save(nib.Nifti1Image(values, single.affine), source)
    reconstruct(tmp_path / "in", tmp_path / "out", options_of(checkpoint)).run()
    after = nib.load(tmp_path / "out" / "BRATS_001" / "BRATS_001.nii.gz")
    assert after.header.binaryblock == nib.load(source).header.binaryblock
    assert np.array_equal(np.asarray(after.dataobj) == 0, values == 0)


# --- what is refused --------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_with_both_named(small: Path, checkpoint: Path, tmp_path: Path) -> None:
    def change(network: torch.nn.Module) -> None:
        with torch.no_grad():
            next(network.parameters()).add_(1)

    other = write_checkpoint(tmp_path / "other.pt", change=change, modalities=[*CONTRASTS])
    path = small / f"{NAMES[0]}.vvq"
    wanted = read_description("", path.read_bytes())["tokenizer"]["hash"]
    with pytest.raises(VaevqMedError, match=rf"found the tokenizer sha256:\w{{64}} in .*, expected {wanted}"):
        decompress(path, tmp_path / "out", DecompressOptions(checkpoint=other, workers=1)).run()
    with pytest.raises(VaevqMedError, match=r"found no best\.pt beside it"):
        decompress(path, tmp_path / "out", DecompressOptions(workers=1)).run()
    assert digests(tmp_path / "out") == {}
    (tmp_path / "a.vvq").write_bytes(path.read_bytes())
    (tmp_path / "best.pt").write_bytes(checkpoint.read_bytes())
    assert decompress(tmp_path / "a.vvq", tmp_path / "out", DecompressOptions(workers=1)).run().written == 1


def test_a_damaged_file_among_others_is_skipped(small: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    contents = [(small / f"{name}.vvq").read_bytes() for name in NAMES]
    (folder / "a.vvq").write_bytes(contents[0])
    (folder / "b.vvq").write_bytes(contents[1][:-200] + b"?" + contents[1][-199:])
    report = decompress(folder, tmp_path / "out", DecompressOptions(checkpoint=checkpoint, workers=1)).run()
    assert report.written == 1
    assert [name for name, _ in report.skipped] == ["b"]
    assert {Path(name).parts[0] for name in digests(tmp_path / "out")} == {"a"}


def test_a_file_that_was_coded_otherwise_than_it_says_is_refused(small: Path) -> None:
    parts = unpack("", (small / f"{NAMES[0]}.vvq").read_bytes())
    for name, content in (("tokens/0", parts["tokens/1"][:-3]), ("masks", b"12345"), ("description", b"no zlib")):
        with pytest.raises(CodecError, match=r"^a\.vvq: "):
            CompressedCase.from_bytes("a.vvq", pack({**parts, name: content}))


def test_contrasts_that_the_tokenizer_was_not_trained_for(cases: Path, tmp_path: Path) -> None:
    two = write_checkpoint(tmp_path / "two.pt", modalities=["t1n", "t2w"])
    with pytest.raises(DataError, match="found the contrast t1c, expected one of t1n, t2w"):
        compress(cases, tmp_path / "out", options_of(two))
    taken = compress(cases, tmp_path / "out", options_of(two, any_contrast=True))
    assert any("was not trained for t1c, t2f" in note for note in taken.work.notes)
    unknown = write_checkpoint(tmp_path / "unknown.pt")
    noted = compress(cases, tmp_path / "out", options_of(unknown))
    assert any("does not say for which contrasts" in note for note in noted.work.notes)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_resamples_is_refused(cases: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be undone"):
        compress(cases, tmp_path / "out", options_of(checkpoint, recipe="brats24/axial_256_n4"))


def test_a_volume_that_slicing_would_leave_out_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "noise-t1c.nii"
    nib.save(nib.Nifti1Image(rng.integers(1, 1000, (28, 36, 6)).astype(np.int16), np.diag([-1, -1, 1, 1])), source)
    with pytest.raises(DataError, match="found no background"):
        compress(source, tmp_path / "a.vvq", options_of(checkpoint)).run()
    assert not (tmp_path / "a.vvq").exists()


def test_what_is_there_is_not_replaced_unasked(checkpoint: Path, tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "a-t1c.nii")
    small = tmp_path / "a.vvq"
    assert compress(source, small, options_of(checkpoint)).run().written == 1
    assert compress(source, small, options_of(checkpoint)).run().reused == 1
    before = source.read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        decompress(small, source, DecompressOptions(checkpoint=checkpoint, workers=1)).run()
    assert source.read_bytes() == before
    with pytest.raises(DataError, match=r"ends with \.nii"):
        decompress(small, tmp_path / "b.mha", DecompressOptions(checkpoint=checkpoint, workers=1)).run()


def test_the_command_line_says_it_in_one_line(
    small: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["vaevq-med", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    damaged = tmp_path / "damaged.vvq"
    damaged.write_bytes((small / f"{NAMES[0]}.vvq").read_bytes()[:-1])
    assert run("decompress", damaged, tmp_path / "a.nii.gz", "--checkpoint", checkpoint) == 2
    error = capsys.readouterr().err
    assert "truncated" in error
    assert len([line for line in error.splitlines() if line.startswith("vaevq-med: ")]) == 1
    assert not (tmp_path / "a.nii.gz").exists()
    source = write_nifti(tmp_path / "a-t1c.nii.gz")
    assert run("compress", source, tmp_path / "a.vvq", "--checkpoint", checkpoint, "--workers", 1) == 0
    assert "bits a voxel" in capsys.readouterr().out


def test_models_are_described(checkpoint: Path) -> None:
    model = _model(checkpoint, "ema", None, None, 3)
    assert isinstance(model, Model)
    assert model.description["patch"] == 4
    assert model.description["num_embeddings"] == 32


def test_a_coder_with_a_model_of_its_own(cases: Path, small: Path, checkpoint: Path, tmp_path: Path) -> None:
    described = read_description("", (small / f"{NAMES[0]}.vvq").read_bytes())["tokenizer"]
    model, other = tmp_path / "context.safetensors", tmp_path / "other.safetensors"
    replace(random_model(0, 32), tokenizer=described["hash"]).save(model)
    replace(random_model(1, 32), tokenizer=described["hash"]).save(other)
    output = tmp_path / "a.vvq"
    compress(cases / NAMES[0], output, options_of(checkpoint, coder="context", model=model)).run()
    content = output.read_bytes()
    expected = CompressedCase.from_bytes("", (small / f"{NAMES[0]}.vvq").read_bytes())
    found = CompressedCase.from_bytes("a.vvq", content, model=model)
    for first, second in zip(expected.streams, found.streams, strict=True):
        assert np.array_equal(first.indices, second.indices)
    with pytest.raises(CodecError, match=r"a\.vvq: coder context: found no model, expected .*sha256:\w{64}"):
        CompressedCase.from_bytes("a.vvq", content)
    with pytest.raises(CodecError, match=r"found the model sha256:\w{64}, expected sha256:\w{64}"):
        CompressedCase.from_bytes("a.vvq", content, model=other)
    with pytest.raises(CodecError, match="expected none, since this coder takes none"):
        compress(cases, tmp_path / "out", options_of(checkpoint, model=model))
    with pytest.raises(CodecError, match="expected one of adaptive, context, fixed, prior"):
        compress(cases, tmp_path / "out", options_of(checkpoint, coder="zip"))


def test_a_bit_that_is_worth_more_makes_a_smaller_file(
    cases: Path, small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def streams(**options: Any) -> tuple[int, list[Any]]:
        output = tmp_path / f"{len([*tmp_path.iterdir()])}.vvq"
        compress(cases / NAMES[0], output, options_of(checkpoint, **options)).run()
        parts = unpack("", output.read_bytes())
        case = CompressedCase.from_bytes("", output.read_bytes(), model=options.get("model"))
        return sum(len(part) for name, part in parts.items() if name.startswith("tokens/")), case.streams

    nearest, plain = streams()
    # So small a weight decides ties alone, of which there are none.
    same, kept = streams(rate_weight=1e-12)
    assert same == nearest
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(plain, kept, strict=True))
    sizes = [nearest, *(streams(rate_weight=weight)[0] for weight in (1e-4, 1e-3, 1e-2, 1e9))]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) > 2
    # Where bits are all that counts, every position takes the commonest codeword.
    assert all(np.unique(one.indices).size <= 2 for one in streams(rate_weight=1e9)[1])
    described = read_description("", (small / f"{NAMES[0]}.vvq").read_bytes())["tokenizer"]
    model = tmp_path / "context.safetensors"
    replace(random_model(0, 32), tokenizer=described["hash"]).save(model)
    by_context = [streams(coder="context", model=model, rate_weight=weight)[0] for weight in (0.0, 1.0)]
    assert by_context[1] < by_context[0]
    with pytest.raises(VaevqMedError, match="--rate-weight: found -1"):
        compress(cases, tmp_path / "out", options_of(checkpoint, rate_weight=-1.0))


def test_indices_that_come_out_otherwise_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (small / f"{NAMES[0]}.vvq").read_bytes()
    decode = AdaptiveCoder.decode

    def elsewhere(self: AdaptiveCoder, data: bytes, layout: Any) -> Any:
        found = decode(self, data, layout)
        found[tuple(np.argwhere(layout.live)[-1])] ^= 1
        return found

    monkeypatch.setattr(AdaptiveCoder, "decode", elsewhere)
    with pytest.raises(CodecError, match="found the indices of stream 0 other than those that were coded"):
        CompressedCase.from_bytes("", content)


def test_a_context_model_is_trained_and_used_by_the_commands(
    slice_dataset: Path,
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.pt")

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["vaevq-med", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    model = tmp_path / "context.safetensors"
    sizes = ("--hidden", 8, "--width", 4, "--epochs", 1)
    assert run("index-model", slice_dataset, model, "--checkpoint", checkpoint, *sizes) == 0
    assert "bits an index" in capsys.readouterr().out
    words = ("--checkpoint", checkpoint, "--coder", "context", "--model", model, "--workers", 1)
    assert run("compress", cases / NAMES[0], tmp_path / "a.vvq", *words) == 0
    decoding = ("--checkpoint", checkpoint, "--model", model, "--workers", 1)
    assert run("decompress", tmp_path / "a.vvq", tmp_path / "back", *decoding) == 0
    assert len([*(tmp_path / "back").glob("*.nii.gz")]) == len(CONTRASTS)
    assert run("index-model", slice_dataset, tmp_path / "none" / "m.safetensors", "--checkpoint", checkpoint) == 2
    assert "found no folder" in capsys.readouterr().err


def test_names_that_would_not_come_back_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    rows = ["case,t1n,t1c,t2w,t2f"]
    for contrast in CONTRASTS:
        write_nifti(tmp_path / contrast / "vol.nii.gz")
    rows.append("p1," + ",".join(str(tmp_path / contrast / "vol.nii.gz") for contrast in CONTRASTS))
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"found two volumes called 'vol\.nii\.gz', expected other names"):
        compress(tmp_path, tmp_path / "out", options_of(checkpoint, cases=tmp_path / "cases.csv")).run()
    hidden = write_nifti(tmp_path / ".hidden-t1c.nii")
    with pytest.raises(VaevqMedError, match="expected the name of a file that is not hidden"):
        compress(hidden, tmp_path / "x.vvq", options_of(checkpoint)).run()
    assert not (tmp_path / "x.vvq").exists()


def test_files_of_other_inputs_and_damaged_ones_in_the_output(checkpoint: Path, tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        path = write_nifti(tmp_path / folder / "scan-t1c.nii.gz")
        image = nib.load(path)
        changed = np.asarray(image.dataobj) * (seed + 1)
        nib.save(nib.Nifti1Image(changed, image.affine, image.header), path)
    output = tmp_path / "out"
    assert compress(tmp_path / "a" / "scan-t1c.nii.gz", output, options_of(checkpoint)).run().written == 1
    first = (output / "scan-t1c.vvq").read_bytes()
    with pytest.raises(DataError, match=r"found another file of this name; --overwrite replaces it"):
        compress(tmp_path / "b" / "scan-t1c.nii.gz", output, options_of(checkpoint)).run()
    assert (output / "scan-t1c.vvq").read_bytes() == first
    compress(tmp_path / "b" / "scan-t1c.nii.gz", output, options_of(checkpoint), overwrite=True).run()
    second = (output / "scan-t1c.vvq").read_bytes()
    assert second != first
    # A finished file of which one byte was changed since is not taken for finished.
    (output / "scan-t1c.vvq").write_bytes(second[:-1] + bytes([second[-1] ^ 1]))
    with pytest.raises(DataError, match="--overwrite replaces it"):
        compress(tmp_path / "b" / "scan-t1c.nii.gz", output, options_of(checkpoint)).run()


def test_the_first_codebooks_alone(cases: Path, tmp_path: Path) -> None:
    stage = {"_target_": "vaevq_med.networks.quantizers.VectorQuantizer", "num_embeddings": 32, "embedding_dim": 4}
    target = "vaevq_med.networks.quantizers.ResidualQuantizer"
    quantizer = {"_target_": target, "stages": [stage], "num_codebooks": 3}

    def change(network: torch.nn.Module) -> None:
        torch.nn.init.normal_(next(network.quantizer.parameters()))  # type: ignore[union-attr]

    checkpoint = write_checkpoint(tmp_path / "rvq.pt", quantizer, change=change)
    streams = {}
    for count in (1, 2, None):
        output = tmp_path / f"{count}.vvq"
        compress(cases / NAMES[0], output, options_of(checkpoint, codebooks=count)).run()
        case = CompressedCase.from_bytes("", output.read_bytes())
        streams[count] = case.streams[0].indices
        options = DecompressOptions(checkpoint=checkpoint, workers=1)
        assert decompress(output, tmp_path / f"back{count}", options).run().written == 1
    assert [stream.shape[-1] for stream in streams.values()] == [1, 2, 3]
    assert np.array_equal(streams[None][..., :2], streams[2])
    with pytest.raises(CodecError, match="--codebooks: found 4, expected 1 to 3 for ResidualQuantizer"):
        compress(cases, tmp_path / "out", options_of(checkpoint, codebooks=4))


def test_a_refused_case_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "noise-t1c.nii"
    nib.save(nib.Nifti1Image(rng.integers(1, 1000, (28, 36, 6)).astype(np.int16), np.diag([-1, -1, 1, 1])), source)
    (tmp_path / "own").mkdir()
    for output in ("new", "own"):
        with pytest.raises(DataError, match="found no background"):
            compress(source, tmp_path / output, options_of(checkpoint)).run()
    assert not (tmp_path / "new").exists()
    assert [*(tmp_path / "own").iterdir()] == []  # a folder that was there stays


def test_the_report_tells_of_all_that_is_there(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def told() -> dict[str, Any]:
        return json.loads((output / "report.json").read_text())

    for name in ("a-t1c", "b-t1c"):
        source = write_nifti(tmp_path / name / f"{name}.nii", extension=True)
        report = compress(source, output, options_of(checkpoint)).run()
        assert [*report.figures] == [name]
    assert [*told()["units"]] == ["a-t1c", "b-t1c"]
    assert any(note.startswith("a-t1c.nii and 1 more: the extensions") for note in told()["notes"])
    (output / "a-t1c.vvq").unlink()
    compress(source, output, options_of(checkpoint)).run()
    assert [*told()["units"]] == ["b-t1c"]
    compress(source, output, options_of(checkpoint, coder="fixed"), overwrite=True).run()
    compress(write_nifti(tmp_path / "c-t1c.nii"), output, options_of(checkpoint), overwrite=True).run()
    assert [*told()["units"]] == ["c-t1c"]  # files of other settings are not its own


def test_the_report_keeps_what_an_earlier_command_skipped(small: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole, output = (small / f"{NAMES[0]}.vvq").read_bytes(), tmp_path / "out"
    options = DecompressOptions(checkpoint=checkpoint, workers=1)
    for folder, damaged in (("first", "a"), ("second", "c"), ("third", "")):
        (tmp_path / folder).mkdir()
        for name in ("a", "b") if folder != "second" else ("c", "d"):
            (tmp_path / folder / f"{name}.vvq").write_bytes(whole[:-1] if name == damaged else whole)
        decompress(tmp_path / folder, output, options).run()
        told = json.loads((output / "report.json").read_text())
        expected = {"first": ["a"], "second": ["a", "c"], "third": ["c"]}[folder]
        assert [one["file"] for one in told["skipped"]] == expected
    assert [*told["units"]] == ["a", "b", "d"]


def test_a_coarse_mask_takes_fewer_bytes_and_loses_no_foreground(
    cases: Path, small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = options_of(checkpoint, mask="coarse")
    reconstruct(cases / NAMES[0], tmp_path / "out", options).run()
    content = (tmp_path / "out" / NAMES[0] / f"{NAMES[0]}.vvq").read_bytes()
    exact = (small / f"{NAMES[0]}.vvq").read_bytes()
    assert len(unpack("", content)["masks"]) < 0.6 * len(unpack("", exact)["masks"])
    assert (b'"vaevq_med_codec":"1"' in exact, b'"vaevq_med_codec":"2"' in content) == (True, True)
    assert "cell" not in read_description("", exact)
    name = f"{NAMES[0]}-t1c.nii.gz"
    before = np.asarray(nib.load(cases / NAMES[0] / name).dataobj)
    after = np.asarray(nib.load(tmp_path / "out" / NAMES[0] / name).dataobj)
    inside = before != 0
    # A voxel keeps the background where no foreground lies in the 3 x 3 voxels around it in its slice.
    reach = maximum_filter(inside, (3, 3, 1))
    assert not after[~reach].any()
    assert after[inside].all()
    assert after[reach & ~inside].any()
    told = json.loads((tmp_path / "out" / "report.json").read_text())["units"][NAMES[0]]["quality"]["t1c"]
    low, high = read_description("", content)["contrasts"][1]["window"]
    pixels = [np.clip((volume[inside] - low) / (high - low), 0, 1) for volume in (before, after.astype(float))]
    assert told["psnr_foreground"] == pytest.approx(-10 * np.log10(np.mean((pixels[0] - pixels[1]) ** 2)), abs=0.01)
    with pytest.raises(DataError, match="made with other settings"):
        reconstruct(cases / NAMES[0], tmp_path / "out", options_of(checkpoint)).run()


# --- segmentations ----------------------------------------------------------------------------------


def write_segmented(folder: Path, name: str) -> Path:
    """A case with its segmentation, whose file is no NIfTI that this package would write."""
    case = write_case(folder, name)
    labels = np.zeros(body().shape, np.uint8)
    labels[10:16, 14:20, 4:8] = 1
    labels[12:14, 16:18, 5:7] = 3
    plain = nib.Nifti1Image(labels, affine_of("LPS")).to_bytes()
    (case / f"{name}-seg.nii.gz").write_bytes(gzip.compress(plain, 1, mtime=5))
    return case


def test_reconstruct_copies_segmentations_and_slices_of_it_have_labels(checkpoint: Path, tmp_path: Path) -> None:
    cases, output = tmp_path / "cases", tmp_path / "out"
    masks = {name: write_segmented(cases, name) / f"{name}-seg.nii.gz" for name in NAMES}
    write_case(cases, "BraTS-GLI-00002-000")
    report = reconstruct(cases, output, options_of(checkpoint)).run()
    assert "segmentations are copied as they are; 2 of 3 cases have one" in report.notes
    for name, path in masks.items():
        assert (output / name / path.name).read_bytes() == path.read_bytes()
    assert not [*(output / "BraTS-GLI-00002-000").glob("*seg*")]
    recipe = Recipe.load("brats24/axial_256").changed(size=32)
    slices = []
    for source in (cases, output):
        folder = tmp_path / f"slices_{source.name}"
        assert Prepare(VolumeSource(source, recipe), folder, workers=1).run().skipped == ()
        slices.append({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*-seg-*.png")})
    assert slices[0] == slices[1]
    assert slices[0]


def test_a_folder_that_was_begun_without_segmentations_gets_them(checkpoint: Path, tmp_path: Path) -> None:
    """Earlier versions did not copy them; what they reconstructed is not made again."""
    cases, output = tmp_path / "cases", tmp_path / "out"
    masks = {name: write_segmented(cases, name) / f"{name}-seg.nii.gz" for name in NAMES}
    aside = [path.rename(tmp_path / path.name) for path in masks.values()]
    reconstruct(cases, output, options_of(checkpoint)).run()
    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.nii.gz")}
    for path in aside:
        path.rename(masks[path.name.removesuffix("-seg.nii.gz")])
    for _ in range(2):
        report = reconstruct(cases, output, options_of(checkpoint)).run()
        assert (report.written, report.reused, report.skipped) == (0, 2, ())
        assert {path: path.stat().st_mtime_ns for path in made} == made
        for name, path in masks.items():
            assert (output / name / path.name).read_bytes() == path.read_bytes()
    (output / NAMES[0] / masks[NAMES[0]].name).unlink()
    masks[NAMES[1]].write_bytes(gzip.compress(b"other"))  # changed in place
    report = reconstruct(cases, output, options_of(checkpoint)).run()
    assert (output / NAMES[0] / masks[NAMES[0]].name).read_bytes() == masks[NAMES[0]].read_bytes()
    place = f"{NAMES[1]}/{NAMES[1]}-seg.nii.gz"
    told = f"output {place}: found another file of this name; --overwrite replaces it"
    assert [*report.skipped] == [(NAMES[1], told)]
    assert (output / place).read_bytes() != masks[NAMES[1]].read_bytes()
    report = reconstruct(cases, output, options_of(checkpoint), overwrite=True).run()
    assert (report.written, report.reused, report.skipped) == (0, 2, ())
    assert (output / place).read_bytes() == masks[NAMES[1]].read_bytes()


def test_compress_and_decompress_leave_segmentations_out(checkpoint: Path, tmp_path: Path) -> None:
    write_segmented(tmp_path / "cases", NAMES[0])
    report = compress(tmp_path / "cases", tmp_path / "small", options_of(checkpoint)).run()
    assert "segmentations are not compressed; 1 of 1 cases have one" in report.notes
    decompress(tmp_path / "small", tmp_path / "back", DecompressOptions(checkpoint=checkpoint, workers=1)).run()
    assert not [*(tmp_path / "small").rglob("*seg*"), *(tmp_path / "back").rglob("*seg*")]


def test_a_segmentation_of_a_volumes_name_gets_another(checkpoint: Path, tmp_path: Path) -> None:
    """The Decathlon calls both alike, in folders of their own."""
    single = nib.load(write_nifti(tmp_path / "x-t1n.nii"))
    values = np.stack([np.asarray(single.dataobj)] * 4, axis=-1)
    for folder, content in (("imagesTr", values), ("labelsTr", (values[..., 0] > 800).astype(np.uint8))):
        (tmp_path / "in" / folder).mkdir(parents=True)
        nib.save(nib.Nifti1Image(content, single.affine), tmp_path / "in" / folder / "BRATS_001.nii.gz")
    reconstruct(tmp_path / "in", tmp_path / "out", options_of(checkpoint)).run()
    folder = tmp_path / "out" / "BRATS_001"
    expected = (tmp_path / "in" / "labelsTr" / "BRATS_001.nii.gz").read_bytes()
    assert (folder / "BRATS_001-seg.nii.gz").read_bytes() == expected
    assert nib.load(folder / "BRATS_001.nii.gz").shape == values.shape
