"""Find, check and read a safetensors checkpoint, lazily by tensor name.

A `Checkpoint` holds no weights: each read opens the shard and maps one tensor, so resident memory is what the caller
keeps.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from a3cli.errors import A3Error, CannotRead
from a3cli.models.families.wrappers import decoder_config
from a3cli.models.hub import INDEX, METADATA_FILES, SINGLE, find_checkpoint, read_config, read_index, refuse_adapter
from a3cli.work.files import Json, hash_file, hash_json, name_hash, reading

if TYPE_CHECKING:
    from typing_extensions import Buffer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# JSON files that describe weights which an export does not hold: other formats' indexes and sizes, adapters.
STALE_FILES = ("*.index.json", "params.json", "adapter_*")
# A shard's content is sampled at this many evenly spaced places for its fingerprint.
SAMPLED_ABOVE = 1_000_000_000  # bytes of weights; up to there hashing takes a second at most
FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 16, 65536
COPIED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors file: its name there, shape, dtype, size in bytes and the offset of its first byte.

    `stored`, the name in the file, lacks the decoder's prefix in a base-model checkpoint.
    """

    stored: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    offset: int


class Checkpoint:
    """A local Hugging Face folder with safetensors weights.

    `raw_config` is config.json, `config` the part of it that describes the decoder, `tensors` maps names to
    `TensorInfo` in file order. Opening reads headers only. Raises A3Error for a missing, truncated, quantised or
    pickle-only checkpoint, for one with an adapter, and for files that are links out of the folder unless
    `follow_symlinks`; `links_out` tells whether there are any.
    """

    def __init__(
        self, folder: Path, *, name: str | None = None, revision: str | None = None, follow_symlinks: bool = False
    ) -> None:
        self.links_out = check_links(folder, follow=follow_symlinks)
        refuse_adapter(folder)
        self.folder = folder
        self.name = name or str(folder)
        self.revision = revision
        self.raw_config = read_config(folder, self.name)
        self.config = decoder_config(self.raw_config)
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
        """Return a tensor in its stored dtype: a view of the mapped file, not to be written to."""
        info = self.info(tensor)
        try:
            with safe_open(info.file, framework="pt") as shard:
                value: torch.Tensor = shard.get_tensor(info.stored)
        except (SafetensorError, OSError) as error:  # damaged after it was opened
            raise CannotRead(f"{info.file}: tensor {tensor} cannot be read ({error}); download it again") from error
        return value

    def read_ahead(self, tensor: str) -> None:
        """Ask the system to prefetch a tensor into its page cache, where it supports that."""
        info = self.info(tensor)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), info.file.open("rb") as file:  # reading it reports the error
                os.posix_fadvise(file.fileno(), info.offset, info.bytes, os.POSIX_FADV_WILLNEED)

    def info(self, tensor: str) -> TensorInfo:
        """Return where a tensor is. Raises A3Error if the checkpoint does not have it."""
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
        """Return whether tensors are stored under other names than those of the model's class."""
        return any(info.stored != name for name, info in self.tensors.items())

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of most of the weights, by bytes."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def parameters(self) -> int:
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())

    def fingerprint(self, *, full: bool = False) -> Json:
        """Return hashes of config.json and of each shard; of a large checkpoint's shards, hashes of samples.

        `full` adds the hash of each whole shard.
        """
        identify = hash_file if self.bytes() <= SAMPLED_ABOVE else fingerprint_shard
        found = {"config.json": hash_json(self.raw_config), "shards": self._of_shards(identify)}
        return found | ({"in_full": self._of_shards(hash_file)} if full else {})

    def _of_shards(self, identify: Callable[[Path], str]) -> Json:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing lets other threads run
            return dict(zip((shard.name for shard in self.shards), threads.map(identify, self.shards), strict=True))

    def small_files(self) -> dict[str, Path]:
        """Return the files beside config and weights, by name: tokenizer, generation config, chat template, licence."""
        files = {path for pattern in METADATA_FILES for path in self.folder.glob(pattern) if path.is_file()}
        left_out = ("config.json", *STALE_FILES)
        return {path.name: path for path in sorted(files) if not any(path.match(pattern) for pattern in left_out)}

    def hash_small_files(self) -> Json:
        return {name: hash_file(path) for name, path in self.small_files().items()}


def resolve_model(
    model: str, revision: str | None = None, *, follow_symlinks: bool = False, cached_only: bool = False
) -> Checkpoint:
    """Open a local folder or a Hub id, of which only the files that a3 needs are downloaded.

    With `cached_only` nothing is downloaded. Raises A3Error if it is neither, or the Hub cannot be reached.
    """
    folder = find_checkpoint(model, revision, cached_only=cached_only)
    if Path(model).is_dir():
        return Checkpoint(folder, follow_symlinks=follow_symlinks)
    return Checkpoint(folder, name=model, revision=folder.name, follow_symlinks=follow_symlinks)


def check_links(folder: Path, *, follow: bool) -> bool:
    """Return whether a file that may be read is a link out of the folder. Raises A3Error if so, unless `follow`.

    Links of the Hub's cache, from `snapshots/<commit>` to its `blobs`, are allowed.
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
    """Return the safetensors files that transformers would load, in name order. Raises A3Error if there are none."""
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

    Large files are compared by the first bytes of each tensor; without any shard only names are compared.
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
    """Return whether two tensors have the same shape, dtype and bytes, or the same first `most` bytes."""
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
    """Return the tensors of one file, ordered by offset. Raises A3Error if it is truncated or malformed."""
    try:
        with safe_open(shard, framework="pt"):  # checks offsets, sizes and file length
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
    """Return the JSON header of a safetensors file."""
    with shard.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def fingerprint_shard(shard: Path) -> str:
    """Return BLAKE3 over size, header and 16 evenly spaced samples of 64 KiB: cheap on a 140 GB checkpoint.

    This covers all of a shard of up to 1 MiB. In a larger one a flipped bit between the samples is found only with
    --full-check.
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
    """Return whether all values are finite: one pass, no copy; the extremes are NaN if any value is."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def row_groups(info: TensorInfo) -> Iterator[TensorInfo]:
    """Yield a stored tensor as groups of consecutive rows, of about `COPIED_AT_ONCE` bytes each."""
    if not info.shape:
        yield info
    elif info.bytes:
        row_bytes = info.bytes // info.shape[0]
        at_once = max(1, COPIED_AT_ONCE // row_bytes)
        for start in range(0, info.shape[0], at_once):
            count = min(at_once, info.shape[0] - start)
            shape, offset = (count, *info.shape[1:]), info.offset + start * row_bytes
            yield replace(info, shape=shape, bytes=count * row_bytes, offset=offset)


def read_stored(info: TensorInfo) -> torch.Tensor:
    """Return a copy of a stored tensor. Raises CannotRead if the file is truncated."""
    return _read(info, info.offset, info.bytes).view(info.shape)


def _read(info: TensorInfo, offset: int, size: int) -> torch.Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(offset)
            whole = fill(file, buffer.numpy().data)
    except OSError as error:
        raise CannotRead(f"{info.file} cannot be read: {error}; download it again") from error
    if not whole:  # truncated after it was opened
        raise CannotRead(f"{info.file} is truncated; download it again")
    return buffer.view(info.dtype)


def fill(file: RawIOBase, buffer: "Buffer") -> bool:
    """Fill a buffer from a file; return False if the file ends first. The system reads at most 2 GiB at once."""
    rest = memoryview(buffer)
    while rest and (count := file.readinto(rest)):
        rest = rest[count:]
    return not rest
