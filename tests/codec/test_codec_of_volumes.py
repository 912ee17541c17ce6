"""Tokenizers of volumes, and of slices whose decoder sees neighbors, in the codec."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.scans import CONTRASTS, affine_of, body, write_case
from helpers.stores import write_checkpoint
from helpers.volumes import volume_tokenizer

from vaevq_med.codec.case import CompressedCase, read_description
from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.coders.context_model import load_context_model
from vaevq_med.codec.container import pack, unpack
from vaevq_med.codec.decompress import restore, window
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.index_model import IndexModel
from vaevq_med.codec.model import Model
from vaevq_med.codec.options import CompressOptions, DecompressOptions
from vaevq_med.codec.stacks import encode_stacks
from vaevq_med.codec.work import compress, decompress, reconstruct
from vaevq_med.core.errors import DataError
from vaevq_med.tokens import volumes
from vaevq_med.trained.network import StoredTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
KINDS: dict[str, dict[str, Any]] = {
    "volumes": {"both": {"spatial_dims": 3, "within_slices": True}},
    "neighbors": {"whole": {"slice_context": 1}},
}
NAME = "BraTS-GLI-00000-000"


def spread(network: Any) -> None:
    """Make the latents reach many codewords."""
    with torch.no_grad():
        network.quant_conv.weight.mul_(40)
        network.decoder.head[-1].weight.mul_(20)
        if network.slice_context:
            torch.nn.init.normal_(network.post_quant_conv.weight)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        kind: write_checkpoint(folder / f"{kind}.pt", change=spread, modalities=[*CONTRASTS], image_size=36, **options)
        for kind, options in KINDS.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case of two contrasts of 36 rows and columns at most, so that nothing is resized; a slice within is empty."""
    folder = tmp_path_factory.mktemp("cases")
    values = body((36, 36, 14))
    values[..., 5] = 0
    (folder / NAME).mkdir()
    for number, contrast in enumerate(("t1n", "t1c")):
        image = nib.Nifti1Image((values * (1 + 0.2 * number)).astype(np.int16), affine_of("LPS"))
        nib.save(image, folder / NAME / f"{NAME}-{contrast}.nii.gz")
    return folder


def options_of(checkpoint: Path, **options: Any) -> CompressOptions:
    return CompressOptions(
        checkpoint=checkpoint, **{"workers": 1, "batch_size": 3, "modality": ["t1n", "t1c"], **options}
    )


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, Path]:
    """A kind, its checkpoint, and the output of ``reconstruct``."""
    kind: str = request.param
    output = tmp_path_factory.mktemp("made") / "out"
    reconstruct(folder / NAME, output, options_of(checkpoints[kind]), preview=True).run()
    return kind, checkpoints[kind], output / NAME


def case_of(output: Path) -> CompressedCase:
    return CompressedCase.from_bytes("", (output / f"{NAME}.vvq").read_bytes())


def test_the_grid_the_header_and_the_background_come_back(made: tuple[str, Path, Path], folder: Path) -> None:
    for contrast in ("t1n", "t1c"):
        before, after = (nib.load(at / f"{NAME}-{contrast}.nii.gz") for at in (folder / NAME, made[2]))
        assert after.header.binaryblock == before.header.binaryblock
        first, second = np.asarray(before.dataobj), np.asarray(after.dataobj)
        assert np.array_equal(first == 0, second == 0)
        assert (first != second).any()
        # Intensities stay within the window, which the percentiles 0 and 99.5 of the foreground bound.
        assert second[second > 0].min() >= first[first > 0].min() - 1
        assert second.max() <= first.max()


def test_threads_and_both_commands_give_the_same_bytes(
    made: tuple[str, Path, Path], folder: Path, tmp_path: Path
) -> None:
    _, checkpoint, output = made
    compress(folder / NAME, tmp_path / "a.vvq", options_of(checkpoint, workers=2)).run()
    assert (tmp_path / "a.vvq").read_bytes() == (output / f"{NAME}.vvq").read_bytes()
    decompress(tmp_path / "a.vvq", tmp_path / "back", DecompressOptions(checkpoint=checkpoint, batch_size=3)).run()
    for contrast in ("t1n", "t1c"):
        file = f"{NAME}-{contrast}.nii.gz"
        assert (tmp_path / "back" / file).read_bytes() == (output / file).read_bytes()


def test_a_folder_of_exact_masks_does_not_go_on_with_coarse_ones(made: tuple[str, Path, Path], folder: Path) -> None:
    _, checkpoint, output = made
    coarse = reconstruct(folder / NAME, output.parent, options_of(checkpoint, mask="coarse"), preview=True)
    with pytest.raises(DataError, match="made with other settings"):
        coarse.run()


def test_only_files_of_volumes_are_of_the_newer_format(made: tuple[str, Path, Path]) -> None:
    kind, _, output = made
    content = (output / f"{NAME}.vvq").read_bytes()
    version = {"volumes": b'"vaevq_med_codec":"2"', "neighbors": b'"vaevq_med_codec":"1"'}
    assert version[kind] in content
    assert ("patch_depth" in read_description("", content)["tokenizer"]) == (kind == "volumes")


def test_live_positions_are_those_over_any_foreground(made: tuple[str, Path, Path]) -> None:
    kind, _, output = made
    case = case_of(output)
    mask = case.contrasts[0].mask  # 36 x 36: a pixel is a voxel
    numbers = np.flatnonzero(mask.any(axis=(1, 2)))
    if kind == "neighbors":
        assert case.slices.tolist() == numbers.tolist()
        assert np.diff(case.slices).max() == 2  # the empty slice is left out
        boxes = {(n, y, x): (slice(z, z + 1), y, x) for n, z in enumerate(numbers) for y in range(9) for x in range(9)}
    else:
        run = range(numbers[0], numbers[-1] + 1)
        assert case.slices.tolist() == [*run]
        assert len(run) % 4
        boxes = {
            (0, n, y, x): (slice(z, min(z + 4, run.stop)), y, x)
            for n, z in enumerate(range(run.start, run.stop, 4))
            for y in range(9)
            for x in range(9)
        }
    live = case.live((0,))
    assert live.size == len(boxes)
    for place, (depth, y, x) in boxes.items():
        assert live[place] == mask[depth, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].any()
    assert not live.all()
    stream = case.streams[0]
    assert stream.indices.shape == (*live.shape, 1)
    assert (stream.indices[~live] == 0).all()
    assert len(np.unique(stream.indices[live])) > 4


def test_squares_go_through_the_network_as_one_volume(made: tuple[str, Path, Path]) -> None:
    """In one piece, padded with its last slice; of slices with a context, run by run."""
    kind, checkpoint, output = made
    stored = StoredTokenizer(checkpoint)
    model, network = Model(stored, device="cpu", batch_size=3), stored.network()
    case = case_of(output)
    slices = case.slices
    squares = torch.rand(len(slices), 1, 36, 36, generator=torch.Generator().manual_seed(0))
    indices = case.filled(case.streams[0])
    pieces = model.pieces(slices)
    assert len(pieces) == {"volumes": 1, "neighbors": 2}[kind]
    for piece in pieces:
        part, of_piece = squares[piece], indices[piece]
        whole = torch.cat([part, part[-1:].expand(-len(part) % network.factors[0], -1, -1, -1)])
        with torch.no_grad():
            expected = network.encode_indices(2 * whole.transpose(0, 1)[None] - 1)
            grid = torch.from_numpy(of_piece if kind == "volumes" else of_piece[None])
            image = (network.decode_indices(grid)[0].transpose(0, 1) + 1) / 2
        found = model.encode(part)
        assert (found == (expected if kind == "volumes" else expected[0]).numpy()).mean() > 0.99
        torch.testing.assert_close(model.decode(of_piece), image.clamp(0, 1), atol=1e-4, rtol=0)


def test_slices_come_back_where_they_were(made: tuple[str, Path, Path]) -> None:
    """The last layer of a volume is of more slices than there are: those at its end are dropped."""
    _, checkpoint, output = made
    model, case = Model(StoredTokenizer(checkpoint), device="cpu", batch_size=3), case_of(output)
    indices, slices, mask = case.filled(case.streams[0]), case.slices, case.contrasts[0].mask
    squares = torch.cat([model.decode(indices[piece])[: len(slices[piece])] for piece in model.pieces(slices)])
    found = window(case, next(iter(restore(case, model))), 0)
    for square, place in zip(squares[:, 0], slices, strict=True):
        inside = torch.from_numpy(mask[place])
        torch.testing.assert_close(found[place][inside], square[inside], atol=2e-3, rtol=0)


def test_windows_are_the_same_on_any_number_of_threads(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes, "MOST_NUMBERS", 1)
    monkeypatch.setattr(volumes, "LEAST_WINDOW", (3, 7, 7))
    squares = torch.rand(14, 1, 36, 36, generator=torch.Generator().manual_seed(1))
    found = []
    for threads in (1, 2):
        model = Model(StoredTokenizer(checkpoints["volumes"]), device="cpu", threads=threads)
        assert volumes.window_of(model.network, (4, 9, 9)) == (3, 7, 7)
        indices = model.encode(squares)
        found.append((indices, model.decode(indices)))
    assert found[0][0].shape == (1, 4, 9, 9, 1)
    assert (found[0][0] == found[1][0]).all()
    assert torch.equal(found[0][1], found[1][1])
    monkeypatch.undo()
    assert volumes.window_of(model.network, (4, 9, 9)) == (4, 9, 9)
    whole = model.encode(squares)
    assert 0.3 < (whole == found[0][0]).mean() < 1  # a window is an approximation


def test_windows_of_the_published_sizes_by_hand() -> None:
    """128 channels: 65,536 voxels; of f = 4 that is 4 x 16 x 16 positions, and 16 planes of 8 x 8."""
    network = volume_tokenizer(num_channels=32, channel_mult=[1, 1, 1])
    assert network.factors == (4, 4, 4)
    # 32 channels have 4 times as many voxels: 4,096 positions.
    assert volumes.window_of(network, (39, 64, 64)) == (4, 32, 32)
    assert volumes.window_of(network, (39, 16, 16)) == (16, 16, 16)
    assert volumes.window_of(network, (2, 64, 32)) == (2, 64, 32)
    assert volumes.window_of(network, (3, 8, 8)) == (3, 8, 8)


def test_every_coder_and_a_rate_weight_take_a_grid_of_three_axes(
    checkpoints: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoints["volumes"]
    stored = StoredTokenizer(checkpoint)
    stacks = [*encode_stacks(FIXTURES / "slices", stored, "training", max_cases=1)]
    assert len(stacks) > 1
    first, second = stacks[:2]
    assert first.layout.live.ndim == 4
    assert first.layout.live.shape[0] == len(first.layout.slices) == 1
    assert second.layout.reference is not None
    assert (second.layout.reference == np.where(first.layout.live[..., None], first.indices, 0)).all()
    model = tmp_path / "context.safetensors"
    options = {"hidden": 8, "width": 3, "epochs": 1, "batch_size": 64}
    IndexModel(dataset=FIXTURES / "slices", checkpoint=checkpoint, output=model, **options).run()  # type: ignore[arg-type]
    load_context_model(model).check_tokenizer(stored.content_hash)
    found = {}
    for name, further in {
        "fixed": {"coder": "fixed"},
        "context": {"coder": "context", "model": model},
        "weighed": {"coder": "context", "model": model, "rate_weight": 1e6},
        "by frequency": {"coder": "adaptive", "rate_weight": 1e6},
    }.items():
        path = tmp_path / f"{name}.vvq"
        compress(folder / NAME, path, options_of(checkpoint, **further)).run()
        found[name] = CompressedCase.from_bytes("", path.read_bytes(), model=further.get("model"))
    for one, other in zip(found["fixed"].streams, found["context"].streams, strict=True):
        assert (one.indices == other.indices).all()
    for name in ("weighed", "by frequency"):
        # A bit that is worth everything leaves few codewords.
        counts = [len(np.unique(found[kind].streams[0].indices)) for kind in (name, "fixed")]
        assert counts[0] < counts[1]


def test_a_stacked_tokenizer_of_volumes_makes_one_stream(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "s.pt", in_channels=4, stack_modalities=True, modalities=[*CONTRASTS], **KINDS["volumes"]
    )
    source = write_case(tmp_path / "cases", NAME)
    reconstruct(source, tmp_path / "out", options_of(checkpoint, modality=None)).run()
    output = tmp_path / "out" / NAME
    assert [name for name in unpack("", (output / f"{NAME}.vvq").read_bytes()) if "tokens" in name] == ["tokens/0"]
    for contrast in CONTRASTS:
        first, second = (np.asarray(nib.load(at / f"{NAME}-{contrast}.nii.gz").dataobj) for at in (source, output))
        assert np.array_equal(first == 0, second == 0)


def test_a_position_without_slices_is_refused(made: tuple[str, Path, Path]) -> None:
    parts = unpack("", (made[2] / f"{NAME}.vvq").read_bytes())
    told = json.loads(zlib.decompress(parts["description"]))
    told["tokenizer"]["patch_depth"] = 0
    parts["description"] = zlib.compress(json.dumps(told).encode())
    with pytest.raises(CodecError, match="positions of 0 slices"):
        CompressedCase.from_bytes("a", pack(parts))


def test_positions_that_are_not_square_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "t.pt", both={"downsampling": [[1, 2], [2, 2]]})
    with pytest.raises(CodecError, match=r"\(2, 4\) pixels, expected as many rows as columns"):
        Model(StoredTokenizer(checkpoint), device="cpu")


def test_a_file_of_the_first_format_reads_and_writes_as_it_did() -> None:
    """The fixture was written by the code before volumes, of an untrained tokenizer and the contrasts t1n and t1c."""
    content = (FIXTURES / "case_v1.vvq").read_bytes()
    case = CompressedCase.from_bytes("case_v1.vvq", content)
    assert [contrast.name for contrast in case.contrasts] == ["t1n", "t1c"]
    assert all(stream.indices.shape == (len(case.slices), 8, 8, 1) for stream in case.streams)
    assert case.streams[0].indices.max() > 0
    again = case.to_bytes(AdaptiveCoder())[0]
    for one, other in itertools.chain(
        [(read_description("", content), read_description("", again))],
        ((unpack("", content)[name], unpack("", again)[name]) for name in ("masks", "tokens/0", "tokens/1")),
    ):
        assert one == other
    assert b'"vaevq_med_codec":"1"' in again
