"""Terms that stay on the device: who reads them, and what happens when one that nobody has read is not finite."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer_of
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from vaevq_med.training.base import BaseTrainer, TrainingError
from vaevq_med.training.checkpoint import load_optimizer
from vaevq_med.training.ema import exponential_moving_average
from vaevq_med.training.progress import ProgressReporter
from vaevq_med.training.terms import Terms


class Reads(TorchFunctionMode):
    """Counts the tensors whose numbers Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in ("tolist", "item", "__float__", "__int__", "__bool__")
        return func(*args, **(kwargs or {}))


def test_terms_are_read_once_and_when_asked_for() -> None:
    with Reads() as reads:
        terms = Terms({"loss": torch.tensor(2.0), "rate": 0.5, "norm": torch.tensor([3.0])})
        assert "loss" in terms
        assert list(terms) == ["loss", "rate", "norm"]
        assert len(terms) == 3
        assert reads.count == 0
        assert dict(terms) == {"loss": 2.0, "rate": 0.5, "norm": 3.0}
        assert terms["norm"] == 3.0
        assert reads.count == 1


@pytest.fixture
def late(toy_overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Overrides of a run that reads its terms as one on a GPU does: every third iteration, and at an epoch's end."""
    monkeypatch.setattr(BaseTrainer, "reads_late", lambda self, optimizer: True)
    fused = {"optimizer#fused": True, "d_optimizer#fused": True}
    return {**toy_overrides, **fused, "log_interval": 3, "objective#adversarial#start_step": 0}


def test_a_step_is_read_where_it_is_logged(late: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(late)
    counts: list[int] = []
    step = trainer._iteration

    def counted(engine: Any, batch: Any) -> Any:
        # Torch's own Adam counts its steps on the CPU here, and the search has a path of its own for the CPU.
        with Reads() as reads:
            found = step(engine, batch)
        counts.append(reads.count)
        return found

    trainer._process_function = counted
    # Of a slow run it shows a line in between, which looks at the terms.
    monkeypatch.setattr(ProgressReporter, "_iteration_completed", lambda self, engine: None)
    trainer.run()
    # Four iterations an epoch, two epochs; the third and the sixth are logged, the fourth and eighth end an epoch.
    quiet = [counts[n - 1] for n in (2, 5, 7)]
    assert len(set(quiet)) == 1
    assert [counts[n - 1] - quiet[0] for n in (3, 4, 6, 8)] == [3, 1, 2, 2]
    assert all(isinstance(value, float) for value in trainer.state.terms.values())
    assert trainer.state.terms["images_per_second"] > 0


class Spoilt(nn.Module):
    """A loss term that is not a number in one iteration."""

    def __init__(self, trainer: Any, at: int) -> None:
        super().__init__()
        self.trainer, self.at = trainer, at

    def forward(self, target: Tensor, output: Any) -> Tensor:
        value = output.reconstruction.square().mean()
        return value * math.nan if self.trainer.state.iteration == self.at else value


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_term_that_is_not_finite_is_named_late_and_changes_nothing(
    late: dict[str, Any], tmp_path: Path, interrupted: bool
) -> None:
    trainer = trainer_of({**late, "checkpoint_interval": 100})
    trainer.objective.terms["reconstruction"] = Spoilt(trainer, at=2)
    states: list[dict[str, Tensor]] = []

    def keep(engine: Any) -> None:
        parts = {"network": engine.network, "discriminator": engine.discriminator}
        states.append({f"{k}.{n}": p.detach().clone() for k, m in parts.items() for n, p in m.named_parameters()})

    trainer.add_event_handler(Events.ITERATION_STARTED, keep)
    if interrupted:  # a checkpoint is asked for in the very iteration
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda engine: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingError, match=r"iteration 2: found loss = nan, reconstruction = nan"):
        trainer.run()
    keep(trainer)
    assert trainer.state.iteration == (2 if interrupted else 3)
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    first, second = states[0], states[1]
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for later in states[2:]:
        assert all(torch.equal(second[name], later[name]) for name in second)


def test_a_state_takes_up_averages_and_leaves_the_kernels() -> None:
    """So that a run of a GPU, whose optimizer is fused, goes on on a CPU, and the other way round."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    fused, plain = torch.optim.Adam([parameter], fused=True), torch.optim.Adam([parameter], lr=0.5)
    fused.step()
    load_optimizer(plain, fused.state_dict())
    assert plain.param_groups[0]["fused"] is None
    assert plain.param_groups[0]["lr"] == 0.5  # what this configuration says
    torch.testing.assert_close(plain.state[parameter]["exp_avg"], torch.full((3,), 0.1))
    again = torch.optim.Adam([parameter], fused=True)
    load_optimizer(again, plain.state_dict())
    assert again.param_groups[0]["fused"] is True
    again.step()
    assert float(again.state[parameter]["step"]) == 2


def test_the_average_is_that_of_torch_and_reads_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = exponential_moving_average(model, decay=0.3)
    reference = AveragedModel(model, use_buffers=True)
    with Reads() as reads:
        average.update_parameters(model)
    assert reads.count <= 1  # the count of updates, which stays on the CPU
    reference.update_parameters(model)
    # The warm-up's decays, (1 + n) / (10 + n) after n updates, by hand, then the one asked for.
    for decay in (2 / 11, 3 / 12, 0.3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3))
        reference.multi_avg_fn = get_ema_multi_avg_fn(decay)
        for each in (average, reference):
            each.update_parameters(model)
    expected = reference.module.state_dict()
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, expected[name]), name
    assert int(average.module[1].num_batches_tracked) == 3
    assert average.n_averaged.device.type == "cpu"
