"""Files that are not what was said: each in one line of what was found and what was expected, at the command line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.foreign_networks import VQGAN
from safetensors.torch import save_file
from typer.testing import CliRunner

from vaevq_med.cli import app as cli
from vaevq_med.cli.app import app
from vaevq_med.core.errors import foreseen
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.registry import known_kinds
from vaevq_med.trained.file import CheckpointError, atomic_save
from vaevq_med.trained.network import StoredTokenizer


def said(*words: str) -> str:
    """The line that a command ends with."""
    result = CliRunner().invoke(app, ["adopt", *words])
    assert result.exit_code != 0, result.output
    line = foreseen(result.exception) if isinstance(result.exception, Exception) else None
    assert line is not None, result.output
    assert "\n" not in line
    return line


def vqgan() -> dict[str, torch.Tensor]:
    around = {"quant_conv": (4, 16), "post_quant_conv": (16, 4)}
    state = VQGAN(multipliers=(1, 2), attention=()).state()
    for name, (a, b) in around.items():
        state |= {f"{name}.weight": torch.zeros(a, b, 1, 1), f"{name}.bias": torch.zeros(a)}
    return {**state, "quantize.embedding.weight": torch.randn(8, 4)}


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0af3\nsize 345678901\n")


class Code:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("it ran",)


def a_pickle(path: Path) -> None:
    torch.save({"state_dict": vqgan(), "callbacks": Code()}, path)


def an_old_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}, "hook": Code()}))


def cut(path: Path) -> None:
    torch.save(vqgan(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def cut_safetensors(path: Path) -> None:
    save_file(vqgan(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def no_safetensors(path: Path) -> None:
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header at all")


def missing_keys(path: Path) -> None:
    torch.save({name: value for name, value in vqgan().items() if "mid.block_2.conv1" not in name}, path)


def further_keys(path: Path) -> None:
    torch.save({**vqgan(), "encoder.down.0.block.0.temb_proj.weight": torch.zeros(1)}, path)


def another_architecture(path: Path) -> None:
    torch.save(
        {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, path
    )


def gumbel(path: Path) -> None:
    torch.save({**vqgan(), "quantize.proj.weight": torch.zeros(8, 16, 1, 1)}, path)


def no_tensors(path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": [1, 2]}, path)


def another_shape(path: Path) -> None:
    state = vqgan()
    state["decoder.up.0.block.1.conv2.weight"] = torch.zeros(7, 32, 3, 3)
    torch.save(state, path)


def a_web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>not found</html>")


def nothing(path: Path) -> None:
    path.touch()


def a_program(path: Path) -> None:
    torch.jit.script(torch.nn.Conv2d(1, 1, 1)).save(path)


@pytest.mark.parametrize(
    ("make", "suffix", "expected"),
    [
        (pointer, "ckpt", "found a pointer of Git LFS to 345678901 bytes in place of the weights (git lfs pull"),
        (pointer, "safetensors", "found a pointer of Git LFS to 345678901 bytes"),
        (
            a_pickle,
            "ckpt",
            "found an unreadable file: a pickle that names print, which is code and is not run, expected a file",
        ),
        (an_old_pickle, "pt", "found an unreadable file: a pickle"),
        (cut, "ckpt", "that is truncated or altered, expected a file of weights"),
        (cut_safetensors, "safetensors", "found a truncated or altered safetensors file of"),
        (no_safetensors, "safetensors", "found a truncated or altered safetensors file of 27 bytes"),
        (missing_keys, "ckpt", "found no tensor 'encoder.mid.block_2.conv1.weight' among"),
        (further_keys, "ckpt", "found 1 tensors without a place (encoder.down.0.block.0.temb_proj.weight), expected"),
        (
            another_architecture,
            "ckpt",
            "found no tensor 'encoder.conv_in.weight' among 3 (conv1.weight, layer1.0.conv1.",
        ),
        (gumbel, "ckpt", "found a Gumbel quantizer (quantize.proj), which draws its indices, expected the nearest"),
        (no_tensors, "ckpt", "found no tensors by name (epoch, optimizer), expected the weights of VQGAN"),
        (another_shape, "ckpt", "found shape [7, 32, 3, 3] of 'decoder.layers.7.conv2.weight'"),
        (a_web_page, "ckpt", "found a web page, expected a file of weights"),
        (nothing, "ckpt", "found an empty file, expected a file of weights"),
        (a_program, "pt", "found an unreadable file: a TorchScript archive, which is a program, expected a file"),
    ],
)
def test_one_line_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], suffix: str, expected: str
) -> None:
    source = tmp_path / f"weights.{suffix}"
    make(source)
    line = said("taming", str(source), str(tmp_path / "out.pt"), "--image-size", "16")
    assert line.startswith(f"{source}: {expected}") or (str(source) in line and expected in line), line
    assert not (tmp_path / "out.pt").exists()
    assert "it ran" not in capsys.readouterr().out


def test_what_the_command_line_itself_refuses(tmp_path: Path) -> None:
    torch.save(vqgan(), tmp_path / "a.pt")
    source, output = str(tmp_path / "a.pt"), str(tmp_path / "out.pt")
    assert "found 'tamming', expected one of diffusers-kl, " in said("tamming", source, output)
    assert "did you mean 'taming'?" in said("tamming", source, output)
    assert "found no file, expected a file of weights" in said("taming", str(tmp_path / "b.pt"), output)
    assert "is no multiple" in said("taming", source, output, "--image-size", "15") or "multiples of (2, 2)" in said(
        "taming", source, output, "--image-size", "15"
    )
    assert "not writable" in said("taming", source, str(tmp_path / "a.pt" / "out.pt"), "--image-size", "16")
    done = CliRunner().invoke(app, ["adopt", "taming", source, output, "--image-size", "16"])
    assert done.exit_code == 0, done.output
    assert "color at 16 pixels, positions of 2x2, 3 bits each (VectorQuantizer)" in done.output
    assert "found something there, expected nothing; --overwrite" in said("taming", source, output)
    again = CliRunner().invoke(app, ["adopt", "taming", source, output, "--image-size", "16", "--overwrite"])
    assert again.exit_code == 0
    told = torch.load(output, weights_only=True)["data"]["adopted"]
    assert (told["kind"], [*told["files"]]) == ("taming", ["a.pt"])


def test_kinds_and_their_options_are_listed() -> None:
    listed = CliRunner().invoke(app, ["adopt", "--list"]).output
    for name, kind in known_kinds().items():
        assert f"{name}: {kind.title}" in listed
        helped = CliRunner().invoke(app, ["adopt", name, "--help"])
        assert helped.exit_code == 0
        assert "--image-size" in helped.output
        assert "--in-channels" in helped.output
    assert "adopt KIND --help" in CliRunner().invoke(app, ["adopt", "--help"]).output
    assert cli.app is app


def test_a_kind_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vaevq_med.foreign import registry

    package = "from vaevq_med.foreign.taming import Taming\nclass Mine(Taming):\n    name, title = 'mine', 'of mine'\n"
    (tmp_path / "my_kinds.py").write_text(package + "class Other: pass\n")
    folder = tmp_path / "my_kinds-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my_kinds\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[vaevq_med.foreign]\nmine = my_kinds:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.known_kinds.cache_clear()
    try:
        assert registry.kind_of("mine").title == "of mine"
        (folder / "entry_points.txt").write_text("[vaevq_med.foreign]\nmine = my_kinds:Other\n")
        registry.known_kinds.cache_clear()
        with pytest.raises(ForeignError, match="expected a class derived from Kind"):
            registry.known_kinds()
    finally:
        registry.known_kinds.cache_clear()


def test_a_checkpoint_of_no_tokenizer_is_refused_without_building_it(tmp_path: Path) -> None:
    definition = {"_target_": "vaevq_med.networks.LlamaGen"}
    atomic_save(
        {"network": {"a": torch.zeros(1)}, "config": json.dumps({"network_def": definition})}, tmp_path / "a.pt"
    )
    said = r"found a checkpoint of vaevq_med.networks.LlamaGen, expected that of a tokenizer, such as .*VisualTokenizer"
    with pytest.raises(CheckpointError, match=said):
        StoredTokenizer(tmp_path / "a.pt").check_target()
