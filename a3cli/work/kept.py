"""Results kept in the work folder for later commands, each by everything that it was made from."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from a3cli.work.files import Json, hash_file, hash_json, read_tensors, write_tensors
from a3cli.work.record import Record

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

REMEDY = "remove it and rerun the same command, which computes it again"
_writing = threading.Lock()


class Kept:
    """What was found of one layer, or of the source: a record of figures, and beside it a file for each set of tensors.

    All results belong to the `request`, and each has what else it was made from, `made_from`. The results of another
    request are removed. Threads may use the same layer.
    """

    def __init__(self, folder: Path, name: str, request: Json) -> None:
        self._folder, self._name, self._request = folder, name, request

    def figures(self, made_from: Json, compute: Callable[[], Json]) -> Json:
        """Return the result if it is known; otherwise compute and keep it."""
        known = self._known(made_from)
        return self._keep(made_from, compute()) if known is None else known

    def tensors(
        self, made_from: Json, compute: "Callable[[], tuple[dict[str, torch.Tensor], Json]]"
    ) -> "tuple[dict[str, torch.Tensor], Json]":
        """Return tensors and their description if they are known; otherwise compute and keep them."""
        found = self.find_tensors(made_from)
        if found is None:
            found = compute()
            self.keep_tensors(made_from, *found)
        return found

    def find_tensors(self, made_from: Json) -> "tuple[dict[str, torch.Tensor], Json] | None":
        """Return tensors and their description if they are known; a file that has changed is not read."""
        path, known = self._file(made_from), self._known(made_from)
        if known is None or not path.is_file():
            return None
        if hash_file(path) != known["hash"]:
            log.warning("%s has changed since it was written; it is computed again", path)
            return None
        return read_tensors(path, REMEDY), known["description"]

    def keep_tensors(self, made_from: Json, tensors: "dict[str, torch.Tensor]", description: Json) -> None:
        path = self._file(made_from)
        with _writing:
            record = self._record()  # first: it may remove the files of another request
            write_tensors(path, tensors)
            record.finish(hash_json(made_from), hash=hash_file(path), description=description)

    def _file(self, made_from: Json) -> Path:
        return self._folder / f"{self._name}-{hash_json(made_from)[:16]}.safetensors"

    def _known(self, made_from: Json) -> Json | None:
        with _writing:
            return self._record().steps.get(hash_json(made_from))

    def _keep(self, made_from: Json, found: Json) -> Json:
        with _writing:
            return self._record().finish(hash_json(made_from), **found)

    def _record(self) -> Record:
        """Return the record as it is on disk; an empty one if that is damaged or of another request."""
        self._folder.mkdir(exist_ok=True)
        record = Record(self._folder / f"{self._name}.json", self._request)
        if not record.resume():
            for path in self._folder.glob(f"{self._name}[.-]*"):
                path.unlink()
        return record
