"""Fewer codewords for a trained tokenizer: what they are, what is written, and who is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stores import SIMVQ, encode, write_checkpoint
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import quantizers
from vaevq_med.tokens import reduction
from vaevq_med.tokens.reduction import ReduceCodebook
from vaevq_med.tokens.store import TokenStore, load_token_store
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.trained.starting import take_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt")


@pytest.fixture(scope="module")
def indices(checkpoint: Path, slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "indices"
    encode(checkpoint, slice_dataset, folder, kind="indices")
    return folder


def images() -> torch.Tensor:
    return torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def test_as_many_codewords_give_the_same_images_to_the_bit(checkpoint: Path, indices: Path, tmp_path: Path) -> None:
    output = tmp_path / "same.pt"
    report = ReduceCodebook(checkpoint, indices, output, 32).run()
    assert (report.num_embeddings, report.reduced, report.source, report.bits) == (32, 32, "codewords", 5.0)
    before, after = (StoredTokenizer(path).network() for path in (checkpoint, output))
    assert type(after.quantizer) is quantizers.VectorQuantizer
    with torch.inference_mode():
        assert torch.equal(after(images()), before(images()))
        assert torch.equal(after.encode_indices(images()), before.encode_indices(images()))


def test_codewords_become_the_means_of_clusters_by_use(
    checkpoint: Path, indices: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "few.pt"
    words = [str(checkpoint), str(indices), str(output), "--num-embeddings", "4"]
    done = CliRunner().invoke(app, ["reduce-codebook", *words])
    assert done.exit_code == 0, done.output
    assert "32 codewords became 4, by clusters of codewords" in done.output
    assert "2.00 bits a position" in done.output
    table = StoredTokenizer(checkpoint).network().quantizer.codebook().detach().double().numpy()
    found = StoredTokenizer(output).network().quantizer.codebook().detach().double().numpy()
    assert found.shape == (4, 4)
    # The fixed point of k-means, weighed by use: each center is the mean of the codewords that are nearest to it.
    used = np.bincount(np.asarray(load_token_store(indices).array("training")).ravel(), minlength=32)
    weights = np.maximum(used, 1e-3)
    nearest = np.square(table[:, None] - found[None]).sum(axis=2).argmin(axis=1)
    for number in range(4):
        members = nearest == number
        mean = np.average(table[members], axis=0, weights=weights[members])
        np.testing.assert_allclose(found[number], mean, atol=1e-5)
    # It is taken as any other: its own tokens, and the start of a training.
    encode(output, slice_dataset, tmp_path / "tokens", kind="indices")
    assert int(np.asarray(load_token_store(tmp_path / "tokens").array("training")).max()) < 4
    stored = StoredTokenizer(output)
    assert stored.data["reduced"]["num_embeddings"] == 32
    assert stored.data["content_hash"] == StoredTokenizer(checkpoint).data["content_hash"]
    fresh = stored.network()
    torch.nn.init.zeros_(fresh.quantizer.embedding)
    take_weights(fresh, stored.tensors)
    np.testing.assert_allclose(fresh.quantizer.embedding.detach().double().numpy(), found)
    assert CliRunner().invoke(app, ["reduce-codebook", *words]).exit_code != 0
    assert CliRunner().invoke(app, ["reduce-codebook", *words, "--overwrite"]).exit_code == 0


def test_latents_become_the_codebook(checkpoint: Path, slice_dataset: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "latents", tmp_path / "refit.pt"
    encode(checkpoint, slice_dataset, folder, kind="latents", dtype="float32")
    report = ReduceCodebook(checkpoint, folder, output, 1).run()
    assert (report.source, report.reduced) == ("latents", 1)
    network = StoredTokenizer(output).network()
    every = np.asarray(load_token_store(folder).array("training"), dtype=np.float64)
    mean = np.moveaxis(every, -3, -1).reshape(-1, 4).mean(axis=0)
    # One cluster of 64 of the latents at random: their mean within some standard errors.
    spread = np.moveaxis(every, -3, -1).reshape(-1, 4).std(axis=0)
    assert np.all(np.abs(network.quantizer.codebook().detach().numpy()[0] - mean) < 5 * spread / 8 + 1e-6)
    report = ReduceCodebook(checkpoint, folder, output, 8, overwrite=True).run()
    centers = StoredTokenizer(output).network().quantizer.codebook().detach().numpy()
    assert len(np.unique(centers, axis=0)) == report.distinct <= 8
    low, high = every.min(axis=(0, 1, 3, 4)), every.max(axis=(0, 1, 3, 4))
    assert np.all((centers >= low - 1e-5) & (centers <= high + 1e-5))


def test_the_codebook_is_the_centers_of_the_latents(
    checkpoint: Path, slice_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clouds of latents, 20 apart and of deviation 0.5, the last of which has 1 latent in 29."""
    folder = tmp_path / "latents"
    encode(checkpoint, slice_dataset, folder, kind="latents", dtype="float32")
    rng = np.random.default_rng(0)
    wanted = np.array([[x, y, z, 5] for x in (-10, 10) for y in (-10, 10) for z in (-10, 10)], np.float32)
    of = rng.choice(8, (16, 8, 8), p=np.array([4, 4, 4, 4, 4, 4, 4, 1]) / 29)
    latents = np.moveaxis(wanted[of] + rng.normal(0, 0.5, (16, 8, 8, 4)), -1, 1)[:, None].astype(np.float32)
    monkeypatch.setattr(TokenStore, "array", lambda self, split: {"training": latents}[split])
    report = ReduceCodebook(checkpoint, folder, tmp_path / "refit.pt", 8).run()
    assert (report.source, report.reduced, report.distinct) == ("latents", 8, 8)
    found = StoredTokenizer(tmp_path / "refit.pt").network().quantizer.codebook().detach().numpy()
    away = np.abs(found[:, None] - wanted[None]).max(axis=2)  # [found, wanted]
    assert sorted(away.argmin(axis=1)) == [*range(8)]
    # 512 latents are drawn, so that a center is the mean of 17 or more: 4 standard errors. A latent is farther away.
    assert away.min(axis=1).max() < 0.5
    assert np.median(away.min(axis=1)) < 0.2


def test_latents_of_all_images_come_mixed(
    checkpoint: Path, slice_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The centers start at the first latents, which must not be those of a few images."""
    taken: list[np.ndarray] = []

    class Recorder:
        def __init__(self, num_clusters: int, seed: int) -> None:
            self.shape = (num_clusters, 4)

        def add(self, features: np.ndarray) -> None:
            taken.append(features)

        def centers(self) -> np.ndarray:
            return np.zeros(self.shape, np.float32)

    monkeypatch.setattr(reduction, "StreamingClusters", Recorder)
    folder = tmp_path / "latents"
    encode(checkpoint, slice_dataset, folder, kind="latents", dtype="float32")
    ReduceCodebook(checkpoint, folder, tmp_path / "out.pt", 8).run()
    every = np.asarray(load_token_store(folder).array("training"), dtype=np.float32)  # [N, ..., D, h, w]
    latents = np.moveaxis(every, -3, -1).reshape(len(every), -1, 4)
    (rows,) = taken
    share = len(rows) // len(every)
    first = [int(np.nonzero((latents == row).all(axis=2).any(axis=1))[0][0]) for row in rows[:share]]
    assert share > 4
    assert len(set(first)) > share / 4


def definition(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"vaevq_med.networks.quantizers.{name}", **options}


REFUSED = {
    "fsq": (definition("FSQ", levels=[4, 4, 3, 3]), "found FSQ, which has no explicit codebook, expected one"),
    "fq": (
        definition("FactorizedQuantizer", num_embeddings=8, embedding_dim=4, num_codebooks=2),
        "found FactorizedQuantizer with 2 codebooks, expected one",
    ),
    "softvq": (
        definition("SoftVQ", num_embeddings=8, embedding_dim=4, readout="hard"),
        "found SoftVQ with 4 codebooks, expected one",
    ),
    "ibq": (
        definition("IBQ", num_embeddings=32, embedding_dim=4),
        "found IBQ, which does not decode the codeword nearest to a latent, expected a quantizer that does",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_who_has_no_one_codebook_of_the_nearest_is_refused(name: str, slice_dataset: Path, tmp_path: Path) -> None:
    quantizer, said = REFUSED[name]
    path = write_checkpoint(tmp_path / f"{name}.pt", {**quantizer, "embedding_dim": 4})
    encode(path, slice_dataset, tmp_path / "tokens", kind="indices")
    with pytest.raises(VaevqMedError, match=rf"{name}\.pt: {said}"):
        ReduceCodebook(path, tmp_path / "tokens", tmp_path / "out.pt", 4).run()
    assert not (tmp_path / "out.pt").exists()


def test_numbers_and_files_that_do_not_fit_are_refused(checkpoint: Path, indices: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.pt"
    for count in (0, 33):
        with pytest.raises(VaevqMedError, match=f"--num-embeddings: found {count}, expected 1 to 32, the codewords of"):
            ReduceCodebook(checkpoint, indices, output, count).run()
    with pytest.raises(VaevqMedError, match="--seed: found -1"):
        ReduceCodebook(checkpoint, indices, output, 4, seed=-1).run()
    other = write_checkpoint(tmp_path / "other.pt", {**SIMVQ, "num_embeddings": 16})
    with pytest.raises(VaevqMedError, match="found another tokenizer, expected that of the tokens"):
        ReduceCodebook(other, indices, output, 4).run()
    output.write_text("mine")
    with pytest.raises(VaevqMedError, match="found something there, expected nothing; --overwrite replaces a file"):
        ReduceCodebook(checkpoint, indices, output, 4).run()


def test_codewords_that_are_equal_need_no_cluster_each(slice_dataset: Path, tmp_path: Path) -> None:
    """Of four distinct codewords among eight, eight stay as they are, four are found, and five are refused."""

    def double(network: Any) -> None:
        with torch.no_grad():
            network.quantizer.embedding[4:] = network.quantizer.embedding[:4]

    vq = definition("VectorQuantizer", num_embeddings=8, embedding_dim=4, init="normal")
    path = write_checkpoint(tmp_path / "vq.pt", vq, change=double)
    encode(path, slice_dataset, tmp_path / "tokens", kind="indices")
    before = StoredTokenizer(path).network()
    for count in (8, 4):
        report = ReduceCodebook(path, tmp_path / "tokens", tmp_path / f"{count}.pt", count).run()
        assert report.distinct == 4
        after = StoredTokenizer(tmp_path / f"{count}.pt").network()
        with torch.inference_mode():
            torch.testing.assert_close(after(images()), before(images()), atol=1e-5, rtol=1e-5)
    with pytest.raises(VaevqMedError, match="expected 1 to 4, the distinct codewords"):
        ReduceCodebook(path, tmp_path / "tokens", tmp_path / "5.pt", 5).run()
