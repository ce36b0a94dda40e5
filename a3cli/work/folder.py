"""The work folder's contract: file names, manifests, fingerprints, atomic writes, the lock.

Stages meet only through these files. Every file is written beside its place and renamed, and a stage's
manifest is written last, so a folder with a manifest is a finished stage. Nobody else builds these paths.

    source.json                      which checkpoint: folder or hub id, revision, fingerprint, small files' hashes
    calibration/progress.json        request and finished layers of a calibration under way
    calibration/hidden-000.bin …     the input of one layer, while under way; hidden-next.bin becomes the next one
    calibration/tokens.safetensors   the blocks [N, T]
    calibration/layer-000.safetensors …   statistics
    calibration/manifest.json        written last
    solution/layer-000.safetensors … projections and kept indices
    solution/manifest.json           written last
    .solution.a3-partial/            the same under way, its finished files named in .solution.a3-progress.json
    channels/layer-000.json …        order in which greedy selection takes the MLP's channels, for every later solution
    probes/best-stock.json …         measured sensitivities of a method and shape
    probes/progress.json, streams-{0,1}.bin   while they are measured
    pareto.json                      points of a sweep over budgets under way
    evaluation.json                  what a recipe measured, and of which export
    .lock, .scratch/                 held while a stage writes; what it needs meanwhile
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from a3cli import __version__
from a3cli.errors import A3Error, CannotRead, CannotWrite, Interrupted, OutOfMemory

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Json = dict[str, Any]

UMASK = os.umask(0)  # can only be read by setting it: once, before there are threads
os.umask(UMASK)


class Work:
    """One work folder: its paths and its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source.json"
        self.calibration = folder / "calibration"
        self.solution = folder / "solution"
        self.calibration_manifest = self.calibration / "manifest.json"
        self.calibration_progress = self.calibration / "progress.json"
        self.solution_manifest = self.solution / "manifest.json"
        self.tokens = self.calibration / "tokens.safetensors"
        self.probes = folder / "probes"
        self.channels = folder / "channels"
        self.points = folder / "pareto.json"
        self.coming_hidden_states = self.calibration / "hidden-next.bin"
        self.evaluation = folder / "evaluation.json"
        self.verification = folder / "verification.json"
        self.scratch = folder / ".scratch"  # gone when the command ends, or else when the next one begins

    def borrowed_by(self, folder: Path) -> "Work":
        """A work folder of its own lock and solution that reads this one's calibration."""
        other = Work(folder)
        other.source, other.calibration, other.tokens = self.source, self.calibration, self.tokens
        other.calibration_manifest, other.calibration_progress = self.calibration_manifest, self.calibration_progress
        other.probes, other.channels = self.probes, self.channels
        return other

    def statistics(self, layer: int) -> Path:
        return self.calibration / layer_file(layer)

    def channel_order(self, layer: int) -> Path:
        return self.channels / f"layer-{layer:03d}.json"

    def layer_solution(self, layer: int) -> Path:
        return self.solution / layer_file(layer)

    def hidden_states(self, layer: int) -> Path:
        """The file that holds the input of `layer` for all blocks."""
        return self.calibration / f"hidden-{layer:03d}.bin"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process."""
        lock_file = self.folder / ".lock"
        with making(self.folder), holding(lock_file, f"work folder {self.folder}", "use another --work"):
            try:
                yield
            finally:
                if list(self.folder.iterdir()) == [lock_file]:
                    lock_file.unlink()


@contextmanager
def holding(lock_file: Path, what: str, otherwise: str) -> Iterator[None]:
    """Hold a lock, which dies with its process, so that none is ever stale. Raises A3Error if another has it."""
    lock = FileLock(lock_file)
    with writing(lock_file):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise A3Error(f"{what} is in use by another a3 process; wait for it, or {otherwise}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def holding_target(target: Path) -> Iterator[None]:
    """Hold a folder that is to be written and its draft, which commands with other work folders could write to."""
    lock_file = target.with_name(f".{target.name}.a3-lock")
    with making(target.parent), holding(lock_file, str(target), "choose another folder"):
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def hash_file(path: Path) -> str:
    """BLAKE3 of the whole file, as `name_hash` has it."""
    digest = blake3()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return name_hash(digest)


def name_hash(digest: blake3) -> str:
    """The hash of a file's content with the name of its function, as manifests have it: `b3sum` prints the rest."""
    return f"blake3:{digest.hexdigest()}"


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder; it and its new parents go again if they are empty at the end, as after an error."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # the first that holds something ends it
            for path in missing:
                path.rmdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise A3Error naming `path` if it cannot be written: disk full, file too large, no permission."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotWrite(f"{path} cannot be written: {error}; fix that or choose another folder") from error


@contextmanager
def reading(path: Path, remedy: str = "restore the file") -> Iterator[None]:
    """Raise CannotRead naming `path` if the block fails to read it: an I/O error, or a file that is damaged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotRead(f"{path} cannot be read: {error}; check the disk, or {remedy}") from error


class Draft:
    """A folder under way: which of its files are finished, and what was learnt when they were made.

    Kept in a file beside the folder. Threads may finish files side by side.
    """

    def __init__(self, folder: Path, progress: Path, request: Json) -> None:
        self.folder, self._progress, self._request = folder, progress, request
        self._finished: dict[str, Json] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Go on with what is there if it is of this request, else with an empty folder."""
        found = read_if_of(self._progress, self._request)
        if found and self.folder.is_dir() and not self.folder.is_symlink():
            self._finished = found["finished"]
            self.drop_unfinished()
            log.info("resuming with %d finished files of %s", len(self._finished), self.folder)
        else:
            self.remove()
            self.folder.mkdir()

    def learnt(self, name: str) -> Json | None:
        """What `finish` was told of a file that is still as it was then."""
        known = self._finished.get(name)
        if known is None:
            return None
        path = self.folder / name
        if path.is_file() and hash_file(path) == known["hash"]:
            return known
        log.warning("%s has changed since it was written; it is computed again", path)
        return None

    def finish(self, name: str, digest: str | None = None, **learnt: Any) -> Json:
        """Record that a file is whole, with its hash and what later steps want to know; returns this."""
        known = {**learnt, "hash": digest or hash_file(self.folder / name)}
        with self._lock:
            self._finished[name] = known
            write_manifest(self._progress, {"request": self._request, "finished": self._finished})
        return known

    def check_space(self, needed: int, what: str) -> None:
        """`check_space` for a folder that is to hold `needed` bytes in the end, of which some may be there."""
        check_space(self.folder.parent, needed - bytes_on_disk(self.folder.iterdir()), what)

    def drop_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in self._finished and not path.is_dir():
                path.unlink()

    def leave(self) -> None:
        """For the next command to go on with, if there is anything that it could use."""
        if self._finished:
            self.drop_unfinished()
        else:
            self.remove()

    def forget(self) -> None:
        self._progress.unlink(missing_ok=True)

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
    `target`, and the next command with the same request goes on with them. Any other error leaves nothing.
    """
    partial, replaced = (target.with_name(f".{target.name}.a3-{what}") for what in ("partial", "replaced"))
    draft = Draft(partial, target.with_name(f".{target.name}.a3-progress.json"), request)
    with making(target.parent):
        shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed: a lock is held
        try:
            with writing(target):
                draft.begin()
            yield draft
            with writing(target):
                if target.exists():  # moved, not removed: half removed it might still look whole
                    target.rename(replaced)
                partial.rename(target)
                draft.forget()
        except (Interrupted, KeyboardInterrupt, CannotRead, CannotWrite, OutOfMemory, OSError, SafetensorError):
            draft.leave()
            raise
        except BaseException:
            draft.remove()
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; it takes `path`'s place only if the block succeeds."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which would be followed
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~UMASK)  # safetensors writes its files for the owner only
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def drop_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing: by `replacing`, and inside of it by safetensors."""
    for pattern in (".*.partial", ".tmp*"):
        for path in folder.glob(pattern):
            path.unlink()


@contextmanager
def making_scratch(folder: Path) -> Iterator[None]:
    """An empty folder that is gone afterwards. What a killed process left there goes first: the lock is held."""
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, value: Json) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


@contextmanager
def open_tensors(path: Path, remedy: str) -> Iterator[Any]:
    """Yield an open safetensors file. Raises CannotRead if it cannot be opened, or the block cannot read from it."""
    from safetensors import safe_open

    with reading(path, remedy), safe_open(path, framework="pt") as file:
        yield file


def read_tensors(path: Path, remedy: str) -> "dict[str, torch.Tensor]":
    """Return all tensors of a file. Raises CannotRead if it cannot be read."""
    with open_tensors(path, remedy) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary


def read_named(path: Path, names: Sequence[str], remedy: str) -> "dict[str, torch.Tensor] | None":
    """The tensors of these names; None if the file lacks one. Raises CannotRead if it cannot be read."""
    with open_tensors(path, remedy) as file:
        if not set(names) <= set(file.keys()):
            return None
        return {name: file.get_tensor(name) for name in names}


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file. Raises CannotRead or CannotWrite, whichever of the two files it was."""
    with reading(source):
        data = source.read_bytes()
    with writing(target):
        target.write_bytes(data)


def write_tensors(path: Path, tensors: "dict[str, torch.Tensor]") -> None:
    from safetensors.torch import save_file  # brings torch: what only looks at configurations does without

    with replacing(path) as partial:
        save_file(tensors, partial)


def read_json(path: Path, remedy: str = "") -> Json:
    """A JSON object from a file. Raises A3Error naming the file if it is missing or no JSON object."""
    then = remedy and f"; {remedy}"
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise A3Error(f"{path} is missing{then}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise A3Error(f"{path} cannot be read as JSON: {error}{then}") from error
    if not isinstance(value, dict):
        raise A3Error(f"{path} holds {type(value).__name__}, not a JSON object{then}")
    return value


def write_manifest(path: Path, value: Json) -> Json:
    """Write a stage's closing manifest with a hash over itself; returns what was written."""
    sealed = {**value, "sha256": hash_json(value)}
    write_json(path, sealed)
    return sealed


def read_manifest(path: Path, remedy: str) -> Json:
    """A manifest as it was written. Raises A3Error if it is missing, malformed or altered."""
    return unaltered(read_json(path, remedy), path, remedy)


def unaltered(sealed: Json, path: Path, remedy: str) -> Json:
    """What was read from a manifest. Raises A3Error if its own hash is not that of its content."""
    if hash_json({key: value for key, value in sealed.items() if key != "sha256"}) != sealed.get("sha256"):
        raise A3Error(f"{path} was altered after it was written; {remedy}")
    return sealed


def read_if_of(path: Path, request: Json, comparable: Callable[[Json], Json] = dict) -> Json | None:
    """What was kept to go on with: a manifest that the same request wrote, unless it is damaged.

    `comparable` returns the part of a request that decides whether two are the same.
    """
    found = read_undamaged(path)
    if found is None and path.exists():
        log.warning("%s has changed since it was written; it is computed again", path)
    return found if found and comparable(found["request"]) == comparable(request) else None


def read_undamaged(path: Path) -> Json | None:
    """Return a manifest as it was written, None if it is missing, malformed or altered."""
    with suppress(A3Error):
        return read_manifest(path, "")
    return None


def differences(old: Json, new: Json, settings: str) -> str:
    """Names of what differs between two requests, those of their nested `settings` one by one."""
    one, other = ({**request, **request[settings], settings: None} for request in (old, new))
    return name_differences(one, other)


def name_differences(one: Json, other: Json) -> str:
    """Keys whose values differ, with those inside of objects: `seed, source (model.safetensors)`; empty if none do."""
    names = []
    for key in sorted(one.keys() | other.keys()):
        old, new = one.get(key), other.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            inner = sorted(set(_differing_leaves(old, new)))
            names.append(f"{key} ({', '.join(inner[:3])}{', …' if len(inner) > 3 else ''})")
        elif old != new:
            names.append(key)
    return ", ".join(names)


def _differing_leaves(one: Json, other: Json) -> Iterator[str]:
    for key in one.keys() | other.keys():
        old, new = one.get(key), other.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing_leaves(old, new)
        elif old != new:
            yield str(key)


def check_hash(path: Path, expected: str, remedy: str) -> None:
    """Raise A3Error unless `path` still has the content that its manifest recorded."""
    if not path.is_file():
        raise A3Error(f"{path} is missing; {remedy}")
    if hash_file(path) != expected:
        raise A3Error(f"{path} is not the file that its manifest recorded (its hash differs); {remedy}")


def check_hashes(expected: dict[Path, str], remedy: str) -> None:
    """`check_hash` for many files, on all cores: hashing lets other threads run."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for checked in [threads.submit(check_hash, path, value, remedy) for path, value in expected.items()]:
            checked.result()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise CannotWrite unless the file system of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotWrite(
            f"no disk space: {what} needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free; "
            "free some or choose another folder"
        )


def bytes_on_disk(paths: Iterable[Path]) -> int:
    """What the files among these take, holes left out."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


def versions() -> Json:
    """What an artifact was made with, for its manifest."""
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {
        "a3cli": __version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
    }


installed_version = cache(importlib.metadata.version)  # reads a file each time
