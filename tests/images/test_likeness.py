"""A copy of an image is found whatever was done to it, and two images that merely resemble each other are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaevq_med.images.likeness import CLOSE, FILLED, Sketch, likeness, sketch

SIDE = 192


def head(seed: int) -> np.ndarray:
    """A round head of a fixed outline with tissue of its own in it, float ``[SIDE, SIDE]`` in [0, 255]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    tissue = np.kron(rng.random((16, 16)), np.ones((12, 12))) + 0.5 * np.kron(rng.random((32, 32)), np.ones((6, 6)))
    return np.where(rows**2 + (1.2 * columns) ** 2 < 0.7, 40 + 110 * tissue, 0)


def save(path: Path, pixels: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, (pixels / 255).astype(np.float32))
    elif path.stem.endswith("16"):
        Image.fromarray((pixels.clip(0, 255) * 257).astype(np.uint16)).save(path)
    else:
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def compare(one: Path, other: Path) -> tuple[int, float, float]:
    """Bits in which the sketches differ, the likeness, and what it is for copies at the least."""
    first, second = sketch([one, other])
    assert isinstance(first, Sketch)
    assert isinstance(second, Sketch)
    return int(np.bitwise_count(first.bits ^ second.bits).sum()), likeness(one, other), max(first.limit, second.limit)


COPIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "again": ("b.png", lambda v: v),
    "16 bit": ("b16.png", lambda v: v),
    "floats": ("b.npy", lambda v: v),
    "jpeg": ("b.jpeg", lambda v: v),
    "darker": ("b.png", lambda v: 0.4 * v),
    "gamma": ("b.png", lambda v: 255 * (v / 255) ** 0.8),
    "moved": ("b.png", lambda v: np.roll(v, (1, -1), (0, 1))),
    "larger": ("b.png", lambda v: np.kron(v, np.ones((2, 2)))),
    "noise": ("b.png", lambda v: v + np.random.default_rng(9).normal(0, 4, v.shape)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found(kind: str, tmp_path: Path) -> None:
    name, change = COPIES[kind]
    distance, value, limit = compare(save(tmp_path / "a.png", head(0)), save(tmp_path / name, change(head(0))))
    assert distance <= CLOSE
    assert limit < value <= 1.0001


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_that_is_mirrored_is_found(kind: str, tmp_path: Path) -> None:
    name, change = COPIES[kind]
    one, other = save(tmp_path / "a.png", head(0)), save(tmp_path / name, change(head(0))[:, ::-1])
    first, second = sketch([one, other])
    assert isinstance(first, Sketch)
    assert isinstance(second, Sketch)
    for bits, mirrored in ((first.bits, second.mirrored), (first.mirrored, second.bits)):
        assert np.bitwise_count(bits ^ mirrored).sum() <= CLOSE
    assert np.bitwise_count(first.bits ^ second.bits).sum() > CLOSE
    assert likeness(one, other) < first.limit < likeness(one, other, mirrored=True) <= 1.0001


def test_other_tissue_in_the_same_outline_is_no_copy(tmp_path: Path) -> None:
    for seed in range(1, 6):
        distance, value, limit = compare(save(tmp_path / "a.png", head(0)), save(tmp_path / "b.png", head(seed)))
        assert distance > CLOSE
        assert value < limit


def test_an_outline_in_common_does_not_hide_what_is_in_it(tmp_path: Path) -> None:
    """Flat heads, whose edge is many times as strong as their tissue."""
    flat = [np.where(head(seed) > 0, 153 + 0.15 * head(seed), 0) for seed in range(4)]
    first = save(tmp_path / "a16.png", flat[0])
    for other in flat[1:]:
        distance, value, limit = compare(first, save(tmp_path / "b16.png", other))
        assert distance <= CLOSE  # as the sketch has it, they are copies
        assert value < limit


def test_small_images_are_copies_only_where_next_to_nothing_differs(tmp_path: Path) -> None:
    """At 32 pixels little but the outline is left of a head."""
    small = [np.where(head(seed) > 0, 150 + 0.03 * head(seed), 0) for seed in range(4)]
    small = [pixels.reshape(32, 6, 32, 6).mean((1, 3)) for pixels in small]
    _, again, limit = compare(save(tmp_path / "a16.png", small[0]), save(tmp_path / "b16.png", 0.7 * small[0]))
    assert again > limit
    for other in small[1:]:
        _, value, limit = compare(tmp_path / "a16.png", save(tmp_path / "b16.png", other))
        assert value < limit


def test_how_much_is_no_background(tmp_path: Path) -> None:
    black, white, dot = np.zeros((SIDE, SIDE)), np.full((SIDE, SIDE), 255.0), np.zeros((SIDE, SIDE))
    dot[:48, :48] = 200
    paths = [save(tmp_path / f"{number}.png", v) for number, v in enumerate((black, white, dot, head(0)))]
    shares = [found.filled for found in sketch(paths) if isinstance(found, Sketch)]
    assert shares[:3] == pytest.approx([0, 0, 1 / 16])
    assert shares[3] > FILLED


def test_what_cannot_be_read_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    whole = save(tmp_path / "whole.png", head(0))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-2000])
    found = sketch([tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "gone.png", whole])
    assert all(isinstance(reason, str) and reason and "\n" not in reason for reason in found[:3])
    assert isinstance(found[3], Sketch)
