"""The priors over tokens beside LlamaGen as their overlays train them and draw from them, at toy size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, OVERLAYS
from helpers.bundles import drawing_overrides as drawing
from helpers.bundles import generator_overrides as toy
from helpers.bundles import run_generator as run
from helpers.stores import encode, write_checkpoint
from monai.bundle import ConfigParser
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.coarse_first import CoarseFirst
from vaevq_med.networks.generators.token_diffusion import TokenDiffusion
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.tokens.clusters import ClusterCodebook
from vaevq_med.tokens.store import TokenDataset

# Process, times, objective, auxiliary weight and label smoothing of the publications, see docs/generation.md.
DIFFUSIONS = {
    "absorbing": ("absorbing", 256, "bound", 0.0, 0.0),
    "maskgit": ("absorbing", 256, "masked", 0.0, 0.1),
    "vq_diffusion": ("mask_replace", 100, "bound", 5e-4, 0.0),
    "vq_ddm": ("uniform", 4000, "bound", 0.0, 0.0),
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "best.pt")


@pytest.fixture(scope="module")
def store(tokenizer_path: Path, slice_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "indices"
    encode(tokenizer_path, slice_dataset, folder, kind="indices")
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The indices that are decoded, a batch each."""
    seen: list[torch.Tensor] = []
    decode = VisualTokenizer.decode_indices
    monkeypatch.setattr(
        VisualTokenizer, "decode_indices", lambda self, indices: (seen.append(indices), decode(self, indices))[1]
    )
    return seen


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_an_overlay_trains_a_token_diffusion_that_draws_and_inpaints(
    name: str,
    store: Path,
    tokenizer_path: Path,
    decoded: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = run("train_autoregressive.json", toy(store, tmp_path / "run"), name)
    network = parser.get_parsed_content("network")
    assert isinstance(network, TokenDiffusion)
    process, num_steps, objective, auxiliary_weight, label_smoothing = DIFFUSIONS[name]
    assert (network.corruption.process, network.corruption.num_steps) == (process, num_steps)
    found = (network.objective, network.auxiliary_weight, network.label_smoothing)
    assert found == (objective, auxiliary_weight, label_smoothing)
    recipe = parser.get_parsed_content("optimizer").param_groups[0]
    assert recipe["betas"] == ((0.9, 0.96) if name in ("maskgit", "vq_diffusion") else (0.9, 0.95))
    figures = parser.get_parsed_content("validate#evaluator").state.metrics
    assert figures["token_bits"] == pytest.approx(figures["loss"] / math.log(2))
    # K is 32, and a step or two have hardly taught anything.
    assert 0.5 < figures["loss"] / math.log(32) < 1.6
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["token_bits"] == pytest.approx(figures["token_bits"])

    chosen = drawing(tmp_path / "run", tokenizer_path, num_steps=3)
    passes: list[int] = []
    features = TokenDiffusion.features

    def counted(self: TokenDiffusion, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(tokens))
        return features(self, tokens, *rest)

    monkeypatch.setattr(TokenDiffusion, "features", counted)
    run("generate.json", {**chosen, "generated_dir": str(tmp_path / "drawn")})
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    told = json.loads((tmp_path / "drawn/drawing.json").read_text())
    assert told["network_calls"] == len(passes) == 3
    assert told["seconds_per_image"] > 0
    decoded.clear()
    box = {"inpaint_tokens": str(store), "inpaint_split": "test", "inpaint_box": [8, 8, 20, 20]}
    run("generate.json", {**chosen, **box, "generated_dir": str(tmp_path / "inpainted")})
    known = TokenDataset(tokens_dir=store, split="test").store.array("test")[:2, 0].astype(np.int64)
    gap = torch.zeros(8, 8, dtype=torch.bool)
    gap[2:5, 2:5] = True  # positions of 4 pixels
    (found,) = decoded
    assert torch.equal(found[:, ~gap], torch.from_numpy(known)[:, ~gap])
    assert not torch.equal(found[:, gap], torch.from_numpy(known)[:, gap])


def test_a_token_diffusion_over_the_bits_of_lfq(
    slice_dataset: Path, decoded: list[torch.Tensor], tmp_path: Path
) -> None:
    """MaskBit's tokens: K = 16 codes are G = 4 indices a position, each of two values."""
    lfq = {"_target_": "vaevq_med.networks.quantizers.LFQ", "num_embeddings": 16, "codebook_per_bit": True}
    path, tokens = write_checkpoint(tmp_path / "lfq.pt", lfq), tmp_path / "tokens"
    encode(path, slice_dataset, tokens, kind="indices")
    stored = TokenDataset(tokens_dir=tokens, split="test").store
    assert stored.array("test").shape[1:] == (1, 8, 8, 4)
    assert [*np.unique(stored.array("test"))] == [0, 1]
    run("train_autoregressive.json", toy(tokens, tmp_path / "run"), "maskgit")
    best, bits = tmp_path / "run/checkpoints/best.pt", tmp_path / "bits.json"
    done = CliRunner().invoke(app, ["token-bits", str(best), str(tokens), str(bits), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "at most" in done.output
    record = json.loads(bits.read_text())
    assert record["uniform_bits"] == 1.0
    # A step or two have hardly taught anything.
    assert record["held_out_bits"] == pytest.approx(1.0, abs=0.15)
    run("generate.json", drawing(tmp_path / "run", path, num_steps=3, generated_dir=str(tmp_path / "drawn")))
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    (found,) = decoded
    assert found.shape == (2, 8, 8, 4)
    assert found.unique().tolist() == [0, 1]


def test_a_resumed_run_keeps_the_least_bits(store: Path, tmp_path: Path) -> None:
    parser = run("train_autoregressive.json", toy(store, tmp_path / "run"), "maskgit")
    first = json.loads((tmp_path / "run" / "run.json").read_text())["token_bits"]
    parser = run("train_autoregressive.json", toy(store, tmp_path / "run", max_epochs=2), "maskgit")
    later = parser.get_parsed_content("validate#evaluator").state.metrics["token_bits"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["token_bits"] == pytest.approx(min(first, later))


def test_the_sizes_of_another_overlay_stay(store: Path, tmp_path: Path) -> None:
    parser = ConfigParser()
    folder = OVERLAYS / "generation"
    for names in (("autoregressive_small_cpu", "maskgit"), ("maskgit", "autoregressive_small_cpu")):
        files = [str(BUNDLE / "train_autoregressive.json"), *(str(folder / f"{name}.json") for name in names)]
        parser.read_config(files)
        definition = parser.get("network_def")
        assert (definition["width"], definition["depth"], definition["process"]) == (256, 4, "absorbing")


# --- coarse first -------------------------------------------------------------------------------------


def test_coarse_first_draws_the_open_positions_of_a_gated_tokenizer(
    slice_dataset: Path, decoded: list[torch.Tensor], tmp_path: Path
) -> None:
    quantizers = "vaevq_med.networks.quantizers"
    level = {"_target_": f"{quantizers}.VectorQuantizer", "num_embeddings": 16, "embedding_dim": 4}
    gate = {"_target_": f"{quantizers}.gates.VarianceGate", "threshold": 0.01}
    two = {"_target_": f"{quantizers}.ResidualTwoLevel", "top": level, "bottom": level, "gate": gate}
    path = write_checkpoint(tmp_path / "gated.pt", two, whole={"cell": 2, "embedding_dim": 4, "variational": False})
    encode(path, slice_dataset, tmp_path / "tokens", kind="indices")
    parser = run("train_autoregressive.json", toy(tmp_path / "tokens", tmp_path / "run"), "coarse_first")
    network = parser.get_parsed_content("network")
    assert isinstance(network, CoarseFirst)
    stored = TokenDataset(tokens_dir=tmp_path / "tokens", split="training").store.array("training").astype(np.int64)
    share = (stored[..., 1] != 16).mean()
    assert 0.05 < share < 0.95
    assert float(network.mean_open) == pytest.approx(share, abs=0.1)
    figures = parser.get_parsed_content("validate#evaluator").state.metrics
    assert figures["token_bits"] == pytest.approx(figures["loss"] / math.log(2))
    assert figures["perplexity"] < 17  # of 17 indices: what is closed is one bit, and its other indices nothing

    chosen = drawing(tmp_path / "run", path)
    run("generate.json", {**chosen, "generated_dir": str(tmp_path / "drawn")})
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    told = json.loads((tmp_path / "drawn/drawing.json").read_text())
    assert told["network_calls"] == 16 + round(16 * 4 * float(network.mean_open))
    assert decoded[0].shape == (2, 4, 4, 5)
    box = {"inpaint_tokens": str(tmp_path / "tokens"), "inpaint_split": "test", "inpaint_box": [8, 8, 20, 20]}
    run("generate.json", {**chosen, **box, "generated_dir": str(tmp_path / "inpainted")})
    known = TokenDataset(tokens_dir=tmp_path / "tokens", split="test").store.array("test")[:2, 0].astype(np.int64)
    gap = torch.zeros(4, 4, dtype=torch.bool)
    gap[1:3, 1:3] = True  # positions of 8 pixels
    assert torch.equal(decoded[1][:, ~gap], torch.from_numpy(known)[:, ~gap])


def test_coarse_first_refuses_one_index_a_position(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("train_autoregressive.json", toy(store, tmp_path / "run"), "coarse_first")
    assert "num_codebooks is 1; expected 2 or more" in capsys.readouterr().err


# --- coarse to fine -----------------------------------------------------------------------------------


def command(*words: str) -> Any:
    return CliRunner().invoke(app, ["cluster-codebook", *words])


def test_coarse_to_fine_from_the_clusters_to_a_picture(store: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    clusters = tmp_path / "clusters.npz"
    done = command(str(tokenizer_path), str(store), str(clusters), "--num-clusters", "5")
    assert done.exit_code == 0, done.output
    assert "32 codewords in 5 clusters" in done.output
    chosen = {"clusters": str(clusters), "num_clusters": 5, "network_def#fine_depth": 1}
    parser = run("train_autoregressive.json", toy(store, tmp_path / "run", **chosen), "coarse_to_fine")
    figures = parser.get_parsed_content("validate#evaluator").state.metrics
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    table = parser.get_parsed_content("network").cluster_of.clone()
    clusters.unlink()
    parser = run("train_autoregressive.json", toy(store, tmp_path / "run", **chosen, max_epochs=2), "coarse_to_fine")
    assert parser.get_parsed_content("train#trainer").state.epoch == 2
    assert torch.equal(parser.get_parsed_content("network").cluster_of, table)
    with pytest.raises(SystemExit):
        run("train_autoregressive.json", toy(store, tmp_path / "anew", **chosen), "coarse_to_fine")
    run("generate.json", drawing(tmp_path / "run", tokenizer_path, generated_dir=str(tmp_path / "drawn")))
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    told = json.loads((tmp_path / "drawn/drawing.json").read_text())
    assert told["network_calls"] == math.prod(parser.get_parsed_content("network").grid_size) + 1


def test_what_has_no_codebook_is_refused_in_a_line(
    store: Path, tokenizer_path: Path, slice_dataset: Path, tmp_path: Path
) -> None:
    fsq = {"_target_": "vaevq_med.networks.quantizers.FSQ", "levels": [4, 4], "embedding_dim": 4, "projection": True}
    path = write_checkpoint(tmp_path / "fsq.pt", fsq)
    encode(path, slice_dataset, tmp_path / "tokens", kind="indices")
    with pytest.raises(VaevqMedError, match=r"fsq\.pt: found FSQ, which has no explicit codebook, expected one"):
        ClusterCodebook(path, tmp_path / "tokens", tmp_path / "out.npz", 4).run()
    with pytest.raises(VaevqMedError, match=r"fsq\.pt: found another tokenizer, expected that of the tokens"):
        ClusterCodebook(path, store, tmp_path / "out.npz", 4).run()
    with pytest.raises(VaevqMedError, match=r"found the suffix '\.json', expected \.npz"):
        ClusterCodebook(path, store, tmp_path / "out.json", 4).run()
    with pytest.raises(VaevqMedError, match="num_clusters is 33; expected 1 to 32, the distinct codewords"):
        ClusterCodebook(tokenizer_path, store, tmp_path / "out.npz", 33).run()
    assert not (tmp_path / "out.npz").exists()
    (tmp_path / "out.npz").write_text("mine")
    with pytest.raises(VaevqMedError, match="found something there, expected nothing; --overwrite replaces a file"):
        ClusterCodebook(tokenizer_path, store, tmp_path / "out.npz", 4).run()
    assert (tmp_path / "out.npz").read_text() == "mine"
    ClusterCodebook(tokenizer_path, store, tmp_path / "out.npz", 4, overwrite=True).run()
    assert (tmp_path / "out.npz").read_bytes() != b"mine"


def test_each_codebook_has_clusters_of_its_own(slice_dataset: Path, tmp_path: Path) -> None:
    fq = {
        "_target_": "vaevq_med.networks.quantizers.FactorizedQuantizer",
        "num_embeddings": 8,
        "embedding_dim": 4,
        "num_codebooks": 2,
    }
    path = write_checkpoint(tmp_path / "fq.pt", fq)
    encode(path, slice_dataset, tmp_path / "tokens", kind="indices")
    report = ClusterCodebook(path, tmp_path / "tokens", tmp_path / "out.npz", 3).run()
    assert (report.num_embeddings, report.num_codebooks) == (8, 2)
    with np.load(tmp_path / "out.npz") as file:
        found = file["cluster_of"]
    assert found.shape == (2, 8)
    assert [sorted(set(row.tolist())) for row in found] == [[0, 1, 2]] * 2
