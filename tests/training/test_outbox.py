"""Messages to a server that fails and comes back, on a clock of the test and without a thread where none is needed."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vaevq_med.training.outbox import Outbox, RefusedError


class Server:
    """Takes messages while it is up."""

    def __init__(self) -> None:
        self.up, self.took, self.calls = True, list[Any](), 0
        self.now = 0.0
        self.said: list[bool] = []

    def send(self, message: Mapping[str, Any]) -> None:
        self.calls += 1
        if not self.up:
            raise ConnectionError("refused")
        if message["n"] == "bad":
            raise RefusedError("no such thing")
        self.took.append(message["n"])

    def outbox(self, folder: Path | None = None, **settings: Any) -> Outbox:
        def note(error: Exception | None) -> None:
            self.said.append(error is not None)

        return Outbox(self.send, folder, clock=lambda: self.now, on_failure=note, **settings)


@pytest.fixture
def server() -> Server:
    return Server()


def send_all(outbox: Outbox) -> None:
    while outbox.step() == 0:
        pass


def test_what_a_dead_server_does_not_take_arrives_in_order(server: Server, tmp_path: Path) -> None:
    outbox = server.outbox(tmp_path / "unsent")
    outbox.put({"n": 0})
    send_all(outbox)
    server.up = False
    for number in range(1, 5):
        outbox.put({"n": number})
        outbox.step()
    assert server.calls == 2  # one try, and none before the pause is over
    assert [json.loads(line)["n"] for line in (tmp_path / "unsent" / "messages.jsonl").open()] == [1, 2, 3, 4]
    server.up = True
    assert outbox.step() == pytest.approx(1)
    server.now = 1.0
    outbox.put({"n": 5})
    send_all(outbox)
    assert server.took == list(range(6))
    assert server.said == [True, False]
    assert outbox.close(0) == 0
    assert not (tmp_path / "unsent").exists()


def test_the_pauses_of_a_server_that_stays_away_grow_to_a_minute(server: Server) -> None:
    server.up = False
    outbox = server.outbox()
    outbox.put({"n": 0})
    pauses = []
    for _ in range(8):
        pauses.append(outbox.step())
        server.now += pauses[-1] or 0
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert server.said == [True]


def test_another_process_sends_what_one_left(server: Server, tmp_path: Path) -> None:
    server.up = False
    first = server.outbox(tmp_path)
    for number in range(3):
        first.put({"n": number})
    first.step()
    server.up, server.now = True, 1.0
    first.step()
    assert first.close(0) == 2
    with (tmp_path / "messages.jsonl").open("ab") as file:
        file.write(b'{"n": 3, "half')  # a process that was killed while it wrote
    second = server.outbox(tmp_path)
    assert [message["n"] for message in second.messages()] == [1, 2]
    second.put({"n": 4})
    send_all(second)
    assert server.took == [0, 1, 2, 4]


def test_a_message_that_is_refused_holds_up_no_other(server: Server) -> None:
    outbox = server.outbox()
    for number in (0, "bad", 1):
        outbox.put({"n": number})
    send_all(outbox)
    assert server.took == [0, 1]
    assert len(outbox) == 0


def test_memory_is_bounded_also_where_nothing_can_be_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.up = False
    kept, lost = server.outbox(tmp_path / "a", limit=3), server.outbox(None, limit=3)
    for number in range(10):
        kept.put({"n": number})
        lost.put({"n": number})
    assert [message["n"] for message in kept.messages()] == list(range(10))
    assert (kept.lost, lost.lost) == (0, 7)
    assert [message["n"] for message in lost.messages()] == [0, 8, 9]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    blocked = server.outbox(tmp_path / "b", limit=3)
    for number in range(10):
        blocked.put({"n": number})
    assert (len(blocked), blocked.lost) == (3, 7)


def test_a_copy_is_sent_as_it_was_and_then_gone(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_text("first")
    outbox = server.outbox(tmp_path / "unsent")
    copy = outbox.copied(picture)
    picture.write_text("second")
    outbox.put({"n": copy.read_text(), "copy": str(copy)})
    send_all(outbox)
    assert server.took == ["first"]
    assert not copy.exists()


def test_a_file_that_vanishes_is_told_of_and_ends_nothing(server: Server, tmp_path: Path) -> None:
    server.up = False
    outbox = server.outbox(tmp_path)
    outbox.put({"n": 0})
    outbox.step()
    (tmp_path / "messages.jsonl").unlink()
    server.up, server.now = True, 1.0
    outbox.put({"n": 1})
    send_all(outbox)
    assert server.took == [1]
    assert (len(outbox), outbox.lost) == (0, 1)


def test_a_file_may_vanish_while_its_message_is_under_way(server: Server, tmp_path: Path) -> None:
    server.up = False
    outbox = server.outbox(tmp_path)
    for number in range(2):
        outbox.put({"n": number})
    outbox.step()
    took = server.send

    def send(message: Mapping[str, Any]) -> None:
        (tmp_path / "messages.jsonl").unlink(missing_ok=True)
        took(message)

    server.up, server.now, outbox = True, 1.0, Outbox(send, tmp_path)
    outbox.step()
    outbox.put({"n": 2})
    send_all(outbox)
    assert server.took == [0, 2]
    assert len(outbox) == 0


def test_nobody_waits_for_a_server_that_hangs(tmp_path: Path) -> None:
    release, entered, took = threading.Event(), threading.Event(), list[int]()

    def hang(message: Mapping[str, Any]) -> None:
        entered.set()
        release.wait(10)
        took.append(message["n"])

    outbox = Outbox(hang, tmp_path)
    outbox.start()
    outbox.put({"n": 0})
    assert entered.wait(10)
    outbox.put({"n": 1})
    assert not outbox.wait(0.01)
    assert outbox.close(0.01) == 2
    release.set()
    # What was under way may have arrived; it is sent again rather than lost.
    assert [message["n"] for message in outbox.messages()] == [0, 1]


def test_an_end_waits_for_a_server_that_is_slow(tmp_path: Path) -> None:
    took = list[int]()
    outbox = Outbox(lambda message: took.append(message["n"]), tmp_path)
    outbox.start()
    for number in range(50):
        outbox.put({"n": number})
    assert outbox.close(10) == 0
    assert took == list(range(50))
