"""Read, write and hash files: every file is written beside its place and renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from safetensors import SafetensorError

from a3cli.errors import A3Error, CannotRead, CannotWrite, kind_of
from a3cli.work.processes import results

if TYPE_CHECKING:
    import torch

Json = dict[str, Any]

UMASK = os.umask(0)  # can only be read by setting it: done once, before threads start

os.umask(UMASK)


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
        raise A3Error(f"{path} holds {kind_of(value)}, not a JSON object{then}")
    return value


def check_hash(path: Path, expected: str, remedy: str) -> None:
    """Check that `path` has the hash that its manifest recorded. Raises A3Error."""
    if not path.is_file():
        raise A3Error(f"{path} is missing; {remedy}")
    if hash_file(path) != expected:
        raise A3Error(f"{path} is not the file that its manifest recorded (its hash differs); {remedy}")


def check_hashes(expected: dict[Path, str], remedy: str, finished: Callable[[], object] = lambda: None) -> None:
    """Call `check_hash` for many files, on all cores: hashing releases the GIL. `finished` is called after each."""
    jobs = [partial(check_hash, path, value, remedy) for path, value in expected.items()]
    for _ in results(ThreadPoolExecutor(os.cpu_count()), jobs):
        finished()


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
