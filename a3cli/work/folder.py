"""The work folder's contract: file names, manifests, fingerprints, atomic writes, the lock.

Stages meet only through these files. Every file is written beside its place and renamed, and a stage's
manifest is written last, so a folder with a manifest is a finished stage. Only this module builds these paths.

    source.json                      which checkpoint: folder or hub id, revision, fingerprint, small files' hashes
    calibration/progress.json        request and finished layers of an unfinished calibration
    calibration/hidden-000.bin …     the input of one layer during calibration; hidden-next.bin becomes the next one
    calibration/tokens.safetensors   the blocks [N, T]
    calibration/layer-000.safetensors …   statistics
    calibration/manifest.json        written last
    solution/layer-000.safetensors … projections and kept indices
    solution/manifest.json           written last
    .solution.a3-partial/            an unfinished solution; .solution.a3-progress.json lists its finished files
    channels/layer-000.json …        the order of greedy channel selection, reused by every later solution
    probes/best-stock.json …         measured sensitivities of a method and shape
    probes/progress.json, streams-{0,1}.bin   during the measurement
    pareto.json                      finished points of `a3 pareto`
    evaluation.json                  the figures that a recipe measured, and the export's hash
    .lock, .scratch/                 the lock of a writing stage; its temporary files
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

UMASK = os.umask(0)  # can only be read by setting it: done once, before threads start
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
        self.scratch = folder / ".scratch"  # removed when the command ends, at the latest when the next one starts

    def borrowed_by(self, folder: Path) -> "Work":
        """Return a work folder with its own lock and solution that reads this one's calibration."""
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
        """Return the path of the file that holds the input of `layer` for all blocks."""
        return self.calibration / f"hidden-{layer:03d}.bin"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process."""
        lock_file = self.folder / ".lock"
        with making(self.folder), holding(lock_file, f"work folder {self.folder}", "use another --work"):
            try:
                yield
            finally:
                if list(self.folder.iterdir()) == [lock_file]:
                    lock_file.unlink()


@contextmanager
def holding(lock_file: Path, what: str, otherwise: str) -> Iterator[None]:
    """Hold a lock. Raises A3Error if another process holds it. The lock ends with its process, so it is never stale."""
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
    """Lock an output folder and its draft against commands that use other work folders."""
    lock_file = target.with_name(f".{target.name}.a3-lock")
    with making(target.parent), holding(lock_file, str(target), "choose another folder"):
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def hash_file(path: Path) -> str:
    """Return the BLAKE3 hash of the whole file, in the form of `name_hash`."""
    digest = blake3()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return name_hash(digest)


def name_hash(digest: blake3) -> str:
    """Return a hash as manifests write it: `blake3:` and the hex digest that `b3sum` prints."""
    return f"blake3:{digest.hexdigest()}"


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder; remove it and its new parents at the end if they are empty, as after an error."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # stops at the first folder that is not empty
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
    """An unfinished folder: its finished files, and the information recorded for each.

    The record is a file beside the folder. Several threads may finish files at once.
    """

    def __init__(self, folder: Path, progress: Path, request: Json) -> None:
        self.folder, self._progress, self._request = folder, progress, request
        self._finished: dict[str, Json] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Keep the finished files if they belong to this request; otherwise start with an empty folder."""
        found = read_if_request_matches(self._progress, self._request)
        if found and self.folder.is_dir() and not self.folder.is_symlink():
            self._finished = found["finished"]
            self.drop_unfinished()
            log.info("resuming with %d finished files of %s", len(self._finished), self.folder)
        else:
            self.remove()
            self.folder.mkdir()

    def finished_info(self, name: str) -> Json | None:
        """Return what `finish` recorded for a file, or None if the file is unfinished or has changed since."""
        known = self._finished.get(name)
        if known is None:
            return None
        path = self.folder / name
        if path.is_file() and hash_file(path) == known["hash"]:
            return known
        log.warning("%s has changed since it was written; it is computed again", path)
        return None

    def finish(self, name: str, digest: str | None = None, **info: Any) -> Json:
        """Record that a file is complete, with its hash and `info` for later steps; return the record."""
        known = {**info, "hash": digest or hash_file(self.folder / name)}
        with self._lock:
            self._finished[name] = known
            write_manifest(self._progress, {"request": self._request, "finished": self._finished})
        return known

    def check_space(self, needed: int, what: str) -> None:
        """Call `check_space` for a folder that will hold `needed` bytes, minus the bytes that exist already."""
        check_space(self.folder.parent, needed - bytes_on_disk(self.folder.iterdir()), what)

    def drop_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in self._finished and not path.is_dir():
                path.unlink()

    def leave(self) -> None:
        """Keep the finished files for the next command; remove the folder if there are none."""
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
    `target`, and the next command with the same request resumes with them. Any other error leaves nothing.
    """
    partial, replaced = (target.with_name(f".{target.name}.a3-{what}") for what in ("partial", "replaced"))
    draft = Draft(partial, target.with_name(f".{target.name}.a3-progress.json"), request)
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
            partial.unlink(missing_ok=True)  # left by a killed process; or a link, which would be followed
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~UMASK)  # safetensors writes its files for the owner only
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def drop_leftovers(folder: Path) -> None:
    """Remove temporary files of a killed process: those of `replacing` and those of safetensors."""
    for pattern in (".*.partial", ".tmp*"):
        for path in folder.glob(pattern):
            path.unlink()


@contextmanager
def making_scratch(folder: Path) -> Iterator[None]:
    """Make an empty folder and remove it afterwards. Files of a killed process are removed first: the lock is held."""
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
    """Return the tensors of these names, or None if the file lacks one. Raises CannotRead if it cannot be read."""
    with open_tensors(path, remedy) as file:
        if not set(names) <= set(file.keys()):
            return None
        return {name: file.get_tensor(name) for name in names}


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file. Raises CannotRead or CannotWrite, depending on which file failed."""
    with reading(source):
        data = source.read_bytes()
    with writing(target):
        target.write_bytes(data)


def write_tensors(path: Path, tensors: "dict[str, torch.Tensor]") -> None:
    from safetensors.torch import save_file  # imports torch, which commands that only read configurations do not need

    with replacing(path) as partial:
        save_file(tensors, partial)


def read_json(path: Path, remedy: str = "") -> Json:
    """Return the JSON object in a file. Raises A3Error naming the file if it is missing or not a JSON object."""
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
    """Write a stage's manifest with a hash of its own content; return what was written."""
    sealed = {**value, "sha256": hash_json(value)}
    write_json(path, sealed)
    return sealed


def read_manifest(path: Path, remedy: str) -> Json:
    """Return a manifest. Raises A3Error if it is missing, malformed or altered."""
    return unaltered(read_json(path, remedy), path, remedy)


def unaltered(sealed: Json, path: Path, remedy: str) -> Json:
    """Return a manifest without its hash. Raises A3Error if the hash does not match the content."""
    if hash_json({key: value for key, value in sealed.items() if key != "sha256"}) != sealed.get("sha256"):
        raise A3Error(f"{path} was altered after it was written; {remedy}")
    return sealed


def read_if_request_matches(path: Path, request: Json, comparable: Callable[[Json], Json] = dict) -> Json | None:
    """Return a manifest written by the same request, or None if there is none or it is damaged.

    `comparable` returns the part of a request that decides whether two are the same.
    """
    found = read_undamaged(path)
    if found is None and path.exists():
        log.warning("%s has changed since it was written; it is computed again", path)
    return found if found and comparable(found["request"]) == comparable(request) else None


def read_undamaged(path: Path) -> Json | None:
    """Return a manifest, or None if it is missing, malformed or altered."""
    with suppress(A3Error):
        return read_manifest(path, "")
    return None


def differences(old: Json, new: Json, settings: str) -> str:
    """Return the names of differing entries of two requests; those of nested `settings` are listed one by one."""
    one, other = ({**request, **request[settings], settings: None} for request in (old, new))
    return name_differences(one, other)


def name_differences(one: Json, other: Json) -> str:
    """Return the differing keys, with those of nested objects: `seed, source (model.safetensors)`; empty if none."""
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
    """Check that `path` has the hash that its manifest recorded. Raises A3Error."""
    if not path.is_file():
        raise A3Error(f"{path} is missing; {remedy}")
    if hash_file(path) != expected:
        raise A3Error(f"{path} is not the file that its manifest recorded (its hash differs); {remedy}")


def check_hashes(expected: dict[Path, str], remedy: str) -> None:
    """Call `check_hash` for many files, on all cores: hashing releases the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for checked in [threads.submit(check_hash, path, value, remedy) for path, value in expected.items()]:
            checked.result()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Check that the file system of `folder` has `needed` bytes free. Raises CannotWrite."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotWrite(
            f"no disk space: {what} needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free; "
            "free some or choose another folder"
        )


def bytes_on_disk(paths: Iterable[Path]) -> int:
    """Return the disk usage of the files among `paths`, without holes."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


def versions() -> Json:
    """Return the versions to record in a manifest."""
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {
        "a3cli": __version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
    }


installed_version = cache(importlib.metadata.version)  # it reads a file at each call
