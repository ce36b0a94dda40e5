"""Safetensors checkpoints: found, checked, read lazily by name, written as a stream.

A `Checkpoint` never holds weights: each read opens its shard, maps the tensor and lets go, so resident
memory is what the caller keeps. `write_shard` takes one tensor at a time, so a shard may be larger than
memory.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from a3cli.errors import A3Error, CannotRead
from a3cli.models.hub import INDEX, METADATA_FILES, SINGLE, find_checkpoint, read_config, read_index, refuse_adapter
from a3cli.work.files import Json, hash_file, hash_json, name_hash, reading
from a3cli.work.writer import HashingWriter

if TYPE_CHECKING:
    from typing_extensions import Buffer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# JSON files that describe weights which an export does not hold: other formats' indexes and sizes, adapters.
STALE_FILES = ("*.index.json", "params.json", "adapter_*")
# A shard's content is sampled at this many evenly spaced places for its fingerprint.
SAMPLED_ABOVE = 1_000_000_000  # bytes of weights; up to there hashing takes a second at most
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 16, 65536
COPIED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lives and what it is; `bytes` is its size in its stored dtype, `offset` where they begin.

    `stored` is its name in the file, which base-model checkpoints write without the decoder's prefix.
    """

    stored: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    offset: int


class Checkpoint:
    """A local Hugging Face folder with safetensors weights.

    `config` is the raw `config.json`, `tensors` maps names to `TensorInfo` in file order. Opening reads
    headers only. Raises A3Error for a missing, truncated, quantised or pickle-only checkpoint, for one with an adapter,
    and for files that are links out of the folder unless `follow_symlinks`; `links_out` tells whether there are any.
    """

    def __init__(
        self, folder: Path, *, name: str | None = None, revision: str | None = None, follow_symlinks: bool = False
    ) -> None:
        self.links_out = check_links(folder, follow=follow_symlinks)
        refuse_adapter(folder)
        self.folder = folder
        self.name = name or str(folder)
        self.revision = revision
        self.config = read_config(folder, self.name)
        self.shards = find_shards(folder, self.name)
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for tensor, info in read_header(shard).items():
                if tensor in self.tensors:
                    raise A3Error(
                        f"tensor {tensor} is in two shards of {folder}; the checkpoint is damaged, download it again"
                    )
                self.tensors[tensor] = info

    def read(self, tensor: str) -> torch.Tensor:
        """One tensor in its stored dtype, a view of the mapped file: don't write to it."""
        info = self.info(tensor)
        try:
            with safe_open(info.file, framework="pt") as shard:
                value: torch.Tensor = shard.get_tensor(info.stored)
        except (SafetensorError, OSError) as error:  # it was whole when it was opened
            raise CannotRead(f"{info.file}: tensor {tensor} cannot be read ({error}); download it again") from error
        return value

    def read_ahead(self, tensor: str) -> None:
        """Ask the system to have a tensor's pages in its cache soon, if it takes such advice."""
        info = self.info(tensor)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), info.file.open("rb") as file:  # who reads it tells what is wrong
                os.posix_fadvise(file.fileno(), info.offset, info.bytes, os.POSIX_FADV_WILLNEED)

    def info(self, tensor: str) -> TensorInfo:
        """Raises A3Error if the checkpoint has no such tensor."""
        if tensor not in self.tensors:
            raise A3Error(f"{self.name} has no tensor {tensor}; use the config.json of this checkpoint")
        return self.tensors[tensor]

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """Return the same checkpoint with tensors under the names that `names` gives to those it holds now."""
        other = copy.copy(self)
        other.tensors = {names[tensor]: info for tensor, info in self.tensors.items()}
        return other

    @property
    def stored_otherwise(self) -> bool:
        """Whether tensors are stored under other names than their model's class has."""
        return any(info.stored != name for name, info in self.tensors.items())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def parameters(self) -> int:
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())

    def fingerprint(self, *, full: bool = False) -> Json:
        """What identifies the content: config, and of each shard all, or samples of a large checkpoint's.

        `full` hashes all of a large one, too.
        """
        identify = hash_file if self.bytes() <= SAMPLED_ABOVE else fingerprint_shard
        found = {"config.json": hash_json(self.config), "shards": self._of_shards(identify)}
        return found | ({"in_full": self._of_shards(hash_file)} if full else {})

    def _of_shards(self, identify: Callable[[Path], str]) -> Json:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing lets other threads run
            return dict(zip((shard.name for shard in self.shards), threads.map(identify, self.shards), strict=True))

    def small_files(self) -> dict[str, Path]:
        """Tokenizer, generation config, chat template, card, licence: what lies beside config and weights, by name."""
        files = {path for pattern in METADATA_FILES for path in self.folder.glob(pattern) if path.is_file()}
        left_out = ("config.json", *STALE_FILES)
        return {path.name: path for path in sorted(files) if not any(path.match(pattern) for pattern in left_out)}

    def hash_small_files(self) -> Json:
        return {name: hash_file(path) for name, path in self.small_files().items()}


def resolve_model(
    model: str, revision: str | None = None, *, follow_symlinks: bool = False, cached_only: bool = False
) -> Checkpoint:
    """Open a local folder, or a hub id through the hub's cache (only what a3 needs is downloaded).

    Raises A3Error if there is neither, or the hub cannot be reached; with `cached_only` the hub is not asked.
    """
    folder = find_checkpoint(model, revision, cached_only=cached_only)
    if Path(model).is_dir():
        return Checkpoint(folder, follow_symlinks=follow_symlinks)
    return Checkpoint(folder, name=model, revision=folder.name, follow_symlinks=follow_symlinks)


def check_links(folder: Path, *, follow: bool) -> bool:
    """Tell whether a file that may be read is a link out of the folder. Raises A3Error if so, unless `follow`.

    The hub's cache links from `snapshots/<commit>` to its own `blobs`.
    """
    links_out = False
    home = folder.resolve()
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in sorted(path for pattern in ("*.safetensors", *METADATA_FILES) for path in folder.glob(pattern)):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            links_out = True
            if not follow:
                raise A3Error(
                    f"{path} is a symbolic link out of its folder, and an export would publish what it points to; put "
                    "the file itself there, or allow it with --follow-symlinks (of a3 calibrate, plan and eval)"
                )
        if not path.is_file() and not path.is_dir():
            raise A3Error(f"{path} is not a regular file; put the file itself there")
    return links_out


def find_shards(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint, in name order: those that transformers would load."""
    single = folder / SINGLE
    if (folder / INDEX).is_file():
        weight_map = read_index(folder)
        shards = [folder / file for file in sorted(set(weight_map.values()))]
        if single.is_file() and shards != [single]:
            check_same_tensors(single, shards, weight_map)
            return [single]
        for shard in shards:
            if not shard.is_file():
                raise A3Error(f"{shard} is missing; download the checkpoint again")
        return shards
    if single.is_file():
        return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise A3Error(f"{name} has only pickle weights (.bin), which a3 never loads; convert it to safetensors first")
    raise A3Error(f"{name} has no {SINGLE} and no {INDEX}; give a folder or Hub id with safetensors weights")


def check_same_tensors(single: Path, shards: list[Path], weight_map: Mapping[str, str]) -> None:
    """Raise A3Error if a single weight file holds other tensors than the shards of the index beside it.

    Where no shard is there, the index's names are compared; of large files, the beginning of each tensor.
    """
    ours = read_header(single)
    there = [shard for shard in shards if shard.is_file()]
    theirs = {name: info for shard in there for name, info in read_header(shard).items()}
    names = theirs if there else weight_map
    problem = next((f"only one has {name}" for name in sorted(ours.keys() ^ names.keys())), None)
    if there and problem is None:
        most = None if sum(info.bytes for info in ours.values()) <= SAMPLED_ABOVE else FINGERPRINT_BYTES
        problem = next((f"{name} differs" for name in ours if not same_content(ours[name], theirs[name], most)), None)
    if problem:
        raise A3Error(
            f"{single} and {single.parent / INDEX} ({len(shards)} shards) hold different tensors ({problem}), and "
            "loaders differ in which they read; remove the wrong one"
        )


def same_content(one: TensorInfo, other: TensorInfo, most: int | None = None) -> bool:
    """Tell whether two tensors have the same shape, dtype and bytes, or the same first `most` bytes."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    end = one.bytes if most is None else min(most, one.bytes)
    for start in range(0, end, COPIED_AT_ONCE):
        size = min(COPIED_AT_ONCE, end - start)
        ours, theirs = (_read(each, each.offset + start, size).view(torch.uint8) for each in (one, other))
        if not torch.equal(ours, theirs):
            return False
    return True


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """Tensors of one file, in the order of their bytes. Raises A3Error if it is truncated or malformed."""
    try:
        with safe_open(shard, framework="pt"):  # the library's own checks: offsets, sizes, file length
            pass
        encoded = header_bytes(shard)
        header = json.loads(encoded)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise A3Error(f"{shard} is truncated or not a safetensors file ({error}); download it again") from error
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        offset = 8 + len(encoded) + start
        dtype = find_dtype(entry["dtype"], name, str(shard))
        infos[name] = TensorInfo(name, shard, tuple(entry["shape"]), dtype, end - start, offset)
    return infos


def find_dtype(name: str, tensor: str, where: str) -> torch.dtype:
    """Return the dtype of a safetensors header's `name`. Raises A3Error for one that a3 does not read."""
    if name not in DTYPES:
        raise A3Error(f"{where}: tensor {tensor} is {name}; a3 reads {', '.join(DTYPES)}, not quantised")
    return DTYPES[name]


def header_bytes(shard: Path) -> bytes:
    with shard.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def fingerprint_shard(shard: Path) -> str:
    """BLAKE3 over size, header and 16 evenly spaced samples of 64 KiB: cheap on a 140 GB checkpoint.

    A shard of up to 1 MiB is covered wholly. In a larger one a flipped bit between the samples goes unnoticed, except
    with --full-check; what an export writes is hashed in full.
    """
    with reading(shard, "download it again"), shard.open("rb") as file:
        size = shard.stat().st_size
        digest = blake3(str(size).encode() + header_bytes(shard))
        for i in range(FINGERPRINT_SAMPLES):
            file.seek(i * max(0, size - FINGERPRINT_BYTES) // (FINGERPRINT_SAMPLES - 1))
            digest.update(file.read(FINGERPRINT_BYTES))
    return f"sampled-{name_hash(digest)}"


def check_finite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raise A3Error if a weight has a NaN or Inf."""
    if not is_finite(tensor):
        raise A3Error(f"{where}: tensor {name} has NaN or Inf values; the checkpoint is damaged, download it again")


def is_finite(tensor: torch.Tensor) -> bool:
    """In one pass and without a temporary: extremes are NaN where any value is."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that an export will write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Tensors in order, split so that no shard exceeds `max_bytes` (a larger tensor gets one of its own)."""
    shards: list[list[PlannedTensor]] = []
    size = max_bytes + 1
    for tensor in tensors:
        if size + tensor.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def shard_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_shard(
    path: Path, tensors: list[PlannedTensor], values: Iterator[Iterable[torch.Tensor]], *, cached: bool = True
) -> str:
    """Write one safetensors file, tensor by tensor; returns its hash.

    `values` yields the tensors in the planned order, each as pieces: rows that follow one another. `cached`: it is read
    soon. Raises ValueError if one differs from its plan.
    """
    offset, header = 0, {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        entry: Any = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        header[tensor.name] = entry
        offset += tensor.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with HashingWriter(path, cached=cached) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor, pieces in zip(tensors, values, strict=True):
            left = tensor.bytes
            for piece in pieces:
                left -= piece.nbytes
                if left < 0 or piece.shape[1:] != tensor.shape[1:] or piece.dtype != tensor.dtype:
                    raise ValueError(f"planned {tensor}, got {tuple(piece.shape)} {piece.dtype}")
                file.write(tensor_bytes(piece))
            if left:
                raise ValueError(f"planned {tensor}, got {left} bytes less")
    return name_hash(file.digest)


def stored_rows(info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor as it lies in its file, some rows at a time. Raises A3Error if it is not all there."""
    if not info.shape or not info.bytes:
        yield _read(info, info.offset, info.bytes).view(info.shape)
        return
    of_row = info.bytes // info.shape[0]
    at_once = max(1, COPIED_AT_ONCE // of_row)
    for start in range(0, info.shape[0], at_once):
        count = min(at_once, info.shape[0] - start)
        yield _read(info, info.offset + start * of_row, count * of_row).view(count, *info.shape[1:])


def _read(info: TensorInfo, offset: int, size: int) -> torch.Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(offset)
            whole = fill(file, buffer.numpy().data)
    except OSError as error:
        raise CannotRead(f"{info.file} cannot be read: {error}; download it again") from error
    if not whole:  # it was when it was opened
        raise CannotRead(f"{info.file} is truncated; download it again")
    return buffer.view(info.dtype)


def fill(file: RawIOBase, buffer: "Buffer") -> bool:
    """Read a file until a buffer is full; False if it ends before. The system reads at most 2 GiB at once."""
    rest = memoryview(buffer)
    while rest and (count := file.readinto(rest)):
        rest = rest[count:]
    return not rest


def write_index(path: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    index = {
        "metadata": {"total_size": sum(t.bytes for tensors in shards.values() for t in tensors)},
        "weight_map": {t.name: shard for shard, tensors in shards.items() for t in tensors},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
