"""Files of weights: hashed and written beside what makes them, past the system's cache where that is possible."""

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a3cli.work import writer
from a3cli.work.writer import HashingWriter, open_past_cache

BLOCK = 2 * mmap.PAGESIZE
FEW_FILES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
pieces = st.lists(st.integers(0, 5) | st.integers(0, 3 * BLOCK) | st.sampled_from([BLOCK, 2 * BLOCK]), max_size=12)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a small file has many, and parts that are synced."""
    monkeypatch.setattr(writer, "BLOCK", BLOCK)
    monkeypatch.setattr(writer, "SYNCED_AT_ONCE", BLOCK)


@pytest.fixture
def past_cache(tmp_path):
    """Skips where there is no writing past the cache, or, as in memory, nothing but the cache."""
    path = tmp_path / "probe"
    path.write_bytes(b"")
    descriptor = open_past_cache(path)
    if descriptor is None:
        pytest.skip("this file system writes nothing past the system's cache")
    os.write(descriptor, mmap.mmap(-1, BLOCK))
    os.close(descriptor)
    if is_in_cache(path, 0):
        pytest.skip("this file system has all in the system's cache")


def is_in_cache(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


def write(path: Path, sizes: list[int], *, cached: bool) -> None:
    """Pieces of these sizes; what lies in the file then, and its hash, are those of the pieces."""
    wanted = [os.urandom(size) for size in sizes]
    with HashingWriter(path, cached=cached) as file:
        for piece in wanted:
            file.write(piece)
    assert path.read_bytes() == b"".join(wanted)
    assert file.digest.digest() == blake3(b"".join(wanted)).digest()


@FEW_FILES
@given(pieces, st.booleans())
def test_a_file_holds_its_pieces(tmp_path, sizes, cached):
    write(tmp_path / "file", sizes, cached=cached)


@FEW_FILES
@given(pieces, st.integers(1, BLOCK))
def test_a_system_may_take_a_part_and_refuse_the_rest(tmp_path, past_cache, sizes, most):
    """As a disk that is nearly full takes a part, and one with larger blocks refuses what lies between them."""
    put = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda file, data, offset: put(file, data[:most], offset))
        write(tmp_path / "file", sizes, cached=False)


def refuse_to_open(patch):
    opens = os.open

    def refusing(path, flags, *rest, **keywords):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opens(path, flags, *rest, **keywords)

    patch.setattr(os, "open", refusing)


def refuse_to_write(patch):
    put, past = os.pwrite, open_past_cache
    refused = set()

    def remembering(path):
        descriptor = past(path)
        refused.add(descriptor)
        return descriptor

    def refusing(file, data, offset):
        if file in refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return put(file, data, offset)

    patch.setattr(writer, "open_past_cache", remembering)
    patch.setattr(os, "pwrite", refusing)


def know_nothing_of_it(patch):
    patch.delattr(os, "O_DIRECT")


@pytest.mark.parametrize("refuse", [refuse_to_open, refuse_to_write, know_nothing_of_it])
def test_systems_that_refuse_it(tmp_path, past_cache, monkeypatch, refuse: Callable):
    refuse(monkeypatch)
    write(tmp_path / "file", [3, 5 * BLOCK, 7], cached=False)


def test_only_what_is_read_soon_stays_in_the_cache(tmp_path, past_cache):
    for cached in (False, True):
        path = tmp_path / str(cached)
        with HashingWriter(path, cached=cached) as file:
            file.write(os.urandom(8 * BLOCK))
        assert is_in_cache(path, 4 * BLOCK) == cached


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_writing_thread_meets_is_raised(tmp_path, monkeypatch, cached):
    """And nothing is left open or running."""
    full = os.open("/dev/full", os.O_WRONLY)
    put = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda _file, data, offset: put(full, data, offset))
    open_before, running = open_files(), threading.active_count()

    def write_much() -> None:
        with HashingWriter(tmp_path / "file", cached=cached) as file:
            if cached:
                os.dup2(full, file._file.fileno())
            for _ in range(10):
                file.write(b"x" * 100_000)

    with pytest.raises(OSError, match="No space left"):
        write_much()
    assert open_files() == open_before
    assert threading.active_count() <= running  # those of other tests may end meanwhile
    os.close(full)


@pytest.mark.parametrize("cached", [True, False])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, cached):
    def fail(_file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)

    def write_little() -> None:
        with HashingWriter(tmp_path / "file", cached=cached) as file:
            file.write(b"x")

    with pytest.raises(OSError, match="Input/output error"):
        write_little()
