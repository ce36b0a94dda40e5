"""Hidden states between layers, for all blocks: in files of the work folder, or in memory.

A sweep reads each layer's input a batch at a time and writes its output. On disk the input stays until the layer is
finished, so a killed sweep resumes at its layer. In memory the output overwrites the input, and a resumed sweep first
runs the layers before it again.

Files are not synced to the disk, which would often take longer than a layer. Checksums of their blocks detect a file
that a power failure left half-written.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import fill
from a3cli.models.shards import tensor_bytes
from a3cli.work.files import hash_json, reading, writing


class Readable(Protocol):
    """Blocks of hidden states `[N, T, d]`, read a batch at a time."""

    def read(self, start: int, count: int) -> torch.Tensor: ...


class Blocks(Readable, Protocol):
    """Blocks of hidden states that are also written a batch at a time."""

    def write(self, start: int, blocks: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class HiddenStates:
    """Blocks in a raw file, starting at block `first`. Several processes may write their own blocks at once."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype
    first: int = 0

    @property
    def block_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.block_bytes

    def create(self) -> None:
        with writing(self.path):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(file, self.bytes)
            finally:
                os.close(file)

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return blocks `[count, T, d]` on the CPU. Raises A3Error if the file is too short."""
        buffer = torch.empty(count * self.block_bytes, dtype=torch.uint8)
        remedy = "remove it and rerun the same command, which computes it again"
        with reading(self.path, remedy), self.path.open("rb", buffering=0) as file:
            file.seek((self.first + start) * self.block_bytes)
            if not fill(file, buffer.numpy().data):
                raise A3Error(f"{self.path} is truncated; rerun the same command, which computes it again")
        return buffer.view(self.dtype).view(count, *self.shape[1:])

    def write(self, start: int, blocks: torch.Tensor) -> None:
        with writing(self.path), self.path.open("r+b") as file:
            file.seek((self.first + start) * self.block_bytes)
            file.write(tensor_bytes(blocks))

    def digest(self) -> str:
        """Return the checksum of the file, comparable with `StatesOnDisk.digests`."""
        whole = replace(self, first=0)
        return digest_of(check for block in range(self.shape[0]) for check in checksums(whole.read(block, 1)))


@dataclass(frozen=True)
class EveryNth:
    """Every n-th of some blocks, from block `first` on."""

    blocks: Readable
    every: int
    first: int

    def read(self, start: int, count: int) -> torch.Tensor:
        places = range(self.first + start * self.every, self.first + (start + count) * self.every, self.every)
        return torch.cat([self.blocks.read(place, 1) for place in places])


CHECKED_AT_ONCE = 1 << 17  # numbers; fits a core's cache


def checksums(blocks: torch.Tensor) -> list[int]:
    """Return the checksum of each block of `[N, T, d]`, computed from its bits on the blocks' device.

    `Σ_t a_t Σ_j b_j x_tj` over integers of 64 bits with odd `a` and `b`: a single bit always changes it.
    """
    size = blocks.shape[-1] * blocks.dtype.itemsize
    words = blocks.contiguous().view(torch.int64 if size % 8 == 0 else torch.uint8)
    generator = torch.Generator().manual_seed(0)
    of_token, of_word = (
        torch.randint(-(2**62), 2**62, (count,), generator=generator).mul_(2).add_(1).to(words.device)
        for count in words.shape[1:]
    )
    at_once = words.shape[1] if words.device.type != "cpu" else max(1, CHECKED_AT_ONCE // words[:, 0].numel())
    totals = [
        ((rows * of_word).sum(-1) * factors).sum(-1)
        for rows, factors in zip(words.split(at_once, 1), of_token.split(at_once), strict=True)
    ]
    sums: list[int] = torch.stack(totals).sum(0).tolist()
    return sums


def digest_of(checks: Iterable[int]) -> str:
    return hash_json(list(checks))


@dataclass(frozen=True)
class TwoFiles:
    """Two files of a folder in turn: one holds a layer's input, the other its output, the next layer's input."""

    folder: Path
    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def input_of(self, layer: int) -> HiddenStates:
        return HiddenStates(self.folder / f"{self.name}-{layer % 2}.bin", self.shape, self.dtype)


class States(Protocol):
    """Each layer's input in turn, for this process's share of the blocks."""

    digests: dict[str, str]  # of complete files, by name

    def has(self, layer: int) -> bool:
        """Return whether the complete input of `layer` exists."""

    def input_of(self, layer: int) -> Blocks: ...

    def begin(self) -> Blocks:
        """Return the place to write the next layer's input to."""

    def end(self, layer: int) -> list[int]:
        """Finish this process's share of the input of `layer`; return the checksums of its blocks."""

    def keep(self, layer: int, checks: list[int]) -> None:
        """Commit the input of `layer` after every process has written its share. One process calls this for all."""

    def retire(self, layer: int) -> None:
        """Release the input of `layer`. One process calls this for all."""


@dataclass
class StatesOnDisk:
    """Two files shared by all processes: a layer's complete input, and the next layer's input while it is written.

    A released file is reused for the next input, so that its disk blocks need not be allocated again. `digests` has the
    complete files, in the process that calls `keep` and `retire`.
    """

    file_of: Callable[[int], Path]
    coming: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype
    first: int = 0
    digests: dict[str, str] = field(default_factory=dict)

    def has(self, layer: int) -> bool:
        path = self.file_of(layer)
        return path.is_file() and path.stat().st_size == self.input_of(layer).bytes

    def input_of(self, layer: int) -> HiddenStates:
        return self._in(self.file_of(layer))

    def _in(self, path: Path) -> HiddenStates:
        return HiddenStates(path, self.shape, self.dtype, self.first)

    def begin(self) -> "Checked":
        states = self._in(self.coming)
        states.create()
        self._written = Checked(states)
        return self._written

    def end(self, layer: int) -> list[int]:  # noqa: ARG002, its name comes when all processes have written theirs
        checks = self._written.checks
        return [checks[block] for block in sorted(checks)]

    def keep(self, layer: int, checks: list[int]) -> None:
        file = self.file_of(layer)
        with writing(file):
            self.coming.replace(file)
        self.digests[file.name] = digest_of(checks)

    def retire(self, layer: int) -> None:
        file = self.file_of(layer)
        with writing(file):
            file.replace(self.coming)
        self.digests.pop(file.name, None)


class Checked:
    """Write blocks to a file and record their checksums."""

    def __init__(self, states: HiddenStates) -> None:
        self._states = states
        self.checks: dict[int, int] = {}

    def read(self, start: int, count: int) -> torch.Tensor:
        return self._states.read(start, count)

    def write(self, start: int, blocks: torch.Tensor) -> None:
        self.checks.update(enumerate(checksums(blocks), start))
        self._states.write(start, blocks)


class StatesInMemory:
    """One process's blocks `[n, T, d]` on a device; each layer's output overwrites its input."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):  # threads, which are not in inference mode, write to it
            self.values = torch.empty(shape, dtype=dtype, device=device)
        self.layer: int | None = None  # the layer whose input is held
        self.digests: dict[str, str] = {}

    def has(self, layer: int) -> bool:
        return self.layer == layer

    def input_of(self, layer: int) -> "StatesInMemory":
        assert self.has(layer)
        return self

    def begin(self) -> "StatesInMemory":
        self.layer = None
        return self

    def read(self, start: int, count: int) -> torch.Tensor:
        return self.values[start : start + count]

    def write(self, start: int, blocks: torch.Tensor) -> None:
        self.values[start : start + len(blocks)] = blocks

    def end(self, layer: int) -> list[int]:
        self.layer = layer
        return []

    def keep(self, layer: int, checks: list[int]) -> None:
        """Do nothing: the blocks end with this process."""

    def retire(self, layer: int) -> None:
        """Do nothing: the input has been overwritten."""
