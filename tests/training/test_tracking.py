"""A run and its tracking server: dead at the start, in between, at the end, or refusing."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from helpers.fake_mlflow import FakeServer
from ignite.engine import Engine, Events

from vaevq_med.training.tracking import MLflowTracker

STEPS = 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()
    monkeypatch.setattr(mlflow, "MlflowClient", fake)
    return fake


def tracker_of(folder: Path, extra: dict[str, Any] | None = None, **settings: Any) -> MLflowTracker:
    """One of a run in ``folder``, as its process makes it, with what its checkpoint remembers."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.pt").write_bytes(b"weights")
    checkpoint: Any = SimpleNamespace(
        directory=folder / "checkpoints",
        extra={} if extra is None else extra,
        interrupted_by=None,
        change_tags=dict,
        start_tags=dict,
    )
    given = {"tracking_uri": "http://mlflow.example", "interval": 2, "patience": 0.05, **settings}
    return MLflowTracker(checkpoint=checkpoint, pictures=folder / "validation", config={"a": 1}, **given)


def train(tracker: MLflowTracker, *, epochs: int = 2, first: int = 0, at: dict[int, Any] | None = None) -> Engine:
    """Epochs of ``STEPS`` iterations, from after iteration ``first`` on; ``at`` acts before an iteration."""

    def step(engine: Engine, batch: Any) -> None:
        engine.state.terms = {"loss": float(engine.state.iteration)}
        (at or {}).get(engine.state.iteration, lambda: None)()

    def draw(engine: Engine) -> None:
        assert tracker.pictures is not None
        tracker.pictures.mkdir(exist_ok=True)
        (tracker.pictures / "grid.png").write_text(f"epoch {engine.state.epoch}")

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, draw)
    tracker.attach(engine)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    engine.state.iteration, engine.state.epoch = first, first // STEPS
    engine.state.max_epochs = engine.state.epoch_length = None
    if first:
        engine.load_state_dict({"iteration": first, "max_epochs": epochs, "epoch_length": STEPS})
        engine.run([0] * STEPS)
    else:
        engine.run([0] * STEPS, max_epochs=epochs)
    return engine


def steps_of(server: FakeServer, run: str = "run0") -> list[int]:
    return [point.step for point in server.runs[run].metrics if point.key == "train/loss"]


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("mlflow_unsent_*"))


def test_a_run_holds_everything_in_order(server: FakeServer, tmp_path: Path) -> None:
    extra: dict[str, Any] = {}
    train(tracker_of(tmp_path, extra))
    run = server.runs["run0"]
    assert steps_of(server) == list(range(1, 9))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1"}
    assert run.files["pictures/epoch_0001/grid.png"] == b"epoch 1"
    assert run.files["pictures/epoch_0002/grid.png"] == b"epoch 2"
    assert run.files["checkpoints/last.pt"] == b"weights"
    assert extra["mlflow_run_id"] == "run0"
    assert leftovers(tmp_path) == []


def test_a_server_that_is_down_at_the_start_is_told_all_when_it_answers(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.up = False
    train(tracker_of(tmp_path), at={6: lambda: setattr(server, "up", True)})
    assert steps_of(server) == list(range(1, 9))
    assert server.runs["run0"].files["pictures/epoch_0001/grid.png"] == b"epoch 1"
    assert server.runs["run0"].info.status == "FINISHED"
    assert leftovers(tmp_path) == []
    assert [record.message for record in caplog.records if "failed" in record.message][1:] == []


def test_a_dead_server_costs_seconds_and_the_resumed_run_tells_it_all(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.up, extra = False, dict[str, Any]()
    began = time.monotonic()
    train(tracker_of(tmp_path, extra))
    assert time.monotonic() - began < 2
    assert server.runs == {}
    (folder,) = leftovers(tmp_path)
    assert str(folder) in caplog.records[-1].message
    assert "1 to 8" in caplog.records[-1].message
    server.up = True
    train(tracker_of(tmp_path, extra), epochs=3, first=8)
    assert list(server.runs) == ["run0"]
    assert steps_of(server) == list(range(1, 13))
    assert [server.runs["run0"].files[f"pictures/epoch_000{n}/grid.png"] for n in (1, 2, 3)] == [
        b"epoch 1",
        b"epoch 2",
        b"epoch 3",
    ]
    assert extra["mlflow_run_id"] == "run0"
    assert leftovers(tmp_path) == []


def test_a_resumed_run_repeats_no_point_that_was_sent(server: FakeServer, tmp_path: Path) -> None:
    extra: dict[str, Any] = {}
    train(tracker_of(tmp_path, extra))
    # Its checkpoint is older than what MLflow was told.
    train(tracker_of(tmp_path, extra), epochs=3, first=4)
    assert steps_of(server) == list(range(1, 13))
    assert list(server.runs) == ["run0"]


def test_a_run_that_was_deleted_goes_on_in_a_new_one(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"mlflow_run_id": "deleted"}
    train(tracker_of(tmp_path, extra), epochs=3, first=8)
    assert steps_of(server) == list(range(9, 13))
    assert extra["mlflow_run_id"] == "run0"
    (line,) = (record.message for record in caplog.records)
    assert "deleted" in line
    assert "run0" in line


def test_the_same_command_after_the_end_sends_what_is_left(server: FakeServer, tmp_path: Path) -> None:
    from vaevq_med.training.events import RunEvents

    extra: dict[str, Any] = {}

    def go_down() -> None:
        patience = time.monotonic() + 10
        while len(steps_of(server)) < 6 and time.monotonic() < patience:
            time.sleep(0.005)
        server.up = False

    train(tracker_of(tmp_path, extra), at={7: go_down})
    assert steps_of(server) == list(range(1, 7))
    assert server.runs["run0"].info.status == "RUNNING"
    assert len(leftovers(tmp_path)) == 1
    server.up = True
    engine = Engine(lambda engine, batch: None)
    tracker_of(tmp_path, extra).attach(engine)
    engine.fire_event(RunEvents.ALREADY_FINISHED)
    assert steps_of(server) == list(range(1, 9))
    assert server.runs["run0"].info.status == "FINISHED"
    assert server.runs["run0"].files["checkpoints/last.pt"] == b"weights"
    assert leftovers(tmp_path) == []


def test_a_run_whose_first_answer_was_lost_is_made_once(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = server.create_run

    def lost(*arguments: Any) -> Any:
        made(*arguments)
        monkeypatch.setattr(server, "create_run", made)
        raise ConnectionResetError

    monkeypatch.setattr(server, "create_run", lost)
    train(tracker_of(tmp_path, patience=5))
    assert list(server.runs) == ["run0"]
    assert server.runs["run0"].data.params == {"a": "1"}
    assert steps_of(server) == list(range(1, 9))


def test_a_deleted_experiment_says_what_to_do(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.deleted = True
    train(tracker_of(tmp_path, experiment="brains"))
    (line,) = (record.message for record in caplog.records if "brains" in record.message)
    assert "\n" not in line
    assert "restore --experiment-id 7" in line
    assert "--experiment" in line
    assert server.runs == {}
    assert len(leftovers(tmp_path)) == 1


def test_a_failed_run_carries_its_error_and_one_on_another_server_waits_for_its_own(
    server: FakeServer, tmp_path: Path
) -> None:
    server.up = False
    train(tracker_of(tmp_path, tracking_uri="http://one.example"))
    server.up = True

    def fail() -> None:
        raise ValueError("a term is not finite")

    train(tracker_of(tmp_path, tracking_uri="http://other.example"), at={3: fail})
    (run,) = server.runs.values()
    assert run.data.tags["error"] == "a term is not finite"
    assert run.info.status == "FAILED"
    assert steps_of(server) == [1, 2]
    assert len(leftovers(tmp_path)) == 1


def test_a_point_that_is_refused_holds_up_no_other(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = tracker_of(tmp_path)
    tracker.start_run()
    tracker.log_metrics({"refused": 1.0}, 1)
    tracker.flush()
    tracker.log_metrics({"taken": 1.0}, 1)
    tracker.end_run("FINISHED")
    assert [point.key for point in server.runs["run0"].metrics] == ["taken"]
    assert server.runs["run0"].info.status == "FINISHED"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert leftovers(tmp_path) == []


def test_the_client_of_mlflow_meets_a_closed_port(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        train(tracker_of(tmp_path, tracking_uri="http://127.0.0.1:9", patience=2))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "refused" in caplog.records[0].message
    assert "1 to 8" in caplog.records[1].message


@pytest.mark.parametrize("uri", ["none", None])
def test_none_and_null_turn_tracking_off(uri: str | None) -> None:
    assert not MLflowTracker(tracking_uri=uri).enabled
    assert MLflowTracker().enabled
