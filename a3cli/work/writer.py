"""Write a file and hash it at the same time."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

WRITTEN_AT_ONCE = 1 << 20  # bytes; so few stay in the processor's cache
SYNCED_AT_ONCE = 1 << 28  # bytes


class HashingWriter:
    """A new file. `digest` is the hash of all pieces; at the end of the block they are on the disk.

    Each piece is hashed in a thread while it is written. Another thread syncs the file meanwhile, so that the disk is
    not idle until the end.
    """

    def __init__(self, path: Path) -> None:
        self.digest = blake3()
        self._file = path.open("wb", buffering=0)
        self._hashing, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []
        self._unsynced = 0

    def __enter__(self) -> "HashingWriter":
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash one piece. Raises OSError."""
        hashed = self._hashing.submit(self.digest.update, data)
        rest = memoryview(data)
        self._unsynced += rest.nbytes
        while rest:
            rest = rest[self._file.write(rest[:WRITTEN_AT_ONCE]) :]
        hashed.result()
        if self._unsynced > SYNCED_AT_ONCE:
            self._sync()

    def _sync(self) -> None:
        self._syncs.append(self._syncing.submit(os.fsync, self._file.fileno()))
        self._unsynced = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._sync()
                for sync in self._syncs:  # each error of the disk is reported to one sync only
                    sync.result()
        finally:
            self._hashing.shutdown()
            self._syncing.shutdown()
            self._file.close()
