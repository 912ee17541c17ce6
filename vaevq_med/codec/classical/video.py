"""Codecs of video: the volume as a sequence of gray frames along z, or of frames that know nothing of each other.

HEVC by x265 and AV1 by SVT-AV1 are those of PyAV; AV1 by libaom is that of the program which imageio-ffmpeg brings,
since PyAV has none. Files are bare streams without a container. What is coded are the numbers themselves: no range and
no color is converted; where a library knows no gray, its two planes of color are constant. All runs in one thread.
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaevq_med.codec.classical.base import ClassicalCodec, Volume
from vaevq_med.codec.errors import CodecError

_LEAST = 64
"""Pixels along an axis that every encoder takes."""


def _framed(volume: Volume) -> Volume:
    """Repeat the last rows and columns up to an even number, at least 64."""
    wanted = [max(_LEAST, length + length % 2) for length in volume.shape[1:]]
    rows, columns = (w - n for w, n in zip(wanted, volume.shape[1:], strict=True))
    framed: Any = np.pad(volume, [(0, 0), (0, rows), (0, columns)], mode="edge")
    return framed


@dataclass(frozen=True, kw_only=True)
class VideoCodec(ClassicalCodec):
    """A video of gray frames.

    Attributes:
        muxer: FFmpeg's name of the bare stream.
        gray: whether the encoder knows gray; otherwise its planes of color are constant.
    """

    muxer: str
    gray: bool
    setting: str = "crf"

    def pixel_format(self, bits: int) -> str:
        """FFmpeg's name of the numbers."""
        return ("gray" if self.gray else "yuv420p") + ("" if bits == 8 else f"{bits}le")

    def _decode(self, files: Sequence[bytes], shape: tuple[int, int, int], bits: int) -> Volume:
        av = self._load("av")
        kind = np.dtype(np.uint8 if bits <= 8 else "<u2")
        frames = []
        with av.open(io.BytesIO(files[0]), format=self.muxer) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                plane = frame.planes[0]
                rows = np.frombuffer(plane, kind).reshape(plane.height, plane.line_size // kind.itemsize)
                frames.append(rows[: shape[1], : shape[2]].copy())
        if len(frames) != shape[0]:
            raise CodecError(f"{self.name}: the stream has {len(frames)} frames; expected {shape[0]}")
        return np.stack(frames)


@dataclass(frozen=True, kw_only=True)
class PyAVCodec(VideoCodec):
    """An encoder of PyAV.

    Attributes:
        encoder: its name in FFmpeg.
        options: the encoder's, of a setting and a number of frames between those that stand alone.
    """

    encoder: str
    options: Callable[[float, int], Mapping[str, str]]
    packages: tuple[str, ...] = ("av",)

    def _encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        av = self._load("av")
        av.logging.set_level(None)
        framed = _framed(volume)
        count, height, width = framed.shape
        file = io.BytesIO()
        group = 1 if self.slices_alone else count
        with av.open(file, "w", format=self.muxer) as container:
            stream: Any = container.add_stream(self.encoder, rate=25, options=dict(self.options(setting, group)))
            stream.width, stream.height, stream.pix_fmt = width, height, self.pixel_format(bits)
            stream.codec_context.thread_count = 1
            stream.codec_context.gop_size = group
            with _own_priority():
                stream.codec_context.open()
            for number, slice_ in enumerate(framed):
                frame = av.VideoFrame(width, height, stream.pix_fmt)
                for index, plane in enumerate(frame.planes):
                    plane.update(_plane(slice_ if index == 0 else None, plane, bits))
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return [file.getvalue()]


@contextmanager
def _own_priority() -> Iterator[None]:
    """What is started inside gets the priority that this process has, whatever it asked for.

    To a superuser SVT-AV1 gives the calling thread and its own the real-time policy FIFO at priority 99, for good,
    which takes a core from everything else on the machine.
    """
    if not hasattr(os, "sched_getscheduler"):  # another system than Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(OSError):  # it has ended, or was never raised
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, parameters)


def _plane(values: np.ndarray | None, plane: Any, bits: int) -> bytes:
    """The bytes of a plane, its lines as long as FFmpeg wants them; of color without any, the middle."""
    kind = np.dtype(np.uint8 if bits <= 8 else "<u2")
    lines = np.full((plane.height, plane.line_size // kind.itemsize), 1 << (bits - 1), kind)
    if values is not None:
        lines[:, : values.shape[1]] = values
    return lines.tobytes()


@dataclass(frozen=True, kw_only=True)
class ProgramCodec(VideoCodec):
    """An encoder of the program in imageio-ffmpeg.

    Attributes:
        words: of the command line, of a setting and a number of frames between those that stand alone.
    """

    words: Callable[[float, int], Sequence[str]]
    packages: tuple[str, ...] = ("imageio-ffmpeg", "av")

    def _encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        framed = _framed(volume)
        count, height, width = framed.shape
        pixels = self.pixel_format(bits)
        data = framed.astype(np.uint8 if bits <= 8 else "<u2").tobytes()
        if not self.gray:
            raise CodecError(f"{self.name}: found an encoder without gray; expected one that knows it")
        command = [self._load("imageio_ffmpeg").get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-threads", "1"]
        command += ["-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}", "-r", "25", "-i", "pipe:0"]
        command += [*self.words(setting, 1 if self.slices_alone else count), "-pix_fmt", pixels, "-threads", "1"]
        done = subprocess.run([*command, "-f", self.muxer, "pipe:1"], input=data, capture_output=True)
        if done.returncode != 0:
            said = (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[0]
            raise CodecError(f"{self.name}: the program failed ({said[:160]}); expected a stream")
        return [done.stdout]


def _x265(setting: float, group: int) -> dict[str, str]:
    # Without its text of options in the stream, and tuned to PSNR as the others are by default.
    params = f"pools=none:frame-threads=1:wpp=0:info=0:log-level=none:keyint={group}:min-keyint={group}:scenecut=0"
    return {"preset": "slow", "tune": "psnr", "crf": f"{setting}", "x265-params": params}


def _svt(setting: float, group: int) -> dict[str, str]:
    return {"preset": "4", "crf": f"{setting}", "svtav1-params": f"lp=1:keyint={group}:scd=0"}


def _aom(setting: float, group: int) -> list[str]:
    words = ["-c:v", "libaom-av1", "-crf", f"{setting}", "-b:v", "0", "-cpu-used", "4", "-g", str(group)]
    return [*words, "-keyint_min", str(group), "-lag-in-frames", "35" if group > 1 else "0", "-row-mt", "0"]


def _pair(kind: Any, name: str, title: str, settings: tuple[float, ...], alone: tuple[float, ...], **further: Any):
    """A codec along z, and with its slices alone."""
    return (
        kind(name=f"{name}_z", title=f"{title}, along z", slices_alone=False, settings=settings, **further),
        kind(name=f"{name}_intra", title=f"{title}, slices alone", slices_alone=True, settings=alone, **further),
    )


CODECS = (
    *_pair(
        PyAVCodec,
        "hevc",
        "HEVC x265",
        (42, 37, 32, 27, 21),
        (44, 38, 32, 26, 20),
        encoder="libx265",
        muxer="hevc",
        gray=True,
        range=(0, 51),
        options=_x265,
        depths=(8, 10, 12),
    ),
    *_pair(
        PyAVCodec,
        "svtav1",
        "AV1 SVT",
        (63, 54, 44, 33, 22),
        (63, 54, 43, 29),
        encoder="libsvtav1",
        muxer="obu",
        gray=False,
        range=(1, 63),  # 0 is its default
        options=_svt,
        depths=(8, 10),
    ),
    *_pair(
        ProgramCodec,
        "libaom",
        "AV1 libaom",
        (62, 53, 43, 31, 19),
        (63, 55, 44, 30),
        muxer="obu",
        gray=True,
        range=(0, 63),
        words=_aom,
        depths=(8, 10, 12),
    ),
)
