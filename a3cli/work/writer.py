"""Write a weight file: hashing and writing run in threads while the next tensor is computed."""

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

Data = bytes | memoryview

# Bytes
WRITTEN_AT_ONCE = 1 << 20  # through the system's cache
SYNCED_AT_ONCE = 1 << 28
BLOCK = 1 << 22  # with O_DIRECT


class HashingWriter:
    """A new file with one thread for hashing and one for writing, since each takes as long as computing a tensor.

    At most `AHEAD` pieces wait. A file that is read soon is `cached`. Others bypass the system's cache where that is
    possible: it is less work, and the content of the cache stays.
    """

    AHEAD = 4

    def __init__(self, path: Path, *, cached: bool) -> None:
        self.digest = blake3()
        self._file = path.open("wb", buffering=0)
        past = None if cached else open_past_cache(path)
        self._disk: _Disk = _Cached(self._file) if past is None else _PastCache(past, self._file)
        self._hashing, self._writing = (ThreadPoolExecutor(1) for _ in range(2))
        self._pending: deque[tuple[Future[blake3], Future[None]]] = deque()

    def __enter__(self) -> "HashingWriter":
        return self

    def write(self, data: Data) -> None:
        """Queue a piece, whose memory must not change any more. Raises the OSError of an earlier piece."""
        while len(self._pending) >= self.AHEAD:
            self._wait()
        hashing, writing = self._hashing.submit(self.digest.update, data), self._writing.submit(self._disk.write, data)
        self._pending.append((hashing, writing))

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._pending and kind is None:
                self._wait()
            if kind is None:
                self._disk.finish()
        finally:
            for thread in (self._hashing, self._writing):
                thread.shutdown()
            self._disk.close()
            self._file.close()


def open_past_cache(path: Path) -> int | None:
    """Return a second descriptor of a file that bypasses the cache, or None if the system does not support it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


class _Disk(Protocol):
    """Writes one piece after another in one thread. `finish` returns when all are on the disk."""

    def write(self, data: Data) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class _Cached:
    """Writes through the system's cache, which a thread syncs meanwhile so that the disk is not idle until the end."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._syncing = ThreadPoolExecutor(1)
        self._unsynced, self._syncs = 0, list[Future[None]]()

    def write(self, data: Data) -> None:
        rest = memoryview(data)
        while rest:  # small pieces stay in the processor's cache, which is several times as fast
            rest = rest[self._file.write(rest[:WRITTEN_AT_ONCE]) :]
        self._unsynced += memoryview(data).nbytes
        if self._unsynced > SYNCED_AT_ONCE:
            self._sync()

    def _sync(self) -> None:
        self._syncs.append(self._syncing.submit(os.fsync, self._file.fileno()))
        self._unsynced = 0

    def finish(self) -> None:
        self._sync()
        for sync in self._syncs:  # an error of the disk is reported once, to the sync that meets it
            sync.result()

    def close(self) -> None:
        self._syncing.shutdown()


class _PastCache:
    """Bypasses the cache with whole blocks from page-aligned memory; one is written while the next one is filled."""

    def __init__(self, past: int, file: FileIO) -> None:
        self._past, self._file = past, file
        self._putting = ThreadPoolExecutor(1)
        self._blocks: deque[Any] = deque(np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8) for _ in range(2))
        self._puts: deque[Future[None]] = deque()
        self._filled = self._offset = 0

    def write(self, data: Data) -> None:
        rest = np.frombuffer(data, np.uint8)
        while rest.size:
            count = min(rest.size, BLOCK - self._filled)
            np.copyto(self._blocks[0][self._filled : self._filled + count], rest[:count])
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == BLOCK:
                self._next()

    def _next(self) -> None:
        block = self._blocks[0].data[: self._filled]
        self._puts.append(self._putting.submit(self._put, block, self._offset))
        self._blocks.rotate()
        self._offset, self._filled = self._offset + self._filled, 0
        while len(self._puts) >= len(self._blocks):
            self._puts.popleft().result()

    def _put(self, block: memoryview, offset: int) -> None:
        while block:
            try:
                count = os.pwrite(self._past, block, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Not a multiple of the disk's block size, as at the end of a file.
                count = os.pwrite(self._file.fileno(), block, offset)
            block, offset = block[count:], offset + count

    def finish(self) -> None:
        self._next()
        while self._puts:
            self._puts.popleft().result()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._putting.shutdown()
        os.close(self._past)
