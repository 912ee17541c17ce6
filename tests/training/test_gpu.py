"""The toy run on a GPU: what a CPU cannot show, in under a minute.

``python -m pytest -m gpu tests/training/test_gpu.py`` on a machine with a GPU; elsewhere all are skipped, unless
``VAEVQ_TEST_DEVICE=cpu`` asks for a dry run of those that do not depend on the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer_of
from ignite.engine import Events
from torch import Tensor

from vaevq_med.networks.quantizers import base
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.trained.file import read_checkpoint

DEVICE = os.environ.get("VAEVQ_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="asks CUDA itself")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Global settings as they were: the runs here change them."""
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


@pytest.fixture
def toy(toy_overrides: dict[str, Any]) -> dict[str, Any]:
    """The toy run on the device, eight steps, the GAN from the third on, without anything random in its kernels."""
    return on(toy_overrides, DEVICE) | {"deterministic": True}


def on(overrides: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        **overrides,
        "device": f"$torch.device('{device}')",
        "precision": "fp32",
        "tf32": False,
        # Without validation, which has tests of its own.
        "val_interval": 1000,
    }


def losses_of(trainer: Any, stop_after: int | None = None) -> list[float]:
    """The loss of every iteration; the run ends as a killed one does after so many."""
    losses: list[float] = []

    class Killed(BaseException):
        pass

    def note(engine: Any) -> None:
        losses.append(float(engine.state.terms["loss"]))
        if len(losses) == stop_after:
            raise Killed

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    if stop_after is None:
        trainer.run()
    else:
        with pytest.raises(Killed):
            trainer.run()
    return losses


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name].cpu(), second[name].cpu())]


def test_a_resumed_run_goes_on_with_the_same_losses(toy: dict[str, Any], tmp_path: Path) -> None:
    every = {"checkpoint_interval": 1}
    whole = losses_of(trainer_of({**toy, **every, "output_dir": str(tmp_path / "whole")}))
    broken = {**toy, **every, "output_dir": str(tmp_path / "broken")}
    # In the middle of an epoch, after the GAN's start.
    first = losses_of(trainer_of(broken), stop_after=3)
    rest = losses_of(trainer_of(broken))
    assert len(whole) == 8
    assert len(set(whole)) == 8
    assert first + rest == whole


def test_two_deterministic_runs_agree_to_the_bit(toy: dict[str, Any], tmp_path: Path) -> None:
    trainers = [trainer_of({**toy, "output_dir": str(tmp_path / name)}) for name in ("first", "second")]
    losses = []
    for number, trainer in enumerate(trainers):
        # Both were made at once, so that the noise of the second follows that of the first.
        torch.manual_seed(0)
        losses.append(losses_of(trainer, stop_after=5))
        assert len(losses[number]) == 5
    assert losses[0] == losses[1]
    assert different(trainers[0].network.state_dict(), trainers[1].network.state_dict()) == []
    assert different(trainers[0].discriminator.state_dict(), trainers[1].discriminator.state_dict()) == []


@pytest.mark.parametrize("written_on", ["device", "cpu"])
def test_a_checkpoint_moves_between_devices(toy: dict[str, Any], tmp_path: Path, written_on: str) -> None:
    """Written on the GPU and resumed on the CPU, and the other way round."""
    devices = [DEVICE, "cpu"] if written_on == "device" else ["cpu", DEVICE]
    overrides = {**toy, "output_dir": str(tmp_path / "run"), "checkpoint_interval": 1}
    losses_of(trainer_of(on(overrides, devices[0])), stop_after=3)
    stored = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    resumed = trainer_of(on(overrides, devices[1]))
    starts: list[dict[str, Tensor]] = []

    def note(engine: Any) -> None:
        starts.append({name: value.clone() for name, value in resumed.network.state_dict().items()})

    resumed.add_event_handler(Events.ITERATION_STARTED(once=4), note)
    losses = losses_of(resumed)
    assert len(losses) == 5
    assert different(starts[0], stored["network"]) == []
    assert {value.device.type for value in starts[0].values()} == {devices[1]}
    for optimizer in (resumed.optimizer, resumed.d_optimizer):
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        assert {moment.device.type for moment in moments} == {devices[1]}


def test_the_devices_give_the_same_indices(toy: dict[str, Any]) -> None:
    """On the same latents, but for ties: of two codewords that are as near as fp32's rounding tells."""
    trainer = trainer_of({**toy, "num_embeddings": 4096, "embedding_dim": 16})
    network: VisualTokenizer = trainer.network.eval()
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        there = network.encode_indices(images.to(DEVICE)).cpu()
        latents_there = network.encode_stage_2_inputs(images.to(DEVICE)).cpu()
        codebook = network.quantizer.codebook().cpu().double()
        # The search alone, on one device's latents.
        search_there = network.quantize(latents_there.to(DEVICE)).indices.cpu()
        network.cpu()
        here = network.encode_indices(images)
        latents_here = network.encode_stage_2_inputs(images)
        search_here = network.quantize(latents_there).indices
    # Of the same numbers the search finds the exact argmin everywhere; the projected codebook's last bits may differ.
    assert float((search_here == search_there).double().mean()) > 0.999
    torch.testing.assert_close(latents_here, latents_there, rtol=1e-3, atol=1e-4)
    unlike = here != there
    assert float(unlike.double().mean()) < 0.01
    rows = latents_here.movedim(1, -1)[unlike.squeeze(-1)].double()
    far = (rows - codebook[there[unlike]]).norm(dim=1) / (rows - codebook[here[unlike]]).norm(dim=1)
    assert bool((far < 1.001).all())


def test_running_out_of_memory_is_survived(toy: dict[str, Any]) -> None:
    trainer = trainer_of({**toy, "micro_batch_size": 4})
    plain = trainer.training_network.forward

    def forward(images: Tensor, noise: Any = None) -> Any:
        output = plain(images, noise)
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    trainer.training_network.forward = forward
    losses = losses_of(trainer, stop_after=4)
    assert trainer.micro_batch_size == 2
    assert len(losses) == 4


@only_cuda
def test_a_full_card_is_survived(toy: dict[str, Any]) -> None:
    """The allocator's own error, from a limit that the whole batch does not fit."""
    large = {**toy, "image_size": 256, "batch_size": 4, "micro_batch_size": 4, "num_embeddings": 32}
    large |= {f"network_def#{part}#num_channels": 64 for part in ("encoder", "decoder")}
    trainer = trainer_of(large)
    images = torch.zeros(4, 1, 256, 256, device="cuda")
    trainer.state.iteration = 1
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer._iteration(trainer, {"image": images})
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total)
    try:
        trainer._iteration(trainer, {"image": images})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.micro_batch_size < 4


@pytest.mark.parametrize("assignment", ["euclidean", "posterior"])
def test_mixed_precision_never_reaches_the_search(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, assignment: str
) -> None:
    calls: list[tuple[Any, ...]] = []
    plain = base.nearest_codeword

    def search(latents: Tensor, codebook: Tensor, **kwargs: Any) -> Tensor:
        precision = kwargs.get("precision")
        dtypes = {tensor.dtype for tensor in (latents, codebook, precision) if tensor is not None}
        calls.append((dtypes, torch.is_autocast_enabled(latents.device.type), precision is not None))
        return plain(latents, codebook, **kwargs)

    monkeypatch.setattr(base, "nearest_codeword", search)
    trainer = trainer_of({**toy, "precision": "bf16", "network_def#quantizer#assignment": assignment})
    seen: list[torch.dtype] = []
    trainer.network.quant_conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses_of(trainer, stop_after=3)
    # The encoder did compute in bf16.
    assert set(seen) == {torch.bfloat16}
    assert len(calls) >= 3
    assert {call[1:] for call in calls} == {(False, assignment == "posterior")}
    assert all(dtypes == {torch.float32} for dtypes, *_ in calls)


@only_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_device(toy: dict[str, Any], precision: str) -> None:
    """Steps 3 and 4 with the GAN on; the terms are read at the end of an epoch, and where they are logged."""
    trainer = trainer_of(
        {**toy, "deterministic": False, "precision": precision, "batch_size": 2, "log_interval": 1000}
        | {"objective#adversarial#start_step": 1}
    )
    images = torch.rand(2, 1, 32, 32, device="cuda") * 2 - 1
    assert trainer.state.epoch_length > 4
    for iteration in (1, 2, 3, 4):
        trainer.state.iteration = iteration
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if iteration > 2 else "default")
        try:
            trainer._iteration(trainer, {"image": images})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert "discriminator_loss" in trainer.state.terms
    assert all(torch.isfinite(torch.tensor(value)) for value in dict(trainer.state.terms).values())
