"""Classical codecs: what goes in comes out, small files are worse ones, and what is missing is said in a line."""

from __future__ import annotations

import importlib
import math
import os

import numpy as np
import pytest
from numpy.typing import NDArray

from vaevq_med.codec.classical import codec_named, find_codecs
from vaevq_med.codec.classical.base import ClassicalCodec, MissingCodecError
from vaevq_med.codec.errors import CodecError

pytest.importorskip("imagecodecs")
pytest.importorskip("av")
pytest.importorskip("imageio_ffmpeg")

CODECS = find_codecs()
QUICK = [name for name in CODECS if not name.startswith("libaom")]
BEST = {"jpeg": 98, "jpeg2000": 60, "jpegxl": 0.3, "jpegls": 1, "sperr": 60}
"""A setting of nearly no loss; of videos the rest."""


def volume(bits: int = 8, shape: tuple[int, int, int] = (6, 70, 90)) -> NDArray:
    """A ball of smooth texture in nothing, with blank slices at both ends and one in the middle."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    texture = 0.6 + 0.2 * np.sin(9 * x + 4 * z) + 0.15 * np.cos(13 * y)
    ball = np.where((x / 0.8) ** 2 + (y / 0.7) ** 2 < 1, texture, 0)
    ball[[0, 3, -1]] = 0
    return np.rint(ball * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def coded(codec: ClassicalCodec, original: NDArray, bits: int, setting: float) -> tuple[int, float, NDArray]:
    files = codec.encode(original, bits, setting)
    found = codec.decode(files, original.shape, bits)
    assert found.shape == original.shape
    assert found.dtype == original.dtype
    error = (found.astype(float) - original)[original > 0] / (2**bits - 1)
    return sum(map(len, files)), -10 * np.log10(max(np.square(error).mean(), 1e-12)), found


def test_every_file_of_the_folder_that_lists_codecs_is_found() -> None:
    assert {"jpeg2000", "jpegxl", "jpegls", "jpeg", "sperr"} <= CODECS.keys()
    assert {f"{name}_{way}" for name in ("hevc", "svtav1", "libaom") for way in ("z", "intra")} <= CODECS.keys()
    assert all(codec.name == name and codec.settings and codec.title for name, codec in CODECS.items())


@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name, codec in CODECS.items() for bits in sorted({codec.depth(8), codec.depth(12)})],
)
def test_a_volume_comes_back_at_high_quality(name: str, bits: int) -> None:
    codec = CODECS[name]
    size, psnr, found = coded(codec, volume(bits), bits, BEST.get(name, 8))
    assert psnr > 38
    assert size < volume(bits).nbytes
    assert not found[[0, 3, -1]].any()  # blank slices are nobody's


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.lossless is not None])
@pytest.mark.parametrize("bits", [8, 12])
def test_without_loss_every_voxel_comes_back(name: str, bits: int) -> None:
    codec, noise = CODECS[name], np.random.default_rng(0)
    bits = codec.depth(bits)
    original = volume(bits)
    original[original > 0] -= noise.integers(0, 9, original.shape).astype(original.dtype)[original > 0]
    assert codec.lossless is not None
    np.testing.assert_array_equal(coded(codec, original, bits, codec.lossless)[2], original)


@pytest.mark.parametrize("name", QUICK)
def test_more_bytes_are_less_loss(name: str) -> None:
    codec = CODECS[name]
    points = [coded(codec, volume(), 8, setting)[:2] for setting in (codec.settings[0], codec.settings[-1])]
    assert points[0][0] < points[1][0]
    assert points[0][1] < points[1][1]


def test_along_z_a_still_volume_costs_less_than_its_slices_alone() -> None:
    still = np.repeat(volume()[1:2], 12, axis=0)
    along, alone = (sum(map(len, CODECS[f"hevc_{way}"].encode(still, 8, 30))) for way in ("z", "intra"))
    assert along < 0.5 * alone


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 33, 47), (3, 240, 240)])
@pytest.mark.parametrize("name", ["hevc_z", "svtav1_intra", "jpeg", "jpeg2000"])
def test_any_grid_comes_back(name: str, shape: tuple[int, int, int]) -> None:
    original = np.random.default_rng(1).integers(100, 140, shape).astype(np.uint8)
    assert coded(CODECS[name], original, 8, BEST.get(name, 8))[1] > 30


def test_a_volume_of_nothing_is_one_bit_a_slice() -> None:
    for codec in CODECS.values():
        files = codec.encode(np.zeros((9, 64, 64), np.uint8), 8, codec.settings[0])
        assert [len(file) for file in files] == [2]
        assert not codec.decode(files, (9, 64, 64), 8).any()


def test_bits_are_the_most_that_the_library_codes() -> None:
    assert [CODECS["svtav1_z"].depth(bits) for bits in (8, 10, 12)] == [8, 10, 10]
    assert [CODECS["libaom_z"].depth(bits) for bits in (8, 12, 16)] == [8, 12, 12]
    with pytest.raises(CodecError, match="bits is 7; expected one of 8"):
        CODECS["jpeg"].depth(7)


def test_another_kind_of_volume_is_refused() -> None:
    with pytest.raises(CodecError, match=r"jpeg2000: the volume is float64 \[6, 70, 90\] at 8 bits; expected uint8"):
        CODECS["jpeg2000"].encode(volume().astype(float), 8, 30)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("sperr", 500), ("sperr", 0), ("sperr", -1), ("sperr", math.nan), ("jpegls", 128), ("jpegls", 1.5)),
        *(("jpeg", 0), ("jpeg2000", 0.5), ("jpeg2000", math.inf), ("jpegxl", 26)),
        *(("hevc_z", 52), ("svtav1_z", 0), ("libaom_z", 64)),
    ],
)
def test_a_setting_that_the_library_does_not_take_never_reaches_it(
    name: str, setting: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(CODECS[name]), "_encode", lambda *_: pytest.fail("it would end the process"))
    with pytest.raises(CodecError, match=rf"{name}: .* is {setting}; expected (whole )?numbers from "):
        CODECS[name].encode(volume(), 8, setting)


@pytest.mark.parametrize("name", QUICK)
def test_both_ends_of_the_range_are_taken(name: str) -> None:
    codec = CODECS[name]
    for setting in codec.range:
        coded(codec, volume(shape=(5, 64, 66)), 8, setting)
    assert all(map(codec.takes, codec.settings))


@pytest.mark.parametrize("name", ["jpegls", "jpeg2000", "jpegxl", "jpeg", "sperr", "hevc_z"])
def test_what_a_library_raises_is_an_error_of_the_codec(name: str) -> None:
    codec = CODECS[name]
    blank = codec.encode(volume(), 8, codec.settings[0])[0]
    with pytest.raises(CodecError, match=f"{name}: found that its library failed to decode") as caught:
        codec.decode([blank, *[b"no such file" * 9] * 3], volume().shape, 8)
    assert "\n" not in str(caught.value)


def test_what_a_library_raises_at_encoding_is_an_error_of_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ClassicalCodec, "takes", lambda *_: True, raising=False)
        with pytest.raises(CodecError, match=r"jpegls: found that its library failed to encode \(JpeglsError"):
            CODECS["jpegls"].encode(volume(), 8, 256)
        with pytest.raises(CodecError, match="hevc_z: found that its library failed to encode"):
            CODECS["hevc_z"].encode(volume(), 8, 52)


def test_the_setting_of_jpeg_ls_is_the_largest_error_of_a_voxel() -> None:
    codec = CODECS["jpegls"]
    assert codec.depth(12) == codec.depth(16) == 8
    original = volume()
    assert 0 < abs(coded(codec, original, 8, 12)[2].astype(int) - original).max() <= 12


def test_an_unknown_name_has_the_nearest() -> None:
    with pytest.raises(CodecError, match="codec is jpg2000; expected jpeg2000"):
        codec_named("jpg2000")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("jpegxl", "imagecodecs", "imagecodecs"),
        ("hevc_z", "av", "av"),
        ("libaom_z", "imageio_ffmpeg", "imageio-ffmpeg"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(wanted: str, *rest: str) -> object:
        if wanted == module:
            raise ModuleNotFoundError(name=wanted)
        return real(wanted, *rest)

    monkeypatch.setattr("vaevq_med.codec.classical.base.importlib.import_module", without)
    with pytest.raises(MissingCodecError) as caught:
        CODECS[name].encode(volume(), 8, 30)
    line = f'{name} needs {package}, which is not installed; expected it: pip install "vaevq_med[codecs]"'
    assert str(caught.value) == line


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux has policies of scheduling")
@pytest.mark.parametrize("name", ["svtav1_z", "svtav1_intra", "hevc_z"])
def test_no_encoder_raises_the_priority_of_the_process(name: str) -> None:
    """SVT-AV1 makes itself and its caller real-time where it may, which stops everything else on a core."""
    before = os.sched_getscheduler(0)
    CODECS[name].encode(volume(), 8, 40)
    assert {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")} == {before}
