"""VQGAN-LC: the quantizer by hand and against a peer, its files, and the bundle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundles import evaluate, quick, run_bundle
from torch import nn
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.initial import built_for_weights
from vaevq_med.networks.quantizers import VQGANLC
from vaevq_med.networks.quantizers.vqgan_lc import read_features
from vaevq_med.trained.network import StoredTokenizer


def saved(path: Path, table: Any) -> Path:
    np.savez(path, features=np.asarray(table, dtype=np.float32))
    return path


def test_a_projected_codebook_by_hand(tmp_path: Path) -> None:
    table = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    path = saved(tmp_path / "features.npz", table)
    quantizer = VQGANLC(num_embeddings=3, embedding_dim=2, num_features=3, features=path, normalize=False)
    with torch.no_grad():
        quantizer.projection.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]))
        quantizer.projection.bias.copy_(torch.tensor([1.0, 0.0]))
    assert quantizer.codebook().tolist() == [[2.0, 0.0], [1.0, 2.0], [7.0, -3.0]]
    z = torch.tensor([[2.5, 1.0], [6.0, -1.0]]).T.reshape(1, 2, 1, 2)
    # (2.5, 1): 0.25 + 1 from (2, 0), 2.25 + 1 from (1, 2); (6, -1): 1 + 4 from (7, -3).
    output = quantizer(z)
    assert output.indices.flatten().tolist() == [0, 2]
    assert output.quantized[0, :, 0].T.tolist() == [[2.0, 0.0], [7.0, -3.0]]
    # (0.25 + 1 + 1 + 4) / 4 elements.
    assert {name: float(loss.detach()) for name, loss in output.losses.items()} == {
        "codebook": 1.5625,
        "commitment": 1.5625,
    }
    # d/de of the mean is (e - z) / 2: (-0.25, -0.5) and (0.5, -1); W's gradient is its outer product with the feature.
    output.losses["codebook"].backward()
    assert quantizer.projection.bias.grad.tolist() == [0.25, -1.5]
    assert quantizer.projection.weight.grad.tolist() == [[-0.25, 0.0, 1.5], [-0.5, 0.0, -3.0]]
    assert not quantizer.features.requires_grad


def test_features_are_centered_and_scaled_by_hand(tmp_path: Path) -> None:
    path = saved(tmp_path / "features.npz", [[9.0, 1.0], [1.0, 7.0], [5.0, 4.0]])
    # Mean (5, 4); squared lengths 25, 25 and 0 have the mean 50 / 3.
    scale = (50 / 3) ** -0.5
    expected = scale * torch.tensor([[4.0, -3.0], [-4.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(
        VQGANLC(num_embeddings=3, embedding_dim=2, num_features=2, features=path).features, expected
    )


def test_codewords_start_with_a_mean_squared_length_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(tmp_path / "features.npz", 30 + 20 * torch.randn(512, 320))
    codebook = VQGANLC(num_embeddings=512, embedding_dim=16, num_features=320, features=path).codebook()
    centered = codebook - codebook.mean(dim=0)
    assert float(centered.detach().square().sum(dim=1).mean()) == pytest.approx(1, rel=0.1)


def test_the_projector_starts_with_a_deviation_of_one_over_the_root_of_d() -> None:
    torch.manual_seed(0)
    weight = VQGANLC(num_embeddings=4, embedding_dim=64, num_features=768).projection.weight
    assert float(weight.detach().std()) == pytest.approx(0.125, rel=0.02)
    assert float(weight.detach().mean()) == pytest.approx(0, abs=3e-3)


def test_any_kind_of_file_gives_the_table(tmp_path: Path) -> None:
    table = torch.randn(5, 3)
    torch.save(table.double(), tmp_path / "bare.pt")
    torch.save({"weight": table, "epoch": 3}, tmp_path / "state.pth")
    saved(tmp_path / "table.npz", table)
    for name in ("bare.pt", "state.pth", "table.npz"):
        assert torch.equal(read_features(tmp_path / name), table), name


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = torch.ones(5, 3)
    torch.save({"a": table, "b": table}, tmp_path / "two.pt")
    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"features": _Trap()}, protocol=2))
    np.savez(tmp_path / "trap.npz", features=np.array([_Trap()], dtype=object))
    (tmp_path / "features.csv").write_text("1,2\n")
    saved(tmp_path / "nan.npz", table * float("nan"))
    np.savez(tmp_path / "other.npz", centers=table.numpy())
    for name, said in {
        "none.npz": "made by: vaevq-med feature-codebook DATASET .*none.npz --num-embeddings 5",
        "two.pt": "found 2 matrices, expected one",
        "trap.pt": "unreadable file",
        "trap.npz": "unreadable file",
        "features.csv": "the suffix '.csv'",
        "nan.npz": "NaN",
        "other.npz": "found 0 matrices",
    }.items():
        with pytest.raises(VaevqMedError, match=said) as error:
            VQGANLC(num_embeddings=5, embedding_dim=2, num_features=3, features=tmp_path / name)
        assert "\n" not in str(error.value)
    assert "ran" not in capsys.readouterr().out
    path = saved(tmp_path / "good.npz", table)
    for count, length in ((6, 3), (5, 4)):
        with pytest.raises(VaevqMedError, match="found 5 features of length 3, expected num_embeddings"):
            VQGANLC(num_embeddings=count, embedding_dim=2, num_features=length, features=path)
    with pytest.raises(VaevqMedError, match="num_features is 0"):
        VQGANLC(num_embeddings=5, embedding_dim=2, num_features=0)


def test_no_file_is_read_where_the_weights_follow(tmp_path: Path) -> None:
    with built_for_weights():
        quantizer = VQGANLC(num_embeddings=5, embedding_dim=2, num_features=3, features=tmp_path / "none.npz")
    assert quantizer.features.shape == (5, 3)
    with pytest.raises(VaevqMedError, match="found no feature codebook"):
        VQGANLC(num_embeddings=5, embedding_dim=2, num_features=3, features=tmp_path / "none.npz")


@pytest.mark.peer
def test_it_agrees_with_a_frozen_codebook_of_vector_quantize_pytorch() -> None:
    """Outputs, indices, losses and gradients; the peer's SimVQ with a frozen codebook of another width is the method.

    Intended differences: the peer returns the losses as their sum with 0.25 before the commitment.
    """
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    ours = VQGANLC(num_embeddings=32, embedding_dim=4, num_features=6)
    theirs = peer.SimVQ(
        dim=4,
        codebook_size=32,
        frozen_codebook_dim=6,
        codebook_transform=nn.Linear(6, 4),
        channel_first=True,
        rotation_trick=False,
    )
    theirs.code_transform.load_state_dict(ours.projection.state_dict())
    theirs.frozen_codebook.copy_(ours.features)
    z, direction = 3 * torch.randn(2, 2, 4, 3, 5)
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices, loss = theirs(first)
    output = ours(second)
    assert len(indices.unique()) > 5
    assert torch.equal(output.indices[..., 0], indices)
    torch.testing.assert_close(output.quantized, quantized)
    own = output.losses["codebook"] + 0.25 * output.losses["commitment"]
    torch.testing.assert_close(own, loss)
    ((quantized * direction).sum() + loss).backward()
    ((output.quantized * direction).sum() + own).backward()
    torch.testing.assert_close(second.grad, first.grad)
    for name, parameter in ours.projection.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.code_transform.get_parameter(name).grad)


def test_the_command_makes_what_the_overlay_trains_on_and_an_evaluation_does_without(
    toy_overrides: dict[str, Any], slice_dataset: Path, tmp_path: Path
) -> None:
    path = tmp_path / "features.npz"
    arguments = ["--num-embeddings", "32", "--grid", "2", "--image-size", "64", "--workers", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, ["feature-codebook", str(slice_dataset), str(path), *arguments])
    assert result.exit_code == 0, result.output
    assert "32 codewords of 320 features" in result.output
    assert "t1n 8, t1c 8, t2w 8, t2f 8" in result.output
    overrides = {**quick(toy_overrides), "features": str(path)}
    parser = run_bundle("train.json", overrides, "vqgan_lc", run_id="training")
    quantizer = parser.get_parsed_content("network").quantizer
    raw = read_features(path)
    kept = quantizer.features @ quantizer.features.T
    expected = (raw - raw.mean(dim=0)) @ (raw - raw.mean(dim=0)).T
    torch.testing.assert_close(kept / kept.trace(), expected / expected.trace())
    path.unlink()
    further = run_bundle("train.json", {**overrides, "max_epochs": 2}, "vqgan_lc", run_id="training")
    assert further.get_parsed_content("train#trainer").state.epoch == 2
    assert torch.equal(further.get_parsed_content("network").quantizer.features, quantizer.features)
    quantizer = further.get_parsed_content("network").quantizer
    stored = StoredTokenizer(Path(overrides["output_dir"]) / "checkpoints" / "last.pt", weights="network")
    assert stored.value("network_def")["quantizer"]["features"] is None
    assert torch.equal(stored.network().quantizer.codebook(), quantizer.codebook())
    evaluate(overrides)


def test_training_without_the_file_names_the_command(
    toy_overrides: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {**quick(toy_overrides), "features": str(tmp_path / "none.npz")}
    with pytest.raises(SystemExit):
        run_bundle("train.json", overrides, "vqgan_lc", run_id="training")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vaevq-med:")]
    assert len(lines) == 1
    assert "vaevq-med feature-codebook DATASET" in lines[0]
    assert "--num-embeddings 32" in lines[0]
