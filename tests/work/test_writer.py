"""Files that are hashed while they are written."""

import errno
import os
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a3cli.work import writer
from a3cli.work.writer import HashingWriter

PART = 8192
FEW_FILES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
pieces = st.lists(st.integers(0, 5) | st.integers(0, 3 * PART) | st.sampled_from([PART, 2 * PART]), max_size=12)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Write even a small file in several parts, with several syncs."""
    monkeypatch.setattr(writer, "WRITTEN_AT_ONCE", PART)
    monkeypatch.setattr(writer, "SYNCED_AT_ONCE", PART)


def write(path: Path, sizes: list[int]) -> None:
    """Write pieces of these sizes and check the file's content and hash."""
    wanted = [os.urandom(size) for size in sizes]
    with HashingWriter(path) as file:
        for piece in wanted:
            file.write(piece)
    assert path.read_bytes() == b"".join(wanted)
    assert file.digest.digest() == blake3(b"".join(wanted)).digest()


@FEW_FILES
@given(pieces)
def test_a_file_holds_its_pieces(tmp_path, sizes):
    write(tmp_path / "file", sizes)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_a_full_disk(tmp_path):
    """The error is raised, and no file stays open and no thread keeps running."""
    full = os.open("/dev/full", os.O_WRONLY)
    open_before, running = open_files(), threading.active_count()

    def write_much() -> None:
        with HashingWriter(tmp_path / "file") as file:
            os.dup2(full, file._file.fileno())
            for _ in range(10):
                file.write(b"x" * 100_000)

    with pytest.raises(OSError, match="No space left"):
        write_much()
    assert open_files() == open_before
    assert threading.active_count() <= running  # threads of other tests may end meanwhile
    os.close(full)


@pytest.mark.parametrize("size", [1, 10 * PART])
def test_a_disk_that_fails_at_the_end(size, tmp_path, monkeypatch):
    def fail(_file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)

    def write_some() -> None:
        with HashingWriter(tmp_path / "file") as file:
            file.write(b"x" * size)

    with pytest.raises(OSError, match="Input/output error"):
        write_some()
