"""An unfinished folder beside its place: its finished files are kept for the next command with the same request."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from a3cli.errors import CannotRead, CannotWrite, Interrupted, OutOfMemory
from a3cli.work.files import Json, bytes_on_disk, check_space, hash_file, making, writing
from a3cli.work.processes import StillRunning
from a3cli.work.record import Record

log = logging.getLogger(__name__)


class Draft:
    """An unfinished folder, and beside it the record of its finished files: their hashes, and what later steps need."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self._record = folder, record

    def begin(self) -> None:
        """Keep the finished files if they belong to this request; otherwise start with an empty folder."""
        if self.folder.is_dir() and not self.folder.is_symlink() and self._record.resume():
            self.drop_unfinished()
            log.info("resuming with %d finished files of %s", len(self._record.steps), self.folder)
        else:
            self.remove()
            self.folder.mkdir()

    def finished_info(self, name: str) -> Json | None:
        """Return what `finish` recorded for a file, or None if the file is unfinished or has changed since."""
        known = self._record.steps.get(name)
        if known is None:
            return None
        path = self.folder / name
        if path.is_file() and hash_file(path) == known["hash"]:
            return known
        log.warning("%s has changed since it was written; it is computed again", path)
        return None

    def finish(self, name: str, digest: str | None = None, **info: Any) -> Json:
        """Record that a file is complete, with its hash and `info` for later steps; return the record."""
        return self._record.finish(name, **info, hash=digest or hash_file(self.folder / name))

    def check_space(self, needed: int, what: str) -> None:
        """Call `check_space` for a folder that will hold `needed` bytes, minus the bytes that exist already."""
        check_space(self.folder.parent, needed - bytes_on_disk(self.folder.iterdir()), what)

    def drop_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in self._record.steps and not path.is_dir():
                path.unlink()

    def leave(self) -> None:
        """Keep the finished files for the next command; remove the folder if there are none."""
        if self._record.steps:
            self.drop_unfinished()
        else:
            self.remove()

    def forget(self) -> None:
        self._record.forget()

    def remove(self) -> None:
        self.forget()
        if self.folder.is_symlink():
            self.folder.unlink()
        elif self.folder.exists():
            shutil.rmtree(self.folder)


@contextmanager
def drafting(target: Path, request: Json) -> Iterator[Draft]:
    """Yield the draft of a folder that takes `target`'s place only if the block succeeds.

    If the process is killed or interrupted, the disk is full, or a file cannot be read, its finished files stay beside
    `target`, and the next command with the same request resumes with them. Any other error leaves nothing.
    """
    partial, replaced = (target.with_name(f".{target.name}.a3-{what}") for what in ("partial", "replaced"))
    draft = Draft(partial, Record(target.with_name(f".{target.name}.a3-progress.json"), request))
    with making(target.parent):
        shutil.rmtree(replaced, ignore_errors=True)  # left by a killed process: the lock is held
        try:
            with writing(target):
                draft.begin()
            yield draft
            with writing(target):
                if target.exists():  # moved, not removed: half removed, it could look complete
                    target.rename(replaced)
                partial.rename(target)
                draft.forget()
        except StillRunning:  # threads may be writing: begin() drops what they do not finish
            raise
        except (Interrupted, KeyboardInterrupt, CannotRead, CannotWrite, OutOfMemory, OSError, SafetensorError):
            draft.leave()
            raise
        except BaseException:
            draft.remove()
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)
