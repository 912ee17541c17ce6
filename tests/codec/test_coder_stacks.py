"""Stacks of a data set: every contrast of a case in the order of its slices, live where the files show something."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import SIMVQ, write_checkpoint
from PIL import Image
from scipy.ndimage import maximum_filter

from vaevq_med.codec.coders.context_model import load_context_model
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.index_model import IndexModel
from vaevq_med.codec.stacks import Stack, encode_stacks, load_stacks, save_stacks
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.trained.network import StoredTokenizer

DATASET = Path(__file__).parents[1] / "fixtures" / "slices"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredTokenizer:
    return StoredTokenizer(write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "t.pt", SIMVQ, image_size=32))


@pytest.fixture(scope="module")
def stacks(stored: StoredTokenizer) -> list[Stack]:
    return list(encode_stacks(DATASET, stored, "training"))


def test_every_slice_stands_in_its_stack(stacks: list[Stack]) -> None:
    entries = json.loads((DATASET / "dataset.json").read_text())["training"]
    found = {(s.case, s.layout.contrast, int(n)) for s in stacks for n in s.layout.slices}
    assert found == {(e["case"], e["modality"], e["slice"]) for e in entries}
    for stack in stacks:
        assert stack.layout.num_embeddings == 32
        assert (np.diff(stack.layout.slices) > 0).all()
        assert stack.indices.shape == (*stack.layout.live.shape, 1)


def test_live_positions_are_those_within_a_pixel_of_where_the_file_is_not_black(stacks: list[Stack]) -> None:
    entries = json.loads((DATASET / "dataset.json").read_text())["training"]
    files = {(e["case"], e["modality"], e["slice"]): DATASET / e["image"] for e in entries}
    for stack in stacks:
        for number, live in zip(stack.layout.slices, stack.layout.live, strict=True):
            pixels = np.asarray(Image.open(files[stack.case, stack.layout.contrast, int(number)]))
            if pixels.shape != (32, 32):
                pytest.skip("the fixture's slices are resized")
            shown = maximum_filter(pixels, 3, mode="constant").reshape(8, 4, 8, 4).max(axis=(1, 3)) > 0
            assert (live == shown).all()


def test_the_reference_is_the_contrast_before(stacks: list[Stack]) -> None:
    assert stacks[0].layout.reference is None
    linked = 0
    for before, stack in pairwise(stacks):
        if before.case != stack.case:
            assert stack.layout.reference is None
            continue
        assert stack.layout.reference is not None
        for number, known in zip(stack.layout.slices, stack.layout.reference, strict=True):
            if number in before.layout.slices:
                place = before.layout.slices.tolist().index(number)
                assert (known == np.where(before.layout.live[place][..., None], before.indices[place], 0)).all()
                linked += 1
    assert linked


def test_stacks_are_kept_in_a_file(stacks: list[Stack], tmp_path: Path) -> None:
    save_stacks(tmp_path / "s.npz", stacks)
    read = load_stacks(tmp_path / "s.npz")
    assert len(read) == len(stacks)
    for one, other in zip(read, stacks, strict=True):
        assert (one.case, one.layout.contrast) == (other.case, other.layout.contrast)
        assert (one.indices == other.indices).all()
        assert (one.layout.live == other.layout.live).all()
        assert (one.layout.reference is None) == (other.layout.reference is None)
        if one.layout.reference is not None:
            assert (one.layout.reference == other.layout.reference).all()
    (tmp_path / "s.npz").write_bytes(b"nothing")
    with pytest.raises(CodecError, match="no readable stacks"):
        load_stacks(tmp_path / "s.npz")


def test_a_model_is_trained_from_a_data_set_and_bound_to_its_tokenizer(stored: StoredTokenizer, tmp_path: Path) -> None:
    output = tmp_path / "index.safetensors"
    options = {"hidden": 8, "width": 3, "epochs": 1, "batch_size": 64}
    made = IndexModel(dataset=DATASET, checkpoint=stored.path, output=output, **options).run()  # type: ignore[arg-type]
    assert made.path == output
    assert made.positions > 0
    assert 0 < made.bits < 6
    model = load_context_model(output)
    model.check_tokenizer(stored.content_hash)
    with pytest.raises(CodecError, match="context model: found one of the tokenizer"):
        model.check_tokenizer("sha256:other")
    with pytest.raises(VaevqMedError, match="expected one"):
        IndexModel(dataset=DATASET, checkpoint=stored.path, output=tmp_path / "no" / "x.safetensors").run()
    with pytest.raises(VaevqMedError, match=r"found the suffix '\.txt', expected \.safetensors"):
        IndexModel(dataset=DATASET, checkpoint=stored.path, output=tmp_path / "x.txt").run()
