"""Files that are whole or as they were, and the number of processes that suits a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vaevq_med.core import jobs
from vaevq_med.core.files import atomic_binary_writer, atomic_write_bytes, atomic_write_text, atomic_writer, file_sha256
from vaevq_med.core.jobs import usable_cores


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
