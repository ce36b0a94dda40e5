"""The one way to resume: a record of finished steps, for the next command with the same request.

A request is everything that a result depends on, as JSON: equal requests give equal bytes.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3cli.errors import A3Error
from a3cli.work.files import Json
from a3cli.work.sealed import read_if_request_matches, read_manifest, write_manifest

log = logging.getLogger(__name__)


class Record:
    """The finished steps of unfinished work by name, each with what later steps need; a sealed file.

    Several threads may finish steps at once.
    """

    def __init__(self, file: Path, request: Json) -> None:
        self.file, self.request = file, request
        self.steps: dict[str, Json] = {}
        self._lock = threading.Lock()

    def resume(self, comparable: Callable[[Json], Json] = dict) -> bool:
        """Take over the steps in the file if they belong to this request; return whether they do.

        `comparable` returns the part of a request that decides whether two are the same. A damaged file is ignored,
        with a warning.
        """
        found = read_if_request_matches(self.file, self.request, comparable)
        if found is None or "finished" not in found:
            return False
        self._take(found)
        return True

    def resume_checked(self, remedy: str) -> str:
        """Take over the steps in the file, whatever their request, and return the file's own hash.

        Raises A3Error for a damaged file, and for one of another version of a3.
        """
        found = read_manifest(self.file, remedy)
        if "finished" not in found:
            raise A3Error(f"{self.file} was written by another version of a3; {remedy}")
        self._take(found)
        return str(found["sha256"])

    def _take(self, found: Json) -> None:
        self.request, self.steps = found["request"], found["finished"]

    def finish(self, step: str, **info: Any) -> Json:
        """Record that a step is finished, and return its information."""
        with self._lock:
            self.steps[step] = info
            write_manifest(self.file, {"request": self.request, "finished": self.steps})
        return info

    def forget(self) -> None:
        self.steps = {}
        self.file.unlink(missing_ok=True)


def computed_once(file: Path, request: Json, compute: Callable[[], Json]) -> Json:
    """Return the result in a file if it belongs to this request; otherwise compute it and write the file."""
    found = read_if_request_matches(file, request)
    if found is not None and "result" in found:  # an earlier version used another name
        return dict(found["result"])
    result = compute()
    file.parent.mkdir(exist_ok=True)
    write_manifest(file, {"request": request, "result": result})
    return result
