"""What all entropy coders keep: nothing is lost, nothing depends on the machine, damage never crashes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.index_stacks import random_model, random_prior, smooth_stack
from hypothesis import given, settings
from hypothesis import strategies as st

from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.context import ContextCoder
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.errors import CodecError

KINDS = ("adaptive", "context", "prior")


def coder_of(kind: str, layout: Layout, seed: int = 0) -> IndexCoder:
    if kind == "adaptive":
        return AdaptiveCoder()
    if kind == "context":
        return ContextCoder(random_model(seed, layout.num_embeddings, layout.num_codebooks))
    return random_prior(seed, layout.num_embeddings, layout.live.shape[1:], layout.num_codebooks)


def draw_layout(
    rng: np.random.Generator, k: int, g: int, shape: tuple[int, ...], share: float, reference: bool = False
) -> tuple[np.ndarray, Layout]:
    live = rng.random(shape) < share
    indices = rng.integers(0, k, (*shape, g))
    known = rng.integers(0, k, (*shape, g)) if reference else None
    slices = np.cumsum(rng.integers(1, 4, shape[0]))
    return indices, Layout(live, slices, k, g, str(rng.choice(["t1n", "t2w", "unheard of", ""])), known)


def comes_back(coder: IndexCoder, indices: np.ndarray, layout: Layout) -> bytes:
    data = coder.encode(indices, layout)
    back = coder.decode(data, layout)
    assert back.dtype == np.int64
    assert (back == np.where(layout.live[..., None], indices, 0)).all()
    return data


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([2, 3, 17]),
    g=st.integers(1, 3),
    count=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    reference=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_indices_come_back(kind: str, seed: int, k: int, g: int, count: int, share: float, reference: bool) -> None:
    indices, layout = draw_layout(np.random.default_rng(seed), k, g, (count, 4, 5), share, reference)
    data = comes_back(coder_of(kind, layout), indices, layout)
    assert (data == b"") == (not layout.live.any())


@pytest.mark.parametrize("kind", KINDS)
def test_large_codebooks_single_positions_and_none_come_back(kind: str) -> None:
    rng = np.random.default_rng(5)
    for k, shape in ((16_384, (2, 2, 3)), (2, (1, 1, 1)), (9, (1, 1, 1)), (9, (2, 4, 4))):
        indices, layout = draw_layout(rng, k, 1, shape, 1.0)
        indices.ravel()[-1] = k - 1
        coder = coder_of(kind, layout)
        comes_back(coder, indices, layout)
        nothing = replace(layout, live=np.zeros_like(layout.live))
        assert coder.encode(indices, nothing) == b""
        assert not coder.decode(b"", nothing).any()
        with pytest.raises(CodecError, match="expected none where nothing is coded"):
            coder.decode(b"\0\0\0\0", nothing)


@pytest.mark.parametrize("kind", ["adaptive", "context"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 6), (1, 2, 2, 2)])
def test_grids_of_other_axes_come_back(kind: str, shape: tuple[int, ...]) -> None:
    indices, layout = draw_layout(np.random.default_rng(8), 7, 2, shape, 0.7, reference=True)
    comes_back(coder_of(kind, layout), indices, layout)


def test_a_codebook_of_one_codeword_takes_no_bytes() -> None:
    indices, layout = draw_layout(np.random.default_rng(8), 1, 1, (2, 3, 3), 1.0)
    assert comes_back(AdaptiveCoder(), indices, layout) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_at_dead_positions_changes_no_byte(kind: str) -> None:
    rng = np.random.default_rng(2)
    indices, layout = draw_layout(rng, 6, 2, (3, 4, 5), 0.5)
    coder = coder_of(kind, layout)
    other = np.where(layout.live[..., None], indices, rng.integers(0, 6, indices.shape))
    assert coder.encode(indices, layout) == coder.encode(other, layout)


@pytest.mark.parametrize("kind", KINDS)
@given(place=st.integers(0, 10_000), change=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=15, deadline=None)
def test_damaged_bytes_are_refused_or_give_other_indices(kind: str, place: int, change: int, cut: bool) -> None:
    stack = smooth_stack(1, shape=(3, 4, 5))
    coder = coder_of(kind, stack.layout)
    data = bytearray(coder.encode(stack.indices, stack.layout))
    place %= len(data)
    if cut:
        data = data[:place]
    else:
        data[place] ^= change
    try:
        back = coder.decode(bytes(data), stack.layout)
    except CodecError:
        assert change or cut
        return
    assert back.shape == stack.indices.shape
    assert back.min() >= 0
    assert back.max() < 16
    assert (change and not cut) or cut or (back == stack.indices).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_end_are_refused(kind: str) -> None:
    stack = smooth_stack(1, shape=(3, 4, 5))
    coder = coder_of(kind, stack.layout)
    data = coder.encode(stack.indices, stack.layout)
    with pytest.raises(CodecError):
        coder.decode(data + bytes(8), stack.layout)
    with pytest.raises(CodecError):
        coder.decode(b"\xff" * 40, stack.layout)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_in_one_line(kind: str) -> None:
    stack = smooth_stack(1, shape=(3, 4, 5))
    coder = coder_of(kind, stack.layout)
    with pytest.raises(CodecError, match=r"indices have shape \[3, 4, 5\]; expected \[3, 4, 5, 1\]"):
        coder.encode(stack.indices[..., 0], stack.layout)
    with pytest.raises(CodecError, match="expected 0 to 15"):
        coder.encode(stack.indices + 1, stack.layout)


@pytest.mark.parametrize("kind", ["context", "prior"])
def test_a_model_of_other_sizes_is_refused(kind: str) -> None:
    stack = smooth_stack(1, shape=(3, 4, 5))
    coder = coder_of(kind, stack.layout)
    for change in ({"num_embeddings": 17}, {"num_codebooks": 2}):
        other = replace(stack.layout, **change)  # type: ignore[arg-type]
        with pytest.raises(CodecError, match=next(iter(change))):
            coder.decode(b"", other)


_AGAIN = """
import sys, json
import torch
from pathlib import Path
torch.set_num_threads(2)
from helpers.index_stacks import random_model, random_prior, smooth_stack
from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.coders.context import ContextCoder
from vaevq_med.codec.coders.context_model import load_context_model
stack = smooth_stack(4, num_codebooks=2, num_embeddings=300, shape=(6, 3, 4), reference=True)
folder = Path(sys.argv[1])
coders = {
    "adaptive": AdaptiveCoder(),
    "context": ContextCoder(load_context_model(folder / "model.safetensors")),
    "prior": random_prior(0, 300, (3, 4), 2),
}
for name, coder in coders.items():
    back = coder.decode((folder / name).read_bytes(), stack.layout)
    print(name, bool((back == stack.indices).all()))
"""


def test_a_fresh_process_with_other_threads_decodes_the_same(tmp_path: Path) -> None:
    stack = smooth_stack(4, num_codebooks=2, num_embeddings=300, shape=(6, 3, 4), reference=True)
    model = random_model(0, 300, 2)
    model.save(tmp_path / "model.safetensors")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for coder in (AdaptiveCoder(), ContextCoder(model), random_prior(0, 300, (3, 4), 2)):
            (tmp_path / coder.name).write_bytes(coder.encode(stack.indices, stack.layout))
    finally:
        torch.set_num_threads(before)
    counts = {name: "2" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    counts["OMP_WAIT_POLICY"] = "passive"  # threads that wait actively stand in each other's way on a busy machine
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN, str(tmp_path)],
        env={**os.environ, **counts, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["adaptive", "True", "context", "True", "prior", "True"]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_plain(kind: str) -> None:
    settings_ = coder_of(kind, smooth_stack(1, shape=(3, 4, 5)).layout).settings
    assert json.loads(json.dumps(settings_)) == settings_
