"""The folder of a command that can be taken up: units whole or not at all, one run at a time, settings in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_binary_writer, atomic_write_text
from vaevq_med.core.folder import BusyError, OutputFolder, difference
from vaevq_med.core.jobs import do_jobs

values = st.integers() | st.text(max_size=5)
settings = st.dictionaries(st.sampled_from("abc"), values)


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    return OutputFolder(tmp_path / "out", ".state", "make-things", "things")


def files(folder: OutputFolder) -> dict[str, str]:
    """Everything but the lock."""
    paths = (path for path in sorted(folder.path.rglob("*")) if path.is_file() and path.name != "lock")
    return {path.relative_to(folder.path).as_posix(): path.read_text() for path in paths}


def make(folder: OutputFolder, name: str, content: str) -> None:
    with folder.unit(name) as partial:
        (partial / "things").mkdir()
        (partial / "things" / content).write_text(content)
        folder.commit(name, {"made": content}, {"things": f"things/{name}", "others": f"others/{name}"})


def killed_while(program: str, *arguments: object) -> None:
    """Run a program up to where it says so, and kill it there."""
    command = [sys.executable, "-c", f"import sys, time\nfrom pathlib import Path\n{program}", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)


WAIT = "print('now', flush=True); time.sleep(60)"


# --- units ------------------------------------------------------------------------------------------------


def test_a_unit_is_in_place_once_it_has_a_record(folder: OutputFolder) -> None:
    make(folder, "a", "one")
    assert files(folder) == {".state/a.json": '{"made": "one"}\n', "things/a/one": "one"}
    assert (folder.record("a"), folder.record("b"), folder.units()) == ({"made": "one"}, None, {"a"})
    (folder.path / "others/a").mkdir(parents=True)
    make(folder, "a", "two")
    assert files(folder) == {".state/a.json": '{"made": "two"}\n', "things/a/two": "two"}
    assert not (folder.path / "others/a").exists()
    for damaged in ("{", "[]", "\xff"):
        (folder.path / ".state/a.json").write_bytes(damaged.encode("latin-1"))
        assert folder.record("a") is None


def test_a_unit_that_fails_leaves_the_earlier_one(folder: OutputFolder) -> None:
    make(folder, "a", "one")
    before = files(folder)

    def interrupted() -> None:
        with folder.unit("a") as partial:
            (partial / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(folder) == before


@pytest.mark.parametrize("moved", [0, 1])
def test_a_unit_that_dies_halfway_into_its_place_is_not_done(
    moved: int, folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, "a", "one")
    replace, calls = os.replace, iter(range(9))

    def die(source: Any, target: Any) -> None:
        if next(calls) == moved:
            raise SystemExit
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(SystemExit):
            make(folder, "a", "two")
    assert folder.record("a") is None
    make(folder, "a", "three")
    assert files(folder) == {".state/a.json": '{"made": "three"}\n', "things/a/three": "three"}


class Death:
    """A process that dies at one of its changes of files, and makes none afterwards."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise SystemExit
            self.left -= 1
            return change(*arguments, **options)

        return changed


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 9)), max_size=8))
def test_wherever_a_run_dies_the_records_tell_the_truth(runs: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = OutputFolder(Path(name) / "out", ".state", "make-things", "things")
        for unit, content, after in runs:
            with patch.context() as dying, contextlib.suppress(SystemExit):
                death = Death(after)
                for owner, change in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "mkdir")):
                    dying.setattr(owner, change, death(getattr(owner, change)))
                make(folder, unit, content)
            for done in folder.units():
                record = folder.record(done)
                made = {path.name for path in (folder.path / "things" / done).iterdir()}
                assert record is not None
                assert made == {record["made"]}
        for unit in "ab":
            make(folder, unit, "end")
        folder.begin()
        assert files(folder) == {f".state/{u}.json": '{"made": "end"}\n' for u in "ab"} | {
            f"things/{u}/end": "end" for u in "ab"
        }


# --- settings ---------------------------------------------------------------------------------------------


def test_other_settings_take_the_result_away_before_anything_is_made_with_them(folder: OutputFolder) -> None:
    folder.records.mkdir(parents=True)
    folder.begin("first")
    (folder.path / "dataset.json").write_text("{}")
    assert (folder.is_of_another("first"), folder.is_of_another("second")) == (False, True)
    folder.begin("first")
    assert (folder.path / "dataset.json").exists()
    folder.begin("second")
    assert files(folder) == {".state/recipe.sha256": "second\n"}


@given(settings, st.sampled_from("abcd"), values, st.booleans())
def test_a_setting_that_differs_is_named(found: dict[str, Any], name: str, value: Any, nested: bool) -> None:
    before, after = ({"in": s} if nested else s for s in (found, {**found, name: value}))
    full = f"in.{name}" if nested else name
    if found.get(name) == value:
        assert difference(before, after) is None
    elif found or not nested:
        assert difference(before, after) == f"{full} {found.get(name, 'unset')}, expected {value}"
        assert difference(after, before) == f"{full} {value}, expected {found.get(name, 'unset')}"


def test_other_settings_are_refused_in_words(folder: OutputFolder) -> None:
    found, expected = {"size": 1, "network": {"width": 8, "name": "a" * 99}}, {"size": 1, "network": {"width": 9}}
    with pytest.raises(DataError, match=r"out: found things of network\.width 8, expected 9; use --overwrite$"):
        folder.refuse_other(found, expected, "things", "use --overwrite")
    with pytest.raises(DataError, match=r"found things of network\.name a{57}\.\.\., expected unset; "):
        folder.refuse_other(found, {**found, "network": {"width": 8}}, "things", "")
    folder.refuse_other(found, found, "things", "")


def test_what_the_command_did_not_begin_is_refused(folder: OutputFolder) -> None:
    folder.check()
    folder.path.mkdir()
    (folder.path / ".dataset.json.part").write_text("")  # of a writer that was killed
    folder.check()
    (folder.path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match=r"with other things in it, expected none, .* of an earlier make-things$"):
        folder.check()
    OutputFolder(folder.path, ".state", "make-things", "things", copies=True).check()
    folder.records.mkdir()
    folder.check()
    with pytest.raises(DataError, match="found a file, expected a folder or nothing"):
        OutputFolder(folder.path / "dataset.json", ".state", "make-things", "things").check()


# --- two at once, and the dead ----------------------------------------------------------------------------


def test_one_run_at_a_time_and_the_next_one_once_it_has_ended(folder: OutputFolder) -> None:
    pytest.importorskip("fcntl")
    with folder.lock():
        with pytest.raises(BusyError, match="found another make-things at work in it, expected none"), folder.lock():
            pass
        with pytest.raises(BusyError), OutputFolder(folder.path, ".state", "make-things", "things").lock():
            pass
    with folder.lock():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="needs workers that are forked")
def test_workers_of_a_killed_run_keep_the_next_one_out(folder: OutputFolder) -> None:
    worker = folder.path.parent / "worker"
    killed_while(
        "import os\nfrom vaevq_med.core.folder import OutputFolder\n"
        "with OutputFolder(Path(sys.argv[1]), '.state', 'make-things', 'things').lock():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        os.close(1)\n        time.sleep(60)\n"
        "    Path(sys.argv[2]).write_text(str(child))\n"
        f"    {WAIT}\n",
        *(folder.path, worker),
    )
    with pytest.raises(BusyError), folder.lock():
        pass
    os.kill(int(worker.read_text()), signal.SIGKILL)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(BusyError), folder.lock():
            return
    pytest.fail("the lock outlives the workers")


def test_nothing_of_a_killed_writer_is_left_after_the_next_run(folder: OutputFolder) -> None:
    program = (
        "from vaevq_med.core.files import atomic_binary_writer\nfrom vaevq_med.core.folder import OutputFolder\n"
        "folder = OutputFolder(Path(sys.argv[1]), '.state', 'make-things', 'things')\n"
        "with folder.lock(), folder.unit('a') as partial, atomic_binary_writer(folder.path / sys.argv[2]) as file:\n"
        f"    (partial / 'half').write_text('half')\n    file.write(b'half')\n    file.flush()\n    {WAIT}\n"
    )
    for name in ("dataset.json", ".state/b.json"):
        killed_while(program, folder.path, name)
        assert len(files(folder)) == 2
        # What the code of earlier days left, too.
        (folder.path / ".dataset.json.x1_y2abc").write_text("half")
        (folder.records / ".c.json.x1_y2abc").write_text("half")
        with folder.lock():
            folder.begin()
        assert files(folder) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="needs file locks")
def test_the_next_write_uses_what_a_killed_one_left_and_two_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    killed_while(
        "from vaevq_med.core.files import atomic_binary_writer\n"
        "with atomic_binary_writer(Path(sys.argv[1])) as file:\n"
        f"    file.write(b'x' * 99)\n    file.flush()\n    {WAIT}\n",
        path,
    )
    assert [left.name for left in tmp_path.iterdir()] == [".file.part"]
    atomic_write_text(path, "short")
    assert [(left.name, left.read_text()) for left in tmp_path.iterdir()] == [("file", "short")]
    with atomic_binary_writer(path) as first:
        first.write(b"first")
        with atomic_binary_writer(path) as second:
            second.write(b"second")
        assert path.read_text() == "second"
    assert [(left.name, left.read_text()) for left in tmp_path.iterdir()] == [("file", "first")]


def test_a_disk_without_locks_and_one_that_refuses_leave_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with OutputFolder(tmp_path, ".state", "make-things", "things").lock():
        atomic_write_text(tmp_path / "file", "whole")
    (tmp_path / ".other.part").symlink_to(tmp_path / "file")
    atomic_write_text(tmp_path / "other", "link")
    assert {path.name for path in tmp_path.iterdir()} == {".state", "file", "other", ".other.part"}
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("name", [".settings.json.bak", ".a.json.swp", ".DS_Store", ".dataset.json.old_one"])
def test_a_file_of_a_users_own_is_neither_taken_for_ours_nor_removed(name: str, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out", ".state", "make", "things")
    folder.path.mkdir()
    (folder.path / name).write_text("mine")
    with pytest.raises(DataError, match="a folder with other things in it"):
        folder.check()
    folder.records.mkdir()
    for left in (".dataset.json.part", ".recipe.json.ab3_x9zq", ".splits.json.ab3_x9zq.part"):
        (folder.path / left).write_text("half")
    folder.check()
    folder.begin("mark")
    assert sorted(path.name for path in folder.path.iterdir()) == sorted([name, ".state"])


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_finished_nothing_leaves_nothing(folder: OutputFolder, there: bool) -> None:
    if there:
        folder.path.mkdir()
    with pytest.raises(DataError), folder.begun("first"):
        raise DataError("nothing could be done")
    assert folder.path.exists() == there
    assert not folder.records.exists()

    def interrupted() -> None:
        make(folder, "a", "x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder.begun("first"):
        interrupted()
    assert folder.units() == {"a"}
    assert (folder.holds_other("first"), folder.holds_other("second")) == (False, True)
    with folder.begun("second"), pytest.raises(BusyError), folder.begun("second"):
        pass
    shutil.rmtree(folder.records)
    (folder.path / "own.txt").write_text("of somebody else")
    with folder.begun("first"):
        pass
    assert (folder.path / "own.txt").exists()


def test_jobs_that_fail_are_skipped_and_told() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise DataError("two is refused")
        return number

    seen: list[object] = []
    skipped = do_jobs(
        work,
        {name: (number,) for number, name in enumerate("abcd")},
        kind="letter",
        workers=1,
        lost=lambda number: [("d/part", "left out")] if number == 3 else [],
        on_start=seen.append,
        on_unit=seen.append,
        on_skip=lambda name, reason: seen.append((name, reason)),
    )
    assert skipped == {"c": "two is refused", "d/part": "left out"}
    assert seen == [4, "a", "b", ("c", "two is refused"), "c", ("d/part", "left out"), "d"]
