"""Files that are whole or as they were, values of a declared type, names and picks, and the processes of a machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from vaevq_med.core import jobs
from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_binary_writer, atomic_write_bytes, atomic_write_text, atomic_writer, file_sha256
from vaevq_med.core.jobs import usable_cores
from vaevq_med.core.names import did_you_mean, nearest
from vaevq_med.core.options import Number, Options
from vaevq_med.core.picks import evenly_spaced


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_text(path, "old")

    def interrupted() -> None:
        with atomic_binary_writer(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    def interrupted_text() -> None:
        with atomic_writer(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    for write in (interrupted, interrupted_text):
        with pytest.raises(KeyboardInterrupt):
            write()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_killed_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom vaevq_med.core.files import atomic_binary_writer\n"
        "with atomic_binary_writer(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n    file.flush()\n    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_written_is_whole_and_readable_by_others(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"abc", durable=durable)
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o644
    # The example of FIPS 180-2, appendix B.1.
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_only_durable_writes_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    atomic_write_bytes(tmp_path / "a", b"", durable=False)
    assert len(synced) == 0
    atomic_write_text(tmp_path / "b", "ä\n")
    assert len(synced) == 1
    assert (tmp_path / "b").read_bytes() == b"\xc3\xa4\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_processes_keep_to_the_limit_of_a_control_group(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == expected


def test_processes_keep_to_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores(tmp_path) == 2


# --- options ----------------------------------------------------------------------------------------------


class Inner(Options):
    share: Number = Field(default=0.5, ge=0, le=1)
    sizes: tuple[int, ...] = (1,)


class Mine(Options):
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    count: int | None = Field(default=None, ge=1, le=9, description="a digit from 1")
    on: bool = False


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["name", "kind", "inner", "count", "on", "share", "sizes", "x"])


@given(plain | st.dictionaries(names, plain | st.dictionaries(names, plain, max_size=3), max_size=5))
def test_any_values_are_taken_as_they_are_or_refused_in_one_line(values: Any) -> None:
    said, line = None, "FILE: "
    try:
        said = Mine.read(values, "FILE").to_dict()
    except DataError as error:
        line = str(error)
    assert line.startswith("FILE: ")
    assert "\n" not in line
    if said is not None:
        assert json.dumps({name: said[name] for name in values}) == json.dumps(
            {name: said[name] if isinstance(value, dict) else value for name, value in values.items()}
        )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "x", "kid": "a"}, "F: kid is unknown; did you mean kind?"),
        ({"name": "x", "\n": 1}, 'F: "\\n" is unknown; expected some of name, kind, inner, count, on'),
        ({"nam": "x"}, "F: nam is unknown; did you mean name?"),
        ({}, "F: name is missing; expected a text"),
        ({"name": "x", "kind": "c"}, 'F: kind is "c"; expected one of a, b'),
        ({"name": "x", "inner": {"share": True}}, "F: inner.share is true; expected 0 to 1"),
        ({"name": "x", "inner": {"sizes": [1, 2.0]}}, "F: inner.sizes is [1, 2.0]; expected a list"),
        ({"name": "x", "inner": [1]}, "F: inner is [1]; expected an object, or null"),
        ({"name": "x", "count": 0}, "F: count is 0; expected a digit from 1, or null"),
        ({"name": "x", "on": 1}, "F: on is 1; expected true or false"),
        ({"name": "x" * 99, "on": "y" * 99}, f'F: on is "{"y" * 76}...; expected true or false'),
        ([], "F: it is []; expected an object"),
    ],
)
def test_what_is_wrong_with_a_value_and_what_was_expected(values: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        Mine.read(values, "F")
    assert str(caught.value) == said


def test_numbers_stay_as_they_are_written_and_a_change_is_checked() -> None:
    for share in (0, 0.0, 1, 1.0, 0.1):
        mine = Mine.read({"name": "x", "inner": {"share": share}}).changed(kind="b", count=None)
        assert json.dumps(mine.to_dict()["inner"]["share"]) == json.dumps(share)
        assert (mine.kind, mine.count) == ("b", None)
    with pytest.raises(DataError, match=r"^count is 10; expected a digit from 1, or null$"):
        mine.changed(count=10)


def test_one_item_is_a_list_of_it() -> None:
    assert Mine.read({"name": "x", "inner": {"sizes": 3}}).inner == Inner(sizes=(3,))
    with pytest.raises(DataError, match="sizes"):
        Mine.read({"name": "x", "inner": {"sizes": "3"}})


def test_items_are_evenly_spaced() -> None:
    assert evenly_spaced(10, None) == list(range(10))
    assert evenly_spaced(3, 7) == [0, 1, 2]
    assert evenly_spaced(11, 3) == [0, 5, 10]
    with pytest.raises(DataError, match="max_items"):
        evenly_spaced(3, 0)


def test_the_nearest_name_is_told_where_one_is_near() -> None:
    known = {"kind": 1, "name": 2}
    assert nearest("nam", known) == "name"
    assert nearest(3, known) == ""
    assert did_you_mean("kid", known, "expected kind or name") == "did you mean 'kind'?"
    assert did_you_mean("zzz", known, "expected kind or name") == "expected kind or name"
    assert (nearest("lr", ["rl"]), nearest("lr", ["rl"], cutoff=0.5)) == ("", "rl")
