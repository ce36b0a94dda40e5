"""Hidden states between layers, for all blocks: in files of the work folder, or in memory.

A sweep reads each layer's input a batch at a time and writes its output. On disk the input stays as it is until the
layer is finished, so a killed sweep goes on at its layer; in memory the output takes the input's place, and a sweep
that died goes through the layers before it again.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from a3cli.checkpoint import fill, tensor_bytes
from a3cli.errors import A3Error
from a3cli.work import writing


class Blocks(Protocol):
    """Blocks of hidden states `[N, T, d]`, read and written a batch at a time."""

    def read(self, start: int, count: int) -> torch.Tensor: ...

    def write(self, start: int, blocks: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class HiddenStates:
    """Blocks in a raw file, from block `first` on. Several processes may write to it at once, each its own blocks."""

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
        """Blocks `[count, T, d]` on the CPU. Raises A3Error if the file is shorter than it must be."""
        buffer = torch.empty(count * self.block_bytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek((self.first + start) * self.block_bytes)
            if not fill(file, buffer.numpy().data):
                raise A3Error(f"{self.path} is truncated; run the same command again, which makes it anew")
        return buffer.view(self.dtype).view(count, *self.shape[1:])

    def sync(self) -> None:
        """Onto the disk, so that a power failure cannot leave a layer that looks done without its output."""
        with writing(self.path), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def write(self, start: int, blocks: torch.Tensor) -> None:
        with writing(self.path), self.path.open("r+b") as file:
            file.seek((self.first + start) * self.block_bytes)
            file.write(tensor_bytes(blocks))


class States(Protocol):
    """Every layer's input in turn, of the blocks that are this process's share."""

    def has(self, layer: int) -> bool:
        """Whether the whole input of `layer` is there."""

    def input_of(self, layer: int) -> Blocks: ...

    def begin(self) -> Blocks:
        """Where the next layer's input is to be written."""

    def end(self, layer: int) -> None:
        """This process has written its share of the input of `layer`."""

    def keep(self, layer: int) -> None:
        """All processes have: from now on it is there. One of them calls this for all."""

    def retire(self, layer: int) -> None:
        """The input of `layer` is needed no more. One of them calls this for all."""


@dataclass(frozen=True)
class StatesOnDisk:
    """Two files that all processes share: a layer's input under its own name is whole, the next one comes to be.

    A file that is done with becomes the next one: the system need not find its blocks again.
    """

    file_of: Callable[[int], Path]
    coming: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype
    first: int = 0

    def has(self, layer: int) -> bool:
        path = self.file_of(layer)
        return path.is_file() and path.stat().st_size == self.input_of(layer).bytes

    def input_of(self, layer: int) -> HiddenStates:
        return self._in(self.file_of(layer))

    def _in(self, path: Path) -> HiddenStates:
        return HiddenStates(path, self.shape, self.dtype, self.first)

    def begin(self) -> HiddenStates:
        states = self._in(self.coming)
        states.create()
        return states

    def end(self, layer: int) -> None:  # noqa: ARG002, its name comes when all processes have written theirs
        self._in(self.coming).sync()

    def keep(self, layer: int) -> None:
        with writing(self.file_of(layer)):
            self.coming.replace(self.file_of(layer))

    def retire(self, layer: int) -> None:
        with writing(self.file_of(layer)):
            self.file_of(layer).replace(self.coming)


class StatesInMemory:
    """One process's blocks `[n, T, d]` on the CPU, each layer's output written over its input."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.values = torch.empty(shape, dtype=dtype)
        self.layer: int | None = None  # whose input they are

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

    def end(self, layer: int) -> None:
        self.layer = layer

    def keep(self, layer: int) -> None:
        """Nothing outlives this process."""

    def retire(self, layer: int) -> None:
        """Written over already."""
